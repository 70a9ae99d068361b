// CUDA kernels that project Gaussians and give each tile the list of those that meet it.
#pragma once

#include "cuda_seam.cuh"
#include "cuda_work.h"

namespace fg3dgs {
namespace device {
__host__ __device__ __forceinline__ float clamp(float x, float low, float high) {
  const float raised = x > low ? x : low;
  return raised < high ? raised : high;
}
}  // namespace device
}  // namespace fg3dgs
#define FG_ISA device
#include "splat_math.h"

namespace fg3dgs {
namespace device {

constexpr float kLog2e = 1.44269504f;
constexpr float kLog2MinAlpha = -7.99435344f;  // log2(1 / 255)
constexpr float kLog2MaxAlpha = -0.01449957f;  // log2(0.99)
constexpr int kAlone = 16;                     // a warp shares the work on boxes of more tiles

// log2 of alpha at (dx, dy) from the mean is a dx^2 + b dx dy + c dy^2 + level.
struct Splat {
  float x, y, z, level, a, b, c;
};

__device__ __forceinline__ Splat load_splat(const CudaWork& w, int64_t i) {
  const float4* p = reinterpret_cast<const float4*>(w.splats) + 2 * i;
  const float4 p0 = p[0], p1 = p[1];
  return {p0.x, p0.y, p0.z, p0.w, p1.x, p1.y, p1.z};
}

// Whether alpha reaches 1/255 in a rectangle of pixel centres: there it is largest on the edges that face the mean.
// Products are only added by fmaf: the compiler must not round them differently where it inlines this.
__device__ __forceinline__ bool touches(const Splat& g, float left, float top, float wide, float high) {
  const float x0 = left + 0.5f - g.x, y0 = top + 0.5f - g.y, x1 = x0 + wide, y1 = y0 + high;
  const float near_x = clamp(0.0f, x0, x1), near_y = clamp(0.0f, y0, y1);
  const float best_x = clamp(near_y * (g.b / (-2.0f * g.a)), x0, x1);
  const float best_y = clamp(near_x * (g.b / (-2.0f * g.c)), y0, y1);
  const float e0 = fmaf(near_x, fmaf(near_x, g.a, best_y * g.b), best_y * best_y * g.c);
  const float e1 = fmaf(best_x, fmaf(best_x, g.a, near_y * g.b), near_y * near_y * g.c);
  return !(max(e0, e1) < kLog2MinAlpha - g.level - 1e-4f);  // the slack covers rounding
}

__device__ __forceinline__ bool touches_tile(const Splat& g, int x, int y) {
  return touches(g, static_cast<float>(x * kTile), static_cast<float>(y * kTile), kTile - 1, kTile - 1);
}

__device__ __forceinline__ int box_tiles(const Box& b) { return (b.x1 - b.x0 + 1) * (b.y1 - b.y0 + 1); }

// visit(tile) for every tile that Gaussian i, if it is drawn, meets. The whole warp must call, with neighbouring i.
template <class Visit>
__device__ __forceinline__ void visit_tiles(const CudaWork& w, int64_t i, bool drawn, const Visit& visit) {
  const auto visit_some = [&](int64_t gaussian, int first, int step) {
    const Box box = w.boxes[gaussian];
    const Splat g = load_splat(w, gaussian);
    const int wide = box.x1 - box.x0 + 1, count = box_tiles(box);
    for (int k = first; k < count; k += step) {
      const int x = box.x0 + k % wide, y = box.y0 + k / wide;
      if (touches_tile(g, x, y)) visit(static_cast<int64_t>(y) * w.tiles_x + x, gaussian);
    }
  };
  __syncwarp();  // boxes and splats may have been written by other lanes just now
  const bool large = drawn && box_tiles(w.boxes[i]) > kAlone;
  if (drawn && !large) visit_some(i, 0, 1);
  for (unsigned rest = __ballot_sync(kFullWarp, large); rest; rest &= rest - 1)
    visit_some(i - lane_id() + __ffs(static_cast<int>(rest)) - 1, lane_id(), 32);
}

struct Direction {
  float d[3], inv_length, basis[16];
};

__device__ __forceinline__ Direction find_direction(const Camera& cam, int count, const float* mean) {
  Direction o;
  float to[3];
  for (int i = 0; i < 3; ++i) to[i] = mean[i] - cam.center[i];
  o.inv_length = 1.0f / sqrtf(to[0] * to[0] + to[1] * to[1] + to[2] * to[2]);
  for (int i = 0; i < 3; ++i) o.d[i] = to[i] * o.inv_length;
  sh_basis(count, o.d[0], o.d[1], o.d[2], o.basis);
  return o;
}

// Writes the colours that spherical harmonics give, or looks at plain ones; false where one is not finite.
__device__ __forceinline__ bool find_colors(const CudaWork& w, const Camera& cam, int64_t i, const float* mean) {
  const Scene& s = w.scene;
  bool good = true;
  if (s.sh_count == 0) {
    for (int c = 0; c < s.channels; ++c) good &= finite(s.colors[i * s.channels + c]);
    return good;
  }
  const Direction dir = find_direction(cam, s.sh_count, mean);
  const float* sh = s.colors + i * s.sh_count * 3;
  for (int c = 0; c < 3; ++c) {
    float sum = 0.5f;
    for (int k = 0; k < s.sh_count; ++k) sum += dir.basis[k] * sh[3 * k + c];
    good &= finite(sum);
    w.colors[3 * i + c] = max(sum, 0.0f);
  }
  return good;
}

// Writes box, splat and key of a Gaussian that touches a pixel; false for any other.
__device__ __forceinline__ bool find_footprint(const CudaWork& w, const Camera& cam, const Projection<float>& o,
                                               int64_t i, float* radius) {
  const float x = o.u + cam.cx + w.scene.means2d[2 * i], y = o.v + cam.cy + w.scene.means2d[2 * i + 1];
  const float level = log2f(w.scene.opacities[i]);
  // alpha >= 1/255 inside an ellipse whose half-extents are these.
  const float reach = (level - kLog2MinAlpha) * (2.0f / kLog2e);
  const float ex = sqrtf(reach * o.a), ey = sqrtf(reach * o.c);
  const float x0 = max(ceilf(x - ex - 0.5f), 0.0f), x1 = min(floorf(x + ex - 0.5f), cam.width - 1);
  const float y0 = max(ceilf(y - ey - 0.5f), 0.0f), y1 = min(floorf(y + ey - 0.5f), cam.height - 1);
  const bool drawn = o.p[2] > cam.near_plane && finite(o.p[2]) && o.det > 0.0f && finite(o.det) &&
                     o.inv_norm > 0.0f && finite(x + y + ex + ey) && x0 <= x1 && y0 <= y1;
  if (!drawn) return false;
  const float inv = 1.0f / o.det, mid = 0.5f * (o.a + o.c);
  const float spread = sqrtf(max(mid * mid - o.det, 0.0f));
  *radius = min(ceilf(3.0f * sqrtf(mid + spread)), 1e9f);
  w.keys[i] = __float_as_uint(o.p[2]);  // z > 0: its bits sort like its value
  w.boxes[i] = {static_cast<uint16_t>(static_cast<int>(x0) / kTile), static_cast<uint16_t>(static_cast<int>(y0) / kTile),
                static_cast<uint16_t>(static_cast<int>(x1) / kTile), static_cast<uint16_t>(static_cast<int>(y1) / kTile)};
  float4* splat = reinterpret_cast<float4*>(w.splats) + 2 * i;
  splat[0] = make_float4(x, y, o.p[2], level);
  splat[1] = make_float4(-0.5f * kLog2e * o.c * inv, kLog2e * o.b * inv, -0.5f * kLog2e * o.a * inv, 0.0f);
  return true;
}

__device__ __forceinline__ Camera load_camera(const Scene& s) {
  return make_camera(s.viewmat, s.intrinsics, s.width, s.height, s.near_plane);
}

// One thread per Gaussian: key, box, splat, colours, radius (radii may be null); counts the pairs.
__global__ void __launch_bounds__(kCudaThreads) project_gaussians(CudaWork w, int32_t* radii) {
  const Scene& s = w.scene;
  const int64_t i = int64_t{blockIdx.x} * kCudaThreads + threadIdx.x;
  bool drawn = false;
  float radius = 0.0f;
  if (i < s.n) {
    w.keys[i] = 0;
    const float opacity = s.opacities[i];
    if (opacity >= kMinAlpha && finite(opacity)) {
      const Camera cam = load_camera(s);
      const float* mean = s.means + 3 * i;
      const Projection<float> o = project(cam, mean, s.quats + 4 * i, s.scales + 3 * i);
      drawn = find_colors(w, cam, i, mean) && find_footprint(w, cam, o, i, &radius);
    }
    if (radii) radii[i] = drawn ? static_cast<int32_t>(radius) : 0;
  }
  unsigned long long pairs = drawn ? box_tiles(w.boxes[i]) : 0;
  for (int step = 16; step > 0; step /= 2) pairs += __shfl_xor_sync(kFullWarp, pairs, step);
  if (lane_id() == 0 && pairs) atomicAdd(w.box_pairs, pairs);
  visit_tiles(w, i, drawn, [&](int64_t tile, int64_t) { atomicAdd(w.tile_count + tile, 1u); });
}

// One thread per tile. Lists lie in the order in which warps come here: nothing else depends on it.
__global__ void __launch_bounds__(kCudaThreads) reserve_lists(CudaWork w, int32_t* num_pairs) {
  const int64_t tile = int64_t{blockIdx.x} * kCudaThreads + threadIdx.x;
  if (tile == 0 && num_pairs)
    *num_pairs = *w.box_pairs < 0x7fffffffull ? static_cast<int32_t>(*w.box_pairs) : 0x7fffffff;
  const unsigned long long count = tile < w.tiles ? w.tile_count[tile] : 0;
  unsigned long long end = count;
  for (int step = 1; step < 32; step *= 2) {
    const unsigned long long before = __shfl_up_sync(kFullWarp, end, step);
    if (lane_id() >= step) end += before;
  }
  unsigned long long base = 0;
  if (lane_id() == 31 && end) base = atomicAdd(w.reserved, end);
  end += __shfl_sync(kFullWarp, base, 31);
  const bool fits = end <= static_cast<unsigned long long>(w.room);
  if (tile < w.tiles) w.tile_start[tile] = fits ? static_cast<uint32_t>(end - count) : kNoList;
}

// One thread per Gaussian.
__global__ void __launch_bounds__(kCudaThreads) scatter_gaussians(CudaWork w) {
  const int64_t i = int64_t{blockIdx.x} * kCudaThreads + threadIdx.x;
  visit_tiles(w, i, i < w.scene.n && w.keys[i] != 0, [&](int64_t tile, int64_t gaussian) {
    if (w.tile_start[tile] == kNoList) return;
    const uint32_t at = atomicAdd(w.tile_fill + tile, 1u);
    if (at < w.tile_count[tile]) w.items[w.tile_start[tile] + at] = static_cast<uint32_t>(gaussian);
  });
}

__device__ __forceinline__ bool overflows(const CudaWork& w) {
  return w.scene.max_pairs >= 0 && *w.box_pairs > static_cast<unsigned long long>(w.scene.max_pairs);
}

}  // namespace device
}  // namespace fg3dgs
