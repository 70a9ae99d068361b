// Attention of many points to a few tokens, and the two layers behind it, with its gradients: the native twin of
// fg3dgs_jax/model/attention.py.
#pragma once

#include <cstdint>

#include "rasterize.h"

namespace fg3dgs {

struct Attend {
  int seen;                  // rows of x
  int tokens, heads;
  int hidden, second, last;  // sizes of the layers behind
  int64_t points;

  int weights() const { return tokens * heads; }
};

constexpr int kMostTokens = 16;

// With w = softmax over the tokens, per head, of to_scores x:
// out = last relu(from_hidden relu(from_weights w + bias) + past_weights w).
template <class T>
struct AttendArraysOf {
  T* x;             // [seen, points]
  T* to_scores;     // [tokens * heads, seen]
  T* from_weights;  // [hidden, tokens * heads]
  T* bias;          // [hidden]
  T* from_hidden;   // [second, hidden]
  T* past_weights;  // [second, tokens * heads]
  T* last;          // [last, second]
};

using AttendArrays = AttendArraysOf<const float>;
using AttendGradients = AttendArraysOf<float>;

// out [last, points]
void attend(const Attend&, const AttendArrays&, float* out, const Executor&);

// From d_out, the gradient by `out`, those by the arrays; everything between is computed again. The bits of the sums
// over the points do not depend on the number of threads.
void attend_backward(const Attend&, const AttendArrays&, const float* d_out, const AttendGradients&, const Executor&);

}  // namespace fg3dgs
