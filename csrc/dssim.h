// D-SSIM of two images and its gradient in one pass: the native twin of losses/image.py. No XLA, no Python.
#pragma once

#include <cstdint>

#include "rasterize.h"

namespace fg3dgs {

// prediction, target, gradient: [height, width, channels]; loss: [1]. loss = 1 - mean SSIM over pixels and channels
// (11-tap Gaussian window, sigma 1.5, zero-padded; data range 1); gradient = d loss / d prediction.
// The bits of the result do not depend on the number of threads.
void dssim(const float* prediction, const float* target, int64_t height, int64_t width, int64_t channels, float* loss,
           float* gradient, const Executor& executor);

}  // namespace fg3dgs
