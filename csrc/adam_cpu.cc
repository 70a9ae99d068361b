// Adam: lines of all arrays, threads.
#include "adam.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "clones.h"
#include "parallel.h"

namespace fg3dgs {
namespace {

constexpr int64_t kLine = 1024;  // rates are written out once per leaf for at least so many values
constexpr int64_t kTask = 16 * kLine;
constexpr int64_t kGrain = 64;  // values whose step is left out together

// Whether all are zero, of either sign.
FG3DGS_CLONES
bool rests(const float* gradient, const float* mean, const float* square, int64_t count) {
  uint32_t any = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits[3];
    std::memcpy(&bits[0], gradient + i, sizeof(float));
    std::memcpy(&bits[1], mean + i, sizeof(float));
    std::memcpy(&bits[2], square + i, sizeof(float));
    any |= bits[0] | bits[1] | bits[2];
  }
  return any << 1 == 0;
}

FG3DGS_CLONES
bool finite_squares(const float* x, int64_t count) {
  int32_t bad = 0;  // no early way out: so the loop is vectors
  for (int64_t i = 0; i < count; ++i) bad |= x[i] * x[i] <= FLT_MAX ? 0 : 1;
  return !bad;
}

FG3DGS_CLONES
void step_grain(const AdamRule& rule, float decay, const float* __restrict rates, const float* __restrict gradient,
                int64_t count, float* __restrict value, float* __restrict mean, float* __restrict square) {
  const auto beta1 = static_cast<float>(rule.beta1), beta2 = static_cast<float>(rule.beta2);
  const auto gain1 = static_cast<float>(1.0 - rule.beta1), gain2 = static_cast<float>(1.0 - rule.beta2);
  const float epsilon = rule.epsilon;
  const float scale1 = 1.0f / rule.left1, scale2 = 1.0f / rule.left2;
  for (int64_t i = 0; i < count; ++i) {
    const float g = gradient[i];
    const float m = beta1 * mean[i] + gain1 * g, s = beta2 * square[i] + gain2 * (g * g);
    const float direction = m * scale1 / (std::sqrt(s * scale2) + epsilon);
    value[i] -= rates[i] * (direction + decay * value[i]);
    mean[i] = m;
    square[i] = s;
  }
}

FG3DGS_CLONES
void decay_grain(float decay, const float* __restrict rates, int64_t count, float* __restrict value) {
  for (int64_t i = 0; i < count; ++i) value[i] -= rates[i] * (decay * value[i]);
}

// Most of a grid's tables lie where no Gaussian is: there a step only decays. The bits are those of the full step.
void step_line(const AdamRule& rule, float decay, const float* rates, const float* gradient, int64_t count,
               float* value, float* mean, float* square) {
  for (int64_t at = 0; at < count; at += kGrain) {
    const int64_t some = std::min(kGrain, count - at);
    if (rule.epsilon > 0 && rests(gradient + at, mean + at, square + at, some)) {
      if (decay) decay_grain(decay, rates + at, some, value + at);
    } else {
      step_grain(rule, decay, rates + at, gradient + at, some, value + at, mean + at, square + at);
    }
  }
}

}  // namespace

void adam(const AdamRule& rule, const AdamLeaf* leaves, int64_t count, const Executor& executor) {
  std::vector<float> rates;
  std::vector<int64_t> line(count), start(count + 1), first(count + 1);  // first: rates' beginnings
  for (int64_t i = 0; i < count; ++i) {
    const int64_t period = leaves[i].period, shortest = std::min(kLine, std::max<int64_t>(leaves[i].size, 1));
    line[i] = (shortest + period - 1) / period * period;
    const int64_t each = std::max<int64_t>(kTask / line[i], 1) * line[i];
    start[i + 1] = start[i] + (leaves[i].size + each - 1) / each;
    first[i + 1] = first[i] + line[i];
  }
  rates.resize(first[count]);
  for (int64_t i = 0; i < count; ++i)
    for (float *to = rates.data() + first[i], *end = to + line[i]; to < end; to += leaves[i].period)
      std::copy_n(leaves[i].rates, leaves[i].period, to);
  parallel_for(executor, start[count], [&](int, int64_t task) {
    const int64_t i = std::upper_bound(start.begin(), start.end(), task) - start.begin() - 1;
    const AdamLeaf& leaf = leaves[i];
    const int64_t each = std::max<int64_t>(kTask / line[i], 1) * line[i], from = (task - start[i]) * each;
    for (int64_t at = from; at < std::min(from + each, leaf.size); at += line[i])
      step_line(rule, leaf.decay, rates.data() + first[i], leaf.gradient + at, std::min(line[i], leaf.size - at),
                leaf.value + at, leaf.mean + at, leaf.square + at);
  });
}

bool can_step(const float* const* gradients, const int64_t* sizes, int64_t count, const Executor& executor) {
  std::vector<int64_t> start(count + 1);
  for (int64_t i = 0; i < count; ++i) start[i + 1] = start[i] + (sizes[i] + kTask - 1) / kTask;
  std::atomic<bool> good{true};
  parallel_for(executor, start[count], [&](int, int64_t task) {
    const int64_t i = std::upper_bound(start.begin(), start.end(), task) - start.begin() - 1;
    const int64_t from = (task - start[i]) * kTask;
    if (!finite_squares(gradients[i] + from, std::min(kTask, sizes[i] - from))) good = false;
  });
  return good;
}

}  // namespace fg3dgs
