// What a rendered layer looks like beside its picture, and the gradient of that, in one pass: the native twin of
// losses/image.py. No XLA, no Python.
#pragma once

#include <cstdint>

#include "rasterize.h"

namespace fg3dgs {

// Bits of a pixel's mark.
constexpr uint8_t kInside = 1;    // the target is the picture; elsewhere it is the background
constexpr uint8_t kOutside = 2;   // must stay empty; what is neither inside nor outside is not judged
constexpr uint8_t kCounted = 4;   // for the squared error

// A layer color [height, width, 3], alpha [height, width], premultiplied, over a background of one colour.
struct Photo {
  const float *color, *alpha;
  const uint8_t *picture, *marks;  // [height, width, 3], [height, width]
  const float *background;         // [3]
  const float *weights;            // [3]: of L1, D-SSIM and the alpha term in the loss
  int64_t height, width;
};

constexpr int kPhotoTerms = 5;  // L1, D-SSIM, alpha term, sum of squared errors, number of counted pixels

// terms: [kPhotoTerms]; loss: [1], the weighted sum of the first three; d_color, d_alpha: its gradient.
// The bits of the results do not depend on the number of threads.
void photo(const Photo& photo, float* loss, float* terms, float* d_color, float* d_alpha, const Executor& executor);

}  // namespace fg3dgs
