// Bytes -> calls of the native core's kernels with operands of every kind, sound and hostile, and what holds for all
// results. Shared by the fuzzer (fuzz.cc) and by the callers at once (threads.cc).
//
// A few bytes choose sizes and a seed for ordinary operands; each group of bytes behind them puts one hostile value
// somewhere. So an input is short, and every byte of it says something.
#pragma once

#include "adam.h"
#include "attend.h"
#include "bytes.h"
#include "gated.h"
#include "grid.h"
#include "listen.h"
#include "mlp.h"
#include "photo.h"
#include "scenes.h"

namespace fuzz {

// The grid encoder and both of its gradients.
class GridCase {
 public:
  explicit GridCase(Bytes& b) {
    const uint32_t levels = b.byte(), table = b.byte(), bound = b.byte(), points = b.byte();
    resolutions_.resize(levels < 240 ? 1 + levels % 4 : levels % 17);
    for (int32_t& r : resolutions_) {
      const uint32_t kind = b.byte();
      r = kind < 250 ? 1 + static_cast<int32_t>(kind % 40) : b.integer();
    }
    grid_.levels = static_cast<int>(resolutions_.size());
    grid_.log2_table = table < 250 ? 1 + static_cast<int>(table % 11) : b.integer();
    grid_.bound = bound < 128 ? 1.0f : bound < 224 ? 0.15f : b.value();
    grid_.points = points < 252 ? points % 20 : points < 255 ? 500 + points % 24 : 1100;
    grid_.resolutions = resolutions_.data();
    entries_ = can_encode(grid_) ? grid_entries(grid_) : -1;
    if (!possible()) return;
    Random random(b.word());
    const float reach = std::min(1.1f * grid_.bound, FLT_MAX / 2);
    tables_ = random.array(3 * entries_, -1, 1);
    positions_ = random.array(3 * grid_.points, -reach, reach);
    cotangent_ = random.array(3 * grid_.levels * grid_.points, -1, 1);
    poke(b, {&positions_, &positions_, &tables_, &cotangent_});
  }
  GridCase(const GridCase&) = delete;

  bool possible() const { return entries_ >= 0 && entries_ <= 1 << 15; }

  // The encoding, the gradients of tables and positions.
  Results run(const Executor& executor) const {
    Results r;
    grid_encode(grid_, tables_.data(), positions_.data(), r.floats(3 * grid_.levels * grid_.points), executor);
    grid_backward_tables(grid_, positions_.data(), cotangent_.data(), r.floats(3 * entries_), executor);
    grid_backward_positions(grid_, tables_.data(), positions_.data(), cotangent_.data(), r.floats(3 * grid_.points),
                            executor);
    return r;
  }

  void check(const Results& r) const {
    for (int64_t i = 0; i < grid_.points; ++i)
      for (int axis = 0; axis < 3; ++axis)
        if (!(std::fabs(positions_[axis * grid_.points + i]) <= grid_.bound))
          for (int k = 0; k < 3; ++k)
            expect(r[2][k * grid_.points + i] == 0, "a position outside of the grid has no gradient");
  }

 private:
  Grid grid_ = {};
  std::vector<int32_t> resolutions_;
  int64_t entries_;
  Floats tables_, positions_, cotangent_;
};

// The picture loss with its gradient.
class ImageCase {
 public:
  explicit ImageCase(Bytes& b) {
    const uint32_t height = b.byte(), width = b.byte();
    height_ = height < 254 ? 1 + height % 7 : 60 + width % 10;  // about a tile
    width_ = width < 254 ? 1 + width % 7 : 120 + height % 16;
    Random random(b.word());
    color_ = random.array(height_ * width_ * 3, 0, 1);
    alpha_ = random.array(height_ * width_, 0, 1);
    background_ = random.array(3, 0, 1);
    weights_ = random.array(3, 0, 1);
    for (float x : random.array(height_ * width_ * 3, 0, 255)) picture_.push_back(static_cast<uint8_t>(x));
    for (float x : random.array(height_ * width_, 0, 255)) marks_.push_back(static_cast<uint8_t>(x));
    if (b.byte() % 4 == 0) std::fill(marks_.begin(), marks_.end(), b.byte());
    poke(b, {&color_, &alpha_, &background_, &weights_});
  }

  bool possible() const { return true; }

  Results run(const Executor& executor) const {
    Results r;
    const Photo p = {color_.data(),      alpha_.data(),   picture_.data(), marks_.data(),
                     background_.data(), weights_.data(), height_,         width_};
    float *loss = r.floats(1), *terms = r.floats(kPhotoTerms), *d_color = r.floats(height_ * width_ * 3);
    photo(p, loss, terms, d_color, r.floats(height_ * width_), executor);
    return r;
  }

  void check(const Results&) const {}

 private:
  int64_t height_, width_;
  Floats color_, alpha_, background_, weights_;
  std::vector<uint8_t> picture_, marks_;
};

// A perceptron and its gradients.
class MlpCase {
 public:
  explicit MlpCase(Bytes& b) {
    const uint32_t layers = b.byte(), points = b.byte();
    sizes_.resize(layers < 240 ? 2 + layers % 3 : layers % 12 + 1);
    for (int32_t& size : sizes_) {
      const uint32_t kind = b.byte();
      size = kind < 200 ? 1 + static_cast<int32_t>(kind % 5) : kind < 253 ? 6 + static_cast<int32_t>(kind % 8) : b.integer();
    }
    mlp_.sizes = sizes_.data();
    mlp_.layers = static_cast<int>(sizes_.size()) - 1;
    mlp_.points = points < 200 ? points % 20 : points < 254 ? 250 + points % 14 : points == 255 ? 4500 : 520;
    possible_ = can_multiply(mlp_) && mlp_weights(mlp_) <= 1 << 14;
    for (size_t i = 0; possible_ && i < sizes_.size(); ++i) possible_ = sizes_[i] <= 100;
    if (!possible_) return;
    Random random(b.word());
    x_ = random.array(sizes_.front() * mlp_.points, -1, 1);
    weights_ = random.array(mlp_weights(mlp_), -1, 1);
    d_out_ = random.array(sizes_.back() * mlp_.points, -1, 1);
    start_ = random.array(sizes_[1] * mlp_.points, -1, 1);
    poke(b, {&x_, &weights_, &d_out_, &start_});
  }
  MlpCase(const MlpCase&) = delete;

  bool possible() const { return possible_; }

  Results run(const Executor& executor) const {
    Results r;
    const int64_t results = sizes_.back() * mlp_.points;
    mlp_forward(mlp_, nullptr, x_.data(), weights_.data(), r.floats(results), executor);
    mlp_forward(mlp_, start_.data(), x_.data(), weights_.data(), r.floats(results), executor);
    float* d_x = r.floats(static_cast<int64_t>(x_.size()));
    mlp_backward(mlp_, x_.data(), weights_.data(), d_out_.data(), d_x, r.floats(static_cast<int64_t>(weights_.size())),
                 executor);
    return r;
  }

  void check(const Results&) const {}

 private:
  Mlp mlp_ = {};
  std::vector<int32_t> sizes_;
  bool possible_;
  Floats x_, weights_, d_out_, start_;
};

// A perceptron with gated conditions, and its gradients.
class GatedCase {
 public:
  explicit GatedCase(Bytes& b) {
    const uint32_t points = b.byte(), odd = b.byte();
    m_.points = points < 200 ? points % 20 : points < 254 ? 250 + points % 14 : points == 255 ? 4500 : 520;
    const auto size = [&b] { return 1 + static_cast<int32_t>(b.byte() % 13); };
    const int32_t in = size(), heights[] = {size(), size()};
    for (int i = 0; i < kGates; ++i) {
      gate_sizes_[i] = {in, heights[i]};
      if (b.byte() % 2) gate_sizes_[i].insert(gate_sizes_[i].begin() + 1, size());
      gates_[i].net = {gate_sizes_[i].data(), static_cast<int>(gate_sizes_[i].size()) - 1, m_.points};
      gates_[i].rectified = i == 1;
    }
    sizes_ = {in + heights[0] + heights[1], size(), size()};
    if (odd > 250) sizes_[odd % 3] = b.integer();
    m_ = {sizes_.data(), 2, m_.points};
    if (!possible()) return;
    Random random(b.word());
    x_ = random.array(in * m_.points, -1, 1);
    weights_ = random.array(mlp_weights(m_), -1, 1);
    d_out_ = random.array(sizes_[2] * m_.points, -1, 1);
    for (int i = 0; i < kGates; ++i) {
      gate_weights_[i] = random.array(mlp_weights(gates_[i].net), -1, 1);
      conditions_[i] = random.array(heights[i], -1, 1);
    }
    poke(b, {&x_, &weights_, &d_out_, &gate_weights_[0], &gate_weights_[1], &conditions_[0], &conditions_[1]});
    for (int i = 0; i < kGates; ++i) {
      gates_[i].weights = gate_weights_[i].data();
      gates_[i].condition = conditions_[i].data();
    }
  }
  GatedCase(const GatedCase&) = delete;

  bool possible() const { return can_gate(m_, gates_) && mlp_weights(m_) <= 1 << 14; }

  Results run(const Executor& executor) const {
    Results r;
    const auto like = [&r](const Floats& given) { return r.floats(static_cast<int64_t>(given.size())); };
    gated_forward(m_, gates_, x_.data(), weights_.data(), like(d_out_), executor);
    float *d_x = like(x_), *d_weights = like(weights_);
    GateGradients d_gates[kGates];
    for (int i = 0; i < kGates; ++i) d_gates[i] = {like(gate_weights_[i]), like(conditions_[i])};
    gated_backward(m_, gates_, x_.data(), weights_.data(), d_out_.data(), d_x, d_weights, d_gates, executor);
    return r;
  }

  void check(const Results&) const {}

 private:
  Mlp m_ = {};
  Gate gates_[kGates] = {};
  std::vector<int32_t> sizes_, gate_sizes_[kGates];
  Floats x_, weights_, d_out_, gate_weights_[kGates], conditions_[kGates];
};

// Adam's step on a few arrays, which are changed in place: here copies of them.
class AdamCase {
 public:
  explicit AdamCase(Bytes& b) {
    rule_ = {0.9, 0.999, 1e-15f, 0.1f, 0.001f};
    if (b.byte() > 250) rule_.left1 = rule_.left2 = b.value();
    arrays_.resize(b.byte() % 4);
    Random random(b.word());
    for (Arrays& a : arrays_) {
      const uint32_t period = b.byte(), repeats = b.byte();
      a.period = 1 + period % 9;
      const int64_t size = a.period * (repeats < 250 ? repeats % 30 : 9000);
      a.decay = repeats % 2 ? 0.0f : 1e-4f;
      a.rates = random.array(a.period, 0, 0.1f);
      a.gradient = random.array(size, -1, 1);
      a.state = random.array(3 * size, 0, 1);
    }
    for (Arrays& a : arrays_) poke(b, {&a.rates, &a.gradient, &a.state});
  }

  bool possible() const { return true; }

  Results run(const Executor& executor) const {
    Results r;
    std::vector<AdamLeaf> leaves;
    for (const Arrays& a : arrays_) {
      const int64_t size = static_cast<int64_t>(a.gradient.size());
      float* state[3];
      for (int i = 0; i < 3; ++i) {
        state[i] = r.floats(size);
        std::copy_n(a.state.data() + i * size, size, state[i]);
      }
      leaves.push_back({a.rates.data(), a.gradient.data(), state[0], state[1], state[2], size, a.period, a.decay});
    }
    adam(rule_, leaves.data(), static_cast<int64_t>(leaves.size()), executor);
    return r;
  }

  void check(const Results&) const {}

 private:
  struct Arrays {
    int64_t period;
    float decay;
    Floats rates, gradient, state;
  };
  AdamRule rule_;
  std::vector<Arrays> arrays_;
};

// Attention to a few tokens with the layers behind it, there and back.
class AttendCase {
 public:
  explicit AttendCase(Bytes& b) {
    const auto size = [&b](int most) { return 1 + static_cast<int>(b.byte()) % most; };
    const uint32_t points = b.byte();
    a_.tokens = b.byte() < 240 ? size(4) : kMostTokens;
    a_.heads = size(3);
    a_.seen = size(9);
    a_.hidden = size(9);
    a_.second = size(9);
    a_.last = size(5);
    a_.points = points < 224 ? points % 20 : points < 252 ? 250 + points % 14 : 1100;
    Random random(b.word());
    const int64_t weights = a_.weights();
    const int64_t sizes[] = {a_.seen * a_.points, weights * a_.seen, a_.hidden * weights, a_.hidden,
                             int64_t{a_.second} * a_.hidden, a_.second * weights, int64_t{a_.last} * a_.second};
    for (int i = 0; i < 7; ++i) arrays_[i] = random.array(sizes[i], -1, 1);
    d_out_ = random.array(a_.last * a_.points, -1, 1);
    poke(b, {&arrays_[0], &arrays_[1], &arrays_[2], &arrays_[3], &arrays_[4], &arrays_[5], &arrays_[6], &d_out_});
  }

  bool possible() const { return true; }

  Results run(const Executor& executor) const {
    Results r;
    const auto like = [&r](const Floats& given) { return r.floats(static_cast<int64_t>(given.size())); };
    const AttendArrays arrays = {arrays_[0].data(), arrays_[1].data(), arrays_[2].data(), arrays_[3].data(),
                                 arrays_[4].data(), arrays_[5].data(), arrays_[6].data()};
    attend(a_, arrays, like(d_out_), executor);
    float* d[7];
    for (int i = 0; i < 7; ++i) d[i] = like(arrays_[i]);
    attend_backward(a_, arrays, d_out_.data(), {d[0], d[1], d[2], d[3], d[4], d[5], d[6]}, executor);
    return r;
  }

  void check(const Results&) const {}

 private:
  Attend a_ = {};
  Floats arrays_[7], d_out_;
};

// The encoder of sound, there and back, and whether its gradients could be stepped along.
class ListenCase {
 public:
  explicit ListenCase(Bytes& b) {
    const auto size = [&b](int most) { return int64_t{1} + b.byte() % most; };
    l_.tokens = size(9);
    l_.steps = b.byte() < 224 ? size(17) : 40;
    int64_t in = size(40);
    for (int i = 0; i < kListenLayers; ++i) {
      const bool last = i == kListenLayers - 1;
      l_.layers[i].in = last ? l_.tokens : in;
      l_.layers[i].out = in = last ? l_.tokens : i == kListenLayers - 2 ? 1 : size(40);
    }
    const uint32_t odd = b.byte();
    if (odd > 250) l_.layers[odd % kListenLayers].out = b.integer();
    if (!possible()) return;
    Random random(b.word());
    windows_ = random.array(l_.tokens * l_.steps * l_.layers[0].in, -1, 1);
    for (int i = 0; i < kListenLayers; ++i) {
      arrays_[2 * i] = random.array(listen_taps(i) * l_.layers[i].in * l_.layers[i].out, -1, 1);
      arrays_[2 * i + 1] = random.array(l_.layers[i].out, -1, 1);
    }
    d_tokens_ = random.array(l_.tokens * l_.features(), -1, 1);
    d_pooled_ = random.array(l_.features(), -1, 1);
    poke(b, {&windows_, &arrays_[0], &arrays_[7], &arrays_[8], &arrays_[11], &arrays_[12], &arrays_[22], &d_tokens_,
             &d_pooled_});
    l_.windows = windows_.data();
    for (int i = 0; i < kListenLayers; ++i) {
      l_.layers[i].kernel = arrays_[2 * i].data();
      l_.layers[i].bias = arrays_[2 * i + 1].data();
    }
  }
  ListenCase(const ListenCase&) = delete;

  bool possible() const { return can_listen(l_); }

  Results run(const Executor& executor) const {
    Results r(4 + 2 * kListenLayers);
    const auto like = [&r](const Floats& given) { return r.floats(static_cast<int64_t>(given.size())); };
    float* tokens = like(d_tokens_);
    listen(l_, tokens, like(d_pooled_));
    ListenSlopes slopes[kListenLayers];
    float* d_windows = like(windows_);
    for (int i = 0; i < kListenLayers; ++i) slopes[i] = {like(arrays_[2 * i]), like(arrays_[2 * i + 1])};
    listen_backward(l_, d_tokens_.data(), d_pooled_.data(), d_windows, slopes);
    std::vector<const float*> gradients;
    std::vector<int64_t> sizes;
    for (int i = 0; i < kListenLayers; ++i) {
      gradients.push_back(slopes[i].kernel);
      sizes.push_back(static_cast<int64_t>(arrays_[2 * i].size()));
    }
    *r.integers(1) = can_step(gradients.data(), sizes.data(), kListenLayers, executor);
    return r;
  }

  void check(const Results& r) const {
    bool good = true;
    for (int i = 0; i < kListenLayers; ++i)
      for (float x : r[3 + 2 * i]) good &= std::isfinite(x * x);
    expect(r.ints(0)[0] == good, "steps are taken where squares are finite");
  }

 private:
  Listen l_ = {};
  Floats windows_, arrays_[2 * kListenLayers], d_tokens_, d_pooled_;
};

// Calls test(case) with the case that the bytes stand for, unless its sizes are ones that the kernels refuse.
template <class Test>
void with_case(Bytes& bytes, Test&& test) {
  const auto run = [&test](const auto& c) {
    if (c.possible()) test(c);
  };
  const uint32_t which = bytes.byte() % 19;
  if (which < 7) return run(SceneCase(bytes));
  if (which < 9) return run(PaintCase(bytes));
  if (which < 13) return run(GridCase(bytes));
  if (which == 13) return run(ImageCase(bytes));
  if (which == 14) return run(MlpCase(bytes));
  if (which == 15) return run(GatedCase(bytes));
  if (which == 16) return run(AdamCase(bytes));
  which == 17 ? run(AttendCase(bytes)) : run(ListenCase(bytes));
}

}  // namespace fuzz
