// What the XLA FFI handlers of all platforms share: operand types, checks, attributes.
#pragma once

#include "xla/ffi/api/ffi.h"

#include <new>
#include <string>
#include <utility>
#include <vector>

#include "grid.h"
#include "mlp.h"
#include "rasterize.h"

namespace fg3dgs {

namespace ffi = xla::ffi;

using F32 = ffi::Buffer<ffi::F32>;
using U8 = ffi::Buffer<ffi::U8>;
using OutF32 = ffi::Result<ffi::Buffer<ffi::F32>>;
using OutI32 = ffi::Result<ffi::Buffer<ffi::S32>>;

inline Executor make_executor(ffi::ThreadPool& pool) {
  return {static_cast<int>(pool.num_threads()),
          [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); }};
}

// Shapes were checked in Python; these checks only keep a wrong caller from reading out of bounds. A layer is a scene
// of means, quats, scales, opacities and colours, without offsets and without a limit.
inline ffi::Error make_layer(F32 means, F32 quats, F32 scales, F32 opacities, F32 colors, F32 viewmat, F32 intrinsics,
                             int64_t width, int64_t height, float near_plane, Scene* s) {
  const int64_t n = static_cast<int64_t>(opacities.element_count());
  const auto size = [](const F32& b) { return static_cast<int64_t>(b.element_count()); };
  const auto dims = colors.dimensions();
  const bool sh = dims.size() == 3;
  const bool good = size(means) == 3 * n && size(quats) == 4 * n && size(scales) == 3 * n && size(viewmat) == 16 &&
                    size(intrinsics) == 4 && (dims.size() == 2 || sh) && dims[0] == n &&
                    (!sh || (dims[1] > 0 && dims[2] == 3)) &&
                    can_rasterize(n, sh ? 3 : dims[1], sh ? dims[1] : 0, width, height);
  if (!good) return ffi::Error(ffi::ErrorCode::kInvalidArgument, "rasterize: operands have the wrong shapes");
  *s = {means.typed_data(),
        quats.typed_data(),
        scales.typed_data(),
        opacities.typed_data(),
        colors.typed_data(),
        viewmat.typed_data(),
        intrinsics.typed_data(),
        nullptr,
        n,
        sh ? 3 : static_cast<int>(dims[1]),
        sh ? static_cast<int>(dims[1]) : 0,
        static_cast<int>(width),
        static_cast<int>(height),
        near_plane,
        -1};
  return ffi::Error::Success();
}

inline ffi::Error make_scene(F32 means, F32 quats, F32 scales, F32 opacities, F32 colors, F32 viewmat, F32 intrinsics,
                             F32 means2d, int64_t width, int64_t height, float near_plane, int64_t max_pairs,
                             Scene* s) {
  ffi::Error error = make_layer(means, quats, scales, opacities, colors, viewmat, intrinsics, width, height,
                                near_plane, s);
  if (error.failure()) return error;
  if (static_cast<int64_t>(means2d.element_count()) != 2 * s->n)
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "rasterize: operands have the wrong shapes");
  s->means2d = means2d.typed_data();
  s->max_pairs = max_pairs;
  return ffi::Error::Success();
}

inline ConstImages make_images(const F32& color, const F32& alpha, const F32& depth) {
  return {color.typed_data(), alpha.typed_data(), depth.typed_data()};
}

inline Gradients make_gradients(OutF32 means, OutF32 quats, OutF32 scales, OutF32 opacities, OutF32 colors,
                                OutF32 viewmat, OutF32 intrinsics, OutF32 means2d) {
  return {means->typed_data(),  quats->typed_data(),   scales->typed_data(),     opacities->typed_data(),
          colors->typed_data(), viewmat->typed_data(), intrinsics->typed_data(), means2d->typed_data()};
}

// What a call of the rasterizer says: nothing, or what it could not hold. Its lists grow with the scene; of one that is
// too large XLA itself would say no more than std::bad_alloc.
template <class Call>
ffi::Error finish(const Call& call) {
  const char* message = nullptr;
  try {
    message = call();
  } catch (const std::bad_alloc&) {
    message = "rasterize: the tiles' lists of Gaussians do not fit into memory; set max_pairs or scale less";
  }
  return message ? ffi::Error(ffi::ErrorCode::kResourceExhausted, message) : ffi::Error::Success();
}

// The grid that fits the operands, or an error; tables [3, entries] may be absent, positions [3, n].
inline ffi::Error make_grid(ffi::Span<const int32_t> resolutions, int64_t log2_table, float bound, F32 positions,
                     int64_t table_size, int64_t encoding_size, Grid* g) {
  *g = {resolutions.begin(), static_cast<int>(resolutions.size()), static_cast<int>(log2_table), bound,
        static_cast<int64_t>(positions.element_count() / 3)};
  const bool good = log2_table == g->log2_table && can_encode(*g) && positions.element_count() % 3 == 0 &&
                    table_size == 3 * grid_entries(*g) && encoding_size == 3 * g->levels * g->points;
  return good ? ffi::Error::Success()
              : ffi::Error(ffi::ErrorCode::kInvalidArgument, "grid: wrong shapes, resolutions or bound");
}

inline int64_t size_of(const F32& buffer) { return static_cast<int64_t>(buffer.element_count()); }

// The network that fits the operands, or an error.
inline ffi::Error make_mlp(ffi::Span<const int32_t> sizes, F32 x, int64_t weights, Mlp* m) {
  const auto dims = x.dimensions();
  *m = {sizes.begin(), static_cast<int>(sizes.size()) - 1, dims.size() == 2 ? dims[1] : -1};
  const bool good = can_multiply(*m) && dims[0] == sizes[0] && mlp_weights(*m) == weights;
  return good ? ffi::Error::Success()
              : ffi::Error(ffi::ErrorCode::kInvalidArgument, "mlp: operands have the wrong shapes");
}

// The attributes that every call on a grid carries.
template <class Binding>
auto bind_grid(Binding&& binding) {
  return std::move(binding)
      .template Attr<ffi::Span<const int32_t>>("resolutions")
      .template Attr<int64_t>("log2_table")
      .template Attr<float>("bound");
}

// The eight operands of a scene, then its sizes.
template <class Binding>
auto bind_operands(Binding&& binding) {
  return std::move(binding)
      .template Arg<F32>()   // means [n, 3]
      .template Arg<F32>()   // quats [n, 4]
      .template Arg<F32>()   // scales [n, 3]
      .template Arg<F32>()   // opacities [n]
      .template Arg<F32>()   // colors [n, c] or [n, k, 3]
      .template Arg<F32>()   // viewmat [4, 4]
      .template Arg<F32>()   // intrinsics [4]
      .template Arg<F32>();  // means2d [n, 2]
}

template <class Binding>
auto bind_sizes(Binding&& binding) {
  return std::move(binding)
      .template Attr<int64_t>("width")
      .template Attr<int64_t>("height")
      .template Attr<float>("near_plane")
      .template Attr<int64_t>("max_pairs");
}

template <class Binding>
auto bind_forward(Binding&& binding) {
  return bind_sizes(bind_operands(std::move(binding))
                        .template Ret<F32>()                     // color
                        .template Ret<F32>()                     // alpha
                        .template Ret<F32>()                     // depth
                        .template Ret<ffi::Buffer<ffi::S32>>()   // radii
                        .template Ret<ffi::Buffer<ffi::S32>>());  // num_pairs
}

template <class Binding>
auto bind_backward(Binding&& binding) {
  return bind_sizes(bind_operands(std::move(binding))
                        .template Arg<F32>()  // color
                        .template Arg<F32>()  // alpha
                        .template Arg<F32>()  // depth
                        .template Arg<F32>()  // cotangent of color
                        .template Arg<F32>()  // cotangent of alpha
                        .template Arg<F32>()  // cotangent of depth
                        .template Ret<F32>()  // cotangents of the eight operands
                        .template Ret<F32>()
                        .template Ret<F32>()
                        .template Ret<F32>()
                        .template Ret<F32>()
                        .template Ret<F32>()
                        .template Ret<F32>()
                        .template Ret<F32>());
}

// (target name, XLA platform, handler) of what a platform offers.
struct Registration {
  const char* name;
  const char* platform;
  XLA_FFI_Handler* handler;
};

// The motion networks on the CPU.
std::vector<Registration> network_registrations();

// Empty in a module that was built without CUDA.
std::vector<Registration> cuda_registrations();

}  // namespace fg3dgs
