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

// One launch on a stream; an error message, or nullptr.
template <class... P, class... A>
const char* launch(void (*kernel)(P...), int64_t blocks, int threads, cudaStream_t stream, const A&... args) {
  if (blocks == 0) return nullptr;
#ifdef __CUDACC__
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(args...);
#else
  emulation::launch(static_cast<unsigned>(blocks), threads, [&] { kernel(args...); });
#endif
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x & 31); }

namespace device {

__device__ __forceinline__ float min(float a, float b) { return a < b ? a : b; }  // b where either is NaN
__device__ __forceinline__ float max(float a, float b) { return a > b ? a : b; }
__device__ __forceinline__ bool finite(float x) { return x - x == 0.0f; }

}  // namespace device
}  // namespace fg3dgs
