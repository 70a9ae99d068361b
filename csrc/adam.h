// Adam's step on many arrays at once, in place: the native twin of training/optim.py. No XLA, no Python.
#pragma once

#include <cstdint>

#include "rasterize.h"

namespace fg3dgs {

// One array of parameters. rates: [period], repeated along the array, whose size is a multiple of it.
struct AdamLeaf {
  const float *rates, *gradient;
  float *value, *mean, *square;  // the parameters and their gradient's moments
  int64_t size, period;
  float decay;  // AdamW
};

struct AdamRule {
  double beta1, beta2;  // 1 - beta is taken before it is rounded
  float epsilon;
  float left1, left2;  // 1 - beta^step, by which the moments are too small
};

// The bits of the results do not depend on the number of threads.
void adam(const AdamRule& rule, const AdamLeaf* leaves, int64_t count, const Executor& executor);

// Whether the squares of all `count` gradients are finite, as a step needs them to be.
bool can_step(const float* const* gradients, const int64_t* sizes, int64_t count, const Executor& executor);

}  // namespace fg3dgs
