// A small multi-layer perceptron over many points, and its gradients: the native twin of fg3dgs_jax/model/mlp.py.
#pragma once

#include <cstdint>

#include "rasterize.h"

namespace fg3dgs {

struct Mlp {
  const int32_t* sizes;  // [layers + 1]: in, hidden.., out
  int layers;
  int64_t points;
};

constexpr int kMostLayers = 8;

constexpr int32_t kMostRows = 1 << 20;  // of a layer

// Whether the kernels can index such a network: whoever builds one asks first.
static inline bool can_multiply(const Mlp& m) {
  bool good = m.layers > 0 && m.layers <= kMostLayers && m.points >= 0;
  for (int i = 0; good && i <= m.layers; ++i) good = m.sizes[i] > 0 && m.sizes[i] <= kMostRows;
  return good;
}

static inline int64_t mlp_weights(const Mlp& m) {
  int64_t count = 0;
  for (int i = 0; i < m.layers; ++i) count += int64_t{m.sizes[i]} * m.sizes[i + 1];
  return count;
}

// x [in, points], weights: the kernels [size_i, size_i+1] one behind the other -> out [out, points]. ReLU between the
// layers and none after the last, no biases. `start` [size_1, points], unless null, is added to the first layer.
void mlp_forward(const Mlp&, const float* start, const float* x, const float* weights, float* out, const Executor&);

// d_out [out, points] -> d_x [in, points] and d_weights; the hidden layers are computed again. The bits of the sums over
// the points do not depend on the number of threads.
void mlp_backward(const Mlp&, const float* x, const float* weights, const float* d_out, float* d_x, float* d_weights,
                  const Executor&);

}  // namespace fg3dgs
