// CPU kernel that projects chunks of Gaussians, a vector of them at a time. Included once per instruction set.
#pragma once

#include "rasterize_cpu.h"
#include "simd.h"
#include "splat_math.h"

namespace fg3dgs {
namespace FG_ISA {

constexpr float kLog2e = 1.44269504f;
constexpr float kLog2MinAlpha = -7.99435344f;  // log2(1 / 255)
constexpr float kLog2MaxAlpha = -0.01449957f;  // log2(0.99)

inline int32_t as_int(float x) {
  int32_t i;
  std::memcpy(&i, &x, 4);
  return i;
}

inline float as_float(int32_t i) {
  float x;
  std::memcpy(&x, &i, 4);
  return x;
}

// The inputs of a vector of Gaussians.
struct Lanes {
  vf mean[3], quat[4], scale[3], offset[2];
};

inline Lanes gather_lanes(const Scene& s, vi index) {
  Lanes in;
  for (int i = 0; i < 3; ++i) in.mean[i] = gather(s.means + i, 3 * index);
  for (int i = 0; i < 4; ++i) in.quat[i] = gather(s.quats + i, 4 * index);
  for (int i = 0; i < 3; ++i) in.scale[i] = gather(s.scales + i, 3 * index);
  for (int i = 0; i < 2; ++i) in.offset[i] = s.means2d ? gather(s.means2d + i, 2 * index) : zero();
  return in;
}

// Spherical harmonics of the directions from the camera: basis[k * kWidth + lane].
struct Directions {
  vf d[3], inv_length;
  alignas(64) float basis[16 * kWidth];
};

inline void find_directions(const Camera& cam, int count, const vf* mean, Directions* out) {
  vf to[3], basis[16];
  for (int i = 0; i < 3; ++i) to[i] = mean[i] - cam.center[i];
  out->inv_length = 1.0f / sqrt(to[0] * to[0] + to[1] * to[1] + to[2] * to[2]);
  for (int i = 0; i < 3; ++i) out->d[i] = to[i] * out->inv_length;
  sh_basis(count, out->d[0], out->d[1], out->d[2], basis);
  for (int k = 0; k < count; ++k) store(out->basis + k * kWidth, basis[k]);
}

// Writes the colours of one Gaussian; false where one is not finite.
inline bool write_colors(const Scene& s, int64_t gaussian, const Directions& dir, int lane, float* out) {
  bool good = true;
  if (s.sh_count == 0) {
    for (int c = 0; c < s.channels; ++c) {
      out[c] = s.colors[gaussian * s.channels + c];
      good &= out[c] - out[c] == 0.0f;
    }
    return good;
  }
  const float* sh = s.colors + gaussian * s.sh_count * 3;
  float sum[3] = {0.5f, 0.5f, 0.5f};
  for (int k = 0; k < s.sh_count; ++k) {
    const float y = dir.basis[k * kWidth + lane];
    for (int c = 0; c < 3; ++c) sum[c] += y * sh[3 * k + c];
  }
  for (int c = 0; c < 3; ++c) {
    good &= sum[c] - sum[c] == 0.0f;
    out[c] = sum[c] > 0.0f ? sum[c] : 0.0f;
  }
  return good;
}

// What of the projection depends on the image: boxes of tiles, radii, the blending coefficients.
struct Footprint {
  vi visible;
  alignas(64) float x[kWidth], y[kWidth], z[kWidth], a[kWidth], b[kWidth], c[kWidth], level[kWidth];
  alignas(64) float slope_x[kWidth], slope_y[kWidth], radius[kWidth];
  alignas(64) float box[4][kWidth];
};

inline void find_footprint(const Camera& cam, const Projection<vf>& o, const vf* offset, vf opacity, Footprint* f) {
  const vf x = o.u + cam.cx + offset[0], y = o.v + cam.cy + offset[1];
  const vf level = log2(opacity);
  // alpha >= 1/255 inside an ellipse whose half-extents are these.
  const vf reach = (level - kLog2MinAlpha) * (2.0f / kLog2e);
  const vf ex = sqrt(reach * o.a), ey = sqrt(reach * o.c);
  const vf x0 = max(ceil(x - ex - 0.5f), zero()), x1 = min(floor(x + ex - 0.5f), broadcast(cam.width - 1));
  const vf y0 = max(ceil(y - ey - 0.5f), zero()), y1 = min(floor(y + ey - 0.5f), broadcast(cam.height - 1));
  f->visible = (o.p[2] > cam.near_plane) & finite(o.p[2]) & (o.det > 0.0f) & finite(o.det) & (o.inv_norm > 0.0f) &
               finite(x + y + ex + ey) & (x0 <= x1) & (y0 <= y1);
  const vf inv = 1.0f / o.det;
  const vf mid = 0.5f * (o.a + o.c);
  const vf spread = sqrt(max(mid * mid - o.det, zero()));
  store(f->x, x);
  store(f->y, y);
  store(f->z, o.p[2]);
  store(f->a, -0.5f * kLog2e * o.c * inv);
  store(f->b, kLog2e * o.b * inv);
  store(f->c, -0.5f * kLog2e * o.a * inv);
  store(f->level, level);
  store(f->slope_x, o.b / o.c);
  store(f->slope_y, o.b / o.a);
  store(f->radius, min(ceil(3.0f * sqrt(mid + spread)), broadcast(1e9f)));
  store(f->box[0], x0);
  store(f->box[1], y0);
  store(f->box[2], x1);
  store(f->box[3], y1);
}

inline Box tile_box(const Footprint& f, int lane) {
  return {static_cast<uint16_t>(static_cast<int>(f.box[0][lane]) / kTile),
          static_cast<uint16_t>(static_cast<int>(f.box[1][lane]) / kTile),
          static_cast<uint16_t>(static_cast<int>(f.box[2][lane]) / kTile),
          static_cast<uint16_t>(static_cast<int>(f.box[3][lane]) / kTile)};
}

inline void write_record(const Footprint& f, int lane, const Box& box, int64_t first_pair, float* rec) {
  rec[kX] = f.x[lane];
  rec[kY] = f.y[lane];
  rec[kA] = f.a[lane];
  rec[kB] = f.b[lane];
  rec[kC] = f.c[lane];
  rec[kLevel] = f.level[lane];
  rec[kZ] = f.z[lane];
  rec[kSlopeX] = f.slope_x[lane];
  rec[kSlopeY] = f.slope_y[lane];
  rec[kOffset] = as_float(static_cast<int32_t>(first_pair));
  rec[kBox0] = as_float(box.x0 | static_cast<int32_t>(static_cast<uint32_t>(box.y0) << 16));
  rec[kBoxW] = as_float(box.x1 - box.x0 + 1);
}

inline void project_chunk(const Work& w, int64_t chunk, int32_t* radii) {
  const Scene& s = *w.scene;
  const Camera cam = make_camera(s.viewmat, s.intrinsics, s.width, s.height, s.near_plane);
  const int64_t begin = chunk * kChunk, end = begin + kChunk < s.n ? begin + kChunk : s.n;
  if (radii) std::memset(radii + begin, 0, (end - begin) * sizeof(int32_t));
  int64_t slot = begin, pairs = 0;
  for (int64_t first = begin; first < end; first += kWidth) {
    const vi next = lane_numbers() + static_cast<int32_t>(first), last = vi{} + static_cast<int32_t>(end - 1);
    const vi index = next < last ? next : last;
    const vf opacity = gather(s.opacities, index);
    uint32_t lanes = bits((opacity >= kMinAlpha) & finite(opacity) & (next <= last));
    if (!lanes) continue;
    const Lanes in = gather_lanes(s, index);
    const Projection<vf> o = project(cam, in.mean, in.quat, in.scale);
    Footprint f;
    find_footprint(cam, o, in.offset, opacity, &f);
    lanes &= bits(f.visible);
    Directions dir;
    if (lanes && s.sh_count) find_directions(cam, s.sh_count, in.mean, &dir);
    for (; lanes; lanes &= lanes - 1) {
      const int l = __builtin_ctz(lanes);
      float* rec = w.records + slot * w.stride;
      if (!write_colors(s, first + l, dir, l, rec + kHeader)) continue;
      const Box box = tile_box(f, l);
      write_record(f, l, box, pairs, rec);
      w.boxes[slot] = box;
      w.ids[slot] = static_cast<int32_t>(first + l);
      w.keys[slot] = static_cast<uint32_t>(as_int(f.z[l]));  // z > 0: its bits sort like its value
      pairs += int64_t{box.x1 - box.x0 + 1} * (box.y1 - box.y0 + 1);
      if (radii) radii[first + l] = static_cast<int32_t>(f.radius[l]);
      ++slot;
    }
  }
  w.chunk_count[chunk] = static_cast<int32_t>(slot - begin);
  w.chunk_pairs[chunk] = pairs;
}

}  // namespace FG_ISA
}  // namespace fg3dgs
