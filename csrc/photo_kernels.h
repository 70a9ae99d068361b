// CPU kernels of the picture loss over tiles. Included once per instruction set.
//
// A tile's lines hold ten pixels of border on every side, since a pixel's gradient hears of SSIM five pixels away, and
// that of pixels another five away. Every blur shifts its map by five: line y, column x of a map that was blurred once
// is pixel (y - 5, x - 5) of the tile, of one that was blurred twice (y, x). Beyond the image all maps are zero.
#pragma once

#include "photo_cpu.h"
#include "simd.h"

namespace fg3dgs {
namespace FG_ISA {

constexpr float kC1 = 0.01f * 0.01f;
constexpr float kC2 = 0.03f * 0.03f;
constexpr int kBorder = 2 * kBlurRadius;

// A tile and its memory: planes of prediction and target by channel, of 1 where a pixel counts, and four maps.
struct PhotoTile {
  int64_t row, column;  // of its first pixel
  int rows, columns;
  float *prediction[3], *target[3], *counted, *map[4], *line[5];

  PhotoTile(const Photo& p, int64_t first_row, int64_t first_column, float* scratch)
      : row(first_row), column(first_column) {
    rows = static_cast<int>(p.height - row < kPhotoRows ? p.height - row : kPhotoRows);
    columns = static_cast<int>(p.width - column < kPhotoColumns ? p.width - column : kPhotoColumns);
    for (int c = 0; c < 3; ++c) prediction[c] = scratch + c * kPhotoPlane;
    for (int c = 0; c < 3; ++c) target[c] = scratch + (3 + c) * kPhotoPlane;
    counted = scratch + 6 * kPhotoPlane;
    for (int i = 0; i < 4; ++i) map[i] = scratch + (7 + i) * kPhotoPlane;
    for (int i = 0; i < 5; ++i) line[i] = scratch + 11 * kPhotoPlane + i * kPhotoPitch;
  }
  bool outside(const Photo& p, int y) const { return row + y < 0 || row + y >= p.height; }
};

// Three interleaved channels <-> three lines. Plain loops, which compilers know how to shuffle.
template <class T>
FG_INLINE void spread(const T* __restrict in, int64_t count, float* __restrict a, float* __restrict b,
                      float* __restrict c) {
  for (int64_t x = 0; x < count; ++x) a[x] = in[3 * x], b[x] = in[3 * x + 1], c[x] = in[3 * x + 2];
}

FG_INLINE void gather_channels(const float* __restrict a, const float* __restrict b, const float* __restrict c,
                               int64_t count, float* __restrict out) {
  for (int64_t x = 0; x < count; ++x) out[3 * x] = a[x], out[3 * x + 1] = b[x], out[3 * x + 2] = c[x];
}

// 1 where a mark has any of some bits, else 0.
FG_INLINE void to_mask(const uint8_t* __restrict marks, uint8_t bits, int64_t count, float* __restrict out) {
  for (int64_t x = 0; x < count; ++x) out[x] = static_cast<float>(static_cast<int32_t>((marks[x] & bits) != 0));
}

// Prediction and target of the tile's pixels and of its border, by channel.
inline void open_photo(const Photo& p, const PhotoTile& t) {
  const int64_t first = t.column - kBorder < 0 ? 0 : t.column - kBorder;
  const int64_t end = t.column + t.columns + kBorder > p.width ? p.width : t.column + t.columns + kBorder;
  const int64_t count = end - first, skip = first - (t.column - kBorder);
  for (int y = 0; y < t.rows + 2 * kBorder; ++y) {
    const int64_t from = int64_t{y} * kPhotoPitch, to = from + skip;
    if (t.outside(p, y - kBorder)) {
      for (int c = 0; c < 3; ++c) {
        std::memset(t.prediction[c] + from, 0, sizeof(float) * kPhotoPitch);
        std::memset(t.target[c] + from, 0, sizeof(float) * kPhotoPitch);
      }
      continue;
    }
    const int64_t start = (t.row + y - kBorder) * p.width + first;
    float *inside = t.line[2] + skip, *judged = t.line[3] + skip, *alpha = t.line[4] + skip;
    to_mask(p.marks + start, kInside, count, inside);
    to_mask(p.marks + start, kInside | kOutside, count, judged);
    to_mask(p.marks + start, kCounted, count, t.counted + to);
    std::memcpy(alpha, p.alpha + start, sizeof(float) * count);
    spread(p.picture + 3 * start, count, t.target[0] + to, t.target[1] + to, t.target[2] + to);
    spread(p.color + 3 * start, count, t.prediction[0] + to, t.prediction[1] + to, t.prediction[2] + to);
    const auto left = static_cast<int32_t>(skip), right = static_cast<int32_t>(skip + count);
    for (int x = 0; x < kPhotoPitch; x += kWidth) {
      const vi at = lane_numbers() + x, there = (at >= left) & (at < right);
      const vi in = (load(t.line[2] + x) > 0.0f) & there, on = (load(t.line[3] + x) > 0.0f) & there;
      const vf through = 1.0f - load(t.line[4] + x);
      for (int c = 0; c < 3; ++c) {
        float *prediction = t.prediction[c] + from + x, *target = t.target[c] + from + x;
        const vf background = there ? broadcast(p.background[c]) : zero();
        const vf want = in ? load(target) * (1.0f / 255.0f) : background;
        store(target, want);
        store(prediction, on ? load(prediction) + through * background : want);
      }
    }
  }
}

// out[x] = the blur of the eleven values from in[x] on; `out` may be `in`.
FG_INLINE void blur_line(const float* in, const float* taps, int columns, float* out) {
  for (int x = 0; x < columns; x += kWidth) {
    vf sum = load(in + x + kBlurRadius) * taps[kBlurRadius];
    for (int k = 0; k < kBlurRadius; ++k) sum += (load(in + x + k) + load(in + x + kBlurTaps - 1 - k)) * taps[k];
    store(out + x, sum);
  }
}

// Line y becomes the blur of the eleven lines from y on, for `lines` lines. A column of registers slides down: every
// value is read once.
inline void blur_columns(float* map, const float* taps, int columns, int lines) {
  for (int x = 0; x < columns; x += kWidth) {
    float* at = map + x;
    vf last[kBlurTaps];  // line y is in last[y % kBlurTaps]
    for (int k = 0; k < kBlurTaps - 1; ++k) last[k] = load(at + k * kPhotoPitch);
    for (int y = 0; y < lines;) {
#pragma GCC unroll 11
      for (int k = 0; k < kBlurTaps; ++k) {
        if (y + k >= lines) break;
        float* here = at + int64_t{y + k} * kPhotoPitch;
        last[(k + 10) % kBlurTaps] = load(here + (kBlurTaps - 1) * kPhotoPitch);
        vf sum = last[(k + 5) % kBlurTaps] * taps[5];
        sum += (last[k] + last[(k + 10) % kBlurTaps]) * taps[0];
        sum += (last[(k + 1) % kBlurTaps] + last[(k + 9) % kBlurTaps]) * taps[1];
        sum += (last[(k + 2) % kBlurTaps] + last[(k + 8) % kBlurTaps]) * taps[2];
        sum += (last[(k + 3) % kBlurTaps] + last[(k + 7) % kBlurTaps]) * taps[3];
        sum += (last[(k + 4) % kBlurTaps] + last[(k + 6) % kBlurTaps]) * taps[4];
        store(here, sum);
      }
      y += kBlurTaps;
    }
  }
}

// The maps of a channel, blurred along the lines: prediction, target, their squares' sum, their product.
inline void blur_products(const Photo& p, const PhotoTile& t, int channel, const float* taps) {
  const int columns = t.columns + kBorder;
  for (int y = 0; y < t.rows + 2 * kBorder; ++y) {
    const int64_t from = int64_t{y} * kPhotoPitch;
    if (t.outside(p, y - kBorder)) {
      for (int i = 0; i < 4; ++i) std::memset(t.map[i] + from, 0, sizeof(float) * kPhotoPitch);
      continue;
    }
    const float *a = t.prediction[channel] + from, *b = t.target[channel] + from;
    for (int x = 0; x < kPhotoPitch; x += kWidth) {
      const vf u = load(a + x), v = load(b + x);
      store(t.line[0] + x, u * u + v * v);
      store(t.line[1] + x, u * v);
    }
    blur_line(a, taps, columns, t.map[0] + from);
    blur_line(b, taps, columns, t.map[1] + from);
    blur_line(t.line[0], taps, columns, t.map[2] + from);
    blur_line(t.line[1], taps, columns, t.map[3] + from);
  }
}

// One register: SSIM from its blurred maps, left in the fourth map, and its derivatives by mean, square and product.
FG_INLINE void compare(float* const* at, int64_t x) {
  const vf a = load(at[0] + x), b = load(at[1] + x), squares = load(at[2] + x), product = load(at[3] + x);
  const vf aa = a * a, bb = b * b, ab = a * b;
  const vf l_up = 2.0f * ab + kC1, by_l = reciprocal(aa + bb + kC1);
  const vf s_up = 2.0f * (product - ab) + kC2, by_s = reciprocal((squares - aa - bb) + kC2);
  const vf luminance = l_up * by_l, structure = s_up * by_s, inverse = luminance * by_s;
  // Through the luminance, and through the variance and covariance that subtract the means.
  store(at[0] + x, 2.0f * ((structure * by_l) * (b - a * luminance) + inverse * (a * structure - b)));
  store(at[1] + x, -inverse * structure);
  store(at[2] + x, 2.0f * inverse);
  store(at[3] + x, luminance * structure);
}

// Fills the first three maps with the derivatives, zero beyond the image, and blurs them along the lines.
inline void blur_slopes(const Photo& p, const PhotoTile& t, const float* taps) {
  const int64_t before = kBlurRadius - t.column, after = p.width - (t.column - kBlurRadius);
  for (int y = 0; y < t.rows + kBorder; ++y) {
    const int64_t from = int64_t{y} * kPhotoPitch;
    if (t.outside(p, y - kBlurRadius)) {
      for (int i = 0; i < 3; ++i) std::memset(t.map[i] + from, 0, sizeof(float) * kPhotoPitch);
      continue;
    }
    for (int x = 0; x < t.columns + kBorder; x += kWidth) compare(t.map, from + x);
    for (int i = 0; i < 3; ++i) {
      float* line = t.map[i] + from;
      for (int64_t x = 0; x < before; ++x) line[x] = 0.0f;
      for (int64_t x = after; x < t.columns + kBorder; ++x) line[x] = 0.0f;
      blur_line(line, taps, t.columns, line);
    }
  }
}

FG_INLINE float sum_of(vf v) {
  float lanes[kWidth], sum = 0.0f;
  store(lanes, v);
  for (int l = 0; l < kWidth; ++l) sum += lanes[l];
  return sum;
}

// Turns a channel's prediction into the gradient by it, and adds to the tile's sums.
inline void pull_channel(const PhotoTile& t, int channel, const PhotoSlopes& slopes, PhotoSums* sums) {
  for (int y = 0; y < t.rows; ++y) {
    const int64_t from = int64_t{y} * kPhotoPitch;
    float* prediction = t.prediction[channel] + from + kBorder * (kPhotoPitch + 1);
    const float* target = t.target[channel] + from + kBorder * (kPhotoPitch + 1);
    const float* counted = t.counted + from + kBorder * (kPhotoPitch + 1);
    const float* ssim = t.map[3] + from + kBlurRadius * (kPhotoPitch + 1);
    vf l1 = zero(), similar = zero(), squares = zero();
    for (int x = 0; x < t.columns; x += kWidth) {
      const vi here = lane_numbers() < static_cast<int32_t>(t.columns - x);
      const vf a = load(prediction + x), b = load(target + x), d = a - b;
      const vf off = clamp(a, zero(), broadcast(1.0f)) - b;
      l1 += here ? (d < 0.0f ? -d : d) : zero();
      similar += here ? load(ssim + x) : zero();
      squares += here ? off * off * load(counted + x) : zero();
      const vf sign = d > 0.0f ? broadcast(slopes.l1) : (d < 0.0f ? broadcast(-slopes.l1) : zero());
      const vf blurred = load(t.map[0] + from + x) + 2.0f * a * load(t.map[1] + from + x) + b * load(t.map[2] + from + x);
      store(prediction + x, here ? sign + slopes.ssim * blurred : a);
    }
    sums->l1 += sum_of(l1);
    sums->ssim += sum_of(similar);
    sums->squares += sum_of(squares);
  }
}

// From the gradients by the prediction to those by the layer, and the alpha term.
inline void close_photo(const Photo& p, const PhotoTile& t, const PhotoSlopes& slopes, PhotoSums* sums,
                        float* d_color, float* d_alpha) {
  const float r = p.background[0], g = p.background[1], b = p.background[2];
  for (int y = 0; y < t.rows; ++y) {
    const int64_t from = int64_t{y + kBorder} * kPhotoPitch + kBorder, start = (t.row + y) * p.width + t.column;
    float *red = t.prediction[0] + from, *green = t.prediction[1] + from, *blue = t.prediction[2] + from;
    float *inside = t.line[0], *outside = t.line[1], *by_alpha = t.line[2], *alpha = t.line[3];
    to_mask(p.marks + start, kInside, t.columns, inside);
    to_mask(p.marks + start, kOutside, t.columns, outside);
    std::memcpy(alpha, p.alpha + start, sizeof(float) * t.columns);
    vf missing = zero(), stray = zero();
    for (int x = 0; x < t.columns; x += kWidth) {
      const vi here = lane_numbers() < static_cast<int32_t>(t.columns - x);
      const vi in = (load(inside + x) > 0.0f) & here, out = (load(outside + x) > 0.0f) & here, on = in | out;
      const vf dr = on ? load(red + x) : zero(), dg = on ? load(green + x) : zero(), db = on ? load(blue + x) : zero();
      store(red + x, dr);
      store(green + x, dg);
      store(blue + x, db);
      store(by_alpha + x, (in ? broadcast(slopes.inside) : zero()) + (out ? broadcast(slopes.outside) : zero()) -
                              (dr * r + dg * g + db * b));
      missing += in ? 1.0f - load(alpha + x) : zero();
      stray += out ? load(alpha + x) : zero();
    }
    std::memcpy(d_alpha + start, by_alpha, sizeof(float) * t.columns);
    gather_channels(red, green, blue, t.columns, d_color + 3 * start);
    sums->missing += sum_of(missing);
    sums->stray += sum_of(stray);
  }
}

inline void photo_tile(const Photo& p, const float* taps, const PhotoSlopes& slopes, int64_t row, int64_t column,
                       float* scratch, PhotoSums* sums, float* d_color, float* d_alpha) {
  const PhotoTile t(p, row, column, scratch);
  *sums = {};
  open_photo(p, t);
  for (int c = 0; c < 3; ++c) {
    blur_products(p, t, c, taps);
    for (float* map : t.map) blur_columns(map, taps, t.columns + kBorder, t.rows + kBorder);
    blur_slopes(p, t, taps);
    for (int i = 0; i < 3; ++i) blur_columns(t.map[i], taps, t.columns, t.rows);
    pull_channel(t, c, slopes, sums);
  }
  close_photo(p, t, slopes, sums, d_color, d_alpha);
}

extern const PhotoKernels kPhotoKernels;
const PhotoKernels kPhotoKernels = {photo_tile};

}  // namespace FG_ISA
}  // namespace fg3dgs
