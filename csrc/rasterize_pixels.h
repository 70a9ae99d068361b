// A tile's pixels between images and scratch. Included once per instruction set.
//
// A tile is 16 x 16 pixels, held as 4 x 4 blocks of 4 x 4 pixels, so that a block fills one 512-bit register (two or
// four narrower ones).
#pragma once

#include "rasterize_cpu.h"
#include "simd.h"

namespace fg3dgs {
namespace FG_ISA {

// Where a tile lies, and its planes of 256 floats in scratch: plane p of block b is at (b * planes + p) * 16.
struct TileView {
  int x, y, width, height;  // pixels; width and height are less than 16 at the image's far edges
  int planes;
  float* scratch;

  FG_INLINE float* block(int b) const { return scratch + b * planes * kBlockLanes; }
};

inline TileView view_tile(const Scene& s, int tiles_x, int tile, int planes, float* scratch) {
  TileView t;
  t.x = (tile % tiles_x) * kTile;
  t.y = (tile / tiles_x) * kTile;
  t.width = s.width - t.x < kTile ? s.width - t.x : kTile;
  t.height = s.height - t.y < kTile ? s.height - t.y : kTile;
  t.planes = planes;
  t.scratch = scratch;
  return t;
}

typedef float v4 __attribute__((vector_size(16)));

FG_INLINE v4 load4(const float* p) {
  v4 v;
  std::memcpy(&v, p, 16);
  return v;
}

FG_INLINE void store4(float* p, v4 v) { std::memcpy(p, &v, 16); }

// Four pixels of `channels` planes <-> interleaved memory. The three-channel case is worth its shuffles.
template <int C>
FG_INLINE void interleave4(const float* planes, int channels, float* out) {
  if constexpr (C == 1) {
    store4(out, load4(planes));
  } else if constexpr (C == 3) {
    const v4 r = load4(planes), g = load4(planes + kBlockLanes), b = load4(planes + 2 * kBlockLanes);
    const v4 rg = __builtin_shufflevector(r, g, 0, 4, 1, 5), gb = __builtin_shufflevector(g, b, 1, 5, 2, 6);
    const v4 br = __builtin_shufflevector(b, r, 0, 5, 2, 7);  // b0 r1 b2 r3
    store4(out, __builtin_shufflevector(rg, br, 0, 1, 4, 5));
    store4(out + 4, __builtin_shufflevector(gb, __builtin_shufflevector(r, g, 2, 6, 2, 6), 0, 1, 4, 5));
    store4(out + 8, __builtin_shufflevector(br, __builtin_shufflevector(g, b, 3, 7, 3, 7), 2, 3, 4, 5));
  } else {
    for (int l = 0; l < 4; ++l)
      for (int c = 0; c < channels; ++c) out[l * channels + c] = planes[c * kBlockLanes + l];
  }
}

template <int C>
FG_INLINE void deinterleave4(const float* in, int channels, float* planes) {
  if constexpr (C == 1) {
    store4(planes, load4(in));
  } else if constexpr (C == 3) {
    const v4 a = load4(in), b = load4(in + 4), c = load4(in + 8);  // r g b r | g b r g | b r g b
    const v4 ab = __builtin_shufflevector(a, b, 1, 2, 4, 5);       // g0 b0 g1 b1
    store4(planes, __builtin_shufflevector(a, __builtin_shufflevector(b, c, 2, 5, 2, 5), 0, 3, 4, 5));
    store4(planes + kBlockLanes, __builtin_shufflevector(ab, __builtin_shufflevector(b, c, 3, 6, 3, 6), 0, 2, 4, 5));
    store4(planes + 2 * kBlockLanes, __builtin_shufflevector(ab, c, 1, 3, 4, 7));
  } else {
    for (int l = 0; l < 4; ++l)
      for (int c = 0; c < channels; ++c) planes[c * kBlockLanes + l] = in[l * channels + c];
  }
}

// visit(its place in plane 0, x, y, how many are inside the image) for each row of four pixels of a tile.
template <class Visit>
FG_INLINE void for_quads(const TileView& t, const Visit& visit) {
  for (int y = 0; y < kTile; ++y)
    for (int x = 0; x < kTile; x += 4) {
      const int inside = y < t.height ? t.width - x : 0;
      visit(t.block((y / 4) * 4 + x / 4) + (y % 4) * 4, x, y, inside < 4 ? inside : 4);
    }
}

// Copies `channels` planes from plane `first` on to an image.
template <int C>
inline void write_planes(const TileView& t, int first, int channels, int image_width, float* image) {
  for_quads(t, [&](const float* p, int x, int y, int inside) {
    p += first * kBlockLanes;
    float* out = image + (int64_t{t.y + y} * image_width + t.x + x) * channels;
    if (inside == 4) return interleave4<C>(p, channels, out);
    for (int l = 0; l < inside; ++l)
      for (int c = 0; c < channels; ++c) out[l * channels + c] = p[c * kBlockLanes + l];
  });
}

// Transmittance 1 inside the image and 0 outside (plane 0); one bit per block that has a pixel inside.
inline uint32_t open_tile(const TileView& t) {
  uint32_t live = 0;
  for_quads(t, [&](float* p, int x, int y, int inside) {
    for (int l = 0; l < 4; ++l) p[l] = l < inside ? 1.0f : 0.0f;
    live |= (inside > 0 ? 1u : 0u) << (y / 4 * 4 + x / 4);
  });
  return live;
}

// Opens a tile for the backward pass. Planes: transmittance; rest, what the Gaussians still to come add to the loss,
// at first sum(cotangent * image); the cotangents of alpha, depth, colours, 0 outside the image.
template <int C>
inline uint32_t open_tile_backward(const Scene& s, const TileView& t, int channels, const ConstImages& rendered,
                                   const ConstImages& cotangents) {
  for_quads(t, [&](float* p, int x, int y, int inside) {
    const int64_t at = int64_t{t.y + y} * s.width + t.x + x;
    float *rest = p + kBlockLanes, *dalpha = rest + kBlockLanes, *ddepth = dalpha + kBlockLanes;
    float* dcolor = ddepth + kBlockLanes;
    if constexpr (C > 0) {
      if (inside == 4) {
        const v4 da = load4(cotangents.alpha + at), dz = load4(cotangents.depth + at);
        v4 sum = da * load4(rendered.alpha + at) + dz * load4(rendered.depth + at);
        float color[C * kBlockLanes];
        deinterleave4<C>(rendered.color + at * C, C, color);
        deinterleave4<C>(cotangents.color + at * C, C, dcolor);
        for (int c = 0; c < C; ++c) sum += load4(dcolor + c * kBlockLanes) * load4(color + c * kBlockLanes);
        store4(dalpha, da);
        store4(ddepth, dz);
        store4(rest, sum);
        return;
      }
    }
    for (int l = 0; l < 4; ++l) {
      const bool in = l < inside;
      dalpha[l] = in ? cotangents.alpha[at + l] : 0.0f;
      ddepth[l] = in ? cotangents.depth[at + l] : 0.0f;
      rest[l] = in ? dalpha[l] * rendered.alpha[at + l] + ddepth[l] * rendered.depth[at + l] : 0.0f;
      for (int c = 0; c < channels; ++c) {
        const float d = in ? cotangents.color[(at + l) * channels + c] : 0.0f;
        dcolor[c * kBlockLanes + l] = d;
        if (in) rest[l] += d * rendered.color[(at + l) * channels + c];
      }
    }
  });
  return open_tile(t);
}

}  // namespace FG_ISA
}  // namespace fg3dgs
