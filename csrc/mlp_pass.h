// Passes of points through perceptrons: what their drivers share.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "mlp_cpu.h"
#include "parallel.h"
#include "workspace.h"

namespace fg3dgs {

constexpr int64_t kMostChunks = 16;  // of a sum over all points: a fixed split, whatever the threads

inline const MlpKernels& mlp_kernels() {
  static const MlpKernels& best = FG_BEST(kMlpKernels);
  return best;
}

// Points [first, first + count) of an array [rows, points], the rest of a pass zero.
inline void load_points(const float* array, int64_t points, int rows, int64_t first, int64_t count, float* out) {
  for (int r = 0; r < rows; ++r) {
    std::memcpy(out + r * kMlpStride, array + r * points + first, count * sizeof(float));
    std::memset(out + r * kMlpStride + count, 0, (kMlpStride - count) * sizeof(float));
  }
}

inline void save_points(const float* rows_in, int64_t points, int rows, int64_t first, int64_t count, float* array) {
  for (int r = 0; r < rows; ++r)
    std::memcpy(array + r * points + first, rows_in + r * kMlpStride, count * sizeof(float));
}

inline int64_t floats_of(const int32_t* sizes, int count) {
  int64_t rows = 0;
  for (int i = 0; i < count; ++i) rows += sizes[i];
  return rows * kMlpStride;
}

// The layers of one pass, each [size, kMlpStride], in memory of floats_of.
struct Layers {
  float* layer[kMostLayers + 1];
  float* end;

  Layers(const int32_t* sizes, int count, float* memory) : end(memory) {
    for (int i = 0; i < count; ++i) {
      layer[i] = end;
      end += int64_t{sizes[i]} * kMlpStride;
    }
  }
};

// Calls call(worker, chunk, first, count) for every pass of `points`, chunks in parallel.
template <class Call>
void for_passes(int64_t points, const Executor& executor, const Call& call) {
  const int64_t passes = (points + kMlpPoints - 1) / kMlpPoints, chunks = std::min(passes, kMostChunks);
  parallel_for(executor, chunks, [&](int worker, int64_t chunk) {
    for (int64_t pass = chunk * passes / chunks; pass < (chunk + 1) * passes / chunks; ++pass) {
      const int64_t first = pass * kMlpPoints;
      call(worker, chunk, first, std::min<int64_t>(kMlpPoints, points - first));
    }
  });
}

// Sums over all points, one set a chunk, added up in order.
class ChunkSums {
 public:
  explicit ChunkSums(int64_t size) : size_(size), sums_(kMostChunks * size, 0.0f) {}

  float* of(int64_t chunk) { return sums_.data() + chunk * size_; }

  // `count` sums from `start` on.
  void total(int64_t start, int64_t count, float* out) const {
    std::fill(out, out + count, 0.0f);
    for (int64_t chunk = 0; chunk < kMostChunks; ++chunk)
      for (int64_t i = 0; i < count; ++i) out[i] += sums_[chunk * size_ + start + i];
  }

 private:
  int64_t size_;
  std::vector<float> sums_;
};

}  // namespace fg3dgs
