// Sixteen lanes of float32 or int32: one AVX-512 register, or two AVX2 ones.
//
// Everything is written once over these lanes. Both forms do the same operations in the same order, so the results
// have the same bits; the build forbids the compiler to contract a * b + c by itself.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

namespace pawl {
namespace PAWL_ISA {

constexpr int kLanes = 16;

#if defined(__AVX512F__)

using F = __m512;
using I = __m512i;

INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
INLINE F set(float x) { return _mm512_set1_ps(x); }
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
INLINE F abs(F a) { return _mm512_abs_ps(a); }
INLINE F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE I to_int(F a) { return _mm512_cvtps_epi32(a); }  // to nearest
INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
INLINE I bits(F a) { return _mm512_castps_si512(a); }
INLINE F from_bits(I a) { return _mm512_castsi512_ps(a); }

INLINE I load(const int32_t* p) { return _mm512_loadu_si512(p); }
INLINE I load_bytes(const void* p) { return _mm512_loadu_si512(p); }  // 64 bytes: four per lane
INLINE void store(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
INLINE I set(int32_t x) { return _mm512_set1_epi32(x); }
INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
INLINE I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
INLINE I mask(I a, I b) { return _mm512_and_si512(a, b); }
template <int BITS> INLINE I shift_left(I a) { return _mm512_slli_epi32(a, BITS); }
template <int BITS> INLINE I shift_right(I a) { return _mm512_srai_epi32(a, BITS); }
INLINE I widen(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store_bytes(void* p, I x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }  // the low bytes
INLINE F first(int n, F a, F b) { return _mm512_mask_mov_ps(b, (__mmask16)((1u << n) - 1), a); }  // a below lane n
INLINE I dot4(I sum, I u, I s) { return _mm512_dpbusd_epi32(sum, u, s); }

// Lane i takes what lane i ^ BIT holds.
template <int BIT> INLINE F exchange(F a) {
  if (BIT == 8) return _mm512_shuffle_f32x4(a, a, 0x4e);
  if (BIT == 4) return _mm512_shuffle_f32x4(a, a, 0xb1);
  return _mm512_permute_ps(a, BIT == 2 ? 0x4e : 0xb1);
}

INLINE __m256 low(F a) { return _mm512_castps512_ps256(a); }
INLINE __m256 high(F a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)); }

#else

struct F { __m256 a, b; };
struct I { __m256i a, b; };

INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
INLINE F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
INLINE F fnma(F x, F y, F z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE F abs(F x) {
  __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE F round(F x) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)};
}
INLINE I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE I bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
INLINE F from_bits(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

INLINE I load_bytes(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
INLINE I load(const int32_t* p) { return load_bytes(p); }
INLINE void store(int32_t* p, I x) {
  _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
INLINE I set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE I sub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
INLINE I mask(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int BITS> INLINE I shift_left(I x) { return {_mm256_slli_epi32(x.a, BITS), _mm256_slli_epi32(x.b, BITS)}; }
template <int BITS> INLINE I shift_right(I x) { return {_mm256_srai_epi32(x.a, BITS), _mm256_srai_epi32(x.b, BITS)}; }
INLINE I widen(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
INLINE void store_bytes(void* p, I x) {
  x = mask(x, set(0xff));
  __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);  // packing works per 128-bit half
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
INLINE F first(int n, F x, F y) {
  __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256 a = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
  __m256 b = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane));
  return {_mm256_blendv_ps(y.a, x.a, a), _mm256_blendv_ps(y.b, x.b, b)};
}
#if defined(__AVXVNNI__)
INLINE __m256i dot4(__m256i sum, __m256i u, __m256i s) { return _mm256_dpbusd_avx_epi32(sum, u, s); }
#else
// Even and odd bytes apart: one product of u8 by s8 fits 16 bits, the sum of two may not.
INLINE __m256i dot4(__m256i sum, __m256i u, __m256i s) {
  __m256i even = _mm256_set1_epi16(0x00ff), ones = _mm256_set1_epi16(1);
  __m256i p = _mm256_maddubs_epi16(_mm256_and_si256(u, even), s);
  __m256i q = _mm256_maddubs_epi16(_mm256_andnot_si256(even, u), s);
  return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(p, ones), _mm256_madd_epi16(q, ones)));
}
#endif
INLINE I dot4(I sum, I u, I s) { return {dot4(sum.a, u.a, s.a), dot4(sum.b, u.b, s.b)}; }

template <int BIT> INLINE F exchange(F x) {
  if (BIT == 8) return {x.b, x.a};
  if (BIT == 4) return {_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1)};
  constexpr int order = BIT == 2 ? 0x4e : 0xb1;
  return {_mm256_permute_ps(x.a, order), _mm256_permute_ps(x.b, order)};
}

INLINE __m256 low(F x) { return x.a; }
INLINE __m256 high(F x) { return x.b; }

#endif

// dot4(sum, u, s): in each lane, sum + the products of its four unsigned bytes of u by the signed ones of s. Exact.

INLINE I set4(const void* p) {  // the four bytes at p, in every lane
  int32_t x;
  memcpy(&x, p, 4);
  return set(x);
}
INLINE float reduce_add(F x) {
  __m256 y = _mm256_add_ps(low(x), high(x));
  __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_add_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
INLINE float reduce_max(F x) {
  __m256 y = _mm256_max_ps(low(x), high(x));
  __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_max_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}

// 2^x, relative error below 2e-7, for any x: beyond [-125, 126] the result is that of the bound.
INLINE F exp2(F x) {
  x = max(min(x, set(126.f)), set(-125.f));
  F n = round(x), f = sub(x, n);
  F p = set(1.5403530e-4f);  // the series of 2^f, on [-0.5, 0.5]
  p = fma(p, f, set(1.3333558e-3f));
  p = fma(p, f, set(9.6181291e-3f));
  p = fma(p, f, set(5.5504109e-2f));
  p = fma(p, f, set(2.4022651e-1f));
  p = fma(p, f, set(6.9314718e-1f));
  p = fma(p, f, set(1.f));
  return from_bits(add(bits(p), shift_left<23>(to_int(n))));
}

// 1 / x for x in [1, 2^100]: a guess from the exponent and three Newton steps; cheaper than dividing sixteen lanes.
INLINE F reciprocal(F x) {
  F r = from_bits(sub(set(0x7ef311c3), bits(x)));
  for (int i = 0; i < 3; i++) r = mul(r, fnma(x, r, set(2.f)));
  return r;
}

INLINE F load_upto(const float* p, int n) {  // the first n of sixteen values, then zeros
  if (n >= kLanes) return load(p);
  alignas(64) float part[kLanes] = {};
  memcpy(part, p, n * sizeof(float));
  return load(part);
}

INLINE void store_upto(float* p, F x, int n) {  // the first n of sixteen values
  if (n >= kLanes) return store(p, x);
  alignas(64) float part[kLanes];
  store(part, x);
  memcpy(p, part, n * sizeof(float));
}

constexpr float kLog2E = 1.44269504f;

INLINE F sigmoid(F x) {
  F e = exp2(min(mul(x, set(-kLog2E)), set(99.f)));
  return reciprocal(add(e, set(1.f)));
}

// One stage of the butterfly inside sixteen lanes: sums where BIT of the lane is 0, differences where it is 1.
template <int BIT> INLINE F butterfly(F x) {
  alignas(64) static constexpr float kSigns[4][kLanes] = {
      {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
      {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
      {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
      {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1}};
  return fma(x, load(kSigns[BIT == 1 ? 0 : BIT == 2 ? 1 : BIT == 4 ? 2 : 3]), exchange<BIT>(x));
}

// 64 values times the orthonormal Walsh-Hadamard matrix, which is its own inverse. It spreads a few large values over
// all 64, so that their 8-bit levels are fine enough (arXiv:2404.00456).
INLINE void rotate64(float* x) {
  F a = load(x), b = load(x + 16), c = load(x + 32), d = load(x + 48), size = set(0.125f);
  F e = add(a, b), f = sub(a, b), g = add(c, d), h = sub(c, d);
  F parts[4] = {add(e, g), add(f, h), sub(e, g), sub(f, h)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    store(x + i * kLanes, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(mul(parts[i], size))))));
}

}  // namespace PAWL_ISA
}  // namespace pawl
