// The CPU's XLA FFI handlers of inference: a frame's picture in one call.
#include "attend.h"
#include "ffi_bind.h"

namespace fg3dgs {
namespace {

// backdrop [h, w, 3 or 4], viewmat, intrinsics, then five arrays per layer -> picture like the backdrop
ffi::Error paint_cpu(ffi::ThreadPool pool, U8 backdrop, F32 viewmat, F32 intrinsics, ffi::RemainingArgs arrays,
                     ffi::Result<U8> out, float near_plane) {
  const auto dims = backdrop.dimensions();
  const int count = static_cast<int>(arrays.size() / 5);
  const bool good = dims.size() == 3 && (dims[2] == 3 || dims[2] == 4) && count > 0 && count <= kMostLayersPainted &&
                    arrays.size() % 5 == 0 && out->element_count() == backdrop.element_count();
  if (!good) return ffi::Error(ffi::ErrorCode::kInvalidArgument, "paint: operands have the wrong shapes");
  Scene layers[kMostLayersPainted];
  for (int i = 0; i < count; ++i) {
    const auto part = [&](int k) { return arrays.get<F32>(5 * i + k); };
    for (int k = 0; k < 5; ++k)
      if (part(k).has_error()) return part(k).error();
    ffi::Error error = make_layer(*part(0), *part(1), *part(2), *part(3), *part(4), viewmat, intrinsics, dims[1],
                                  dims[0], near_plane, &layers[i]);
    if (error.failure()) return error;
    if (layers[i].channels != 3)
      return ffi::Error(ffi::ErrorCode::kInvalidArgument, "paint: a layer's colours have three channels");
  }
  const Canvas canvas = {backdrop.typed_data(), out->typed_data(), static_cast<int>(dims[2])};
  return finish([&] { return rasterize_paint(layers, count, canvas, make_executor(pool)); });
}

// start [hidden, n], x [in, n], weights -> [out, n]
ffi::Error mlp_onto_cpu(ffi::ThreadPool pool, F32 start, F32 x, F32 weights, OutF32 out,
                        ffi::Span<const int32_t> sizes) {
  Mlp m;
  ffi::Error error = make_mlp(sizes, x, size_of(weights), &m);
  if (error.failure()) return error;
  if (size_of(start) != m.sizes[1] * m.points || size_of(*out) != m.sizes[m.layers] * m.points)
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "mlp: operands have the wrong shapes");
  mlp_forward(m, start.typed_data(), x.typed_data(), weights.typed_data(), out->typed_data(), make_executor(pool));
  return ffi::Error::Success();
}

// queries [h c, n], keys [t, h, c], from_weights [m, t h], bias [m], from_hidden [l, m], past_weights [l, t h],
// last [o, l] -> [o, n]
ffi::Error attend_cpu(ffi::ThreadPool pool, F32 queries, F32 keys, F32 from_weights, F32 bias, F32 from_hidden,
                      F32 past_weights, F32 last, OutF32 out) {
  const auto k = keys.dimensions(), q = queries.dimensions();
  const bool ranks = k.size() == 3 && q.size() == 2 && last.dimensions().size() == 2;
  if (!ranks) return ffi::Error(ffi::ErrorCode::kInvalidArgument, "attend: operands have the wrong ranks");
  const int64_t hidden = size_of(bias), second = last.dimensions()[1], weights = k[0] * k[1];
  const Attend a = {static_cast<int>(k[0]),   static_cast<int>(k[1]),   static_cast<int>(k[2]),
                    static_cast<int>(hidden), static_cast<int>(second), static_cast<int>(last.dimensions()[0]), q[1]};
  const bool good = a.tokens > 0 && a.tokens <= kMostTokens && a.heads > 0 && a.width > 0 && a.width <= kMostHeadWidth &&
                    q[0] == k[1] * k[2] && size_of(from_weights) == hidden * weights &&
                    size_of(from_hidden) == second * hidden && size_of(past_weights) == second * weights &&
                    size_of(*out) == a.last * a.points && hidden > 0 && second > 0 && a.last > 0;
  if (!good) return ffi::Error(ffi::ErrorCode::kInvalidArgument, "attend: operands have the wrong shapes");
  attend(a,
         {queries.typed_data(), keys.typed_data(), from_weights.typed_data(), bias.typed_data(),
          from_hidden.typed_data(), past_weights.typed_data(), last.typed_data(), out->typed_data()},
         make_executor(pool));
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kMlpOntoCpu, mlp_onto_cpu,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Attr<
                           ffi::Span<const int32_t>>("sizes"));
XLA_FFI_DEFINE_HANDLER(kAttendCpu, attend_cpu,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()
                           .Arg<F32>().Arg<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER(kPaintCpu, paint_cpu,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<U8>()   // backdrop
                           .Arg<F32>()  // viewmat
                           .Arg<F32>()  // intrinsics
                           .RemainingArgs()
                           .Ret<U8>()
                           .Attr<float>("near_plane"));

}  // namespace

std::vector<Registration> frame_registrations() {
  return {{"fg3dgs_paint", "cpu", kPaintCpu},
          {"fg3dgs_mlp_onto", "cpu", kMlpOntoCpu},
          {"fg3dgs_attend", "cpu", kAttendCpu}};
}

}  // namespace fg3dgs
