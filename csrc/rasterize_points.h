// CPU kernels over chunks of Gaussians, a vector of them at a time. Included once per instruction set.
#pragma once

#include "rasterize_cpu.h"
#include "simd.h"
#include "splat_math.h"

namespace fg3dgs {
namespace FG_ISA {

constexpr float kLog2e = 1.44269504f;
constexpr float kLog2MinAlpha = -7.99435344f;   // log2(1 / 255)
constexpr float kLog2MaxAlpha = -0.01449957f;   // log2(0.99)

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
  for (int i = 0; i < 2; ++i) in.offset[i] = gather(s.means2d + i, 2 * index);
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

// Sums the pair gradients of one visible Gaussian, in the order of its tiles, into the first of them.
inline const float* sum_pairs(const Work& w, int64_t chunk, int64_t slot) {
  const Box& box = w.boxes[slot];
  const int64_t count = int64_t{box.x1 - box.x0 + 1} * (box.y1 - box.y0 + 1);
  const int64_t first = w.chunk_pairs[chunk] + as_int(w.records[slot * w.stride + kOffset]);
  float* sum = w.pair_gradients + first * w.pair_stride;
  const float* p = sum + w.pair_stride;
  for (int64_t k = 1; k < count; ++k, p += w.pair_stride)
    for (int i = 0; i < w.pair_stride; i += 4)
      for (int j = 0; j < 4; ++j) sum[i + j] += p[i + j];
  return sum;
}

// Cotangents of one Gaussian's colours -> its coefficients; adds what reaches the basis to `basis_gradient`.
inline void color_gradients(const Scene& s, const Directions& dir, int lane, int64_t gaussian, const float* rec,
                            const float* dcolor, float* out, float (*basis_gradient)[kWidth]) {
  if (s.sh_count == 0) {
    for (int c = 0; c < s.channels; ++c) out[gaussian * s.channels + c] = dcolor[c];
    return;
  }
  float d[3];
  for (int c = 0; c < 3; ++c) d[c] = rec[kHeader + c] > 0.0f ? dcolor[c] : 0.0f;  // the clamp at zero
  const float* sh = s.colors + gaussian * s.sh_count * 3;
  float* dsh = out + gaussian * s.sh_count * 3;
  for (int k = 0; k < s.sh_count; ++k) {
    const float y = dir.basis[k * kWidth + lane];
    for (int c = 0; c < 3; ++c) dsh[3 * k + c] = y * d[c];
    basis_gradient[k][lane] = sh[3 * k] * d[0] + sh[3 * k + 1] * d[1] + sh[3 * k + 2] * d[2];
  }
}

// Cotangent of the means through the viewing direction.
inline void direction_gradient(int count, const Directions& dir, const float (*basis_gradient)[kWidth], vf* out) {
  vf g[16], d[3];
  for (int k = 0; k < count; ++k) g[k] = load(basis_gradient[k]);
  sh_basis_backward(count, dir.d[0], dir.d[1], dir.d[2], g, &d[0], &d[1], &d[2]);
  const vf radial = d[0] * dir.d[0] + d[1] * dir.d[1] + d[2] * dir.d[2];
  for (int i = 0; i < 3; ++i) out[i] = (d[i] - dir.d[i] * radial) * dir.inv_length;
}

inline ScreenGradient<vf> screen_gradient(const Projection<vf>& o, const float (*sums)[kWidth]) {
  ScreenGradient<vf> g;
  const vf inv = 1.0f / o.det;
  const vf sx = load(sums[1]), sy = load(sums[2]);
  g.x = inv * (o.c * sx - o.b * sy);
  g.y = inv * (o.a * sy - o.b * sx);
  g.a = -0.5f * load(sums[3]);
  g.b = -load(sums[4]);
  g.c = -0.5f * load(sums[5]);
  g.depth = load(sums[6]);
  return g;
}

inline void scatter(float* p, int64_t stride, const int32_t* index, int count, vf v) {
  alignas(64) float a[kWidth];
  store(a, v);
  for (int l = 0; l < count; ++l) p[stride * index[l]] = a[l];
}

inline void clear_gradients(const Scene& s, const Gradients& out, int64_t begin, int64_t end) {
  const int64_t m = (end - begin) * sizeof(float), color = s.sh_count ? 3 * s.sh_count : s.channels;
  std::memset(out.means + 3 * begin, 0, 3 * m);
  std::memset(out.quats + 4 * begin, 0, 4 * m);
  std::memset(out.scales + 3 * begin, 0, 3 * m);
  std::memset(out.opacities + begin, 0, m);
  std::memset(out.colors + color * begin, 0, color * m);
  std::memset(out.means2d + 2 * begin, 0, 2 * m);
}

struct CameraSums {
  vf v[kCameraSums];
};

inline void add_camera(const PointGradient<vf>& g, const vf* center, vi mask, CameraSums* sums) {
  const vf none = zero();
  for (int i = 0; i < 9; ++i) sums->v[i] += mask ? g.rotation[i] : none;
  for (int i = 0; i < 3; ++i) sums->v[9 + i] += mask ? g.translation[i] : none;
  sums->v[12] += mask ? g.fx : none;
  sums->v[13] += mask ? g.fy : none;
  sums->v[14] += mask ? g.cx : none;
  sums->v[15] += mask ? g.cy : none;
  for (int i = 0; i < 3; ++i) sums->v[16 + i] -= mask ? center[i] : none;
}

// One vector of visible Gaussians, slots [slot, slot + count).
inline void unproject_lanes(const Work& w, const Camera& cam, const Gradients& out, int64_t chunk, int64_t slot,
                            int count, CameraSums* camera) {
  const Scene& s = *w.scene;
  alignas(64) int32_t ids[kWidth];
  for (int l = 0; l < kWidth; ++l) ids[l] = w.ids[slot + (l < count ? l : count - 1)];
  vi index;
  std::memcpy(&index, ids, sizeof index);
  const vi mask = lane_numbers() < count;
  const Lanes in = gather_lanes(s, index);
  const vf opacity = gather(s.opacities, index);
  const Projection<vf> o = project(cam, in.mean, in.quat, in.scale);
  Directions dir;
  if (s.sh_count) find_directions(cam, s.sh_count, in.mean, &dir);

  alignas(64) float sums[7][kWidth] = {};
  alignas(64) float basis_gradient[16][kWidth] = {};
  for (int l = 0; l < count; ++l) {
    const float* row = sum_pairs(w, chunk, slot + l);
    for (int i = 0; i < 7; ++i) sums[i][l] = row[i];
    color_gradients(s, dir, l, ids[l], w.records + (slot + l) * w.stride, row + 7, out.colors, basis_gradient);
  }
  const ScreenGradient<vf> screen = screen_gradient(o, sums);
  const PointGradient<vf> g = unproject(cam, in.mean, o, screen);
  vf through[3] = {zero(), zero(), zero()};
  if (s.sh_count) direction_gradient(s.sh_count, dir, basis_gradient, through);
  for (int i = 0; i < 3; ++i) scatter(out.means + i, 3, ids, count, g.mean[i] + through[i]);
  for (int i = 0; i < 4; ++i) scatter(out.quats + i, 4, ids, count, g.quat[i]);
  for (int i = 0; i < 3; ++i) scatter(out.scales + i, 3, ids, count, g.scale[i]);
  scatter(out.means2d, 2, ids, count, screen.x);
  scatter(out.means2d + 1, 2, ids, count, screen.y);
  scatter(out.opacities, 1, ids, count, load(sums[0]) / opacity);
  add_camera(g, through, mask, camera);
}

inline void unproject_chunk(const Work& w, const Gradients& out, int64_t chunk, double* camera_sums) {
  const Scene& s = *w.scene;
  const Camera cam = make_camera(s.viewmat, s.intrinsics, s.width, s.height, s.near_plane);
  const int64_t begin = chunk * kChunk, end = begin + kChunk < s.n ? begin + kChunk : s.n;
  clear_gradients(s, out, begin, end);
  CameraSums sums = {};
  for (int i = 0; i < w.chunk_count[chunk]; i += kWidth) {
    const int left = w.chunk_count[chunk] - i;
    unproject_lanes(w, cam, out, chunk, begin + i, left < kWidth ? left : kWidth, &sums);
  }
  for (int i = 0; i < kCameraSums; ++i) {
    camera_sums[i] = 0;
    for (int l = 0; l < kWidth; ++l) camera_sums[i] += sums.v[i][l];
  }
}

}  // namespace FG_ISA
}  // namespace fg3dgs
