// CUDA under nvcc; under another compiler the tests' emulation of it (tests/cuda_emulation), which runs the same sources.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda_emulation.h"
#endif

#include <cmath>
#include <cstdint>

namespace fg3dgs {

constexpr int64_t kMostBlocks = 0x7fffffff;  // of a launch

// What went wrong in the call just made, or nullptr. Asking forgets it: no later call finds it.
inline const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// One launch on a stream; an error message, or nullptr.
template <class... P, class... A>
const char* launch(void (*kernel)(P...), int64_t blocks, int threads, cudaStream_t stream, const A&... args) {
  if (blocks == 0) return nullptr;
  if (blocks > kMostBlocks) return "there is more work than one launch can hold";
#ifdef __CUDACC__
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(args...);
#else
  emulation::launch(static_cast<unsigned>(blocks), threads, stream, [&] { kernel(args...); });
#endif
  return last_error();
}

// Zeros on a stream; an error message, or nullptr.
inline const char* clear(void* begin, int64_t bytes, cudaStream_t stream) {
  static_cast<void>(cudaMemsetAsync(begin, 0, static_cast<size_t>(bytes), stream));
  return last_error();
}

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x & 31); }

namespace device {

__device__ __forceinline__ float min(float a, float b) { return a < b ? a : b; }  // b where either is NaN
__device__ __forceinline__ float max(float a, float b) { return a > b ? a : b; }
__device__ __forceinline__ bool finite(float x) { return x - x == 0.0f; }

}  // namespace device
}  // namespace fg3dgs
