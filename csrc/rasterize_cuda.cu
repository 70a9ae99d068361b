// The CUDA backend's driver: what is launched, in which order. The arithmetic is in the kernels.
#include "rasterize_cuda_unproject.cuh"

namespace fg3dgs {
namespace {

using namespace device;

constexpr int kChannels = 4;  // of a launch, unless there are three

// Every step of a call: the first error stops the rest.
#define FG_TRY(step) \
  if (const char* message = (step)) return message

const char* find_lists(const CudaWork& w, int32_t* radii, int32_t* num_pairs, cudaStream_t stream) {
  const int64_t blocks = gaussian_blocks(w.scene.n);
  FG_TRY(clear(w.box_pairs, w.zeroed_bytes, stream));  // the fields that start from zero lie first
  FG_TRY(launch(project_gaussians, blocks, kCudaThreads, stream, w, radii));
  FG_TRY(launch(reserve_lists, (w.tiles + kCudaThreads - 1) / kCudaThreads, kCudaThreads, stream, w, num_pairs));
  return launch(scatter_gaussians, blocks, kCudaThreads, stream, w);
}

template <Sum kind>
const char* blend_backward(const CudaWork& w, const ConstImages& rendered, const ConstImages& cotangents,
                           cudaStream_t stream) {
  if (w.scene.channels == 3)
    return launch(blend_tiles_backward<3, kind>, w.tiles, kCudaThreads, stream, w, rendered, cotangents, 0, 3);
  for (int first = 0; first < w.scene.channels; first += kChannels) {
    const int count = w.scene.channels - first < kChannels ? w.scene.channels - first : kChannels;
    FG_TRY(launch(blend_tiles_backward<kChannels, kind>, w.tiles, kCudaThreads, stream, w, rendered, cotangents, first,
                  count));
  }
  return nullptr;
}

}  // namespace

const char* rasterize_forward_cuda(const Scene& s, const Images& out, int32_t* radii, int32_t* num_pairs,
                                   void* workspace, int64_t room, CUstream_st* stream) {
  CudaWork w;
  make_work(s, CudaPass::kForward, room, workspace, &w);
  FG_TRY(find_lists(w, radii, num_pairs, stream));
  if (s.channels == 3) return launch(blend_tiles<3>, w.tiles, kCudaThreads, stream, w, out, 0, 3);
  for (int first = 0; first < s.channels; first += kChannels) {
    const int count = s.channels - first < kChannels ? s.channels - first : kChannels;
    FG_TRY(launch(blend_tiles<kChannels>, w.tiles, kCudaThreads, stream, w, out, first, count));
  }
  return nullptr;
}

const char* rasterize_backward_cuda(const Scene& s, const ConstImages& rendered, const ConstImages& cotangents,
                                    const Gradients& out, bool deterministic, void* workspace, int64_t room,
                                    CUstream_st* stream) {
  CudaWork w;
  make_work(s, deterministic ? CudaPass::kDeterministic : CudaPass::kBackward, room, workspace, &w);
  FG_TRY(find_lists(w, nullptr, nullptr, stream));
  if (deterministic) {
    FG_TRY(blend_backward<Sum::kLargest>(w, rendered, cotangents, stream));
    FG_TRY(blend_backward<Sum::kExact>(w, rendered, cotangents, stream));
  } else {
    FG_TRY(blend_backward<Sum::kFast>(w, rendered, cotangents, stream));
  }
  const int64_t blocks = gaussian_blocks(s.n);
  FG_TRY(launch(unproject_gaussians, blocks, kCudaThreads, stream, w, out));
  return launch(finish_camera, 1, 32 * kCameraSums, stream, w, blocks, out);
}

}  // namespace fg3dgs
