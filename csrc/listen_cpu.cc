// The encoder of sound: so little work that one thread does it.
#include "listen.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "clones.h"

namespace fg3dgs {
namespace {

constexpr float kLeak = 0.02f;

// What a layer does: `count` sequences of `length` vectors become sequences of `made` vectors.
struct Shape {
  int64_t count, length, made, in, out;
  int taps, stride;
  bool leaks;

  int64_t given() const { return count * length * in; }
  int64_t results() const { return count * made * out; }
};

Shape shape_of(const Listen& l, int i) {
  const bool strided = i < kStrided, last = i == kListenLayers - 1, along = i > kLastOfTokens && !last;
  int64_t length = strided ? l.steps : along ? l.tokens : 1;
  for (int k = 0; strided && k < i; ++k) length = (length + 1) / 2;
  const int64_t count = i <= kLastOfTokens ? l.tokens : 1;
  return {count, length, strided ? (length + 1) / 2 : length, l.layers[i].in, l.layers[i].out, listen_taps(i),
          strided ? 2 : 1, i != kLastOfTokens && !last};
}

// The step of its sequence that tap k of result t sees, or -1 beyond the ends.
FG3DGS_INLINED int64_t seen(const Shape& s, int64_t t, int k) {
  const int64_t at = t * s.stride + k - s.taps / 2;
  return at < s.length ? at : -1;
}

constexpr int64_t kBlock = 32;  // sums that stay in registers

// to [size] += the products of x [depth] with a matrix whose row is `stride` floats.
template <int64_t Size>
FG3DGS_INLINED void add_product(const float* x, const float* matrix, int64_t depth, int64_t stride, float* to) {
  float sums[Size];
  for (int64_t o = 0; o < Size; ++o) sums[o] = to[o];
  for (int64_t c = 0; c < depth; ++c)
    for (int64_t o = 0; o < Size; ++o) sums[o] += x[c] * matrix[c * stride + o];
  for (int64_t o = 0; o < Size; ++o) to[o] = sums[o];
}

FG3DGS_INLINED void add_product(const float* x, const float* matrix, int64_t depth, int64_t size, float* to) {
  int64_t o = 0;
  for (; o + kBlock <= size; o += kBlock) add_product<kBlock>(x, matrix + o, depth, size, to + o);
  for (; o + 8 <= size; o += 8) add_product<8>(x, matrix + o, depth, size, to + o);
  for (; o < size; ++o) add_product<1>(x, matrix + o, depth, size, to + o);
}

FG3DGS_CLONES
void run_layer(const Shape& s, const ListenLayer& layer, const float* in, float* out) {
  for (int64_t n = 0; n < s.count; ++n)
    for (int64_t t = 0; t < s.made; ++t) {
      float* to = out + (n * s.made + t) * s.out;
      std::copy_n(layer.bias, s.out, to);
      for (int k = 0; k < s.taps; ++k) {
        const int64_t at = seen(s, t, k);
        if (at >= 0) add_product(in + (n * s.length + at) * s.in, layer.kernel + k * s.in * s.out, s.in, s.out, to);
      }
      for (int64_t o = 0; s.leaks && o < s.out; ++o) to[o] = to[o] >= 0 ? to[o] : kLeak * to[o];
    }
}

// `up`, the gradient by `out`, becomes that by the sums under the ReLU. Adds to d_in.
FG3DGS_CLONES
void pull_layer(const Shape& s, const ListenLayer& layer, const float* in, const float* out, float* up,
                float* d_in, const ListenSlopes& slopes) {
  for (int64_t i = 0; s.leaks && i < s.results(); ++i) up[i] = out[i] >= 0 ? up[i] : kLeak * up[i];
  std::fill_n(slopes.kernel, s.taps * s.in * s.out, 0.0f);
  std::fill_n(slopes.bias, s.out, 0.0f);
  std::vector<float> turned(s.taps * s.in * s.out);  // [taps, out, in]
  for (int k = 0; k < s.taps; ++k)
    for (int64_t c = 0; c < s.in; ++c)
      for (int64_t o = 0; o < s.out; ++o) turned[(k * s.out + o) * s.in + c] = layer.kernel[(k * s.in + c) * s.out + o];
  for (int64_t n = 0; n < s.count; ++n)
    for (int64_t t = 0; t < s.made; ++t) {
      const float* from = up + (n * s.made + t) * s.out;
      for (int64_t o = 0; o < s.out; ++o) slopes.bias[o] += from[o];
      for (int k = 0; k < s.taps; ++k) {
        const int64_t at = seen(s, t, k);
        if (at < 0) continue;
        const float* x = in + (n * s.length + at) * s.in;
        float* __restrict d_kernel = slopes.kernel + k * s.in * s.out;
        for (int64_t c = 0; c < s.in; ++c, d_kernel += s.out)
          for (int64_t o = 0; o < s.out; ++o) d_kernel[o] += x[c] * from[o];
        add_product(from, turned.data() + k * s.in * s.out, s.out, s.in, d_in + (n * s.length + at) * s.in);
      }
    }
}

// What every layer sees, values or gradients, one behind the other, and what the last one makes.
struct Rows {
  std::vector<float> memory;
  const float* windows;  // what the first layer sees; null: it has rows here, too
  int64_t start[kListenLayers + 1], made;

  Rows(const Listen& l, const float* given) : windows(given) {
    int64_t size = 0;
    for (int i = 0; i < kListenLayers; ++i) {
      start[i] = size;
      size += i || !given ? shape_of(l, i).given() : 0;
    }
    start[kListenLayers] = size;
    made = size + l.tokens;  // the mean's place: what the last strided layer makes, before it is averaged
    memory.resize(made + shape_of(l, kStrided - 1).results());
  }
  float* in(int i) { return memory.data() + start[i]; }
  float* strided() { return memory.data() + made; }
  const float* seen_by(int i) { return i == 0 && windows ? windows : in(i); }
  // Where layer i puts its results.
  float* out(int i) { return i == kStrided - 1 ? strided() : in(i + 1); }
};

void hear(const Listen& l, Rows* rows) {
  const auto run = [&](int i) { run_layer(shape_of(l, i), l.layers[i], rows->seen_by(i), rows->out(i)); };
  for (int i = 0; i < kStrided; ++i) run(i);
  const Shape s = shape_of(l, kStrided - 1);
  for (int64_t n = 0; n < s.count; ++n)
    for (int64_t o = 0; o < s.out; ++o) {
      float sum = 0;
      for (int64_t t = 0; t < s.made; ++t) sum += rows->strided()[(n * s.made + t) * s.out + o];
      rows->in(kStrided)[n * s.out + o] = sum / static_cast<float>(s.made);
    }
  for (int i = kStrided; i < kListenLayers; ++i) run(i);
}

// The tokens' shares, of the last layer's scores.
std::vector<float> share_out(const float* scores, int64_t count) {
  std::vector<float> shares(count);
  float top = scores[0], total = 0;
  for (int64_t n = 0; n < count; ++n) top = scores[n] > top || std::isnan(scores[n]) ? scores[n] : top;
  for (int64_t n = 0; n < count; ++n) total += shares[n] = std::exp(scores[n] - top);
  for (float& share : shares) share /= total;
  return shares;
}

}  // namespace

bool can_listen(const Listen& l) {
  const auto fits = [](int64_t size) { return size > 0 && size <= kMostHeard; };
  bool good = fits(l.tokens) && fits(l.steps);
  for (int i = 0; i < kListenLayers; ++i) {
    const ListenLayer& layer = l.layers[i];
    good &= fits(layer.in) && fits(layer.out) && (i == 0 || i == kListenLayers - 1 || layer.in == l.layers[i - 1].out);
  }
  const ListenLayer& last = l.layers[kListenLayers - 1];
  return good && l.layers[kListenLayers - 2].out == 1 && last.in == l.tokens && last.out == l.tokens;
}

void listen(const Listen& l, float* tokens, float* pooled) {
  Rows rows(l, l.windows);
  hear(l, &rows);
  const float* made = rows.in(kLastOfTokens + 1);
  std::copy_n(made, l.tokens * l.features(), tokens);
  const std::vector<float> shares = share_out(rows.in(kListenLayers), l.tokens);
  std::fill_n(pooled, l.features(), 0.0f);
  for (int64_t n = 0; n < l.tokens; ++n)
    for (int64_t f = 0; f < l.features(); ++f) pooled[f] += shares[n] * made[n * l.features() + f];
}

void listen_backward(const Listen& l, const float* d_tokens, const float* d_pooled, float* d_windows,
                     const ListenSlopes (&slopes)[kListenLayers]) {
  Rows rows(l, l.windows), up(l, nullptr);
  hear(l, &rows);
  const int64_t features = l.features();
  const float* tokens = rows.in(kLastOfTokens + 1);
  const std::vector<float> shares = share_out(rows.in(kListenLayers), l.tokens);
  float *d_scores = up.in(kListenLayers), *d_made = up.in(kLastOfTokens + 1), mean = 0;
  for (int64_t n = 0; n < l.tokens; ++n) {
    for (int64_t f = 0; f < features; ++f) {
      d_made[n * features + f] = d_tokens[n * features + f] + shares[n] * d_pooled[f];
      d_scores[n] += tokens[n * features + f] * d_pooled[f];
    }
    mean += shares[n] * d_scores[n];
  }
  for (int64_t n = 0; n < l.tokens; ++n) d_scores[n] = shares[n] * (d_scores[n] - mean);
  const auto pull = [&](int i) {
    pull_layer(shape_of(l, i), l.layers[i], rows.seen_by(i), rows.out(i), up.out(i), up.in(i), slopes[i]);
  };
  for (int i = kListenLayers - 1; i >= kStrided; --i) pull(i);
  const Shape s = shape_of(l, kStrided - 1);
  for (int64_t n = 0; n < s.count; ++n)
    for (int64_t t = 0; t < s.made; ++t)
      for (int64_t o = 0; o < s.out; ++o)
        up.strided()[(n * s.made + t) * s.out + o] = up.in(kStrided)[n * s.out + o] / static_cast<float>(s.made);
  for (int i = kStrided - 1; i >= 0; --i) pull(i);
  std::copy_n(up.in(0), shape_of(l, 0).given(), d_windows);
}

}  // namespace fg3dgs
