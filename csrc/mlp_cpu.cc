// The perceptron's driver: passes of points, threads, sums over them. The arithmetic is in the kernels.
#include "mlp_cpu.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "workspace.h"

namespace fg3dgs {
namespace {

constexpr int64_t kMostChunks = 16;  // of a sum over all points: a fixed split, whatever the threads

const MlpKernels& kernels() {
  static const MlpKernels& best = FG_BEST(kMlpKernels);
  return best;
}

// Points [first, first + count) of an array [rows, points], the rest of a pass zero.
void load(const float* array, int64_t points, int rows, int64_t first, int64_t count, float* out) {
  for (int r = 0; r < rows; ++r) {
    std::memcpy(out + r * kMlpStride, array + r * points + first, count * sizeof(float));
    std::memset(out + r * kMlpStride + count, 0, (kMlpStride - count) * sizeof(float));
  }
}

void save(const float* rows_in, int64_t points, int rows, int64_t first, int64_t count, float* array) {
  for (int r = 0; r < rows; ++r)
    std::memcpy(array + r * points + first, rows_in + r * kMlpStride, count * sizeof(float));
}

int64_t floats_of(const int32_t* sizes, int count) {
  int64_t rows = 0;
  for (int i = 0; i < count; ++i) rows += sizes[i];
  return rows * kMlpStride;
}

// The layers of one pass, each [size, kMlpStride], in memory of floats_of.
struct Layers {
  float* layer[kMostLayers + 1];

  Layers(const int32_t* sizes, int count, float* memory) {
    for (int i = 0; i < count; ++i) {
      layer[i] = memory;
      memory += int64_t{sizes[i]} * kMlpStride;
    }
  }
};

}  // namespace

void mlp_forward(const Mlp& m, const float* start, const float* x, const float* weights, float* out,
                 const Executor& executor) {
  const int64_t passes = (m.points + kMlpPoints - 1) / kMlpPoints;
  const int64_t chunks = std::min(passes, kMostChunks), floats = floats_of(m.sizes, m.layers + 1);
  Lease ws;
  float* space = ws->scratch.ensure(floats * std::max(1, executor.num_threads));
  parallel_for(executor, chunks, [&](int worker, int64_t chunk) {
    const Layers layers(m.sizes, m.layers + 1, space + worker * floats);
    for (int64_t pass = chunk * passes / chunks; pass < (chunk + 1) * passes / chunks; ++pass) {
      const int64_t first = pass * kMlpPoints, count = std::min<int64_t>(kMlpPoints, m.points - first);
      load(x, m.points, m.sizes[0], first, count, layers.layer[0]);
      if (start) load(start, m.points, m.sizes[1], first, count, layers.layer[1]);
      kernels().run(m, start != nullptr, weights, m.layers, layers.layer);
      save(layers.layer[m.layers], m.points, m.sizes[m.layers], first, count, out);
    }
  });
}

void mlp_backward(const Mlp& m, const float* x, const float* weights, const float* d_out, float* d_x, float* d_weights,
                  const Executor& executor) {
  const int64_t passes = (m.points + kMlpPoints - 1) / kMlpPoints, size = mlp_weights(m);
  const int64_t chunks = std::min(passes, kMostChunks), floats = floats_of(m.sizes, m.layers + 1);
  std::vector<float> sums(chunks * size, 0.0f);
  Lease ws;
  float* space = ws->scratch.ensure(2 * floats * std::max(1, executor.num_threads));
  parallel_for(executor, chunks, [&](int worker, int64_t chunk) {
    const Layers layers(m.sizes, m.layers + 1, space + 2 * worker * floats);
    const Layers up(m.sizes, m.layers + 1, space + (2 * worker + 1) * floats);
    for (int64_t pass = chunk * passes / chunks; pass < (chunk + 1) * passes / chunks; ++pass) {
      const int64_t first = pass * kMlpPoints, count = std::min<int64_t>(kMlpPoints, m.points - first);
      load(x, m.points, m.sizes[0], first, count, layers.layer[0]);
      load(d_out, m.points, m.sizes[m.layers], first, count, up.layer[m.layers]);
      kernels().run(m, false, weights, m.layers - 1, layers.layer);
      kernels().pull(m, weights, layers.layer, up.layer, sums.data() + chunk * size);
      save(up.layer[0], m.points, m.sizes[0], first, count, d_x);
    }
  });
  std::fill(d_weights, d_weights + size, 0.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < size; ++i) d_weights[i] += sums[chunk * size + i];
}

void attend(const Attend& a, const AttendArrays& arrays, const Executor& executor) {
  const int queries = a.heads * a.width;
  const int32_t sizes[] = {queries, a.tokens * a.heads, a.hidden, a.second, a.last};
  const int64_t passes = (a.points + kMlpPoints - 1) / kMlpPoints;
  const int64_t chunks = std::min(passes, kMostChunks), floats = floats_of(sizes, 5);
  Lease ws;
  float* space = ws->scratch.ensure(floats * std::max(1, executor.num_threads));
  parallel_for(executor, chunks, [&](int worker, int64_t chunk) {
    const Layers rows(sizes, 5, space + worker * floats);
    for (int64_t pass = chunk * passes / chunks; pass < (chunk + 1) * passes / chunks; ++pass) {
      const int64_t first = pass * kMlpPoints, count = std::min<int64_t>(kMlpPoints, a.points - first);
      load(arrays.queries, a.points, queries, first, count, rows.layer[0]);
      kernels().attend(a, arrays, rows.layer);
      save(rows.layer[4], a.points, a.last, first, count, arrays.out);
    }
  });
}

}  // namespace fg3dgs
