// What attention by batched products (`products.py`) does beside them: tokens turned and sorted into documents and back,
// scalar products of their rows, softmax of causal scores. Compiled with `kernels.cpp`.
//
// T rows (tokens), H heads, D size of a head, K keys. All tensors are contiguous unless a stride is given.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

#include "numbers.h"

namespace {

// Rotary positions: (a, b) -> (a cos - b sin, b cos + a sin) for the two halves of a head; `back` is the transpose.
template <class S>
inline void head_of(const S* in, S* out, const S* cos, const S* sin, int64_t D, bool back) {
  if (!cos) {
    std::memcpy(out, in, D * sizeof(S));
    return;
  }
  const int64_t half = D / 2;
#pragma omp simd
  for (int64_t d = 0; d < half; ++d) {
    const float a = load(in + d), b = load(in + half + d);
    const float c = load(cos + d), e = load(cos + half + d), s = load(sin + d), u = load(sin + half + d);
    store(out + d, back ? a * c + b * u : a * c - b * s);
    store(out + half + d, back ? b * e - a * s : b * e + a * u);
  }
}

// From rows of tokens (H heads side by side) to documents: (document, head, position, D). `token` says which token
// stands in a slot (-1: none, and zeros), `start` the first slot of its document and `length` how many there are.
template <class S>
void gather(const S* rows, int64_t stride, S* out, const S* cos, const S* sin, const int64_t* token,
            const int64_t* start, const int64_t* length, int64_t slots, int64_t H, int64_t D) {
#pragma omp parallel for schedule(static)
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t t = token[slot];
    S* first = out + start[slot] * H * D + (slot - start[slot]) * D;
    if (t < 0) {
      for (int64_t h = 0; h < H; ++h)
        for (int64_t d = 0; d < D; ++d) store(first + h * length[slot] * D + d, 0.0f);
      continue;
    }
    for (int64_t h = 0; h < H; ++h)
      head_of(rows + t * stride + h * D, first + h * length[slot] * D, cos ? cos + t * D : nullptr,
              sin ? sin + t * D : nullptr, D, false);
  }
}

// The way back; `slot_of` says where a token stands, `slots` for padding, which gets zeros.
template <class S>
void scatter(const S* in, S* rows, int64_t stride, const S* cos, const S* sin, const int64_t* slot_of,
             const int64_t* start, const int64_t* length, int64_t slots, int64_t T, int64_t H, int64_t D) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const int64_t slot = slot_of[t];
    S* out = rows + t * stride;
    if (slot >= slots) {
      for (int64_t d = 0; d < H * D; ++d) store(out + d, 0.0f);
      continue;
    }
    const S* first = in + start[slot] * H * D + (slot - start[slot]) * D;
    for (int64_t h = 0; h < H; ++h)
      head_of(first + h * length[slot] * D, out + h * D, cos ? cos + t * D : nullptr, sin ? sin + t * D : nullptr, D,
              true);
  }
}

// Scalar products of two rows of tokens, head by head, in the place of a slot: (document, head, position).
template <class S>
void dots(const S* one, const S* other, int64_t stride, int64_t other_stride, float* out, const int64_t* slot_of,
          const int64_t* start, const int64_t* length, int64_t slots, int64_t T, int64_t H, int64_t D) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const int64_t slot = slot_of[t];
    if (slot >= slots) continue;
    float* first = out + start[slot] * H + (slot - start[slot]);
    for (int64_t h = 0; h < H; ++h) {
      const S *a = one + t * stride + h * D, *b = other + t * other_stride + h * D;
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < D; ++d) sum += load(a + d) * load(b + d);
      first[h * length[slot]] = sum;
    }
  }
}

// Which keys a row of scores sees: rows are `queries` positions from `first` on, again and again.
struct Range {
  int64_t begin, end;
};
inline Range visible(int64_t row, int64_t queries, int64_t first, int64_t window) {
  const int64_t q = first + row % queries;
  return {window > 0 && q + 1 > window ? q + 1 - window : 0, q + 1};
}

// Scores become weights; `log_sum` keeps log(sum(exp(scale * score))) of each row.
template <class S>
void causal_softmax(S* scores, float* log_sum, int64_t rows, int64_t K, int64_t queries, int64_t first,
                    int64_t window, float scale) {
#pragma omp parallel
  {
    std::vector<float> held(K);
    float* e = held.data();
#pragma omp for schedule(static, 16)
    for (int64_t row = 0; row < rows; ++row) {
      S* s = scores + row * K;
      const Range keys = visible(row, queries, first, window);
      float most = -INFINITY;
#pragma omp simd reduction(max : most)
      for (int64_t k = keys.begin; k < keys.end; ++k) most = load(s + k) > most ? load(s + k) : most;
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = keys.begin; k < keys.end; ++k) {
        e[k] = exp_of((load(s + k) - most) * scale);
        sum += e[k];
      }
      const float share = 1.0f / sum;
      for (int64_t k = 0; k < keys.begin; ++k) store(s + k, 0.0f);
#pragma omp simd
      for (int64_t k = keys.begin; k < keys.end; ++k) store(s + k, e[k] * share);
      for (int64_t k = keys.end; k < K; ++k) store(s + k, 0.0f);
      log_sum[row] = most * scale + std::log(sum);
    }
  }
}

// Scores become weights P again and `grad`, dP, becomes the scores' gradient: scale * P (dP - sum(P dP)).
template <class S>
void causal_softmax_backward(S* scores, S* grad, const float* log_sum, int64_t rows, int64_t K, int64_t queries,
                             int64_t first, int64_t window, float scale) {
#pragma omp parallel
  {
    std::vector<float> held(K);
    float* p = held.data();
#pragma omp for schedule(static, 16)
    for (int64_t row = 0; row < rows; ++row) {
      S *s = scores + row * K, *g = grad + row * K;
      const Range keys = visible(row, queries, first, window);
      const float log_of_sum = log_sum[row];
      float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (int64_t k = keys.begin; k < keys.end; ++k) {
        p[k] = exp_of(load(s + k) * scale - log_of_sum);
        dot += p[k] * load(g + k);
      }
      for (int64_t k = 0; k < keys.begin; ++k) store(s + k, 0.0f), store(g + k, 0.0f);
#pragma omp simd
      for (int64_t k = keys.begin; k < keys.end; ++k) {
        store(g + k, p[k] * (load(g + k) - dot) * scale);
        store(s + k, p[k]);
      }
      for (int64_t k = keys.end; k < K; ++k) store(s + k, 0.0f), store(g + k, 0.0f);
    }
  }
}

}  // namespace

FOR_BOTH(gather,
         (const void* rows, int64_t stride, void* out, const void* cos, const void* sin, const int64_t* token,
          const int64_t* start, const int64_t* length, int64_t slots, int64_t H, int64_t D),
         (IN(rows), stride, OUT(out), IN(cos), IN(sin), token, start, length, slots, H, D))
FOR_BOTH(scatter,
         (const void* in, void* rows, int64_t stride, const void* cos, const void* sin, const int64_t* slot_of,
          const int64_t* start, const int64_t* length, int64_t slots, int64_t T, int64_t H, int64_t D),
         (IN(in), OUT(rows), stride, IN(cos), IN(sin), slot_of, start, length, slots, T, H, D))
FOR_BOTH(dots,
         (const void* one, const void* other, int64_t stride, int64_t other_stride, float* out, const int64_t* slot_of,
          const int64_t* start, const int64_t* length, int64_t slots, int64_t T, int64_t H, int64_t D),
         (IN(one), IN(other), stride, other_stride, out, slot_of, start, length, slots, T, H, D))
FOR_BOTH(causal_softmax,
         (void* scores, float* log_sum, int64_t rows, int64_t K, int64_t queries, int64_t first, int64_t window,
          float scale),
         (OUT(scores), log_sum, rows, K, queries, first, window, scale))
FOR_BOTH(causal_softmax_backward,
         (void* scores, void* grad, const float* log_sum, int64_t rows, int64_t K, int64_t queries, int64_t first,
          int64_t window, float scale),
         (OUT(scores), OUT(grad), log_sum, rows, K, queries, first, window, scale))
