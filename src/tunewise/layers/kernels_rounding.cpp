// Rows rounded to 8 bits with one scale each, for the products of `kernels_int8.cpp`: any rows to nearest, and the
// probabilities of a cross entropy at random. Compiled with `kernels.cpp`; the plain twins are in `int8.py` and
// `narrow_head.py`.
//
// M rows, K columns; T tokens, V vocabulary.

#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include <omp.h>

#include "numbers.h"
#include "panels.h"
#include "vectors.h"

namespace {

// q = round(x * col_scale / scale), scale = max|x * col_scale| / 127 of each row; a row of zeros has a scale of zero.
template <class S>
void quantize_rows(const S* x, const float* col_scale, int8_t* q, float* scale, int64_t M, int64_t K) {
#pragma omp parallel
  {
    std::vector<float> held(K);
    float* number = held.data();
#pragma omp for schedule(static)
    for (int64_t m = 0; m < M; ++m) {
      const S* row = x + m * K;
      float most = 0.0f, none = 0.0f;
      if (col_scale) {
#pragma omp simd
        for (int64_t k = 0; k < K; ++k) number[k] = load(row + k) * col_scale[k];
      } else {
#pragma omp simd
        for (int64_t k = 0; k < K; ++k) number[k] = load(row + k);
      }
#pragma omp simd reduction(max : most)
      for (int64_t k = 0; k < K; ++k) {
        const float size = std::fabs(number[k]);
        most = size > most ? size : most;
      }
#pragma omp simd reduction(+ : none)
      for (int64_t k = 0; k < K; ++k) none += number[k] * 0.0f;  // a maximum does not see what is not a number
      scale[m] = most / 127.0f + none;
      const float steps = most > 0.0f ? 127.0f / most : 0.0f;
      int8_t* out = q + m * K;
#pragma omp simd
      for (int64_t k = 0; k < K; ++k)
        out[k] = static_cast<int8_t>(static_cast<int32_t>(std::nearbyint(number[k] * steps)));
    }
  }
}

#ifdef __AVX512BF16__
template <>
void quantize_rows(const bf16* x, const float* col_scale, int8_t* q, float* scale, int64_t M, int64_t K) {
#pragma omp parallel for schedule(static)
  for (int64_t m = 0; m < M; ++m) {
    const bf16* row = x + m * K;
    const auto number = [&](int64_t k, __mmask16 lanes) {
      const __m512 n = load16(row + k, lanes);
      return col_scale ? _mm512_mul_ps(n, _mm512_maskz_loadu_ps(lanes, col_scale + k)) : n;
    };
    __m512 most_of = _mm512_setzero_ps(), none_of = most_of;
    for (int64_t k = 0; k < K; k += 16) {
      const __m512 n = number(k, first_of(K - k));
      most_of = _mm512_max_ps(most_of, _mm512_abs_ps(n));
      none_of = _mm512_fmadd_ps(n, _mm512_setzero_ps(), none_of);  // a maximum does not see what is not a number
    }
    const float most = _mm512_reduce_max_ps(most_of);
    scale[m] = most / 127.0f + _mm512_reduce_add_ps(none_of);
    const __m512 steps = all_of(most > 0.0f ? 127.0f / most : 0.0f);
    for (int64_t k = 0; k < K; k += 16) {
      const __mmask16 lanes = first_of(K - k);
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(number(k, lanes), steps));
      _mm512_mask_cvtepi32_storeu_epi8(q + m * K + k, lanes, rounded);
    }
  }
}
#endif

// Where the last digit of a rounded number goes: a sequence that fills [0, 1) evenly (multiples of the golden ratio), from a
// start that token and logit of the label decide, so that a run can be repeated.
inline uint32_t start_of(float logit, int64_t t) {
  uint32_t key = (std::bit_cast<uint32_t>(logit) ^ static_cast<uint32_t>(t) * 0x85ebca6bu) * 0xc2b2ae35u;
  return key ^ key >> 16;
}
inline float part_of(uint32_t start, uint32_t v) {
  return static_cast<float>((start + v * 0x9e3779b1u) >> 8) * 0x1p-24f;
}

// Cross entropy of each row, and its gradient in two parts: that of the label, `label_grad`, and for all others
// row_scale * q ~ scale * p * col_scale, rounded up or down at random to one of 255 steps, right on average. q takes the
// place of the logits, a row's at the beginning of theirs.
template <class S>
void rounded_cross_entropy(S* logits, const int64_t* labels, const float* col_scale, float* row_scale, float* label_grad,
                           float* loss, int64_t T, int64_t V, float scale) {
#pragma omp parallel
  {
    std::vector<float> held(V);
    float* number = held.data();
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; ++t) {
      const S* row = logits + t * V;
      const int64_t label = labels[t];
      const float target = load(row + label);
      float most = -INFINITY, sum = 0.0f, top = 0.0f;
#pragma omp simd reduction(max : most)
      for (int64_t v = 0; v < V; ++v) most = load(row + v) > most ? load(row + v) : most;
      const auto add = [&](int64_t begin, int64_t end) {
        float part = 0.0f, largest = 0.0f;
#pragma omp simd reduction(+ : part) reduction(max : largest)
        for (int64_t v = begin; v < end; ++v) {
          const float e = exp_of((load(row + v) - most) * scale), weighed = e * col_scale[v];
          number[v] = weighed;
          part += e;
          largest = weighed > largest ? weighed : largest;
        }
        sum += part;
        top = largest > top ? largest : top;
      };
      add(0, label);
      add(label + 1, V);
      const float log_of_sum = std::log(sum + exp_of((target - most) * scale));
      loss[t] = log_of_sum - (target - most) * scale;
      label_grad[t] = scale * std::expm1(-loss[t]);  // p - 1 without cancellation
      row_scale[t] = scale * top / 255.0f * std::exp(-log_of_sum);
      const float steps = top > 0.0f ? 255.0f / top : 0.0f;
      const uint32_t start = start_of(target, t);
      uint8_t* q = reinterpret_cast<uint8_t*>(logits + t * V);  // all of the row has been read
#pragma omp simd
      for (int64_t v = 0; v < V; ++v) {
        const float rounded = number[v] * steps + part_of(start, static_cast<uint32_t>(v));
        q[v] = static_cast<uint8_t>(static_cast<int32_t>(rounded < 255.0f ? rounded : 255.0f));
      }
      q[label] = 0;
    }
  }
}

#ifdef __AVX512BF16__
template <>
void rounded_cross_entropy(bf16* logits, const int64_t* labels, const float* col_scale, float* row_scale,
                           float* label_grad, float* loss, int64_t T, int64_t V, float scale) {
  const __m512 factor = all_of(scale * LOG2_E);
  const __m512i places = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(0x9e3779b1u));
#pragma omp parallel
  {
    static thread_local Room<float> room;
    float* number = room.of((V + 15) / 16 * 16);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; ++t) {
      bf16* row = logits + t * V;
      const int64_t label = labels[t];
      const float target = load(row + label);
      __m512 most_of = all_of(-INFINITY), sum_of = _mm512_setzero_ps(), top_of = sum_of;
      for (int64_t v = 0; v < V; v += 16) {
        const __mmask16 lanes = first_of(V - v);
        most_of = _mm512_mask_max_ps(most_of, lanes, most_of, load16(row + v, lanes));
      }
      const float most = _mm512_reduce_max_ps(most_of);
      store(row + label, -INFINITY);  // all others; the label's part is added exactly
      for (int64_t v = 0; v < V; v += 16) {
        const __mmask16 lanes = first_of(V - v);
        const __m512 above = _mm512_sub_ps(load16(row + v, lanes), all_of(most));
        const __m512 e = exp2_of(_mm512_mul_ps(above, factor), lanes);
        const __m512 weighed = _mm512_mul_ps(e, _mm512_maskz_loadu_ps(lanes, col_scale + v));
        sum_of = _mm512_add_ps(sum_of, e);
        top_of = _mm512_max_ps(top_of, weighed);
        _mm512_storeu_ps(number + v, weighed);
      }
      const float top = _mm512_reduce_max_ps(top_of), sum = _mm512_reduce_add_ps(sum_of);
      const float log_of_sum = std::log(sum + exp_of((target - most) * scale));
      loss[t] = log_of_sum - (target - most) * scale;
      label_grad[t] = scale * std::expm1(-loss[t]);  // p - 1 without cancellation
      row_scale[t] = scale * top / 255.0f * std::exp(-log_of_sum);
      const __m512 steps = all_of(top > 0.0f ? 255.0f / top : 0.0f);
      __m512i place = _mm512_add_epi32(places, _mm512_set1_epi32(start_of(target, t)));
      uint8_t* q = reinterpret_cast<uint8_t*>(row);  // all of the row has been read
      for (int64_t v = 0; v < V; v += 16) {
        const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(place, 8)), all_of(0x1p-24f));
        const __m512 rounded = _mm512_fmadd_ps(_mm512_loadu_ps(number + v), steps, part);
        const __m512i digits = _mm512_cvttps_epi32(_mm512_min_ps(rounded, all_of(255.0f)));
        _mm512_mask_cvtepi32_storeu_epi8(q + v, first_of(V - v), digits);
        place = _mm512_add_epi32(place, _mm512_set1_epi32(16 * 0x9e3779b1u));
      }
      q[label] = 0;
    }
  }
}
#endif

}  // namespace

FOR_BOTH(quantize_rows, (const void* x, const float* col_scale, void* q, float* scale, int64_t M, int64_t K),
         (IN(x), col_scale, static_cast<int8_t*>(q), scale, M, K))
FOR_BOTH(rounded_cross_entropy,
         (void* logits, const int64_t* labels, const float* col_scale, float* row_scale, float* label_grad, float* loss,
          int64_t T, int64_t V, float scale),
         (OUT(logits), labels, col_scale, row_scale, label_grad, loss, T, V, scale))
