// What the picture loss's driver and its kernels, one per instruction set, share.
#pragma once

#include "isa.h"
#include "photo.h"

namespace fg3dgs {

constexpr int kBlurRadius = 5;
constexpr int kBlurTaps = 2 * kBlurRadius + 1;
// A tile's maps stay in the second cache; its borders, seen by two tiles, are a third of it.
constexpr int kPhotoRows = 64, kPhotoColumns = 128;
constexpr int kPhotoPitch = kPhotoColumns + 4 * kBlurRadius + 12;  // of a line with its borders, whole registers
constexpr int kPhotoLines = kPhotoRows + 4 * kBlurRadius;
constexpr int64_t kPhotoPlane = int64_t{kPhotoPitch} * kPhotoLines;
constexpr int64_t kPhotoScratch = 11 * kPhotoPlane + 5 * kPhotoPitch;  // floats: 3 + 3 + 1 + 4 planes and five lines

// Factors of the gradient's parts.
struct PhotoSlopes {
  float l1, ssim, inside, outside;
};

struct PhotoSums {
  double l1, ssim, missing, stray, squares;
};

struct PhotoKernels {
  // The tile from (row, column) on: its sums, its gradient. scratch: kPhotoScratch floats, 64-byte aligned.
  void (*tile)(const Photo&, const float* taps, const PhotoSlopes&, int64_t row, int64_t column, float* scratch,
               PhotoSums* sums, float* d_color, float* d_alpha);
};

FG_PER_ISA(extern const PhotoKernels kPhotoKernels;)

}  // namespace fg3dgs
