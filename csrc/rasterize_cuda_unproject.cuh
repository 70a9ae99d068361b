// CUDA kernels that take Gaussians from the sums over their pixels back to their parameters, and the camera's gradient.
#pragma once

#include "rasterize_cuda_blend.cuh"

namespace fg3dgs {
namespace device {

__device__ __forceinline__ ScreenGradient<float> screen_gradient(const Projection<float>& o, const float* sums) {
  ScreenGradient<float> g;
  const float inv = 1.0f / o.det;
  g.x = inv * (o.c * sums[1] - o.b * sums[2]);
  g.y = inv * (o.a * sums[2] - o.b * sums[1]);
  g.a = -0.5f * sums[3];
  g.b = -sums[4];
  g.c = -0.5f * sums[5];
  g.depth = sums[6];
  return g;
}

// Writes the cotangents of a Gaussian's colours; `through` gets what reaches its mean by the viewing direction.
__device__ __forceinline__ void color_gradients(const CudaWork& w, const Camera& cam, int64_t i, const float* mean,
                                                float* out, float* through) {
  const Scene& s = w.scene;
  const int64_t sums = i * w.stride + kMoments;
  if (s.sh_count == 0) {
    for (int c = 0; c < s.channels; ++c) out[i * s.channels + c] = read_sum(w, sums + c);
    return;
  }
  const Direction dir = find_direction(cam, s.sh_count, mean);
  float d[3], basis[16];
  for (int c = 0; c < 3; ++c) d[c] = w.colors[3 * i + c] > 0.0f ? read_sum(w, sums + c) : 0.0f;  // the clamp at zero
  const float* sh = s.colors + i * s.sh_count * 3;
  float* dsh = out + i * s.sh_count * 3;
  for (int k = 0; k < s.sh_count; ++k) {
    for (int c = 0; c < 3; ++c) dsh[3 * k + c] = dir.basis[k] * d[c];
    basis[k] = sh[3 * k] * d[0] + sh[3 * k + 1] * d[1] + sh[3 * k + 2] * d[2];
  }
  float along[3];
  sh_basis_backward(s.sh_count, dir.d[0], dir.d[1], dir.d[2], basis, &along[0], &along[1], &along[2]);
  const float radial = along[0] * dir.d[0] + along[1] * dir.d[1] + along[2] * dir.d[2];
  for (int k = 0; k < 3; ++k) through[k] = (along[k] - dir.d[k] * radial) * dir.inv_length;
}

// Writes one value to all gradients of a Gaussian.
__device__ __forceinline__ void fill_gradients(const Scene& s, const Gradients& out, int64_t i, float value) {
  for (int k = 0; k < 3; ++k) out.means[3 * i + k] = out.scales[3 * i + k] = value;
  for (int k = 0; k < 4; ++k) out.quats[4 * i + k] = value;
  for (int k = 0; k < 2; ++k) out.means2d[2 * i + k] = value;
  out.opacities[i] = value;
  const int colors = s.sh_count ? 3 * s.sh_count : s.channels;
  for (int k = 0; k < colors; ++k) out.colors[i * colors + k] = value;
}

// Writes the gradients of a drawn Gaussian, and its share of the camera's.
__device__ __forceinline__ void unproject_one(const CudaWork& w, const Gradients& out, int64_t i, float* camera) {
  const Scene& s = w.scene;
  const Camera cam = load_camera(s);
  const float* mean = s.means + 3 * i;
  const Projection<float> o = project(cam, mean, s.quats + 4 * i, s.scales + 3 * i);
  // A needle whose determinant is all rounding: compiled here, it may round to nothing where it did not when drawn.
  if (!(o.det > 0.0f)) return fill_gradients(s, out, i, 0.0f);
  float sums[kMoments], through[3] = {};
  for (int k = 0; k < kMoments; ++k) sums[k] = read_sum(w, i * w.stride + k);
  color_gradients(w, cam, i, mean, out.colors, through);
  const ScreenGradient<float> screen = screen_gradient(o, sums);
  const PointGradient<float> g = unproject(cam, mean, o, screen);
  for (int k = 0; k < 3; ++k) out.means[3 * i + k] = g.mean[k] + through[k];
  for (int k = 0; k < 4; ++k) out.quats[4 * i + k] = g.quat[k];
  for (int k = 0; k < 3; ++k) out.scales[3 * i + k] = g.scale[k];
  out.means2d[2 * i] = screen.x;
  out.means2d[2 * i + 1] = screen.y;
  out.opacities[i] = sums[0] / s.opacities[i];
  for (int k = 0; k < 9; ++k) camera[k] = g.rotation[k];
  for (int k = 0; k < 3; ++k) camera[9 + k] = g.translation[k];
  camera[12] = g.fx;
  camera[13] = g.fy;
  camera[14] = g.cx;
  camera[15] = g.cy;
  for (int k = 0; k < 3; ++k) camera[16 + k] = -through[k];
}

// One thread per Gaussian; each block leaves its share of the camera's gradient, summed in a fixed order.
__global__ void __launch_bounds__(kCudaThreads) unproject_gaussians(CudaWork w, Gradients out) {
  __shared__ float shares[kWarps][kCameraSums];
  const int64_t i = int64_t{blockIdx.x} * kCudaThreads + threadIdx.x;
  float camera[kCameraSums] = {};
  if (i < w.scene.n) {
    if (overflows(w)) {
      fill_gradients(w.scene, out, i, nanf(""));
    } else if (w.keys[i] == 0) {
      fill_gradients(w.scene, out, i, 0.0f);
    } else {
      unproject_one(w, out, i, camera);
    }
  }
  for (int k = 0; k < kCameraSums; ++k) {
    for (int step = 16; step > 0; step /= 2) camera[k] += __shfl_xor_sync(kFullWarp, camera[k], step);
    if (lane_id() == 0) shares[threadIdx.x / 32][k] = camera[k];
  }
  __syncthreads();
  if (threadIdx.x >= kCameraSums) return;
  float sum = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) sum += shares[warp][threadIdx.x];
  w.camera[int64_t{blockIdx.x} * kCameraSums + threadIdx.x] = sum;
}

// One block of a warp per sum. The camera's centre is -R^T t.
__global__ void __launch_bounds__(32 * kCameraSums) finish_camera(CudaWork w, int64_t blocks, Gradients out) {
  __shared__ double total[kCameraSums];
  const int k = static_cast<int>(threadIdx.x) / 32, thread = static_cast<int>(threadIdx.x);
  double sum = 0.0;
  for (int64_t b = lane_id(); b < blocks; b += 32) sum += w.camera[b * kCameraSums + k];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  if (lane_id() == 0) total[k] = overflows(w) ? static_cast<double>(nanf("")) : sum;
  __syncthreads();
  const float* viewmat = w.scene.viewmat;
  const double* center = total + 16;
  if (thread < 4) out.intrinsics[thread] = static_cast<float>(total[12 + thread]);
  if (thread >= 16) return;
  const int i = thread / 4, j = thread % 4;
  double value = overflows(w) ? total[0] : 0.0;
  if (i < 3 && j < 3) value = total[3 * i + j] - viewmat[4 * i + 3] * center[j];
  if (i < 3 && j == 3) {
    value = total[9 + i];
    for (int c = 0; c < 3; ++c) value -= viewmat[4 * i + c] * center[c];
  }
  out.viewmat[thread] = static_cast<float>(value);
}

}  // namespace device
}  // namespace fg3dgs
