// CPU kernel that takes chunks of Gaussians from pair gradients back to their parameters. Included once per
// instruction set.
#pragma once

#include "rasterize_project.h"

namespace fg3dgs {
namespace FG_ISA {

// Sums the pair gradients of one visible Gaussian, in the order of its tiles, into the first of them.
inline const float* sum_pairs(const Work& w, int64_t chunk, int64_t slot) {
  const Box& box = w.boxes[slot];
  const int64_t count = int64_t{box.x1 - box.x0 + 1} * (box.y1 - box.y0 + 1);
  const int64_t first = w.chunk_pairs[chunk] + as_int(w.records[slot * w.stride + kOffset]);
  float* sum = w.pair_gradients + first * w.pair_stride;
  const float* p = sum + w.pair_stride;
  for (int64_t k = 1; k < count; ++k, p += w.pair_stride)
    for (int i = 0; i < w.pair_stride; i += kWidth) store(sum + i, load(sum + i) + load(p + i));
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
