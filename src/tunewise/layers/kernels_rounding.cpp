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

}  // namespace

FOR_BOTH(quantize_rows, (const void* x, const float* col_scale, void* q, float* scale, int64_t M, int64_t K),
         (IN(x), col_scale, static_cast<int8_t*>(q), scale, M, K))
FOR_BOTH(rounded_cross_entropy,
         (void* logits, const int64_t* labels, const float* col_scale, float* row_scale, float* label_grad, float* loss,
          int64_t T, int64_t V, float scale),
         (OUT(logits), labels, col_scale, row_scale, label_grad, loss, T, V, scale))
