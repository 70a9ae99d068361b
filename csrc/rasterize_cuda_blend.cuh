// CUDA kernels over tiles: blending and its backward pass, up to C channels at a time (everything in the backward pass
// is linear in the channels' cotangents, so more of them are more launches). Chunk 0 also sees alpha and depth.
#pragma once

#include "rasterize_cuda_list.cuh"

namespace fg3dgs {
namespace device {

// One block per tile; channels [first, first + count), count <= C.
template <int C>
__global__ void __launch_bounds__(kCudaThreads) blend_tiles(CudaWork w, Images out, int first, int count) {
  const int64_t tile = blockIdx.x;
  const Pixel p = find_pixel(w, tile);
  float transmittance = p.inside ? 1.0f : 0.0f;
  float alpha = 0.0f, depth = 0.0f, color[C] = {};
  if (overflows(w)) {
    alpha = depth = nanf("");
    for (int c = 0; c < C; ++c) color[c] = alpha;
  } else {
    for_gaussians<C>(w, tile, first, count, transmittance, [&](const Splat& g, uint32_t, const float* rgb) {
      const Layer o = blend_layer(g, p, transmittance);
      alpha += o.weight;
      depth += o.weight * g.z;
      for (int c = 0; c < C; ++c) color[c] += o.weight * rgb[c];
      transmittance = o.left;
    });
  }
  if (!p.inside) return;
  for (int c = 0; c < C; ++c)
    if (c < count) out.color[p.at * w.scene.channels + first + c] = color[c];
  if (first) return;
  out.alpha[p.at] = alpha;
  out.depth[p.at] = depth;
}

// Sums v[i], i < 2 N, over the warp; lane l gets the sum of v[l / 2] (for N = 8). Each step halves what a lane holds:
// 16 exchanges in all, not 80. A template and no loop: the values stay in registers.
template <int N>
__device__ __forceinline__ float sum_over_warp(float (&v)[16]) {
  if constexpr (N == 0) {
    return v[0] + __shfl_xor_sync(kFullWarp, v[0], 1);
  } else {
    const bool high = lane_id() & (2 * N);
    for (int k = 0; k < N; ++k) {
      const float given = high ? v[k] : v[k + N], kept = high ? v[k + N] : v[k];
      v[k] = kept + __shfl_xor_sync(kFullWarp, given, 2 * N);
    }
    return sum_over_warp<N / 2>(v);
  }
}

enum class Sum { kFast, kLargest, kExact };

// Power of two that brings a sum's largest addend, given by its bits, below 2^34: 2^27 addends of it fit into 63 bits.
__device__ __forceinline__ int exact_shift(uint32_t largest) { return 33 - (static_cast<int>(largest >> 23) - 127); }

constexpr double kMostUnits = 0x1p35;  // of an addend: 2^27 of them still fit

__device__ __forceinline__ bool not_finite(uint32_t bits) { return bits >= 0x7f800000u; }

// Adds a warp's share to one of a Gaussian's sums. kFast: in the order in which warps come, which rounding shows.
// kLargest, then kExact: integers, whose sum has no order.
template <Sum kind>
__device__ __forceinline__ void add_share(const CudaWork& w, int64_t at, float share) {
  if constexpr (kind == Sum::kFast) {
    atomicAdd(w.sums + at, share);
  } else if constexpr (kind == Sum::kLargest) {
    atomicMax(w.largest + at, __float_as_uint(fabsf(share)));
  } else {
    const uint32_t largest = w.largest[at];
    if (not_finite(largest)) return;
    // Another kernel found the largest, and may have rounded away what cancels to almost nothing here.
    const double exact = ldexp(static_cast<double>(share), exact_shift(largest));
    const long long units = llrint(fmin(fmax(exact, -kMostUnits), kMostUnits));
    atomicAdd(reinterpret_cast<unsigned long long*>(w.exact) + at, static_cast<unsigned long long>(units));
  }
}

// One of a Gaussian's sums, however it was added up.
__device__ __forceinline__ float read_sum(const CudaWork& w, int64_t at) {
  if (w.sums) return w.sums[at];
  if (not_finite(w.largest[at])) return nanf("");
  return static_cast<float>(ldexp(static_cast<double>(w.exact[at]), -exact_shift(w.largest[at])));
}

// A pixel's cotangents, and what the Gaussians still to come add to the loss.
template <int C>
struct PixelGradient {
  float rest, alpha, depth, color[C];
};

template <int C>
__device__ __forceinline__ PixelGradient<C> load_gradient(const CudaWork& w, const Pixel& p, const ConstImages& rendered,
                                                          const ConstImages& cotangents, int first, int count) {
  PixelGradient<C> o = {};
  if (!p.inside) return o;
  if (first == 0) {
    o.alpha = cotangents.alpha[p.at];
    o.depth = cotangents.depth[p.at];
    o.rest = o.alpha * rendered.alpha[p.at] + o.depth * rendered.depth[p.at];
  }
  for (int c = 0; c < C; ++c)
    if (c < count) {
      const int64_t at = p.at * w.scene.channels + first + c;
      o.color[c] = cotangents.color[at];
      o.rest += o.color[c] * rendered.color[at];
    }
  return o;
}

// One block per tile. With w_i = alpha_i T_i and gain_i = d loss / d w_i:
// d loss / d alpha_i = T_i gain_i - (sum over j > i of w_j gain_j) / (1 - alpha_i).
template <int C, Sum kind>
__global__ void __launch_bounds__(kCudaThreads)
    blend_tiles_backward(CudaWork w, ConstImages rendered, ConstImages cotangents, int first, int count) {
  static_assert(kMoments + C <= 16, "sum_over_warp takes 16");
  if (overflows(w)) return;
  const int64_t tile = blockIdx.x;
  const Pixel p = find_pixel(w, tile);
  float transmittance = p.inside ? 1.0f : 0.0f;
  PixelGradient<C> d = load_gradient<C>(w, p, rendered, cotangents, first, count);
  for_gaussians<C>(w, tile, first, count, transmittance, [&](const Splat& g, uint32_t id, const float* rgb) {
    const Layer o = blend_layer(g, p, transmittance);
    if (!__any_sync(kFullWarp, o.alpha > 0.0f && transmittance > 0.0f)) return;
    float v[16] = {};
    float gain = d.alpha + d.depth * g.z;
    v[6] = o.weight * d.depth;
    for (int c = 0; c < C; ++c) {
      gain += d.color[c] * rgb[c];
      v[kMoments + c] = o.weight * d.color[c];
    }
    d.rest -= o.weight * gain;
    const float dalpha = transmittance * gain - d.rest / (1.0f - o.alpha);
    if (o.exponent < kLog2MaxAlpha && o.left > 0.0f) {  // neither capped nor stopped
      v[0] = dalpha * o.alpha;                          // d loss / d log(alpha)
      v[1] = v[0] * o.dx;
      v[2] = v[0] * o.dy;
      v[3] = v[1] * o.dx;
      v[4] = v[1] * o.dy;
      v[5] = v[2] * o.dy;
    }
    transmittance = o.left;
    const float share = sum_over_warp<8>(v);
    const int k = lane_id() / 2, channel = k - kMoments;
    if (lane_id() % 2 || channel >= count) return;
    add_share<kind>(w, int64_t{id} * w.stride + (channel < 0 ? k : kMoments + first + channel), share);
  });
}

}  // namespace device
}  // namespace fg3dgs
