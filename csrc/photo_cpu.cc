// The picture loss's driver: tiles, threads, sums over them. The arithmetic is in the kernels.
#include "photo_cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "clones.h"
#include "parallel.h"
#include "workspace.h"

namespace fg3dgs {
namespace {

const PhotoKernels& kernels() {
  static const PhotoKernels& best = FG_BEST(kPhotoKernels);
  return best;
}

struct Window {
  float taps[kBlurTaps];
  Window() {
    double sum = 0.0;
    for (int i = 0; i < kBlurTaps; ++i) sum += weight(i);
    for (int i = 0; i < kBlurTaps; ++i) taps[i] = static_cast<float>(weight(i) / sum);
  }
  static double weight(int i) { return std::exp(-0.5 * (i - kBlurRadius) * (i - kBlurRadius) / (1.5 * 1.5)); }
};

FG3DGS_CLONES
int64_t count_marks(const uint8_t* __restrict marks, int64_t count, uint8_t bit) {
  int64_t total = 0;
  for (int64_t i = 0; i < count;) {
    int32_t part = 0;
    for (const int64_t end = std::min(i + 4096, count); i < end; ++i) part += (marks[i] & bit) != 0;
    total += part;
  }
  return total;
}

}  // namespace

void photo(const Photo& p, float* loss, float* terms, float* d_color, float* d_alpha, const Executor& executor) {
  const int64_t pixels = p.height * p.width;
  const double inside = std::max<double>(count_marks(p.marks, pixels, kInside), 1.0);
  const double outside = std::max<double>(count_marks(p.marks, pixels, kOutside), 1.0);
  const double values = 3.0 * pixels;
  const PhotoSlopes slopes = {static_cast<float>(p.weights[0] / values), static_cast<float>(-p.weights[1] / values),
                              static_cast<float>(-p.weights[2] / inside), static_cast<float>(p.weights[2] / outside)};
  const Window window;
  const int64_t down = (p.height + kPhotoRows - 1) / kPhotoRows, across = (p.width + kPhotoColumns - 1) / kPhotoColumns;
  std::vector<PhotoSums> sums(down * across);
  Lease ws;
  float* space = ws->scratch.ensure(kPhotoScratch * std::max(1, executor.num_threads));
  parallel_for(executor, down * across, [&](int worker, int64_t tile) {
    kernels().tile(p, window.taps, slopes, tile / across * kPhotoRows, tile % across * kPhotoColumns,
                   space + worker * kPhotoScratch, &sums[tile], d_color, d_alpha);
  });
  PhotoSums all = {};
  for (const PhotoSums& s : sums) {  // in order, whoever computed them
    all.l1 += s.l1;
    all.ssim += s.ssim;
    all.missing += s.missing;
    all.stray += s.stray;
    all.squares += s.squares;
  }
  terms[0] = static_cast<float>(all.l1 / values);
  terms[1] = static_cast<float>(1.0 - all.ssim / values);
  terms[2] = static_cast<float>(all.missing / inside + all.stray / outside);
  terms[3] = static_cast<float>(all.squares);
  terms[4] = static_cast<float>(count_marks(p.marks, pixels, kCounted));
  *loss = p.weights[0] * terms[0] + p.weights[1] * terms[1] + p.weights[2] * terms[2];
}

}  // namespace fg3dgs
