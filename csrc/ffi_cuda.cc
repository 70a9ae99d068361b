// CUDA's XLA FFI handlers. They put work on XLA's stream and return: no allocation, no waiting, so that XLA can record them
// into a CUDA graph. What they need besides operands and results is one more result, which XLA plans like any other
// buffer: memory from a scratch allocator would be gone when the graph is replayed.
#ifdef FG_CUDA
#include "cuda_work.h"
#include "ffi_bind.h"

namespace fg3dgs {
namespace {

using Stream = CUstream_st*;
using Workspace = ffi::Result<ffi::Buffer<ffi::U8>>;

ffi::Error check_workspace(const Scene& s, CudaPass pass, Workspace& workspace) {
  const auto given = static_cast<int64_t>(workspace->element_count());
  if (given >= workspace_bytes(s, pass, default_room(s))) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "rasterize: the workspace is too small");
}

ffi::Error finish_cuda(const char* message) {
  if (!message) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal,
                    std::string("fg3dgs_jax: a CUDA kernel was not started: ") + message +
                        "; kernels that were built for other devices or a newer driver must be built again here "
                        "(FG3DGS_CUDA=1 pip install -e .)");
}

// -> color [h, w, c], alpha [h, w], depth [h, w], radii [n], num_pairs [], workspace
ffi::Error forward_cuda(Stream stream, F32 means, F32 quats, F32 scales, F32 opacities, F32 colors, F32 viewmat,
                        F32 intrinsics, F32 means2d, OutF32 color, OutF32 alpha, OutF32 depth, OutI32 radii,
                        OutI32 num_pairs, int64_t width, int64_t height, float near_plane, int64_t max_pairs,
                        Workspace workspace) {
  Scene scene;
  ffi::Error error = make_scene(means, quats, scales, opacities, colors, viewmat, intrinsics, means2d, width, height,
                                near_plane, max_pairs, &scene);
  if (error.failure()) return error;
  error = check_workspace(scene, CudaPass::kForward, workspace);
  if (error.failure()) return error;
  const Images images = {color->typed_data(), alpha->typed_data(), depth->typed_data()};
  return finish_cuda(rasterize_forward_cuda(scene, images, radii->typed_data(), num_pairs->typed_data(),
                                            workspace->typed_data(), default_room(scene), stream));
}

// color, alpha, depth: what forward returned; d_*: their cotangents -> cotangents of the eight inputs, workspace
ffi::Error backward_cuda(Stream stream, F32 means, F32 quats, F32 scales, F32 opacities, F32 colors, F32 viewmat,
                         F32 intrinsics, F32 means2d, F32 color, F32 alpha, F32 depth, F32 d_color, F32 d_alpha,
                         F32 d_depth, OutF32 d_means, OutF32 d_quats, OutF32 d_scales, OutF32 d_opacities,
                         OutF32 d_colors, OutF32 d_viewmat, OutF32 d_intrinsics, OutF32 d_means2d, int64_t width,
                         int64_t height, float near_plane, int64_t max_pairs, Workspace workspace, bool deterministic) {
  Scene scene;
  ffi::Error error = make_scene(means, quats, scales, opacities, colors, viewmat, intrinsics, means2d, width, height,
                                near_plane, max_pairs, &scene);
  if (error.failure()) return error;
  error = check_workspace(scene, pass_of(true, deterministic), workspace);
  if (error.failure()) return error;
  return finish_cuda(rasterize_backward_cuda(
      scene, make_images(color, alpha, depth), make_images(d_color, d_alpha, d_depth),
      make_gradients(d_means, d_quats, d_scales, d_opacities, d_colors, d_viewmat, d_intrinsics, d_means2d),
      deterministic, workspace->typed_data(), default_room(scene), stream));
}

// Shapes and levels; the kernels take so many levels by value.
ffi::Error make_grid_cuda(ffi::Span<const int32_t> resolutions, int64_t log2_table, float bound, F32 positions,
                          int64_t table_size, int64_t encoding_size, Grid* g) {
  if (resolutions.size() > kMostGridLevels)
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "grid: more than 32 levels");
  return make_grid(resolutions, log2_table, bound, positions, table_size, encoding_size, g);
}

// tables [3, entries], positions [3, n] -> encoding [3, levels, n]
ffi::Error encode_cuda(Stream stream, F32 tables, F32 positions, OutF32 out, ffi::Span<const int32_t> resolutions,
                       int64_t log2_table, float bound) {
  Grid g;
  ffi::Error error = make_grid_cuda(resolutions, log2_table, bound, positions, size_of(tables), size_of(*out), &g);
  if (error.failure()) return error;
  return finish_cuda(grid_encode_cuda(g, tables.typed_data(), positions.typed_data(), out->typed_data(), stream));
}

// positions, cotangent of the encoding -> cotangent of the tables
ffi::Error tables_cuda(Stream stream, F32 positions, F32 cotangent, OutF32 out, ffi::Span<const int32_t> resolutions,
                       int64_t log2_table, float bound) {
  Grid g;
  ffi::Error error = make_grid_cuda(resolutions, log2_table, bound, positions, size_of(*out), size_of(cotangent), &g);
  if (error.failure()) return error;
  return finish_cuda(
      grid_backward_tables_cuda(g, positions.typed_data(), cotangent.typed_data(), out->typed_data(), stream));
}

// tables, positions, cotangent of the encoding -> cotangent of the positions
ffi::Error positions_cuda(Stream stream, F32 tables, F32 positions, F32 cotangent, OutF32 out,
                          ffi::Span<const int32_t> resolutions, int64_t log2_table, float bound) {
  Grid g;
  ffi::Error error = make_grid_cuda(resolutions, log2_table, bound, positions, size_of(tables), size_of(cotangent), &g);
  if (error.failure()) return error;
  return finish_cuda(grid_backward_positions_cuda(g, tables.typed_data(), positions.typed_data(),
                                                  cotangent.typed_data(), out->typed_data(), stream));
}

auto bind_stream() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<Stream>>(); }

XLA_FFI_DEFINE_HANDLER(kForwardCuda, forward_cuda, bind_forward(bind_stream()).Ret<ffi::Buffer<ffi::U8>>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kBackwardCuda, backward_cuda,
                       bind_backward(bind_stream()).Ret<ffi::Buffer<ffi::U8>>().Attr<bool>("deterministic"),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kEncodeCuda, encode_cuda, bind_grid(bind_stream().Arg<F32>().Arg<F32>().Ret<F32>()),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kTablesCuda, tables_cuda, bind_grid(bind_stream().Arg<F32>().Arg<F32>().Ret<F32>()),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kPositionsCuda, positions_cuda,
                       bind_grid(bind_stream().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>()),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

std::vector<Registration> cuda_registrations() {
  return {
      {"fg3dgs_rasterize_forward", "CUDA", kForwardCuda}, {"fg3dgs_rasterize_backward", "CUDA", kBackwardCuda},
      {"fg3dgs_grid_encode", "CUDA", kEncodeCuda},        {"fg3dgs_grid_backward_tables", "CUDA", kTablesCuda},
      {"fg3dgs_grid_backward_positions", "CUDA", kPositionsCuda},
  };
}

}  // namespace fg3dgs
#endif
