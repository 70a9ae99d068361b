// XLA FFI handlers and the Python module: the only file that knows either.
#include "xla/ffi/api/ffi.h"

#include <pybind11/pybind11.h>

#include <exception>
#include <string>

#include "dssim.h"
#include "grid.h"
#include "rasterize.h"

namespace ffi = xla::ffi;
namespace py = pybind11;

namespace {

using F32 = ffi::Buffer<ffi::F32>;
using OutF32 = ffi::Result<ffi::Buffer<ffi::F32>>;
using OutI32 = ffi::Result<ffi::Buffer<ffi::S32>>;

fg3dgs::Executor make_executor(ffi::ThreadPool& pool) {
  return {static_cast<int>(pool.num_threads()),
          [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); }};
}

// Shapes were checked in Python; these checks only keep a wrong caller from reading out of bounds.
ffi::Error make_scene(F32 means, F32 quats, F32 scales, F32 opacities, F32 colors, F32 viewmat, F32 intrinsics,
                      F32 means2d, int64_t width, int64_t height, float near_plane, int64_t max_pairs,
                      fg3dgs::Scene* s) {
  const int64_t n = static_cast<int64_t>(opacities.element_count());
  const auto size = [](const F32& b) { return static_cast<int64_t>(b.element_count()); };
  const auto dims = colors.dimensions();
  const bool sh = dims.size() == 3;
  const bool good = size(means) == 3 * n && size(quats) == 4 * n && size(scales) == 3 * n && size(means2d) == 2 * n &&
                    size(viewmat) == 16 && size(intrinsics) == 4 && (dims.size() == 2 || sh) && dims[0] == n &&
                    (!sh || (dims[2] == 3 && (dims[1] == 1 || dims[1] == 4 || dims[1] == 9 || dims[1] == 16))) &&
                    dims[1] > 0 && width > 0 && height > 0 && width <= 65535 && height <= 65535 && n < (1LL << 29);
  if (!good) return ffi::Error(ffi::ErrorCode::kInvalidArgument, "rasterize: operands have the wrong shapes");
  *s = {means.typed_data(),
        quats.typed_data(),
        scales.typed_data(),
        opacities.typed_data(),
        colors.typed_data(),
        viewmat.typed_data(),
        intrinsics.typed_data(),
        means2d.typed_data(),
        n,
        sh ? 3 : static_cast<int>(dims[1]),
        sh ? static_cast<int>(dims[1]) : 0,
        static_cast<int>(width),
        static_cast<int>(height),
        near_plane,
        max_pairs};
  return ffi::Error::Success();
}

ffi::Error finish(const char* message) {
  return message ? ffi::Error(ffi::ErrorCode::kResourceExhausted, message) : ffi::Error::Success();
}

// -> color [h, w, c], alpha [h, w], depth [h, w], radii [n], num_pairs []
ffi::Error forward_cpu(ffi::ThreadPool pool, F32 means, F32 quats, F32 scales, F32 opacities, F32 colors, F32 viewmat,
                       F32 intrinsics, F32 means2d, OutF32 color, OutF32 alpha, OutF32 depth, OutI32 radii,
                       OutI32 num_pairs, int64_t width, int64_t height, float near_plane, int64_t max_pairs) {
  fg3dgs::Scene scene;
  ffi::Error error = make_scene(means, quats, scales, opacities, colors, viewmat, intrinsics, means2d, width, height,
                                near_plane, max_pairs, &scene);
  if (error.failure()) return error;
  const fg3dgs::Images images = {color->typed_data(), alpha->typed_data(), depth->typed_data()};
  return finish(rasterize_forward(scene, images, radii->typed_data(), num_pairs->typed_data(), make_executor(pool)));
}

// color, alpha, depth: what forward returned; d_*: their cotangents -> cotangents of the eight inputs, in order
ffi::Error backward_cpu(ffi::ThreadPool pool, F32 means, F32 quats, F32 scales, F32 opacities, F32 colors, F32 viewmat,
                        F32 intrinsics, F32 means2d, F32 color, F32 alpha, F32 depth, F32 d_color, F32 d_alpha,
                        F32 d_depth, OutF32 d_means, OutF32 d_quats, OutF32 d_scales, OutF32 d_opacities,
                        OutF32 d_colors, OutF32 d_viewmat, OutF32 d_intrinsics, OutF32 d_means2d, int64_t width,
                        int64_t height, float near_plane, int64_t max_pairs) {
  fg3dgs::Scene scene;
  ffi::Error error = make_scene(means, quats, scales, opacities, colors, viewmat, intrinsics, means2d, width, height,
                                near_plane, max_pairs, &scene);
  if (error.failure()) return error;
  const fg3dgs::ConstImages rendered = {color.typed_data(), alpha.typed_data(), depth.typed_data()};
  const fg3dgs::ConstImages cotangents = {d_color.typed_data(), d_alpha.typed_data(), d_depth.typed_data()};
  const fg3dgs::Gradients gradients = {d_means->typed_data(),      d_quats->typed_data(),  d_scales->typed_data(),
                                       d_opacities->typed_data(),  d_colors->typed_data(), d_viewmat->typed_data(),
                                       d_intrinsics->typed_data(), d_means2d->typed_data()};
  return finish(rasterize_backward(scene, rendered, cotangents, gradients, make_executor(pool)));
}

// prediction, target [h, w, c] -> loss [], d loss / d prediction [h, w, c]
ffi::Error dssim_cpu(ffi::ThreadPool pool, F32 prediction, F32 target, OutF32 loss, OutF32 gradient) {
  const auto dims = prediction.dimensions();
  if (dims.size() != 3 || prediction.element_count() == 0 || target.element_count() != prediction.element_count())
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "dssim: operands have the wrong shapes");
  fg3dgs::dssim(prediction.typed_data(), target.typed_data(), dims[0], dims[1], dims[2], loss->typed_data(),
                gradient->typed_data(), make_executor(pool));
  return ffi::Error::Success();
}

// The grid that fits the operands, or an error; tables [3, entries] may be absent, positions [3, n].
ffi::Error make_grid(ffi::Span<const int32_t> resolutions, int64_t log2_table, float bound, F32 positions,
                     int64_t table_size, int64_t encoding_size, fg3dgs::Grid* g) {
  *g = {resolutions.begin(), static_cast<int>(resolutions.size()), static_cast<int>(log2_table), bound,
        static_cast<int64_t>(positions.element_count() / 3)};
  const bool good = g->levels > 0 && log2_table > 0 && log2_table < 31 && positions.element_count() % 3 == 0 &&
                    table_size == 3 * fg3dgs::grid_entries(*g) && encoding_size == 3 * g->levels * g->points;
  return good ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kInvalidArgument, "grid: wrong shapes");
}

int64_t size_of(const F32& buffer) { return static_cast<int64_t>(buffer.element_count()); }

// tables [3, entries], positions [3, n] -> encoding [3, levels, n]
ffi::Error grid_encode_cpu(ffi::ThreadPool pool, F32 tables, F32 positions, OutF32 out,
                           ffi::Span<const int32_t> resolutions, int64_t log2_table, float bound) {
  fg3dgs::Grid g;
  ffi::Error error = make_grid(resolutions, log2_table, bound, positions, size_of(tables), size_of(*out), &g);
  if (error.failure()) return error;
  fg3dgs::grid_encode(g, tables.typed_data(), positions.typed_data(), out->typed_data(), make_executor(pool));
  return ffi::Error::Success();
}

// positions, cotangent of the encoding -> cotangent of the tables
ffi::Error grid_backward_tables_cpu(ffi::ThreadPool pool, F32 positions, F32 cotangent, OutF32 out,
                                    ffi::Span<const int32_t> resolutions, int64_t log2_table, float bound) {
  fg3dgs::Grid g;
  ffi::Error error = make_grid(resolutions, log2_table, bound, positions, size_of(*out), size_of(cotangent), &g);
  if (error.failure()) return error;
  fg3dgs::grid_backward_tables(g, positions.typed_data(), cotangent.typed_data(), out->typed_data(),
                               make_executor(pool));
  return ffi::Error::Success();
}

// tables, positions, cotangent of the encoding -> cotangent of the positions
ffi::Error grid_backward_positions_cpu(ffi::ThreadPool pool, F32 tables, F32 positions, F32 cotangent, OutF32 out,
                                       ffi::Span<const int32_t> resolutions, int64_t log2_table, float bound) {
  fg3dgs::Grid g;
  ffi::Error error = make_grid(resolutions, log2_table, bound, positions, size_of(tables), size_of(cotangent), &g);
  if (error.failure()) return error;
  fg3dgs::grid_backward_positions(g, tables.typed_data(), positions.typed_data(), cotangent.typed_data(),
                                  out->typed_data(), make_executor(pool));
  return ffi::Error::Success();
}

// The attributes that every call on a grid carries.
template <class Binding>
auto bind_grid(Binding binding) {
  return std::move(binding)
      .template Attr<ffi::Span<const int32_t>>("resolutions")
      .template Attr<int64_t>("log2_table")
      .template Attr<float>("bound");
}

auto bind_forward() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<F32>()                    // means [n, 3]
      .Arg<F32>()                    // quats [n, 4]
      .Arg<F32>()                    // scales [n, 3]
      .Arg<F32>()                    // opacities [n]
      .Arg<F32>()                    // colors [n, c] or [n, k, 3]
      .Arg<F32>()                    // viewmat [4, 4]
      .Arg<F32>()                    // intrinsics [4]
      .Arg<F32>()                    // means2d [n, 2]
      .Ret<F32>()                    // color
      .Ret<F32>()                    // alpha
      .Ret<F32>()                    // depth
      .Ret<ffi::Buffer<ffi::S32>>()  // radii
      .Ret<ffi::Buffer<ffi::S32>>()  // num_pairs
      .Attr<int64_t>("width")
      .Attr<int64_t>("height")
      .Attr<float>("near_plane")
      .Attr<int64_t>("max_pairs");
}

auto bind_backward() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<F32>()  // means
      .Arg<F32>()  // quats
      .Arg<F32>()  // scales
      .Arg<F32>()  // opacities
      .Arg<F32>()  // colors
      .Arg<F32>()  // viewmat
      .Arg<F32>()  // intrinsics
      .Arg<F32>()  // means2d
      .Arg<F32>()  // color
      .Arg<F32>()  // alpha
      .Arg<F32>()  // depth
      .Arg<F32>()  // cotangent of color
      .Arg<F32>()  // cotangent of alpha
      .Arg<F32>()  // cotangent of depth
      .Ret<F32>()  // cotangents of the first eight arguments
      .Ret<F32>()
      .Ret<F32>()
      .Ret<F32>()
      .Ret<F32>()
      .Ret<F32>()
      .Ret<F32>()
      .Ret<F32>()
      .Attr<int64_t>("width")
      .Attr<int64_t>("height")
      .Attr<float>("near_plane")
      .Attr<int64_t>("max_pairs");
}

XLA_FFI_DEFINE_HANDLER(kForwardCpu, forward_cpu, bind_forward());
XLA_FFI_DEFINE_HANDLER(kBackwardCpu, backward_cpu, bind_backward());
XLA_FFI_DEFINE_HANDLER(kDssimCpu, dssim_cpu,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<F32>());

XLA_FFI_DEFINE_HANDLER(kGridEncodeCpu, grid_encode_cpu,
                       bind_grid(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Ret<F32>()));
XLA_FFI_DEFINE_HANDLER(kGridBackwardTablesCpu, grid_backward_tables_cpu,
                       bind_grid(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Ret<F32>()));
XLA_FFI_DEFINE_HANDLER(kGridBackwardPositionsCpu, grid_backward_positions_cpu,
                       bind_grid(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>()));

template <class Handler>
py::capsule capsule(Handler* handler) {
  return py::capsule(reinterpret_cast<void*>(handler));
}

// (target name, XLA platform, handler); Python registers whatever is here.
py::list registrations() {
  py::list out;
  out.append(py::make_tuple("fg3dgs_rasterize_forward", "cpu", capsule(kForwardCpu)));
  out.append(py::make_tuple("fg3dgs_rasterize_backward", "cpu", capsule(kBackwardCpu)));
  out.append(py::make_tuple("fg3dgs_dssim", "cpu", capsule(kDssimCpu)));
  out.append(py::make_tuple("fg3dgs_grid_encode", "cpu", capsule(kGridEncodeCpu)));
  out.append(py::make_tuple("fg3dgs_grid_backward_tables", "cpu", capsule(kGridBackwardTablesCpu)));
  out.append(py::make_tuple("fg3dgs_grid_backward_positions", "cpu", capsule(kGridBackwardPositionsCpu)));
  return out;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of fg3dgs_jax, as XLA FFI targets.";
  m.def("registrations", &registrations);
}
