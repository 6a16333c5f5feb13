// Sixteen numbers at once, for processors with AVX-512 BF16: bf16 is read and written as `numbers.h` does it, the
// exponential is good to 3e-6, where bf16 is to 2e-3.
#pragma once

#ifdef __AVX512BF16__

#include <cstdint>
#include <cstring>

#include <immintrin.h>

#include "numbers.h"

namespace {

constexpr float LOG2_E = 1.44269504088896341f;
constexpr __mmask16 ALL = 0xffff;

inline __m512 all_of(float x) { return _mm512_set1_ps(x); }

// The first of `left` numbers, sixteen at most.
inline __mmask16 first_of(int64_t left) { return left >= 16 ? ALL : static_cast<__mmask16>((1u << left) - 1u); }

inline __m512 load16(const bf16* p, __mmask16 lanes = ALL) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}
inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
inline void store16(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
inline void store16(bf16* to, __m512 x, __mmask16 lanes = ALL) {
  _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}

// 2^x, cut as `numbers.h` cuts its exponential: zero below e^-60; not a number where x is none. Zero outside of `lanes`.
inline __m512 exp2_of(__m512 x, __mmask16 lanes = ALL) {
  lanes = _mm512_mask_cmp_ps_mask(lanes, x, all_of(-86.5f), _CMP_NLT_UQ);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_fmadd_ps(all_of(9.5701011693e-3f), r, all_of(5.5917860261e-2f));
  p = _mm512_fmadd_ps(p, r, all_of(2.4024744846e-1f));
  p = _mm512_fmadd_ps(p, r, all_of(6.9312181475e-1f));
  p = _mm512_fmadd_ps(p, r, all_of(9.9999926144e-1f));
  return _mm512_maskz_scalef_ps(lanes, p, n);
}

// 1 / (1 + e^-x); the exponent is cut where its power would be infinite.
inline __m512 sigmoid_of(__m512 x) {
  const __m512 power = _mm512_min_ps(all_of(86.5f), _mm512_mul_ps(x, all_of(-LOG2_E)));  // x where one is not a number
  return _mm512_div_ps(all_of(1.0f), _mm512_add_ps(all_of(1.0f), exp2_of(power)));
}

}  // namespace
#endif
