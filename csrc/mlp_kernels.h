// CPU kernel of the perceptron: one pass of points through all layers. Included once per instruction set.
#pragma once

#include <cmath>

#include "mlp_cpu.h"
#include "simd.h"

namespace fg3dgs {
namespace FG_ISA {

template <int N>
struct Count {
  static constexpr int value = N;
};

// `Rows` rows of out = finish(matrix * in), for `Vectors` vectors of points. Row r, column k of the matrix is at
// r * row + k * column; rows of `in` and `out` are kMlpStride apart. finish(at, sum) is told where in `out` a sum goes.
template <int Rows, int Vectors, class Finish>
FG_INLINE void multiply_rows(const float* matrix, int64_t row, int64_t column, int depth, const float* in, int64_t at,
                             float* out, const Finish& finish) {
  vf sums[Rows][Vectors];  // in registers, if all loops over them are unrolled
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) sums[r][v] = zero();
  for (int k = 0; k < depth; ++k) {
    vf x[Vectors];
    for (int v = 0; v < Vectors; ++v) x[v] = load(in + k * kMlpStride + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const vf weight = broadcast(matrix[r * row + k * column]);
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) sums[r][v] += weight * x[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) {
      const int64_t here = at + r * kMlpStride + v * kWidth;
      store(out + here, finish(here, sums[r][v]));
    }
}

// out [rows, kMlpPoints] = finish(matrix [rows, depth] * in [depth, kMlpPoints]). As many sums as there are registers
// for.
template <class Finish>
inline void multiply(const float* matrix, int64_t row, int64_t column, int rows, int depth, const float* in,
                     float* out, const Finish& finish) {
  constexpr int kMost = kWidth == 16 ? 12 : 6;
  for (int p = 0; p < kMlpPoints; p += 2 * kWidth) {
    const auto some = [&](auto count, int r) {
      multiply_rows<decltype(count)::value, 2>(matrix + r * row, row, column, depth, in + p, r * kMlpStride + p, out,
                                               finish);
    };
    int r = 0;
    for (; r + kMost <= rows; r += kMost) some(Count<kMost>(), r);
    if (r + 8 <= rows) some(Count<8>(), r), r += 8;
    if (r + 4 <= rows) some(Count<4>(), r), r += 4;
    if (r + 2 <= rows) some(Count<2>(), r), r += 2;
    if (r < rows) some(Count<1>(), r);
  }
}

template <int A, int B>
FG_INLINE void add_products(const float* a, const float* b, float* out, int64_t row) {
  vf sums[A * B];
  for (int i = 0; i < A * B; ++i) sums[i] = zero();
  for (int p = 0; p < kMlpPoints; p += kWidth) {
    vf x[A];
    for (int i = 0; i < A; ++i) x[i] = load(a + i * kMlpStride + p);
    for (int j = 0; j < B; ++j) {
      const vf y = load(b + j * kMlpStride + p);
      for (int i = 0; i < A; ++i) sums[i * B + j] += x[i] * y;
    }
  }
  static_assert(A * B <= kWidth, "one vector takes all sums");
  float totals[kWidth];
  store(totals, sum_lanes<kWidth>(sums, A * B));
  for (int i = 0; i < A; ++i) {
    if constexpr (B == 4) {  // as one: the compiler would take the vector apart
      typedef float v4 __attribute__((vector_size(16)));
      v4 held, more;
      std::memcpy(&held, out + i * row, sizeof held);
      std::memcpy(&more, totals + 4 * i, sizeof more);
      held += more;
      std::memcpy(out + i * row, &held, sizeof held);
    } else {
      for (int j = 0; j < B; ++j) out[i * row + j] += totals[i * B + j];
    }
  }
}

template <int A, int B>
FG_INLINE void add_rows(const float* a, const float* b, int columns, float* out) {
  int j = 0;
  for (; j + B <= columns; j += B) add_products<A, B>(a, b + j * kMlpStride, out + j, columns);
  for (; j < columns; ++j) add_products<A, 1>(a, b + j * kMlpStride, out + j, columns);
}

// out [rows, columns] += a [rows, kMlpPoints] * b [columns, kMlpPoints]^T
inline void add_outer(const float* a, const float* b, int rows, int columns, float* out) {
  constexpr int kA = kWidth == 16 ? 4 : 2, kB = kWidth == 16 ? 4 : kWidth == 8 ? 3 : 2;  // as many sums as there are registers for
  int i = 0;
  for (; i + kA <= rows; i += kA) add_rows<kA, kB>(a + i * kMlpStride, b, columns, out + int64_t{i} * columns);
  for (; i < rows; ++i) add_rows<1, kB>(a + i * kMlpStride, b, columns, out + int64_t{i} * columns);
}

FG_INLINE vf at_least(vf floor, vf x) { return x < floor ? floor : x; }  // NaN stays
FG_INLINE vf relu(vf x) { return at_least(zero(), x); }

FG_INLINE vf as_is(int64_t, vf sum) { return sum; }

inline void run_layers(const Mlp& m, bool onto, const float* weights, int count, float* const* layer) {
  for (int i = 0; i < count; ++i) {
    const int in = m.sizes[i], out = m.sizes[i + 1];
    const vf floor = broadcast(i + 1 < m.layers ? 0.0f : -INFINITY);  // of a ReLU, or none
    const float* held = layer[i + 1];
    const auto go = [&](const auto& finish) { multiply(weights, 1, out, out, in, layer[i], layer[i + 1], finish); };
    if (onto && i == 0)
      go([=](int64_t at, vf sum) { return at_least(floor, sum + load(held + at)); });
    else
      go([=](int64_t, vf sum) { return at_least(floor, sum); });
    weights += int64_t{in} * out;
  }
}

inline void pull_layers(const Mlp& m, bool onto, const float* weights, float* const* layer, float* const* up,
                        float* d_weights) {
  int64_t start = mlp_weights(m);
  for (int i = m.layers - 1; i >= 0; --i) {
    const int in = m.sizes[i], out = m.sizes[i + 1];
    const float *held = up[i], *value = layer[i];
    start -= int64_t{in} * out;
    add_outer(layer[i], up[i + 1], in, out, d_weights + start);
    const auto go = [&](const auto& finish) { multiply(weights + start, out, 1, in, out, up[i + 1], up[i], finish); };
    if (i > 0)  // a ReLU
      go([=](int64_t at, vf sum) { return load(value + at) > zero() ? sum : zero(); });
    else if (onto)
      go([=](int64_t at, vf sum) { return sum + load(held + at); });
    else
      go(as_is);
  }
}

inline void gate(const float* condition, bool rectified, int rows, const float* gates, float* out) {
  for (int r = 0; r < rows; ++r)
    for (int i = r * kMlpStride; i < r * kMlpStride + kMlpPoints; i += kWidth) {
      const vf raw = load(gates + i);
      store(out + i, condition[r] * (rectified ? relu(raw) : raw));
    }
}

inline void pull_gate(const float* condition, bool rectified, int rows, const float* gates, float* up,
                      float* d_condition) {
  for (int r = 0; r < rows; ++r) {
    vf sum = zero();
    for (int i = r * kMlpStride; i < r * kMlpStride + kMlpPoints; i += kWidth) {
      const vf gradient = load(up + i), raw = load(gates + i), scaled = condition[r] * gradient;
      sum += gradient * (rectified ? relu(raw) : raw);
      store(up + i, rectified ? (raw > zero() ? scaled : zero()) : scaled);
    }
    d_condition[r] += sum_lanes<kWidth>(&sum, 1)[0];
  }
}

// Products of matrices [rows, columns] with a pass, and of their transposes.
template <class Finish>
FG_INLINE void apply(const float* matrix, int rows, int columns, const float* in, float* out, const Finish& finish) {
  multiply(matrix, columns, 1, rows, columns, in, out, finish);
}

template <class Finish>
FG_INLINE void apply_transposed(const float* matrix, int rows, int columns, const float* in, float* out,
                                const Finish& finish) {
  multiply(matrix, 1, columns, columns, rows, in, out, finish);
}

// Scores become weights: softmax over the tokens of one head, whose rows are `step` floats apart.
FG_INLINE void share_out(int tokens, int64_t step, float* rows) {
  constexpr float kLog2e = 1.44269504f;
  vf scores[kMostTokens], top, total = zero();
  for (int t = 0; t < tokens; ++t) {
    scores[t] = load(rows + t * step) * kLog2e;
    top = t ? max(top, scores[t]) : scores[t];
  }
  for (int t = 0; t < tokens; ++t) {
    scores[t] = exp2(max(broadcast(-126.0f), scores[t] - top));  // in this order NaN stays
    total += scores[t];
  }
  const vf share = 1.0f / total;
  for (int t = 0; t < tokens; ++t) store(rows + t * step, scores[t] * share);
}

// The gradient by the weights becomes that by the scores.
FG_INLINE void pull_share(int tokens, int64_t step, const float* weights, float* up) {
  vf mean = zero();
  for (int t = 0; t < tokens; ++t) mean += load(weights + t * step) * load(up + t * step);
  for (int t = 0; t < tokens; ++t) store(up + t * step, load(weights + t * step) * (load(up + t * step) - mean));
}

inline void run_attend(const Attend& a, const AttendArrays& arrays, float* const* rows) {
  const int weights = a.weights();
  apply(arrays.to_scores, weights, a.seen, rows[0], rows[1], as_is);
  for (int h = 0; h < a.heads; ++h)
    for (int p = h * kMlpStride; p < h * kMlpStride + kMlpPoints; p += kWidth)
      share_out(a.tokens, int64_t{a.heads} * kMlpStride, rows[1] + p);
  apply(arrays.from_weights, a.hidden, weights, rows[1], rows[2],
        [&](int64_t at, vf sum) { return relu(sum + arrays.bias[at / kMlpStride]); });
  apply(arrays.past_weights, a.second, weights, rows[1], rows[3], as_is);
  apply(arrays.from_hidden, a.second, a.hidden, rows[2], rows[3],
        [&](int64_t at, vf sum) { return relu(sum + load(rows[3] + at)); });
  apply(arrays.last, a.last, a.second, rows[3], rows[4], as_is);
}

inline void pull_attend(const Attend& a, const AttendArrays& arrays, float* const* rows, float* const* up,
                        const AttendGradients& out) {
  const int weights = a.weights();
  const auto through = [rows](int layer) {  // a ReLU
    return [value = rows[layer]](int64_t at, vf sum) { return load(value + at) > zero() ? sum : zero(); };
  };
  add_outer(up[4], rows[3], a.last, a.second, out.last);
  apply_transposed(arrays.last, a.last, a.second, up[4], up[3], through(3));
  add_outer(up[3], rows[2], a.second, a.hidden, out.from_hidden);
  add_outer(up[3], rows[1], a.second, weights, out.past_weights);
  apply_transposed(arrays.from_hidden, a.second, a.hidden, up[3], up[2], through(2));
  add_outer(up[2], rows[1], a.hidden, weights, out.from_weights);
  for (int r = 0; r < a.hidden; ++r) {
    vf sum = zero();
    for (int p = 0; p < kMlpPoints; p += kWidth) sum += load(up[2] + r * kMlpStride + p);
    out.bias[r] += sum_lanes<kWidth>(&sum, 1)[0];
  }
  apply_transposed(arrays.past_weights, a.second, weights, up[3], up[1], as_is);
  apply_transposed(arrays.from_weights, a.hidden, weights, up[2], up[1],
                   [&](int64_t at, vf sum) { return sum + load(up[1] + at); });
  for (int h = 0; h < a.heads; ++h)
    for (int p = h * kMlpStride; p < h * kMlpStride + kMlpPoints; p += kWidth)
      pull_share(a.tokens, int64_t{a.heads} * kMlpStride, rows[1] + p, up[1] + p);
  add_outer(up[1], rows[0], weights, a.seen, out.to_scores);
  apply_transposed(arrays.to_scores, weights, a.seen, up[1], up[0], as_is);
}

const MlpKernels kMlpKernels = {run_layers, pull_layers, gate, pull_gate, run_attend, pull_attend};

}  // namespace FG_ISA
}  // namespace fg3dgs
