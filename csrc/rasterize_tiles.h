// CPU kernels over tiles: blending and its backward pass. Included once per instruction set.
//
// Each Gaussian of a tile, nearest first, visits only the blocks of 4 x 4 pixels that its ellipse alpha >= 1/255
// touches. A pixel that has stopped has transmittance 0.
#pragma once

#include "rasterize_pixels.h"
#include "rasterize_unproject.h"

namespace fg3dgs {
namespace FG_ISA {

constexpr int kParts = kBlockLanes / kWidth;  // registers per block

// Offsets of the blocks in a tile and of the pixel centres in a block.
alignas(64) constexpr float kBlockX[16] = {0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12};
alignas(64) constexpr float kBlockY[16] = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
alignas(64) constexpr float kLaneX[16] = {.5, 1.5, 2.5, 3.5, .5, 1.5, 2.5, 3.5, .5, 1.5, 2.5, 3.5, .5, 1.5, 2.5, 3.5};
alignas(64) constexpr float kLaneY[16] = {.5, .5, .5, .5, 1.5, 1.5, 1.5, 1.5, 2.5, 2.5, 2.5, 2.5, 3.5, 3.5, 3.5, 3.5};

// One bit per block that the ellipse touches: the largest alpha over the block's pixel centres, taken as a rectangle,
// is on the edges that face the mean (or at the mean).
FG_INLINE uint32_t touched_blocks(const float* rec, float tile_x, float tile_y) {
  const float x = tile_x + 0.5f - rec[kX], y = tile_y + 0.5f - rec[kY];
  const vf threshold = broadcast(kLog2MinAlpha - rec[kLevel] - 1e-4f);  // the slack covers rounding
  uint32_t mask = 0;
  for (int j = 0; j < kParts; ++j) {
    const vf x0 = load(kBlockX + j * kWidth) + x, x1 = x0 + 3.0f;
    const vf y0 = load(kBlockY + j * kWidth) + y, y1 = y0 + 3.0f;
    const vf near_x = clamp(zero(), x0, x1), near_y = clamp(zero(), y0, y1);
    const vf best_x = clamp(near_y * rec[kSlopeX], x0, x1), best_y = clamp(near_x * rec[kSlopeY], y0, y1);
    const vf e0 = near_x * (near_x * rec[kA] + best_y * rec[kB]) + best_y * best_y * rec[kC];
    const vf e1 = best_x * (best_x * rec[kA] + near_y * rec[kB]) + near_y * near_y * rec[kC];
    mask |= bits_at_least(max(e0, e1), threshold) << (j * kWidth);
  }
  return mask;
}

// A record's blending coefficients, and the pixel offsets of a tile's first block from its mean.
struct Splat {
  vf a, b, c, level, x[kParts], y[kParts];

  FG_INLINE Splat(const float* rec, float tile_x, float tile_y)
      : a(broadcast(rec[kA])), b(broadcast(rec[kB])), c(broadcast(rec[kC])), level(broadcast(rec[kLevel])) {
    for (int j = 0; j < kParts; ++j) {
      x[j] = load(kLaneX + j * kWidth) + (tile_x - rec[kX]);
      y[j] = load(kLaneY + j * kWidth) + (tile_y - rec[kY]);
    }
  }
};

// alpha of one Gaussian on a register of pixels (0 where skipped), and what it leaves of the transmittance.
struct Layer {
  vf dx, dy, exponent, alpha, weight, left;
};

FG_INLINE Layer blend_layer(const Splat& g, int part, int block, vf transmittance, vf floor) {
  Layer o;
  o.dx = g.x[part] + kBlockX[block];
  o.dy = g.y[part] + kBlockY[block];
  o.exponent = o.dx * (g.a * o.dx + g.b * o.dy) + (g.c * o.dy * o.dy + g.level);
  const vf alpha = exp2(min(o.exponent, broadcast(kLog2MaxAlpha)));
  o.alpha = o.exponent >= kLog2MinAlpha ? alpha : zero();
  o.weight = o.alpha * transmittance;
  const vf left = transmittance - o.weight;
  const vi goes_on = left >= floor;  // also false where it has stopped before
  o.weight = goes_on ? o.weight : zero();
  o.left = goes_on ? left : zero();
  return o;
}

// The next few Gaussians of a tile and the blocks that each touches, found ahead of blending: the processor then
// guesses the loops over blocks better, and waits for no record.
struct Batch {
  static constexpr int kSize = 32;
  int count;
  const float* records[kSize];
  float x[kSize], y[kSize];  // of the tile's corner, from the mean
  uint32_t blocks[kSize];

  FG_INLINE void find(const Work& w, const TileView& t, const uint32_t* items, int64_t left, uint32_t live) {
    count = left < kSize ? static_cast<int>(left) : kSize;
    const float tile_x = static_cast<float>(t.x), tile_y = static_cast<float>(t.y);
    for (int i = 0; i < count; ++i) {
      records[i] = w.records + int64_t{items[i]} * w.stride;
      if (i + 4 < left) __builtin_prefetch(w.records + int64_t{items[i + 4]} * w.stride);
      x[i] = tile_x - records[i][kX];
      y[i] = tile_y - records[i][kY];
      blocks[i] = touched_blocks(records[i], tile_x, tile_y) & live;
    }
  }
};

// One bit per Gaussian of a batch that touches a block, for each of the 16 blocks.
FG_INLINE void turn(const Batch& batch, uint32_t* by_block) {
  static_assert(Batch::kSize == 32, "one bit each");
#if defined(__AVX512F__)
  const __m512i low = _mm512_loadu_si512(batch.blocks), high = _mm512_loadu_si512(batch.blocks + 16);
  const uint32_t some = batch.count < 32 ? (1u << batch.count) - 1 : ~0u;
  for (int b = 0; b < 16; ++b) {
    const __m512i bit = _mm512_set1_epi32(1 << b);
    const uint32_t l = _mm512_test_epi32_mask(low, bit), h = _mm512_test_epi32_mask(high, bit);
    by_block[b] = (l | h << 16) & some;
  }
#else
  for (int b = 0; b < 16; ++b) by_block[b] = 0;
  for (int i = 0; i < batch.count; ++i)
    for (uint32_t m = batch.blocks[i]; m; m &= m - 1) by_block[__builtin_ctz(m)] |= 1u << i;
#endif
}

inline void clear_tile(const TileView& t, int image_width, int channels, const Images& out) {
  for (int y = 0; y < t.height; ++y) {
    const int64_t at = int64_t{t.y + y} * image_width + t.x;
    std::memset(out.alpha + at, 0, sizeof(float) * t.width);
    std::memset(out.depth + at, 0, sizeof(float) * t.width);
    std::memset(out.color + at * channels, 0, sizeof(float) * t.width * channels);
  }
}

// A Gaussian's alpha at offsets from its mean, 0 where it is skipped.
FG_INLINE vf alpha_at(const float* rec, vf dx, vf dy) {
  const vf exponent = dx * (rec[kA] * dx + rec[kB] * dy) + (rec[kC] * dy * dy + rec[kLevel]);
  const vf alpha = exp2(min(exponent, broadcast(kLog2MaxAlpha)));
  return exponent >= kLog2MinAlpha ? alpha : zero();
}

// Some Gaussians of a batch on one register of pixels, C channels, whose state stays in registers meanwhile; the same
// arithmetic as blend_layer. False once every pixel has stopped.
template <int C>
FG_INLINE bool blend_block(const Batch& batch, uint32_t which, int part, int block, float* p) {
  const vf lane_x = load(kLaneX + part * kWidth), lane_y = load(kLaneY + part * kWidth);
  vf state[3 + C];
  for (int k = 0; k < 3 + C; ++k) state[k] = load(p + k * kBlockLanes);
  uint32_t open = 1;
  for (; which && open; which &= which - 1) {
    const int i = __builtin_ctz(which);
    const float* rec = batch.records[i];
    const vf dx = (lane_x + batch.x[i]) + kBlockX[block], dy = (lane_y + batch.y[i]) + kBlockY[block];
    vf weight = alpha_at(rec, dx, dy) * state[0];
    // A pixel that has stopped stays below the floor, for transmittance never grows: no need to remember it.
    state[0] -= weight;
    weight = state[0] >= kMinTransmittance ? weight : zero();
    open = bits_at_least(state[0], broadcast(kMinTransmittance));
    state[1] += weight;
    state[2] += weight * rec[kZ];
    for (int c = 0; c < C; ++c) state[3 + c] += weight * rec[kHeader + c];
  }
  for (int k = 0; k < 3 + C; ++k) store(p + k * kBlockLanes, state[k]);
  return open;
}

// A batch on a tile, block by block: blend(one bit per Gaussian, block, register of the block, its pixels) is false once
// every pixel has stopped. Returns the blocks that are still live.
template <class Blend>
FG_INLINE uint32_t for_blocks(const Batch& batch, const TileView& t, uint32_t live, const Blend& blend) {
  uint32_t by_block[16];
  turn(batch, by_block);
  for (uint32_t blocks = live; blocks; blocks &= blocks - 1) {
    const int b = __builtin_ctz(blocks);
    if (!by_block[b]) continue;
    bool open = false;
    for (int j = 0; j < kParts; ++j) open |= blend(by_block[b], b, j, t.block(b) + j * kWidth);
    if (!open) live &= ~(1u << b);
  }
  return live;
}

// Planes: transmittance, alpha, depth, colours. C = 0: any number of channels.
template <int C>
void blend_tile(const Work& w, const Images& out, int tile, float* scratch) {
  const Scene& s = *w.scene;
  const int channels = C ? C : s.channels;
  const TileView t = view_tile(s, w.tiles_x, tile, channels + 3, scratch);
  if (w.tile_start[tile] == w.tile_start[tile + 1]) return clear_tile(t, s.width, channels, out);
  std::memset(scratch, 0, sizeof(float) * 16 * kBlockLanes * t.planes);
  uint32_t live = open_tile(t);
  const uint32_t* items = w.tile_items + w.tile_start[tile];
  const uint32_t* end = w.tile_items + w.tile_start[tile + 1];
  const float tile_x = static_cast<float>(t.x), tile_y = static_cast<float>(t.y);

  Batch batch;
  for (; items < end && live; items += batch.count) {
    batch.find(w, t, items, end - items, live);
    if constexpr (C > 0) {
      live = for_blocks(batch, t, live, [&](uint32_t which, int block, int part, float* p) {
        return blend_block<C>(batch, which, part, block, p);
      });
      continue;
    }
    for (int i = 0; i < batch.count; ++i) {  // more channels than registers
      const float* rec = batch.records[i];
      const Splat g(rec, tile_x, tile_y);
      for (uint32_t blocks = batch.blocks[i]; blocks; blocks &= blocks - 1) {
        const int b = __builtin_ctz(blocks);
        uint32_t open = 0;
        for (int j = 0; j < kParts; ++j) {
          float* p = t.block(b) + j * kWidth;
          const Layer o = blend_layer(g, j, b, load(p), broadcast(kMinTransmittance));
          open |= bits_at_least(o.left, broadcast(kMinTransmittance));
          store(p, o.left);
          store(p + kBlockLanes, load(p + kBlockLanes) + o.weight);
          store(p + 2 * kBlockLanes, load(p + 2 * kBlockLanes) + o.weight * rec[kZ]);
          for (int c = 0; c < channels; ++c) {
            float* q = p + (3 + c) * kBlockLanes;
            store(q, load(q) + o.weight * rec[kHeader + c]);
          }
        }
        if (!open) live &= ~(1u << b);
      }
    }
  }
  write_planes<1>(t, 1, 1, s.width, out.alpha);
  write_planes<1>(t, 2, 1, s.width, out.depth);
  write_planes<C>(t, 3, channels, s.width, out.color);
}

// One Gaussian on one register of pixels, backward. With w_i = alpha_i T_i and gain_i = d loss / d w_i:
// d loss / d alpha_i = T_i gain_i - (sum over j > i of w_j gain_j) / (1 - alpha_i). Adds to the sums of a pair.
template <int C>
FG_INLINE uint32_t backward_layer(const Splat& g, const float* rec, int channels, int part, int block, float* p,
                                  vf* sums) {
  const vf transmittance = load(p);
  const Layer o = blend_layer(g, part, block, transmittance, broadcast(kMinTransmittance));
  const vf ddepth = load(p + 3 * kBlockLanes);
  vf gain = load(p + 2 * kBlockLanes) + ddepth * rec[kZ];
  sums[6] += o.weight * ddepth;
  for (int c = 0; c < (C ? C : channels); ++c) {
    const vf dcolor = load(p + (4 + c) * kBlockLanes);
    gain += dcolor * rec[kHeader + c];
    sums[7 + c] += o.weight * dcolor;
  }
  const vf rest = load(p + kBlockLanes) - o.weight * gain;
  const vf dalpha = transmittance * gain - rest * reciprocal(1.0f - o.alpha);
  const vi varies = (o.exponent < kLog2MaxAlpha) & (o.left > 0.0f);  // neither capped nor stopped
  const vf v = varies ? dalpha * o.alpha : zero();                   // d loss / d log(alpha)
  const vf vx = v * o.dx, vy = v * o.dy;
  sums[0] += v;
  sums[1] += vx;
  sums[2] += vy;
  sums[3] += vx * o.dx;
  sums[4] += vx * o.dy;
  sums[5] += vy * o.dy;
  store(p, o.left);
  store(p + kBlockLanes, rest);
  return bits_at_least(o.left, broadcast(kMinTransmittance));
}

// Where the gradient of the pair of a slot and a tile lies.
FG_INLINE float* pair_gradient(const Work& w, const TileView& t, uint32_t slot, const float* rec) {
  const int32_t box = as_int(rec[kBox0]);
  const int x = t.x / kTile - (box & 0xffff), y = t.y / kTile - (box >> 16 & 0xffff);
  const int64_t pair = w.chunk_pairs[slot / kChunk] + as_int(rec[kOffset]) + int64_t{y} * as_int(rec[kBoxW]) + x;
  return w.pair_gradients + pair * w.pair_stride;
}

template <int C>
void blend_tile_backward(const Work& w, const ConstImages& rendered, const ConstImages& cotangents, int tile,
                         float* scratch) {
  const Scene& s = *w.scene;
  const int channels = C ? C : s.channels, count = 7 + channels;
  const TileView t = view_tile(s, w.tiles_x, tile, 4 + channels, scratch);
  if (w.tile_start[tile] == w.tile_start[tile + 1]) return;
  uint32_t live = open_tile_backward<C>(s, t, channels, rendered, cotangents);
  vf fixed_sums[C ? 7 + C : 1];
  vf* const sums = C ? fixed_sums : reinterpret_cast<vf*>(scratch + 16 * kBlockLanes * t.planes);
  const uint32_t* items = w.tile_items + w.tile_start[tile];
  const uint32_t* end = w.tile_items + w.tile_start[tile + 1];
  const float tile_x = static_cast<float>(t.x), tile_y = static_cast<float>(t.y);

  Batch batch;
  for (; items < end; items += batch.count) {
    batch.find(w, t, items, end - items, live);
    for (int i = 0; i < batch.count; ++i) {
      const float* rec = batch.records[i];
      float* out = pair_gradient(w, t, items[i], rec);
      uint32_t blocks = batch.blocks[i];
      for (int c = 0; c < count; ++c) sums[c] = zero();
      const Splat g(rec, tile_x, tile_y);
      for (; blocks; blocks &= blocks - 1) {
        const int b = __builtin_ctz(blocks);
        uint32_t open = 0;
        for (int j = 0; j < kParts; ++j)
          open |= backward_layer<C>(g, rec, channels, j, b, t.block(b) + j * kWidth, sums);
        if (!open) live &= ~(1u << b);
      }
      for (int c = 0; c < count; c += kWidth) store(out + c, sum_lanes<kWidth>(sums + c, count - c));
    }
  }
}

inline void blend(const Work& w, const Images& out, int tile, float* scratch) {
  switch (w.scene->channels) {
    case 1:
      return blend_tile<1>(w, out, tile, scratch);
    case 3:
      return blend_tile<3>(w, out, tile, scratch);
    case 4:
      return blend_tile<4>(w, out, tile, scratch);
    default:
      return blend_tile<0>(w, out, tile, scratch);
  }
}

inline void blend_backward(const Work& w, const ConstImages& rendered, const ConstImages& cotangents, int tile,
                           float* scratch) {
  switch (w.scene->channels) {
    case 1:
      return blend_tile_backward<1>(w, rendered, cotangents, tile, scratch);
    case 3:
      return blend_tile_backward<3>(w, rendered, cotangents, tile, scratch);
    case 4:
      return blend_tile_backward<4>(w, rendered, cotangents, tile, scratch);
    default:
      return blend_tile_backward<0>(w, rendered, cotangents, tile, scratch);
  }
}

}  // namespace FG_ISA
}  // namespace fg3dgs
