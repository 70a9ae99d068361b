// Attention of many points to a few tokens, and the two layers behind it: the native twin of fg3dgs_jax/model/attention.py.
#pragma once

#include <cstdint>

#include "rasterize.h"

namespace fg3dgs {

struct Attend {
  int tokens, heads, width;  // width: of a head
  int hidden, second, last;  // sizes of the layers behind
  int64_t points;
};

constexpr int kMostTokens = 16, kMostHeadWidth = 32;

// With w = softmax over the tokens, per head, of keys . queries:
// out = last relu(from_hidden relu(from_weights w + bias) + past_weights w).
struct AttendArrays {
  const float* queries;       // [heads * width, points]
  const float* keys;          // [tokens, heads, width]
  const float* from_weights;  // [hidden, tokens * heads]
  const float* bias;          // [hidden]
  const float* from_hidden;   // [second, hidden]
  const float* past_weights;  // [second, tokens * heads]
  const float* last;          // [last, second]
  float* out;                 // [last, points]
};

void attend(const Attend&, const AttendArrays&, const Executor&);

}  // namespace fg3dgs
