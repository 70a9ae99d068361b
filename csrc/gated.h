// A perceptron that sees points beside gated conditions, and its gradients: the native twin of fg3dgs_jax/model/gated.py.
#pragma once

#include "mlp.h"

namespace fg3dgs {

// A vector that is the same for all points, times what a perceptron of each point lets through: relu(net) or net.
struct Gate {
  Mlp net;
  const float* weights;
  const float* condition;  // [the net's last size]
  bool rectified;
};

struct GateGradients {
  float* weights;
  float* condition;
};

constexpr int kGates = 2;

// Whether `m` fits what it is to see: x, and the gated conditions of all gates behind it.
static inline bool can_gate(const Mlp& m, const Gate* gates) {
  bool good = can_multiply(m);
  int64_t rows = 0;
  for (int i = 0; i < kGates && good; ++i) {
    const Mlp& net = gates[i].net;
    good = can_multiply(net) && net.points == m.points && net.sizes[0] == gates[0].net.sizes[0];
    rows += good ? net.sizes[net.layers] : 0;
  }
  return good && m.sizes[0] == gates[0].net.sizes[0] + rows;
}

// x [in, points] -> out [out, points] of the perceptron `m` on [x; gate 0; gate 1].
void gated_forward(const Mlp& m, const Gate* gates, const float* x, const float* weights, float* out, const Executor&);

// d_out [out, points] -> d_x, d_weights and the gates'; everything between is computed again. The bits of the sums over
// the points do not depend on the number of threads.
void gated_backward(const Mlp& m, const Gate* gates, const float* x, const float* weights, const float* d_out,
                    float* d_x, float* d_weights, const GateGradients* d_gates, const Executor&);

}  // namespace fg3dgs
