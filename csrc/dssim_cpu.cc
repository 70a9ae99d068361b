#include "dssim.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "clones.h"
#include "parallel.h"

namespace fg3dgs {
namespace {

constexpr int kRadius = 5;
constexpr int kTaps = 2 * kRadius + 1;
constexpr float kC1 = 0.01f * 0.01f;
constexpr float kC2 = 0.03f * 0.03f;
constexpr int64_t kBand = 64;  // rows per task

struct Window {
  float taps[kTaps];
  Window() {
    double sum = 0.0;
    for (int i = 0; i < kTaps; ++i) sum += std::exp(-0.5 * (i - kRadius) * (i - kRadius) / (1.5 * 1.5));
    for (int i = 0; i < kTaps; ++i)
      taps[i] = static_cast<float>(std::exp(-0.5 * (i - kRadius) * (i - kRadius) / (1.5 * 1.5)) / sum);
  }
};

// line: width values with kRadius zeros on each side, first value at line[kRadius].
FG3DGS_CLONES
void blur_line(const float* __restrict line, const float* __restrict taps, int64_t width, float* __restrict out) {
  for (int64_t x = 0; x < width; ++x) {
    float sum = taps[kRadius] * line[x + kRadius];
    for (int k = 0; k < kRadius; ++k) sum += taps[k] * (line[x + k] + line[x + kTaps - 1 - k]);
    out[x] = sum;
  }
}

// rows: kTaps pointers to lines of width values.
FG3DGS_CLONES
void blur_column(const float* const* rows, const float* __restrict taps, int64_t width, float* __restrict out) {
  const float *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3], *r4 = rows[4], *r5 = rows[5],
              *r6 = rows[6], *r7 = rows[7], *r8 = rows[8], *r9 = rows[9], *r10 = rows[10];
  for (int64_t x = 0; x < width; ++x)
    out[x] = taps[5] * r5[x] + taps[0] * (r0[x] + r10[x]) + taps[1] * (r1[x] + r9[x]) + taps[2] * (r2[x] + r8[x]) +
             taps[3] * (r3[x] + r7[x]) + taps[4] * (r4[x] + r6[x]);
}

FG3DGS_CLONES
void multiply_lines(const float* __restrict a, const float* __restrict b, int64_t width, float* __restrict aa,
                    float* __restrict bb, float* __restrict ab) {
  for (int64_t x = 0; x < width; ++x) {
    aa[x] = a[x] * a[x];
    bb[x] = b[x] * b[x];
    ab[x] = a[x] * b[x];
  }
}

// SSIM of one line from its blurred maps, and its derivatives by mean(a), mean(a a) and mean(a b).
FG3DGS_CLONES
double similarity_line(const float* __restrict ma, const float* __restrict mb, const float* __restrict aa,
                       const float* __restrict bb, const float* __restrict ab, int64_t width, float* __restrict by_mean,
                       float* __restrict by_square, float* __restrict by_product, float* __restrict values) {
  for (int64_t x = 0; x < width; ++x) {
    const float a = ma[x], b = mb[x];
    const float l_up = 2.0f * a * b + kC1, l_down = a * a + b * b + kC1;
    const float s_up = 2.0f * (ab[x] - a * b) + kC2, s_down = (aa[x] - a * a) + (bb[x] - b * b) + kC2;
    const float luminance = l_up / l_down, structure = s_up / s_down;
    const float inverse = luminance / s_down;
    values[x] = luminance * structure;
    by_product[x] = 2.0f * inverse;
    by_square[x] = -inverse * structure;
    // Through the luminance, and through the variance and covariance that subtract the means.
    by_mean[x] = structure * (2.0f * b - 2.0f * a * luminance) / l_down - 2.0f * b * inverse +
                 2.0f * a * inverse * structure;
  }
  double sum = 0.0;
  for (int64_t x = 0; x < width; ++x) sum += values[x];
  return sum;
}

FG3DGS_CLONES
void combine_line(const float* __restrict a, const float* __restrict b, const float* __restrict by_mean,
                  const float* __restrict by_square, const float* __restrict by_product, float scale, int64_t width,
                  int64_t channels, float* __restrict out) {
  for (int64_t x = 0; x < width; ++x)
    out[x * channels] = scale * (by_mean[x] + 2.0f * a[x * channels] * by_square[x] + b[x * channels] * by_product[x]);
}

// The last kTaps rows of `maps` maps; a row outside the image is zero.
class Ring {
 public:
  Ring(int maps, int64_t width) : maps_(maps), width_(width), data_(kTaps * maps * width) {}
  float* row(int map, int64_t y) { return data_.data() + ((y + kTaps * 4) % kTaps * maps_ + map) * width_; }
  void clear(int64_t y) { std::fill_n(row(0, y), maps_ * width_, 0.0f); }
  // Blur down the column around row y.
  void column(int map, int64_t y, const float* taps, float* out) {
    const float* rows[kTaps];
    for (int k = 0; k < kTaps; ++k) rows[k] = row(map, y + k - kRadius);
    blur_column(rows, taps, width_, out);
  }

 private:
  int64_t maps_, width_;
  std::vector<float> data_;
};

struct ImagePair {
  const float *prediction, *target;
  int64_t height, width, channels;
};

// One channel's rows [first, last): blurred maps flow through one ring, blurred derivatives through another, so that
// everything between the images and the gradient stays in the cache.
class Band {
 public:
  Band(const ImagePair& images, const Window& window)
      : im_(images), taps_(window.taps), line_(5 * stride(), 0.0f), scratch_(9 * images.width), maps_(5, images.width),
        slopes_(3, images.width) {}

  // Returns the sum of SSIM over the rows and writes their gradient.
  double run(int64_t channel, int64_t first, int64_t last, float scale, float* gradient) {
    double sum = 0.0;
    for (int64_t y = first - 2 * kRadius; y < last + 2 * kRadius; ++y) {
      blur_products(channel, y);
      const int64_t middle = y - kRadius;
      if (middle < first - kRadius) continue;
      const double part = compare(middle);
      if (middle >= first && middle < last) sum += part;
      if (middle - kRadius >= first) write_gradient(channel, middle - kRadius, scale, gradient);
    }
    return sum;
  }

 private:
  int64_t stride() const { return im_.width + kTaps - 1; }
  bool outside(int64_t y) const { return y < 0 || y >= im_.height; }

  void blur_products(int64_t channel, int64_t y) {
    if (outside(y)) return maps_.clear(y);
    float* start = line_.data() + kRadius;
    for (int64_t x = 0; x < im_.width; ++x) {
      const int64_t at = (y * im_.width + x) * im_.channels + channel;
      start[x] = im_.prediction[at];
      start[x + stride()] = im_.target[at];
    }
    multiply_lines(start, start + stride(), im_.width, start + 2 * stride(), start + 3 * stride(),
                   start + 4 * stride());
    for (int i = 0; i < 5; ++i) blur_line(line_.data() + i * stride(), taps_, im_.width, maps_.row(i, y));
  }

  double compare(int64_t y) {
    if (outside(y)) return slopes_.clear(y), 0.0;
    const int64_t width = im_.width;
    float* at = scratch_.data();
    for (int i = 0; i < 5; ++i) maps_.column(i, y, taps_, at + i * width);
    // The derivatives go to the middles of three padded lines, whose borders stay zero.
    float* slopes = line_.data() + kRadius;
    const double sum = similarity_line(at, at + width, at + 2 * width, at + 3 * width, at + 4 * width, width, slopes,
                                       slopes + stride(), slopes + 2 * stride(), at + 5 * width);
    for (int i = 0; i < 3; ++i) blur_line(line_.data() + i * stride(), taps_, width, slopes_.row(i, y));
    return sum;
  }

  void write_gradient(int64_t channel, int64_t y, float scale, float* gradient) {
    const int64_t at = y * im_.width * im_.channels + channel;
    float* maps = scratch_.data();
    for (int i = 0; i < 3; ++i) slopes_.column(i, y, taps_, maps + i * im_.width);
    combine_line(im_.prediction + at, im_.target + at, maps, maps + im_.width, maps + 2 * im_.width, scale, im_.width,
                 im_.channels, gradient + at);
  }

  const ImagePair& im_;
  const float* taps_;
  std::vector<float> line_, scratch_;
  Ring maps_, slopes_;
};

}  // namespace

void dssim(const float* prediction, const float* target, int64_t height, int64_t width, int64_t channels, float* loss,
           float* gradient, const Executor& executor) {
  const ImagePair images{prediction, target, height, width, channels};
  const Window window;
  const int64_t bands = (height + kBand - 1) / kBand;
  const double count = static_cast<double>(height) * width * channels;
  std::vector<double> sums(channels * bands, 0.0);
  parallel_for(executor, channels * bands, [&](int, int64_t task) {
    const int64_t first = task % bands * kBand;
    Band band(images, window);
    sums[task] = band.run(task / bands, first, std::min(first + kBand, height), static_cast<float>(-1.0 / count),
                          gradient);
  });
  double sum = 0.0;
  for (double part : sums) sum += part;  // in order, whoever computed them
  *loss = static_cast<float>(1.0 - sum / count);
}

}  // namespace fg3dgs
