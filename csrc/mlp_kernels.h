// CPU kernel of the perceptron: one pass of points through all layers. Included once per instruction set.
#pragma once

#include "mlp_cpu.h"
#include "simd.h"

namespace fg3dgs {
namespace FG_ISA {

// `Rows` rows of out = matrix * in, or with Onto of out += matrix * in, for `Vectors` vectors of points. Row r, column k of the matrix is at
// r * row + k * column; rows of `in` and `out` are kMlpStride apart.
template <bool Onto, int Rows, int Vectors>
FG_INLINE void multiply_rows(const float* matrix, int64_t row, int64_t column, int depth, const float* in, float* out) {
  vf sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sums[r][v] = Onto ? load(out + r * kMlpStride + v * kWidth) : zero();
  for (int k = 0; k < depth; ++k) {
    vf x[Vectors];
    for (int v = 0; v < Vectors; ++v) x[v] = load(in + k * kMlpStride + v * kWidth);
    for (int r = 0; r < Rows; ++r) {
      const vf weight = broadcast(matrix[r * row + k * column]);
      for (int v = 0; v < Vectors; ++v) sums[r][v] += weight * x[v];
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) store(out + r * kMlpStride + v * kWidth, sums[r][v]);
}

// out [rows, kMlpPoints] = matrix [rows, depth] * in [depth, kMlpPoints]. Six rows of two vectors: as many sums as AVX2
// has registers for.
template <bool Onto = false>
inline void multiply(const float* matrix, int64_t row, int64_t column, int rows, int depth, const float* in,
                     float* out) {
  for (int p = 0; p < kMlpPoints; p += 2 * kWidth) {
    int r = 0;
    for (; r + 6 <= rows; r += 6)
      multiply_rows<Onto, 6, 2>(matrix + r * row, row, column, depth, in + p, out + r * kMlpStride + p);
    for (; r + 2 <= rows; r += 2)
      multiply_rows<Onto, 2, 2>(matrix + r * row, row, column, depth, in + p, out + r * kMlpStride + p);
    if (r < rows) multiply_rows<Onto, 1, 2>(matrix + r * row, row, column, depth, in + p, out + r * kMlpStride + p);
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
  for (int i = 0; i < A; ++i)
    for (int j = 0; j < B; ++j) out[i * row + j] += totals[i * B + j];
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

inline void relu(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = values[i] < 0.0f ? 0.0f : values[i];  // NaN stays
}

inline void mask(const float* hidden, float* gradient, int64_t count) {
  for (int64_t i = 0; i < count; ++i) gradient[i] = hidden[i] > 0.0f ? gradient[i] : 0.0f;
}

inline void run_layers(const Mlp& m, bool onto, const float* weights, int count, float* const* layer) {
  for (int i = 0; i < count; ++i) {
    const int in = m.sizes[i], out = m.sizes[i + 1];
    const auto run = onto && i == 0 ? multiply<true> : multiply<false>;
    run(weights, 1, out, out, in, layer[i], layer[i + 1]);
    if (i + 1 < m.layers) relu(layer[i + 1], int64_t{out} * kMlpStride);
    weights += int64_t{in} * out;
  }
}

inline void pull_layers(const Mlp& m, const float* weights, float* const* layer, float* const* up, float* d_weights) {
  int64_t start = mlp_weights(m);
  for (int i = m.layers - 1; i >= 0; --i) {
    const int in = m.sizes[i], out = m.sizes[i + 1];
    start -= int64_t{in} * out;
    add_outer(layer[i], up[i + 1], in, out, d_weights + start);
    multiply(weights + start, out, 1, in, out, up[i + 1], up[i]);
    if (i > 0) mask(layer[i], up[i], int64_t{in} * kMlpStride);
  }
}

inline void gate(const float* condition, bool rectified, int rows, const float* gates, float* out) {
  for (int r = 0; r < rows; ++r)
    for (int i = r * kMlpStride; i < r * kMlpStride + kMlpPoints; ++i)
      out[i] = condition[r] * (rectified && gates[i] < 0.0f ? 0.0f : gates[i]);  // NaN stays
}

inline void pull_gate(const float* condition, bool rectified, int rows, const float* gates, float* up,
                      float* d_condition) {
  for (int r = 0; r < rows; ++r) {
    vf sum = zero();
    for (int p = r * kMlpStride; p < r * kMlpStride + kMlpPoints; p += kWidth) {
      const vf gradient = load(up + p), raw = load(gates + p);
      sum += gradient * (rectified ? (raw < zero() ? zero() : raw) : raw);
      store(up + p, condition[r] * gradient);
    }
    d_condition[r] += sum_lanes<kWidth>(&sum, 1)[0];
    if (rectified) mask(gates + r * kMlpStride, up + r * kMlpStride, kMlpPoints);
  }
}

// Softmax over the tokens of one head's scores, for a vector of points: `keys` of a token are heads * width apart, its
// weights `heads` rows.
FG_INLINE void attend_head(const Attend& a, const float* keys, const float* queries, float* weights) {
  constexpr float kLog2e = 1.44269504f;
  vf scores[kMostTokens], top, total = zero();
  for (int t = 0; t < a.tokens; ++t) {
    const float* key = keys + t * a.heads * a.width;
    vf sum = zero();
    for (int c = 0; c < a.width; ++c) sum += key[c] * load(queries + c * kMlpStride);
    scores[t] = sum * kLog2e;
    top = t ? max(top, scores[t]) : scores[t];
  }
  for (int t = 0; t < a.tokens; ++t) {
    scores[t] = exp2(max(scores[t] - top, broadcast(-126.0f)));
    total += scores[t];
  }
  const vf share = 1.0f / total;
  for (int t = 0; t < a.tokens; ++t) store(weights + t * a.heads * kMlpStride, scores[t] * share);
}

inline void run_attend(const Attend& a, const AttendArrays& arrays, float* const* rows) {
  for (int h = 0; h < a.heads; ++h)
    for (int p = 0; p < kMlpPoints; p += kWidth)
      attend_head(a, arrays.keys + h * a.width, rows[0] + h * a.width * kMlpStride + p, rows[1] + h * kMlpStride + p);
  for (int r = 0; r < a.hidden; ++r)
    for (int p = 0; p < kMlpPoints; p += kWidth) store(rows[2] + r * kMlpStride + p, broadcast(arrays.bias[r]));
  const int weights = a.tokens * a.heads;
  multiply<true>(arrays.from_weights, weights, 1, a.hidden, weights, rows[1], rows[2]);
  relu(rows[2], int64_t{a.hidden} * kMlpStride);
  multiply(arrays.from_hidden, a.hidden, 1, a.second, a.hidden, rows[2], rows[3]);
  multiply<true>(arrays.past_weights, weights, 1, a.second, weights, rows[1], rows[3]);
  relu(rows[3], int64_t{a.second} * kMlpStride);
  multiply(arrays.last, a.second, 1, a.last, a.second, rows[3], rows[4]);
}

const MlpKernels kMlpKernels = {run_layers, pull_layers, gate, pull_gate, run_attend};

}  // namespace FG_ISA
}  // namespace fg3dgs
