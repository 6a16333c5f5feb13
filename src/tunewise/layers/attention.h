// Attention of some queries with some keys, forward and backward: what `kernels_attention.cpp` shares out among threads.
//
//   P = softmax(scale Q K^T)    O = P V
//   dV = P^T dO    dS = P (dO V^T - delta)    delta = sum(dO O)    dQ = scale dS K    dK = scale dS^T Q
//
// Keys come in blocks of `KEYS`, put in the order of the instructions, and meet queries `QUERIES` at a time: forward with
// a running maximum and sum (Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023), backward a block of keys after the
// other, whose gradients stay in the cache while all queries pass.
//
// L positions of a document, D size of a head.
#pragma once

#ifdef __AVX512BF16__

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "pairs.h"

namespace {

constexpr int64_t KEYS = 512;
constexpr int64_t QUERIES = 48;
constexpr int64_t LINE = KEYS + 16;  // words from a pair of queries to the next: powers of two meet in few places of a cache

// One head of queries, what it asks of its document, and what it gave.
struct Head {
  const bf16 *q, *grad;
  const float *log_sum, *delta;
  int64_t L, D, window;
  float scale;
};

// Keys [begin, end) of a document, from `first` on in the order of the instructions.
struct Keys {
  const uint32_t *keys_across, *values_across, *keys_along, *values_along;
  int64_t first, end;
};

// The keys that a query sees, and which of sixteen from `from` on they are.
struct Seen {
  int64_t begin, end;
  Seen(int64_t query, int64_t window) : begin(window > 0 && query >= window ? query + 1 - window : 0), end(query + 1) {}
  bool has_all(int64_t from, int64_t to) const { return begin <= from && to <= end; }
  __mmask16 lanes(int64_t from) const {
    const auto bits = [from](int64_t edge) { return (1u << std::clamp<int64_t>(edge - from, 0, 16)) - 1u; };
    return static_cast<__mmask16>(bits(end) & ~bits(begin));
  }
};

// The keys of a block that some of `rows` queries from `query` on see, in vectors: whole ones from `begin` on, which is a
// multiple of 16; none where `end` is not behind it.
struct Span {
  int64_t begin, end;
  Span(const Head& head, const Keys& keys, int64_t query, int64_t rows)
      : begin(std::max(keys.first, Seen(query, head.window).begin / 16 * 16)), end(std::min(keys.end, query + rows)) {}
  int64_t vectors() const { return (end - begin + 15) / 16; }
  int64_t pairs() const { return (end - begin + 1) / 2; }
};

// A thread's own memory, for heads of size D.
struct Desk {
  float *scores, *slopes, *sums;             // [ROWS][KEYS] twice, [QUERIES][D]
  float *sum_k, *sum_v;                      // [KEYS][D]
  uint32_t *weights_T, *slopes_T;            // [QUERIES / 2][LINE], pairs of queries
  uint32_t *asked_along, *grad_along;        // [QUERIES / 2][D]
  uint32_t *keys_across, *values_across;     // [KEYS / 16][D / 2][16]
  uint32_t *keys_along, *values_along;       // [KEYS / 2][D]
  bf16* rounded;                             // [ROWS][KEYS]

  explicit Desk(int64_t D) {
    static thread_local Room<float> room;
    float* next = room.of(2 * ROWS * KEYS + QUERIES * D + 2 * KEYS * D + QUERIES * (LINE + D) + 2 * KEYS * D +
                          ROWS * KEYS / 2);
    const auto floats = [&next](int64_t count) { return std::exchange(next, next + count); };
    const auto words = [&floats](int64_t count) { return reinterpret_cast<uint32_t*>(floats(count)); };
    scores = floats(ROWS * KEYS), slopes = floats(ROWS * KEYS), sums = floats(QUERIES * D);
    sum_k = floats(KEYS * D), sum_v = floats(KEYS * D);
    weights_T = words(QUERIES / 2 * LINE), slopes_T = words(QUERIES / 2 * LINE);
    asked_along = words(QUERIES / 2 * D), grad_along = words(QUERIES / 2 * D);
    keys_across = words(KEYS * D / 2), values_across = words(KEYS * D / 2);
    keys_along = words(KEYS * D / 2), values_along = words(KEYS * D / 2);
    rounded = reinterpret_cast<bf16*>(words(ROWS * KEYS / 2));
  }
};

inline const uint32_t* words_of(const bf16* x) { return reinterpret_cast<const uint32_t*>(x); }

// Weights of a row that counts from its new maximum on; returns by how much what came before has to be multiplied.
template <bool IS_WHOLE>
inline float weigh(const float* s, bf16* w, const Seen& seen, const Span& span, float factor, float& most, float& sum) {
  const int64_t count = 16 * span.vectors();
  const auto lanes = [&](int64_t j) { return IS_WHOLE ? static_cast<__mmask16>(0xffff) : seen.lanes(span.begin + j); };
  __m512 most_of = _mm512_set1_ps(most), sum_of = _mm512_setzero_ps();
  for (int64_t j = 0; j < count; j += 16)
    most_of = _mm512_mask_max_ps(most_of, lanes(j), most_of, _mm512_loadu_ps(s + j));
  const float before = most;
  most = _mm512_reduce_max_ps(most_of);
  const __m512 scale = _mm512_set1_ps(factor), shift = _mm512_set1_ps(most * factor);
  for (int64_t j = 0; j < count; j += 16) {
    const __m512 e = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(s + j), scale, shift), lanes(j));
    sum_of = _mm512_add_ps(sum_of, e);
    store16(w + j, e);
  }
  const float share = before == most || before == -INFINITY ? 1.0f : std::exp2((before - most) * factor);
  sum = sum * share + _mm512_reduce_add_ps(sum_of);
  return share;
}

// `count` <= QUERIES queries from `first` on: their output and the logarithms of their sums. `keys`: all keys.
void forward_of(const Head& head, const Keys& keys, int64_t first, int64_t count, bf16* out, float* log_sum, Desk& desk) {
  const int64_t D = head.D, pairs = D / 2;
  const float factor = head.scale * LOG2_E;
  float most[QUERIES], sum[QUERIES];
  std::fill(most, most + count, -INFINITY);
  std::fill(sum, sum + count, 0.0f);
  std::fill(desk.sums, desk.sums + count * D, 0.0f);
  for (int64_t from = Seen(first, head.window).begin / KEYS * KEYS; from < first + count; from += KEYS) {
    const Keys held{nullptr, nullptr, nullptr, nullptr, from, std::min(head.L, from + KEYS)};
    for (int64_t row = 0; row < count; row += ROWS) {
      const int64_t rows = std::min<int64_t>(ROWS, count - row), query = first + row;
      const Span span(head, held, query, rows);
      if (span.end <= span.begin) continue;
      product(rows, span.vectors(), {words_of(head.q + query * D), pairs, 1},
              {keys.keys_across + span.begin * pairs, 16, 16 * pairs}, pairs, desk.scores, KEYS);
      float* sums = desk.sums + row * D;
      for (int64_t r = 0; r < rows; ++r) {
        const Seen seen(query + r, head.window);
        const auto weigh_row = seen.has_all(span.begin, span.begin + 16 * span.vectors()) ? weigh<true> : weigh<false>;
        const float share = weigh_row(desk.scores + r * KEYS, desk.rounded + r * KEYS, seen, span, factor, most[row + r],
                                      sum[row + r]);
        if (share != 1.0f)
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) sums[r * D + d] *= share;
      }
      product(rows, D / 16, {words_of(desk.rounded), KEYS / 2, 1}, {keys.values_along + span.begin / 2 * D, D, 16},
              span.pairs(), sums, D, true);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const float share = 1.0f / sum[r];
    bf16* to = out + (first + r) * D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) store(to + d, desk.sums[r * D + d] * share);
    log_sum[first + r] = most[r] * head.scale + std::log(sum[r]);
  }
}

// Two queries' weights and slopes, of the scores and the outputs' gradients times values: as pairs of queries, and the
// slopes in rows too. `other` may be beyond the last one, and is then not seen.
template <bool IS_WHOLE>
inline void slope(const Desk& desk, int64_t r, int64_t pair, const Seen* seen, const Span& span, int64_t at,
                  const float* log_sum, const float* delta, float factor) {
  const float *s[2] = {desk.scores + r * KEYS, desk.scores + (r + 1) * KEYS};
  const float *t[2] = {desk.slopes + r * KEYS, desk.slopes + (r + 1) * KEYS};
  bf16* u = desk.rounded + r * KEYS;
  uint32_t *weights_T = desk.weights_T + pair * LINE + at, *slopes_T = desk.slopes_T + pair * LINE + at;
  const __m512 scale = _mm512_set1_ps(factor);
  __m512 shift[2], off[2];
  for (int i = 0; i < 2; ++i) shift[i] = _mm512_set1_ps(log_sum[i] * LOG2_E), off[i] = _mm512_set1_ps(delta[i]);
  for (int64_t j = 0; j < 16 * span.vectors(); j += 16) {
    __m512 p[2], d[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __mmask16 lanes = IS_WHOLE ? static_cast<__mmask16>(0xffff) : seen[i].lanes(span.begin + j);
      p[i] = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(s[i] + j), scale, shift[i]), lanes);
      d[i] = _mm512_maskz_mul_ps(lanes, p[i], _mm512_sub_ps(_mm512_loadu_ps(t[i] + j), off[i]));
    }
    const __m512i weights = both_of(p[0], p[1]), slopes = both_of(d[0], d[1]);
    _mm512_storeu_si512(weights_T + j, paired(weights));
    _mm512_storeu_si512(slopes_T + j, paired(slopes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(u + j), _mm512_castsi512_si256(slopes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(u + KEYS + j), _mm512_extracti64x4_epi64(slopes, 1));
  }
}

// What `count` <= QUERIES queries from `first` on add to the gradients of a block of keys and values (`desk.sum_k`,
// `desk.sum_v`), and the block's part of their own (`sum_q`), all but the factor `scale`.
void backward_of(const Head& head, const Keys& keys, int64_t first, int64_t count, float* sum_q, const Desk& desk) {
  const int64_t D = head.D, pairs = D / 2;
  const Span all(head, keys, first, count);
  if (all.end <= all.begin) return;
  const int64_t columns = 16 * all.vectors();
  for (int64_t row = 0; row < count; row += ROWS) {
    const int64_t rows = std::min<int64_t>(ROWS, count - row), query = first + row;
    const Span span(head, keys, query, rows);
    const int64_t at = span.begin - all.begin, width = 16 * std::max<int64_t>(0, span.vectors());
    for (int64_t r = 0; r < rows; r += 2)
      for (uint32_t* line : {desk.weights_T, desk.slopes_T}) {
        uint32_t* to = line + (row + r) / 2 * LINE;
        std::fill(to, to + (width ? at : columns), 0u);
        if (width) std::fill(to + at + width, to + columns, 0u);
      }
    if (!width) continue;
    const int64_t from = span.begin - keys.first, place = query * D;
    product(rows, span.vectors(), {words_of(head.q + place), pairs, 1},
            {keys.keys_across + from * pairs, 16, 16 * pairs}, pairs, desk.scores, KEYS);
    product(rows, span.vectors(), {words_of(head.grad + place), pairs, 1},
            {keys.values_across + from * pairs, 16, 16 * pairs}, pairs, desk.slopes, KEYS);
    for (int64_t r = 0; r < rows; r += 2) {
      const bool has_other = r + 1 < rows;
      Seen seen[2] = {Seen(query + r, head.window), Seen(query + r + 1, head.window)};
      if (!has_other) seen[1].end = 0;
      const int64_t one = query + r, other = has_other ? one + 1 : one;
      const float log_sum[2] = {head.log_sum[one], head.log_sum[other]}, delta[2] = {head.delta[one], head.delta[other]};
      const bool is_whole = seen[0].has_all(span.begin, span.begin + width) && seen[1].has_all(span.begin, span.begin + width);
      const auto slope_rows = is_whole ? slope<true> : slope<false>;
      slope_rows(desk, r, (row + r) / 2, seen, span, at, log_sum, delta, head.scale * LOG2_E);
    }
    product(rows, D / 16, {words_of(desk.rounded), KEYS / 2, 1}, {keys.keys_along + from / 2 * D, D, 16}, span.pairs(),
            sum_q + row * D, D, true);
  }
  along(head.q + first * D, D, count, D, desk.asked_along);
  along(head.grad + first * D, D, count, D, desk.grad_along);
  const int64_t begin = all.begin - keys.first;
  for (int64_t key = 0; key < columns; key += ROWS) {
    const int64_t skipped = std::max<int64_t>(0, (all.begin + key - first) / 2);  // queries before a key do not see it
    const int64_t left = (count + 1) / 2 - skipped, rows = std::min<int64_t>(ROWS, columns - key);
    if (left <= 0) break;
    product(rows, D / 16, {desk.weights_T + skipped * LINE + key, 1, LINE}, {desk.grad_along + skipped * D, D, 16}, left,
            desk.sum_v + (begin + key) * D, D, true);
    product(rows, D / 16, {desk.slopes_T + skipped * LINE + key, 1, LINE}, {desk.asked_along + skipped * D, D, 16}, left,
            desk.sum_k + (begin + key) * D, D, true);
  }
}

inline void round_to(bf16* to, const float* sums, int64_t count, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store(to + i, sums[i] * scale);
}

}  // namespace
#endif
