// Operands from bytes, and results that know whether they were written.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "rasterize.h"

namespace fuzz {

using namespace fg3dgs;
using Floats = std::vector<float>;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "ERROR: a kernel broke its word: %s\n", what);
  std::abort();
}

inline void expect(bool good, const char* what) {
  if (!good) fail(what);
}

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}
  bool empty() const { return at_ == end_; }
  uint32_t byte() { return empty() ? 0 : *at_++; }
  uint32_t word() { return byte() | byte() << 8; }
  int32_t integer() { return static_cast<int32_t>(word() | word() << 16); }

  float value() {
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();
    constexpr float kValues[] = {0,     -0.0f,  kNan,   -kNan,       kInf,        -kInf,    FLT_MIN, 1e-45f,    -1e-40f,
                                 1e-30f, 1e-20f, 1e-10f, 1.0f / 255,  0.00392157f, 0.00999f, 0.01f,   0.5f,      0.99f,
                                 1,      -1,     15.5f,  65535,       16777216,    -2.1e9f,  4.3e9f,  1e10f,     1e19f,
                                 1.9e19f, 1e30f, -1e30f, FLT_MAX,     -FLT_MAX};
    const uint32_t which = byte();
    if (which < sizeof kValues / sizeof *kValues) return kValues[which];
    const int32_t bits = integer();
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }

 private:
  const uint8_t *at_, *end_;
};

// Ordinary operands from a seed.
class Random {
 public:
  explicit Random(uint32_t seed) : state_(seed * 2654435761u + 0x9e3779b9u) {}
  float uniform(float low, float high) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 17;
    state_ ^= state_ << 5;
    return low + (high - low) * static_cast<float>(state_ >> 8) * 0x1p-24f;
  }
  Floats array(int64_t count, float low, float high) {
    Floats out(count);
    for (float& x : out) x = uniform(low, high);
    return out;
  }

 private:
  uint32_t state_;
};

inline void poke(Bytes& bytes, std::initializer_list<Floats*> arrays) {
  for (int i = 0; i < 64 && !bytes.empty(); ++i) {
    Floats& array = *arrays.begin()[bytes.byte() % arrays.size()];
    const uint32_t where = bytes.word();
    const float value = bytes.value();
    if (!array.empty()) array[where % array.size()] = value;
  }
}

// Results, filled with a NaN of its own kind: what a kernel forgot to write is noticed.
class Results {
 public:
  static constexpr uint32_t kUnwritten = 0x7fc5dead;
  explicit Results(size_t most = 11) { arrays_.reserve(most); }

  float* floats(int64_t count) {
    float mark;
    std::memcpy(&mark, &kUnwritten, sizeof mark);
    arrays_.emplace_back(count, mark);
    return arrays_.back().data();
  }
  int32_t* integers(int64_t count) {
    integers_.emplace_back(count, static_cast<int32_t>(kUnwritten));
    return integers_.back().data();
  }
  const Floats& operator[](size_t i) const { return arrays_[i]; }
  const std::vector<int32_t>& ints(size_t i) const { return integers_[i]; }

  void expect_written() const {
    const auto unwritten = [](const auto& array) {
      for (const auto& x : array) {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        if (bits == kUnwritten) return true;
      }
      return false;
    };
    for (const auto& array : arrays_) expect(!unwritten(array), "a result is not written everywhere");
    for (const auto& array : integers_) expect(!unwritten(array), "a result is not written everywhere");
  }

  bool same_bits(const Results& other) const { return same(arrays_, other.arrays_) && same(integers_, other.integers_); }

 private:
  template <class T>
  static bool same(const std::vector<std::vector<T>>& a, const std::vector<std::vector<T>>& b) {
    bool equal = a.size() == b.size();
    for (size_t i = 0; equal && i < a.size(); ++i)
      equal = a[i].size() == b[i].size() && (a[i].empty() || !std::memcmp(a[i].data(), b[i].data(), 4 * a[i].size()));
    return equal;
  }
  std::vector<Floats> arrays_;
  std::vector<std::vector<int32_t>> integers_;
};

inline bool all_nan(const Floats& array) {
  for (float x : array)
    if (!std::isnan(x)) return false;
  return true;
}

}  // namespace fuzz
