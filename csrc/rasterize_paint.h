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

// Some Gaussians of a batch on one register of pixels, whose state stays in registers meanwhile. False once every pixel
// has stopped.
FG_INLINE bool paint_block(const Batch& batch, uint32_t which, vf x, vf y, float* p) {
  const vf floor = load(plane(p, kFloor));
  vf transmittance = load(plane(p, kTransmittance)), rest = load(plane(p, kRest));
  vf red = load(plane(p, kColors)), green = load(plane(p, kColors + 1)), blue = load(plane(p, kColors + 2));
  uint32_t open = 1;
  for (; which && open; which &= which - 1) {
    const float* rec = batch.records[__builtin_ctz(which)];
    const vf alpha = alpha_at(rec, x - rec[kX], y - rec[kY]);
    // A pixel that has stopped stays below its floor, for transmittance never grows: no need to remember it.
    const vf left = transmittance - alpha * transmittance;
    const vf weight = left >= floor ? transmittance - left : zero();
    transmittance = left;
    open = bits_at_least(left, floor);
    rest -= weight;
    red += weight * rec[kHeader];
    green += weight * rec[kHeader + 1];
    blue += weight * rec[kHeader + 2];
  }
  store(plane(p, kTransmittance), transmittance);
  store(plane(p, kRest), rest);
  store(plane(p, kColors), red);
  store(plane(p, kColors + 1), green);
  store(plane(p, kColors + 2), blue);
  return open;
}

FG_INLINE void paint_layer(const Work& w, const TileView& t, const uint32_t* items, const uint32_t* end,
                           uint32_t live) {
  const vf tile_x = broadcast(static_cast<float>(t.x)), tile_y = broadcast(static_cast<float>(t.y));
  Batch batch;
  for (; items < end && live; items += batch.count) {
    batch.find(w, t, items, end - items, live);
    live = for_blocks(batch, t, live, [&](uint32_t which, int block, int part, float* p) {
      return paint_block(batch, which, load(kLaneX + part * kWidth) + kBlockX[block] + tile_x,
                         load(kLaneY + part * kWidth) + kBlockY[block] + tile_y, p);
    });
  }
}

typedef uint8_t vb __attribute__((vector_size(kWidth)));

FG_INLINE vf load_bytes(const uint8_t* p) {
  vb bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, vf);
}

// Grey levels of values in [0, 1], halves to the even one; NaN is 0.
FG_INLINE void store_greys(uint8_t* p, vf x) {
  const vf rounded = clamp(x * 255.0f, zero(), broadcast(255.0f)) + 12582912.0f;
  const vb bytes = __builtin_convertvector(reinterpret_cast<vi>(rounded) & 255, vb);
  std::memcpy(p, &bytes, sizeof bytes);
}

// One row of a tile as pixels of C channels: what the layers show, and the rest once per channel.
template <int C>
FG_INLINE void gather_row(const TileView& t, int y, float* color, float* rest) {
  for (int x = 0; x < kTile; x += 4) {
    const float* p = t.block((y / 4) * 4 + x / 4) + (y % 4) * 4;
    float thrice[C * kBlockLanes];
    interleave4<3>(p + kColors * kBlockLanes, 3, color + 3 * x);
    for (int c = 0; c < C; ++c) store4(thrice + c * kBlockLanes, load4(p + kRest * kBlockLanes));
    interleave4<C>(thrice, C, rest + C * x);
  }
}

inline void write_row(const TileView& t, const Canvas& c, int image_width, int y) {
  alignas(64) float color[3 * kTile], rest[3 * kTile];
  const int64_t at = (int64_t{t.y + y} * image_width + t.x) * c.channels;
  alignas(64) uint8_t behind[4 * kTile], out[4 * kTile];  // whole vectors, also at the image's far edge
  std::memcpy(behind, c.backdrop + at, static_cast<size_t>(t.width) * c.channels);
  if (c.channels == 3) {
    gather_row<3>(t, y, color, rest);
    for (int i = 0; i < 3 * kTile; i += kWidth)
      store_greys(out + i, load(color + i) + load(rest + i) * (load_bytes(behind + i) * (1.0f / 255.0f)));
  } else {
    gather_row<1>(t, y, color, rest);
    constexpr float kClear = 0.5f / 255.0f;  // alpha that rounds to 0: the colour under it does not matter
    alignas(64) float pixels[4 * kTile];
    for (int x = 0; x < t.width; ++x) {
      const float under = behind[4 * x + 3] / 255.0f, alpha = 1.0f - rest[x] * (1.0f - under);
      for (int k = 0; k < 3; ++k)
        pixels[4 * x + k] = (color[3 * x + k] + rest[x] * (behind[4 * x + k] / 255.0f * under)) /
                            (alpha > kClear ? alpha : kClear);
      pixels[4 * x + 3] = alpha;
    }
    for (int i = 0; i < 4 * kTile; i += kWidth) store_greys(out + i, load(pixels + i));
  }
  std::memcpy(c.out + at, out, static_cast<size_t>(t.width) * c.channels);
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
