// The CPU's XLA FFI handlers, and the Python module.
#include <pybind11/pybind11.h>

#include "cuda_work.h"
#include "dssim.h"
#include "ffi_bind.h"

namespace py = pybind11;

namespace fg3dgs {
namespace {

// -> color [h, w, c], alpha [h, w], depth [h, w], radii [n], num_pairs []
ffi::Error forward_cpu(ffi::ThreadPool pool, F32 means, F32 quats, F32 scales, F32 opacities, F32 colors, F32 viewmat,
                       F32 intrinsics, F32 means2d, OutF32 color, OutF32 alpha, OutF32 depth, OutI32 radii,
                       OutI32 num_pairs, int64_t width, int64_t height, float near_plane, int64_t max_pairs) {
  Scene scene;
  ffi::Error error = make_scene(means, quats, scales, opacities, colors, viewmat, intrinsics, means2d, width, height,
                                near_plane, max_pairs, &scene);
  if (error.failure()) return error;
  const Images images = {color->typed_data(), alpha->typed_data(), depth->typed_data()};
  return finish([&] {
    return rasterize_forward(scene, images, radii->typed_data(), num_pairs->typed_data(), make_executor(pool));
  });
}

// color, alpha, depth: what forward returned; d_*: their cotangents -> cotangents of the eight inputs, in order
ffi::Error backward_cpu(ffi::ThreadPool pool, F32 means, F32 quats, F32 scales, F32 opacities, F32 colors, F32 viewmat,
                        F32 intrinsics, F32 means2d, F32 color, F32 alpha, F32 depth, F32 d_color, F32 d_alpha,
                        F32 d_depth, OutF32 d_means, OutF32 d_quats, OutF32 d_scales, OutF32 d_opacities,
                        OutF32 d_colors, OutF32 d_viewmat, OutF32 d_intrinsics, OutF32 d_means2d, int64_t width,
                        int64_t height, float near_plane, int64_t max_pairs) {
  Scene scene;
  ffi::Error error = make_scene(means, quats, scales, opacities, colors, viewmat, intrinsics, means2d, width, height,
                                near_plane, max_pairs, &scene);
  if (error.failure()) return error;
  return finish([&] {
    return rasterize_backward(
        scene, make_images(color, alpha, depth), make_images(d_color, d_alpha, d_depth),
        make_gradients(d_means, d_quats, d_scales, d_opacities, d_colors, d_viewmat, d_intrinsics, d_means2d),
        make_executor(pool));
  });
}

// prediction, target [h, w, c] -> loss [], d loss / d prediction [h, w, c]
ffi::Error dssim_cpu(ffi::ThreadPool pool, F32 prediction, F32 target, OutF32 loss, OutF32 gradient) {
  const auto dims = prediction.dimensions();
  if (dims.size() != 3 || prediction.element_count() == 0 || target.element_count() != prediction.element_count())
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "dssim: operands have the wrong shapes");
  dssim(prediction.typed_data(), target.typed_data(), dims[0], dims[1], dims[2], loss->typed_data(),
                gradient->typed_data(), make_executor(pool));
  return ffi::Error::Success();
}

// tables [3, entries], positions [3, n] -> encoding [3, levels, n]
ffi::Error grid_encode_cpu(ffi::ThreadPool pool, F32 tables, F32 positions, OutF32 out,
                           ffi::Span<const int32_t> resolutions, int64_t log2_table, float bound) {
  Grid g;
  ffi::Error error = make_grid(resolutions, log2_table, bound, positions, size_of(tables), size_of(*out), &g);
  if (error.failure()) return error;
  grid_encode(g, tables.typed_data(), positions.typed_data(), out->typed_data(), make_executor(pool));
  return ffi::Error::Success();
}

// positions, cotangent of the encoding -> cotangent of the tables
ffi::Error grid_backward_tables_cpu(ffi::ThreadPool pool, F32 positions, F32 cotangent, OutF32 out,
                                    ffi::Span<const int32_t> resolutions, int64_t log2_table, float bound) {
  Grid g;
  ffi::Error error = make_grid(resolutions, log2_table, bound, positions, size_of(*out), size_of(cotangent), &g);
  if (error.failure()) return error;
  grid_backward_tables(g, positions.typed_data(), cotangent.typed_data(), out->typed_data(),
                               make_executor(pool));
  return ffi::Error::Success();
}

// tables, positions, cotangent of the encoding -> cotangent of the positions
ffi::Error grid_backward_positions_cpu(ffi::ThreadPool pool, F32 tables, F32 positions, F32 cotangent, OutF32 out,
                                       ffi::Span<const int32_t> resolutions, int64_t log2_table, float bound) {
  Grid g;
  ffi::Error error = make_grid(resolutions, log2_table, bound, positions, size_of(tables), size_of(cotangent), &g);
  if (error.failure()) return error;
  grid_backward_positions(g, tables.typed_data(), positions.typed_data(), cotangent.typed_data(),
                                  out->typed_data(), make_executor(pool));
  return ffi::Error::Success();
}

// x [in, n], weights [sum of in * out] -> [out, n]
ffi::Error mlp_forward_cpu(ffi::ThreadPool pool, F32 x, F32 weights, OutF32 out, ffi::Span<const int32_t> sizes) {
  Mlp m;
  ffi::Error error = make_mlp(sizes, x, size_of(weights), &m);
  if (error.failure()) return error;
  mlp_forward(m, nullptr, x.typed_data(), weights.typed_data(), out->typed_data(), make_executor(pool));
  return ffi::Error::Success();
}

// x, weights, cotangent of the result [out, n] -> cotangents of x and of the weights
ffi::Error mlp_backward_cpu(ffi::ThreadPool pool, F32 x, F32 weights, F32 d_out, OutF32 d_x, OutF32 d_weights,
                            ffi::Span<const int32_t> sizes) {
  Mlp m;
  ffi::Error error = make_mlp(sizes, x, size_of(weights), &m);
  if (error.failure()) return error;
  mlp_backward(m, x.typed_data(), weights.typed_data(), d_out.typed_data(), d_x->typed_data(), d_weights->typed_data(),
               make_executor(pool));
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kMlpForwardCpu, mlp_forward_cpu,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Ret<F32>().Attr<
                           ffi::Span<const int32_t>>("sizes"));
XLA_FFI_DEFINE_HANDLER(kMlpBackwardCpu, mlp_backward_cpu,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<F32>().Attr<
                           ffi::Span<const int32_t>>("sizes"));
XLA_FFI_DEFINE_HANDLER(kForwardCpu, forward_cpu, bind_forward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(kBackwardCpu, backward_cpu, bind_backward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(kDssimCpu, dssim_cpu,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<F32>());

XLA_FFI_DEFINE_HANDLER(kGridEncodeCpu, grid_encode_cpu,
                       bind_grid(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Ret<F32>()));
XLA_FFI_DEFINE_HANDLER(kGridBackwardTablesCpu, grid_backward_tables_cpu,
                       bind_grid(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Ret<F32>()));
XLA_FFI_DEFINE_HANDLER(kGridBackwardPositionsCpu, grid_backward_positions_cpu,
                       bind_grid(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>()));

// (target name, XLA platform, handler); Python registers whatever is here.
py::list registrations() {
  std::vector<Registration> all = {
      {"fg3dgs_rasterize_forward", "cpu", kForwardCpu},
      {"fg3dgs_rasterize_backward", "cpu", kBackwardCpu},
      {"fg3dgs_dssim", "cpu", kDssimCpu},
      {"fg3dgs_mlp_forward", "cpu", kMlpForwardCpu},
      {"fg3dgs_mlp_backward", "cpu", kMlpBackwardCpu},
      {"fg3dgs_grid_encode", "cpu", kGridEncodeCpu},
      {"fg3dgs_grid_backward_tables", "cpu", kGridBackwardTablesCpu},
      {"fg3dgs_grid_backward_positions", "cpu", kGridBackwardPositionsCpu},
  };
  for (const std::vector<Registration>& more : {frame_registrations(), cuda_registrations()})
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
  m.attr("INTERFACE") = 4;  // as in fg3dgs_jax/native.py
  m.def("registrations", &fg3dgs::registrations);
  m.def("cuda_workspace_bytes", &fg3dgs::cuda_workspace_bytes, py::arg("n"), py::arg("channels"), py::arg("sh_count"),
        py::arg("width"), py::arg("height"), py::arg("max_pairs"), py::arg("backward"), py::arg("deterministic"));
}
