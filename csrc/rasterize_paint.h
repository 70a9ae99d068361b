// CPU kernel over tiles that paints a finished picture: layers of Gaussians, front to back, over a backdrop. Included
// once per instruction set.
//
// A tile's items are sorted by layer, then by depth. Inside a layer everything is as in blend_tile, seen through what
// the layers before it left of each pixel: transmittance starts there, and stops at that share of the usual floor.
#pragma once

#include "rasterize_tiles.h"

namespace fg3dgs {
namespace FG_ISA {

// Planes of a tile: transmittance; rest, what the layers so far leave of the backdrop; floor, where a pixel stops;
// colours.
enum PaintPlane { kTransmittance, kRest, kFloor, kColors, kPaintPlanes = kColors + 3 };

FG_INLINE float* plane(float* p, int which) { return p + which * kBlockLanes; }

// A layer begins: every pixel is as bright as the rest. One bit per block inside the image.
inline uint32_t open_layer(const TileView& t, uint32_t inside) {
  for (uint32_t blocks = inside; blocks; blocks &= blocks - 1) {
    float* block = t.block(__builtin_ctz(blocks));
    for (int j = 0; j < kParts; ++j) {
      float* p = block + j * kWidth;
      const vf rest = load(plane(p, kRest));
      store(plane(p, kTransmittance), rest);
      store(plane(p, kFloor), max(rest * kMinTransmittance, broadcast(1e-30f)));  // outside the image above its 0
    }
  }
  return inside;
}

FG_INLINE void paint_layer(const Work& w, const TileView& t, const uint32_t* items, const uint32_t* end,
                           uint32_t live) {
  const float tile_x = static_cast<float>(t.x), tile_y = static_cast<float>(t.y);
  Batch batch;
  for (; items < end && live; items += batch.count) {
    batch.find(w, t, items, end - items, live);
    for (int i = 0; i < batch.count; ++i) {
      const float* rec = batch.records[i];
      const Splat g(rec, tile_x, tile_y);
      for (uint32_t blocks = batch.blocks[i]; blocks; blocks &= blocks - 1) {
        const int b = __builtin_ctz(blocks);
        uint32_t open = 0;
        for (int j = 0; j < kParts; ++j) {
          float* p = t.block(b) + j * kWidth;
          const vf floor = load(plane(p, kFloor));
          const Layer o = blend_layer(g, j, b, load(plane(p, kTransmittance)), floor);
          open |= bits_at_least(o.left, floor);
          store(plane(p, kTransmittance), o.left);
          store(plane(p, kRest), load(plane(p, kRest)) - o.weight);
          for (int c = 0; c < 3; ++c) {
            float* q = plane(p, kColors + c);
            store(q, load(q) + o.weight * rec[kHeader + c]);
          }
        }
        if (!open) live &= ~(1u << b);
      }
    }
  }
}

// To the nearest integer, halves to the even one.
FG_INLINE float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

FG_INLINE uint8_t to_grey(float x) {
  x = x > 0.0f ? x : 0.0f;
  return static_cast<uint8_t>(static_cast<int>(round_even((x < 1.0f ? x : 1.0f) * 255.0f)));
}

// One row of a tile, planes gathered to interleaved pixels, laid over the backdrop.
inline void write_row(const TileView& t, const Canvas& c, int image_width, int y) {
  float color[3 * kTile], rest[kTile];
  for (int x = 0; x < kTile; x += 4) {
    const float* p = t.block((y / 4) * 4 + x / 4) + (y % 4) * 4;
    interleave4<3>(p + kColors * kBlockLanes, 3, color + 3 * x);
    store4(rest + x, load4(p + kRest * kBlockLanes));
  }
  const int64_t at = (int64_t{t.y + y} * image_width + t.x) * c.channels;
  const uint8_t* behind = c.backdrop + at;
  uint8_t* out = c.out + at;
  if (c.channels == 3) {
    float thrice[3 * kTile];
    for (int x = 0; x < kTile; ++x) thrice[3 * x] = thrice[3 * x + 1] = thrice[3 * x + 2] = rest[x];
    for (int i = 0; i < 3 * t.width; ++i) out[i] = to_grey(color[i] + thrice[i] * (behind[i] / 255.0f));
    return;
  }
  constexpr float kClear = 0.5f / 255.0f;  // alpha that rounds to 0: the colour under it does not matter
  for (int x = 0; x < t.width; ++x) {
    const float under = behind[4 * x + 3] / 255.0f, alpha = 1.0f - rest[x] * (1.0f - under);
    for (int k = 0; k < 3; ++k) {
      const float premultiplied = color[3 * x + k] + rest[x] * (behind[4 * x + k] / 255.0f * under);
      out[4 * x + k] = to_grey(premultiplied / (alpha > kClear ? alpha : kClear));
    }
    out[4 * x + 3] = to_grey(alpha);
  }
}

inline void copy_tile(const TileView& t, const Canvas& c, int image_width) {
  for (int y = 0; y < t.height; ++y) {
    const int64_t at = (int64_t{t.y + y} * image_width + t.x) * c.channels;
    std::memcpy(c.out + at, c.backdrop + at, static_cast<size_t>(t.width) * c.channels);
  }
}

inline void paint_tile(const Work& w, const Canvas& canvas, int tile, float* scratch) {
  const Scene& s = *w.scene;
  const TileView t = view_tile(s, w.tiles_x, tile, kPaintPlanes, scratch);
  const uint32_t* items = w.tile_items + w.tile_start[tile];
  const uint32_t* end = w.tile_items + w.tile_start[tile + 1];
  if (items == end) return copy_tile(t, canvas, s.width);
  std::memset(scratch, 0, sizeof(float) * 16 * kBlockLanes * t.planes);
  const uint32_t inside = open_tile(t);
  for (int b = 0; b < 16; ++b)
    for (int j = 0; j < kBlockLanes; j += kWidth) store(t.block(b) + kRest * kBlockLanes + j, load(t.block(b) + j));
  for (int layer = 0; items < end; ++layer) {
    const uint32_t* last = end;  // the first item of a later layer: their slots come after this one's
    for (const uint32_t* low = items; low < last;) {
      const uint32_t* middle = low + (last - low) / 2;
      *middle < w.layer_end[layer] ? low = middle + 1 : last = middle;
    }
    if (last > items) paint_layer(w, t, items, last, open_layer(t, inside));
    items = last;
  }
  for (int y = 0; y < t.height; ++y) write_row(t, canvas, s.width, y);
}

const Kernels kKernels = {project_chunk, blend, blend_backward, unproject_chunk, paint_tile};

}  // namespace FG_ISA
}  // namespace fg3dgs
