// How a block walks through its tile's Gaussians, nearest first, in shared memory.
#pragma once

#include "rasterize_cuda_bins.cuh"

namespace fg3dgs {
namespace device {

constexpr int kSorted = 2048;  // keys a block can sort at a time
constexpr int kKept = 1024;    // of more, the nearest ones are kept
constexpr int kWarps = kCudaThreads / 32;
constexpr int kWarpWide = 8, kWarpHigh = 4;  // pixels of a warp; a tile is 2 x 4 of them

// A tile's Gaussians by depth, then by number: keys (depth << 32 | Gaussian), unique, none 0.
struct SortedKeys {
  uint64_t keys[kSorted];
  int count;
  uint64_t limit;  // keys from here on were dropped
};

__device__ __forceinline__ void order_pair(uint64_t* keys, int a, int b, int count) {
  if (b >= count) return;
  const uint64_t ka = keys[a], kb = keys[b];
  if (ka > kb) {
    keys[a] = kb;
    keys[b] = ka;
  }
}

// Bitonic sort, every exchange upwards, so that keys beyond `count` can be missing. Whole block; ends synchronised.
__device__ __forceinline__ void sort_keys(uint64_t* keys, int count) {
  const int half = kSorted / 2;
  for (int size = 2; size < 2 * count; size *= 2) {
    // While the size does not exceed 64, a warp's exchanges stay within the same 64 keys.
    for (int span = size / 2; span >= 1; span /= 2) {
      const bool flip = span == size / 2;
      for (int k = static_cast<int>(threadIdx.x); k < half; k += kCudaThreads) {
        const int low = k & (span - 1), group = (k - low) * 2;
        if (group >= count) break;
        order_pair(keys, group + low, flip ? group + 2 * span - 1 - low : group + low + span, count);
      }
      if (2 * span > 64 || (span == 1 && (size >= 64 || size >= count))) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
}

__device__ __forceinline__ uint64_t depth_key(const CudaWork& w, uint32_t gaussian) {
  return static_cast<uint64_t>(w.keys[gaussian]) << 32 | gaussian;
}

// Key of a tile's k-th candidate, 0 where it does not meet the tile: from its list, or of all Gaussians without one.
__device__ __forceinline__ uint64_t candidate(const CudaWork& w, int tile_x, int tile_y, uint32_t start, int64_t k) {
  if (start != kNoList) return depth_key(w, w.items[start + k]);
  const auto i = static_cast<uint32_t>(k);
  if (w.keys[i] == 0) return 0;
  const Box b = w.boxes[i];
  if (tile_x < b.x0 || tile_x > b.x1 || tile_y < b.y0 || tile_y > b.y1) return 0;
  return touches_tile(load_splat(w, i), tile_x, tile_y) ? depth_key(w, i) : 0;
}

// Fills `s` with the next keys above `last`, sorted. Returns whether there are still more. Whole block.
__device__ __forceinline__ bool next_keys(const CudaWork& w, int64_t tile, uint64_t last, SortedKeys* s) {
  const int tile_x = static_cast<int>(tile % w.tiles_x), tile_y = static_cast<int>(tile / w.tiles_x);
  const uint32_t start = w.tile_start[tile];
  const uint32_t listed = w.tile_fill[tile] < w.tile_count[tile] ? w.tile_fill[tile] : w.tile_count[tile];
  const int64_t candidates = w.tile_count[tile] == 0 ? 0 : start != kNoList ? listed : w.scene.n;
  if (threadIdx.x == 0) {
    s->count = 0;
    s->limit = ~uint64_t{0};
  }
  __syncthreads();
  for (int64_t first = 0; first < candidates; first += kCudaThreads) {
    const int64_t k = first + threadIdx.x;
    const uint64_t key = k < candidates ? candidate(w, tile_x, tile_y, start, k) : 0;
    if (key > last && key < s->limit) s->keys[atomicAdd(&s->count, 1)] = key;
    __syncthreads();
    const int count = s->count;
    __syncthreads();
    if (count <= kSorted - kCudaThreads) continue;
    sort_keys(s->keys, count);
    if (threadIdx.x == 0) {
      s->count = kKept;
      s->limit = s->keys[kKept];
    }
    __syncthreads();
  }
  sort_keys(s->keys, s->count);
  return s->limit != ~uint64_t{0};
}

// The splats of the next Gaussians in shared memory, with a bit for each warp whose pixels they touch.
template <int C>
struct Batch {
  Splat splats[kCudaThreads];
  uint32_t ids[kCudaThreads];
  float colors[kCudaThreads][C];
  uint8_t warps[kCudaThreads];
};

__device__ __forceinline__ uint8_t touched_warps(const Splat& g, float tile_x, float tile_y) {
  uint8_t mask = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    const float left = tile_x + static_cast<float>(warp % 2 * kWarpWide);
    const float top = tile_y + static_cast<float>(warp / 2 * kWarpHigh);
    mask |= touches(g, left, top, kWarpWide - 1, kWarpHigh - 1) ? 1 << warp : 0;
  }
  return mask;
}

// Channels [first, first + count) of a Gaussian's colour; the rest of C is 0.
template <int C>
__device__ __forceinline__ void load_batch(const CudaWork& w, uint64_t key, float tile_x, float tile_y, int first,
                                           int count, Batch<C>* batch) {
  const auto id = static_cast<uint32_t>(key);
  const Splat g = load_splat(w, id);
  const float* color = w.scene.sh_count ? w.colors + 3 * int64_t{id} : w.scene.colors + int64_t{id} * w.scene.channels;
  batch->splats[threadIdx.x] = g;
  batch->ids[threadIdx.x] = id;
  for (int c = 0; c < C; ++c) batch->colors[threadIdx.x][c] = c < count ? color[first + c] : 0.0f;
  batch->warps[threadIdx.x] = touched_warps(g, tile_x, tile_y);
}

// One thread's pixel.
struct Pixel {
  int x, y;
  float px, py;  // its centre
  bool inside;
  int64_t at;  // in an image of one channel
};

__device__ __forceinline__ Pixel find_pixel(const CudaWork& w, int64_t tile) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_id();
  Pixel p;
  p.x = static_cast<int>(tile % w.tiles_x) * kTile + warp % 2 * kWarpWide + lane % kWarpWide;
  p.y = static_cast<int>(tile / w.tiles_x) * kTile + warp / 2 * kWarpHigh + lane / kWarpWide;
  p.px = static_cast<float>(p.x) + 0.5f;
  p.py = static_cast<float>(p.y) + 0.5f;
  p.inside = p.x < w.scene.width && p.y < w.scene.height;
  p.at = int64_t{p.y} * w.scene.width + p.x;
  return p;
}

// blend(splat, Gaussian, colour) for the Gaussians that touch the warp's pixels, nearest first, by the whole warp
// together, until every pixel's `transmittance` is 0. Whole block.
template <int C, class Blend>
__device__ __forceinline__ void for_gaussians(const CudaWork& w, int64_t tile, int first, int channels,
                                              const float& transmittance, const Blend& blend) {
  __shared__ SortedKeys sorted;
  __shared__ Batch<C> batch;
  const float tile_x = static_cast<float>(tile % w.tiles_x * kTile), tile_y = static_cast<float>(tile / w.tiles_x * kTile);
  const int warp = static_cast<int>(threadIdx.x) / 32, thread = static_cast<int>(threadIdx.x);
  uint64_t last = 0;
  bool more = true;
  while (more) {
    more = next_keys(w, tile, last, &sorted);
    const int total = sorted.count;
    for (int start = 0; start < total; start += kCudaThreads) {
      if (!__syncthreads_or(transmittance > 0.0f)) return;
      const int count = total - start < kCudaThreads ? total - start : kCudaThreads;
      if (thread < count) load_batch(w, sorted.keys[start + thread], tile_x, tile_y, first, channels, &batch);
      __syncthreads();
      for (int base = 0; base < count && __any_sync(kFullWarp, transmittance > 0.0f); base += 32) {
        const bool mine = base + lane_id() < count && (batch.warps[base + lane_id()] >> warp & 1);
        for (unsigned bits = __ballot_sync(kFullWarp, mine); bits; bits &= bits - 1) {
          const int k = base + __ffs(static_cast<int>(bits)) - 1;
          blend(batch.splats[k], batch.ids[k], batch.colors[k]);
        }
      }
    }
    if (total) last = sorted.keys[total - 1];
    if (more && !__syncthreads_or(transmittance > 0.0f)) return;
  }
}

// alpha of one Gaussian at a pixel (0 where skipped), and what it leaves of the transmittance. Products are only added by
// fmaf, as in `touches`: the backward pass must draw and stop where the forward pass did.
struct Layer {
  float dx, dy, exponent, alpha, weight, left;
};

__device__ __forceinline__ Layer blend_layer(const Splat& g, const Pixel& p, float transmittance) {
  Layer o;
  o.dx = p.px - g.x;
  o.dy = p.py - g.y;
  o.exponent = fmaf(o.dx, fmaf(g.a, o.dx, g.b * o.dy), fmaf(g.c * o.dy, o.dy, g.level));
  o.alpha = o.exponent >= kLog2MinAlpha ? exp2f(min(o.exponent, kLog2MaxAlpha)) : 0.0f;
  o.weight = o.alpha * transmittance;
  o.left = fmaf(-o.alpha, transmittance, transmittance);
  if (!(o.left >= kMinTransmittance)) o.weight = o.left = 0.0f;  // also where it has stopped before
  return o;
}

}  // namespace device
}  // namespace fg3dgs
