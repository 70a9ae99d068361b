// The CPU's XLA FFI handlers of pictures and of Adam, and the Python module.
#include <pybind11/pybind11.h>

#include "adam.h"
#include "cuda_work.h"
#include "ffi_bind.h"
#include "photo.h"

namespace py = pybind11;

namespace fg3dgs {
namespace {

// -> color [h, w, c], alpha [h, w], depth [h, w], radii [n], num_pairs [], ticket []: for backward; 0 unless `keeps`
ffi::Error forward_cpu(ffi::ThreadPool pool, F32 means, F32 quats, F32 scales, F32 opacities, F32 colors, F32 viewmat,
                       F32 intrinsics, F32 means2d, OutF32 color, OutF32 alpha, OutF32 depth, OutI32 radii,
                       OutI32 num_pairs, int64_t width, int64_t height, float near_plane, int64_t max_pairs,
                       OutI32 ticket, bool keeps) {
  Scene scene;
  ffi::Error error = make_scene(means, quats, scales, opacities, colors, viewmat, intrinsics, means2d, width, height,
                                near_plane, max_pairs, &scene);
  if (error.failure()) return error;
  const Images images = {color->typed_data(), alpha->typed_data(), depth->typed_data()};
  return finish([&] {
    *ticket->typed_data() = 0;
    return rasterize_forward(scene, images, radii->typed_data(), num_pairs->typed_data(),
                             keeps ? ticket->typed_data() : nullptr, make_executor(pool));
  });
}

// color, alpha, depth, ticket: what forward returned; d_*: their cotangents -> cotangents of the eight inputs, in order
ffi::Error backward_cpu(ffi::ThreadPool pool, F32 means, F32 quats, F32 scales, F32 opacities, F32 colors, F32 viewmat,
                        F32 intrinsics, F32 means2d, F32 color, F32 alpha, F32 depth, F32 d_color, F32 d_alpha,
                        F32 d_depth, OutF32 d_means, OutF32 d_quats, OutF32 d_scales, OutF32 d_opacities,
                        OutF32 d_colors, OutF32 d_viewmat, OutF32 d_intrinsics, OutF32 d_means2d, int64_t width,
                        int64_t height, float near_plane, int64_t max_pairs, ffi::Buffer<ffi::S32> ticket) {
  Scene scene;
  ffi::Error error = make_scene(means, quats, scales, opacities, colors, viewmat, intrinsics, means2d, width, height,
                                near_plane, max_pairs, &scene);
  if (error.failure()) return error;
  return finish([&] {
    return rasterize_backward(
        scene, make_images(color, alpha, depth), make_images(d_color, d_alpha, d_depth),
        make_gradients(d_means, d_quats, d_scales, d_opacities, d_colors, d_viewmat, d_intrinsics, d_means2d),
        *ticket.typed_data(), make_executor(pool));
  });
}

// color [h, w, 3], alpha [h, w], picture [h, w, 3], marks [h, w], background [3], weights [3]
// -> loss [], terms [5], d loss / d color, d loss / d alpha
ffi::Error photo_cpu(ffi::ThreadPool pool, F32 color, F32 alpha, U8 picture, U8 marks, F32 background, F32 weights,
                     OutF32 loss, OutF32 terms, OutF32 d_color, OutF32 d_alpha) {
  const auto dims = color.dimensions();
  const int64_t pixels = size_of(alpha);
  const bool good = dims.size() == 3 && pixels > 0 && dims[0] * dims[1] == pixels && dims[2] == 3 &&
                    static_cast<int64_t>(picture.element_count()) == 3 * pixels &&
                    static_cast<int64_t>(marks.element_count()) == pixels && size_of(background) == 3 &&
                    size_of(weights) == 3 && size_of(*terms) == kPhotoTerms;
  if (!good) return ffi::Error(ffi::ErrorCode::kInvalidArgument, "photo: operands have the wrong shapes");
  const Photo p = {color.typed_data(),      alpha.typed_data(),   picture.typed_data(), marks.typed_data(),
                   background.typed_data(), weights.typed_data(), dims[0],              dims[1]};
  photo(p, loss->typed_data(), terms->typed_data(), d_color->typed_data(), d_alpha->typed_data(), make_executor(pool));
  return ffi::Error::Success();
}

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

// control [3]: 1 or 0 whether to step at all, 1 - beta1^step, 1 - beta2^step; then rates, gradient, value, mean, square of
// every array -> value, mean, square of every array, which are the operands themselves, changed
ffi::Error adam_cpu(ffi::ThreadPool pool, F32 control, ffi::RemainingArgs arrays, ffi::RemainingRets results,
                    double beta1, double beta2, float epsilon, ffi::Span<const float> decays) {
  const ffi::Error wrong(ffi::ErrorCode::kInvalidArgument, "adam: operands do not fit, or are not changed in place");
  const size_t count = decays.size();
  if (size_of(control) != 3 || arrays.size() != 5 * count || results.size() != 3 * count) return wrong;
  std::vector<AdamLeaf> leaves;
  for (size_t i = 0; i < count; ++i) {
    const auto rates = arrays.get<F32>(5 * i), gradient = arrays.get<F32>(5 * i + 1);
    if (!rates.has_value() || !gradient.has_value()) return wrong;
    AdamLeaf leaf = {rates->typed_data(), gradient->typed_data(), nullptr, nullptr, nullptr,
                     size_of(*gradient),  size_of(*rates),        decays[i]};
    float** const in_place[3] = {&leaf.value, &leaf.mean, &leaf.square};
    for (size_t k = 0; k < 3; ++k) {
      const auto from = arrays.get<F32>(5 * i + 2 + k);
      auto to = results.get<F32>(3 * i + k);
      if (!from.has_value() || !to.has_value() || size_of(*from) != leaf.size || size_of(**to) != leaf.size ||
          from->typed_data() != (*to)->typed_data())
        return wrong;
      *in_place[k] = (*to)->typed_data();
    }
    if (leaf.period < 1 || leaf.size % leaf.period) return wrong;
    leaves.push_back(leaf);
  }
  const float* c = control.typed_data();
  if (c[0] != 0.0f) adam({beta1, beta2, epsilon, c[1], c[2]}, leaves.data(), count, make_executor(pool));
  return ffi::Error::Success();
}

// gradients -> 1 or 0, whether all their squares are finite
ffi::Error can_step_cpu(ffi::ThreadPool pool, ffi::RemainingArgs arrays, OutI32 out) {
  std::vector<const float*> gradients;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < arrays.size(); ++i) {
    const auto array = arrays.get<F32>(i);
    if (!array.has_value()) return ffi::Error(ffi::ErrorCode::kInvalidArgument, "can_step: a gradient is not float32");
    gradients.push_back(array->typed_data());
    sizes.push_back(size_of(*array));
  }
  *out->typed_data() = can_step(gradients.data(), sizes.data(), static_cast<int64_t>(sizes.size()), make_executor(pool));
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kCanStepCpu, can_step_cpu,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().Ret<ffi::Buffer<ffi::S32>>());
XLA_FFI_DEFINE_HANDLER(kAdamCpu, adam_cpu,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<F32>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<double>("beta1")
                           .Attr<double>("beta2")
                           .Attr<float>("epsilon")
                           .Attr<ffi::Span<const float>>("decays"));
XLA_FFI_DEFINE_HANDLER(kPaintCpu, paint_cpu,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<U8>()   // backdrop
                           .Arg<F32>()  // viewmat
                           .Arg<F32>()  // intrinsics
                           .RemainingArgs()
                           .Ret<U8>()
                           .Attr<float>("near_plane"));
XLA_FFI_DEFINE_HANDLER(kForwardCpu, forward_cpu,
                       bind_forward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()).Ret<ffi::Buffer<ffi::S32>>().Attr<bool>(
                           "keeps"));
XLA_FFI_DEFINE_HANDLER(kBackwardCpu, backward_cpu,
                       bind_backward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()).Arg<ffi::Buffer<ffi::S32>>());
XLA_FFI_DEFINE_HANDLER(kPhotoCpu, photo_cpu,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<F32>()
                           .Arg<F32>()
                           .Arg<U8>()
                           .Arg<U8>()
                           .Arg<F32>()
                           .Arg<F32>()
                           .Ret<F32>()
                           .Ret<F32>()
                           .Ret<F32>()
                           .Ret<F32>());

// (target name, XLA platform, handler); Python registers whatever is here.
py::list registrations() {
  std::vector<Registration> all = {
      {"fg3dgs_rasterize_forward", "cpu", kForwardCpu},
      {"fg3dgs_rasterize_backward", "cpu", kBackwardCpu},
      {"fg3dgs_paint", "cpu", kPaintCpu},
      {"fg3dgs_photo", "cpu", kPhotoCpu},
      {"fg3dgs_adam", "cpu", kAdamCpu},
      {"fg3dgs_can_step", "cpu", kCanStepCpu},
  };
  for (const std::vector<Registration>& more : {network_registrations(), cuda_registrations()})
    all.insert(all.end(), more.begin(), more.end());
  py::list out;
  for (const Registration& r : all)
    out.append(py::make_tuple(r.name, r.platform, py::capsule(reinterpret_cast<void*>(r.handler))));
  return out;
}

// Bytes that a call on CUDA needs besides its operands and results; also known to a module built without CUDA, so that
// programs can be lowered anywhere.
int64_t cuda_workspace_bytes(int64_t n, int channels, int sh_count, int width, int height, int64_t max_pairs,
                             bool backward, bool deterministic) {
  Scene s = {};
  s.n = n;
  s.channels = channels;
  s.sh_count = sh_count;
  s.width = width;
  s.height = height;
  s.max_pairs = max_pairs;
  return workspace_bytes(s, pass_of(backward, deterministic), default_room(s));
}

}  // namespace

#ifndef FG_CUDA
std::vector<Registration> cuda_registrations() { return {}; }
#endif

}  // namespace fg3dgs

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of fg3dgs_jax, as XLA FFI targets.";
  m.attr("INTERFACE") = 9;  // as in fg3dgs_jax/native.py
  m.def("registrations", &fg3dgs::registrations);
  m.def("cuda_workspace_bytes", &fg3dgs::cuda_workspace_bytes, py::arg("n"), py::arg("channels"), py::arg("sh_count"),
        py::arg("width"), py::arg("height"), py::arg("max_pairs"), py::arg("backward"), py::arg("deterministic"));
}
