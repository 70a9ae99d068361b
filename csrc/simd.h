// Vectors of the instruction set that the including file is compiled for.
//
// FG_ISA names the set and the namespace. Everything that is compiled more than once, for several sets, lives in
// that namespace: otherwise the linker would keep one copy of each inline function, perhaps the one that this
// processor cannot run. For the same reason those files use no standard containers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FG_INLINE inline __attribute__((always_inline))

namespace fg3dgs {
namespace FG_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kWidth)));
typedef int32_t vi __attribute__((vector_size(4 * kWidth)));
typedef uint32_t vu __attribute__((vector_size(4 * kWidth)));  // for arithmetic on bits, which may wrap

FG_INLINE vf broadcast(float x) { return x - vf{}; }
FG_INLINE vf zero() { return vf{}; }

FG_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

FG_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// One bit per lane of a comparison's result.
FG_INLINE uint32_t bits(vi mask) {
#if defined(__AVX512F__)
  return static_cast<uint32_t>(_mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#else
  uint32_t r = 0;
  for (int l = 0; l < kWidth; ++l) r |= (mask[l] != 0 ? 1u : 0u) << l;
  return r;
#endif
}

// bits(a >= b) without the detour through a vector.
FG_INLINE uint32_t bits_at_least(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GE_OQ);
#else
  return bits(a >= b);
#endif
}

// p[index[l]] in lane l.
FG_INLINE vf gather(const float* p, vi index) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_i32gather_ps(reinterpret_cast<__m512i>(index), p, 4));
#elif defined(__AVX2__)
  return reinterpret_cast<vf>(_mm256_i32gather_ps(p, reinterpret_cast<__m256i>(index), 4));
#else
  vf v;
  for (int l = 0; l < kWidth; ++l) v[l] = p[index[l]];
  return v;
#endif
}

FG_INLINE vi lane_numbers() {
  vi v;
  for (int l = 0; l < kWidth; ++l) v[l] = l;
  return v;
}

// As on x86: the second operand where either is NaN.
FG_INLINE vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vf>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

FG_INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vf>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

FG_INLINE vf clamp(vf x, vf low, vf high) { return min(max(x, low), high); }

// Lane by lane; the compiler turns these loops into single instructions where the set has them.
FG_INLINE vf sqrt(vf x) {
  alignas(64) float a[kWidth];
  store(a, x);
  for (int l = 0; l < kWidth; ++l) a[l] = __builtin_sqrtf(a[l]);
  return load(a);
}

FG_INLINE vf floor(vf x) {
  alignas(64) float a[kWidth];
  store(a, x);
  for (int l = 0; l < kWidth; ++l) a[l] = __builtin_floorf(a[l]);
  return load(a);
}

FG_INLINE vf ceil(vf x) { return -floor(-x); }

FG_INLINE vi finite(vf x) { return (x - x) == 0.0f; }

// 2^x for x in [-126, 0.5], relative error below 2e-7; anything else gives garbage, never a trap.
FG_INLINE vf exp2(vf x) {
#if defined(__AVX512DQ__)
  const __m512 e = reinterpret_cast<__m512>(x);
  const vf f = reinterpret_cast<vf>(_mm512_reduce_ps(e, 0));  // x - round(x)
  const vf n = x - f;
#else
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const vf shifted = x + kRound;
  const vf f = x - (shifted - kRound);
#endif
  // Minimax on [-0.5, 0.5].
  vf p = f * 1.32647272e-03f + 9.67151264e-03f;
  p = p * f + 5.55073374e-02f;
  p = p * f + 2.40222421e-01f;
  p = p * f + 6.93146978e-01f;
  p = p * f + 1.0f;
#if defined(__AVX512DQ__)
  return reinterpret_cast<vf>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  return reinterpret_cast<vf>(reinterpret_cast<vu>(p) + (reinterpret_cast<vu>(shifted) << 23));
#endif
}

// log2(x) for normal x > 0, absolute error below 4e-7.
FG_INLINE vf log2(vf x) {
  vi i = reinterpret_cast<vi>(reinterpret_cast<vu>(x) - 0x3f3504f3);  // bits of sqrt(1/2): the mantissa goes to [sqrt(1/2), sqrt(2))
  const vi exponent = i >> 23;
  i = (i & 0x007fffff) + 0x3f3504f3;
  const vf m = reinterpret_cast<vf>(i);
  const vf s = (m - 1.0f) / (m + 1.0f);  // log2(m) = 2 / ln 2 * atanh(s)
  const vf s2 = s * s;
  vf p = s2 * 0.4317494f + 0.5767138f;
  p = p * s2 + 0.96179885f;
  p = p * s2 + 2.88539008f;
  return p * s + __builtin_convertvector(exponent, vf);
}

// 1 / x to about 1e-7 for normal x.
FG_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf r = reinterpret_cast<vf>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}

#if defined(__AVX512F__)
FG_INLINE vf add_pairs(vf a, vf b) {  // sums of neighbours: a's in the low half, b's in the high half
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#elif defined(__AVX2__)
FG_INLINE vf add_pairs(vf a, vf b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
#else
FG_INLINE vf add_pairs(vf a, vf b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
}
#endif

// Lane i of the result is the sum of v[i]'s lanes, for i < count; N = kWidth.
template <int N>
FG_INLINE vf sum_lanes(const vf* v, int count) {
  if (count <= 0) return zero();
  if constexpr (N == 1) {
    return v[0];
  } else {
    return add_pairs(sum_lanes<N / 2>(v, count), sum_lanes<N / 2>(v + N / 2, count - N / 2));
  }
}

}  // namespace FG_ISA
}  // namespace fg3dgs
