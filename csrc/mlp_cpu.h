// What the perceptron's driver and its kernels, one per instruction set, share.
#pragma once

#include "attend.h"
#include "isa.h"
#include "mlp.h"

namespace fg3dgs {

constexpr int kMlpPoints = 256;               // per pass: its layers stay in the second cache
constexpr int kMlpStride = kMlpPoints + 16;   // rows do not all start in the same few sets of the first cache

struct MlpKernels {
  // Fills layers 1 to `count` of a pass from layer 0, each [size, kMlpStride]; `onto` adds to what layer 1 holds.
  void (*run)(const Mlp&, bool onto, const float* weights, int count, float* const* layer);
  // Gradients of a pass: `up` holds the last layer's and ends with the first's, to which `onto` adds; the weights' are
  // added.
  void (*pull)(const Mlp&, bool onto, const float* weights, float* const* layer, float* const* up, float* d_weights);
  // Rows [rows, kMlpStride]: out = gates * condition, or max(gates, 0) * condition.
  void (*gate)(const float* condition, bool rectified, int rows, const float* gates, float* out);
  // From the gradient `up` of that: the condition's is added, the gates' takes its place.
  void (*pull_gate)(const float* condition, bool rectified, int rows, const float* gates, float* up, float* d_condition);
  // One pass: rows of x, weights, hidden, second and last layer, in that order, each [size, kMlpStride].
  void (*attend)(const Attend&, const AttendArrays&, float* const* rows);
  // Gradients of a pass: `up` holds the last layer's and ends with those of x; the other arrays' are added.
  void (*pull_attend)(const Attend&, const AttendArrays&, float* const* rows, float* const* up,
                      const AttendGradients&);
};

FG_PER_ISA(extern const MlpKernels kMlpKernels;)

}  // namespace fg3dgs
