// Causal attention of short documents in bf16, a document and a head of keys at a time: what belongs together stays in a
// core's own cache, the upper half of the scores is not computed, and sums and softmax are made in fp32.
//
//   P = softmax(scale Q K^T)    O = P V
//   dV = P^T dO    dS = scale P (dO V^T - sum(P dO V^T))    dQ = dS K    dK = dS^T Q
//
// For processors with AVX-512 BF16, which multiply pairs of bf16 and add them up in fp32; others take the batched products
// of `products.py`, whose tests compare both.
//
// L positions of a document, D size of a head, H heads of queries, K heads of keys, G = H / K heads that share one. All
// tensors are (document, head, L, D), one document behind the other; `pair` means two bf16 in a word of 32 bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include <omp.h>

#include "numbers.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

constexpr int ROWS = 6;        // rows of a product that are held in registers, with four vectors each
constexpr int VECTORS = 4;
constexpr int64_t CHUNK = 48;  // queries whose weights are kept until they meet the other side's gradient

inline int64_t up_to(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

// The intrinsic's result goes to another register, with a copy for each (gcc 12).
inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

// Pairs on the left: word (row r, pair p) at r * row + p * pair. On the right: vector v of pair p at p * pair + v * vector.
struct Left {
  const uint32_t* words;
  int64_t row, pair;
};
struct Right {
  const uint32_t* words;
  int64_t pair, vector;
};

// out[R][16 V] = (out +) left right. Every loop over the sums is unrolled and stands here, or gcc keeps them in memory.
template <int R, int V>
void block(Left left, Right right, int64_t pairs, float* out, int64_t out_row, bool adds) {
  __m512 sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = adds ? _mm512_loadu_ps(out + r * out_row + 16 * v) : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512i w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = _mm512_loadu_si512(right.words + p * right.pair + v * right.vector);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i x = _mm512_set1_epi32(static_cast<int32_t>(left.words[r * left.row + p * left.pair]));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = dot(sum[r][v], w[v], x);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(out + r * out_row + 16 * v, sum[r][v]);
}

using Block = void (*)(Left, Right, int64_t, float*, int64_t, bool);
constexpr Block BLOCKS[ROWS][VECTORS] = {
    {block<1, 1>, block<1, 2>, block<1, 3>, block<1, 4>}, {block<2, 1>, block<2, 2>, block<2, 3>, block<2, 4>},
    {block<3, 1>, block<3, 2>, block<3, 3>, block<3, 4>}, {block<4, 1>, block<4, 2>, block<4, 3>, block<4, 4>},
    {block<5, 1>, block<5, 2>, block<5, 3>, block<5, 4>}, {block<6, 1>, block<6, 2>, block<6, 3>, block<6, 4>}};

// `rows` <= ROWS rows times `vectors` vectors of 16 columns.
inline void product(int64_t rows, int64_t vectors, Left left, Right right, int64_t pairs, float* out, int64_t out_row,
                    bool adds = false) {
  for (int64_t v = 0; v < vectors; v += VECTORS) {
    const int64_t held = std::min<int64_t>(VECTORS, vectors - v);
    const Right from{right.words + v * right.vector, right.pair, right.vector};
    BLOCKS[rows - 1][held - 1](left, from, pairs, out + 16 * v, out_row, adds);
  }
}

inline uint32_t word(const bf16* p) {
  uint32_t both;
  std::memcpy(&both, p, 4);
  return both;
}

// Rows as columns of a product: [row / 16][D / 2][16], pairs along D; zeros behind the last row.
void across(const bf16* x, int64_t L, int64_t D, uint32_t* out) {
  for (int64_t first = 0; first < L; first += 16) {
    uint32_t* panel = out + first * (D / 2);
    const int64_t held = std::min<int64_t>(16, L - first);
    for (int64_t r = 0; r < 16; ++r) {
      const bf16* row = x + (first + r) * D;
      for (int64_t p = 0; p < D / 2; ++p) panel[p * 16 + r] = r < held ? word(row + 2 * p) : 0u;
    }
  }
}

// Rows that are summed over: [row / 2][D], pairs of rows; zeros behind the last.
void along(const bf16* x, int64_t L, int64_t D, uint32_t* out) {
  for (int64_t r = 0; r < L; r += 2) {
    const bf16 *one = x + r * D, *other = one + D;
    uint32_t* pairs = out + r / 2 * D;
    if (r + 1 < L) {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) pairs[d] = one[d].bits | static_cast<uint32_t>(other[d].bits) << 16;
    } else {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) pairs[d] = one[d].bits;
    }
  }
}

// Keys that a query sees: from `begin` to `end`, and which of sixteen from `first` on they are.
struct Keys {
  int64_t begin, end;
  __mmask16 lanes(int64_t first) const {
    const auto bits = [first](int64_t edge) { return (1u << std::clamp<int64_t>(edge - first, 0, 16)) - 1u; };
    return static_cast<__mmask16>(bits(end) & ~bits(begin));
  }
};
inline Keys seen_by(int64_t query, int64_t window) {
  return {window > 0 && query >= window ? query + 1 - window : 0, query + 1};
}

// `numbers.h`'s exponential of sixteen; zero outside of `lanes`.
inline __m512 exp_of(__m512 x, __mmask16 lanes) {
  const auto all = [](float number) { return _mm512_set1_ps(number); };
  lanes = _mm512_mask_cmp_ps_mask(lanes, x, all(-60.0f), _CMP_NLT_UQ);
  x = _mm512_min_ps(all(60.0f), x);  // the second operand where one is not a number
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, all(0.693359375f), x);
  r = _mm512_fmadd_ps(n, all(2.12194440e-4f), r);
  __m512 p = all(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, all(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, all(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, all(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, all(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, all(5.0000001201e-1f));
  p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), all(1.0f));
  return _mm512_maskz_scalef_ps(lanes, p, n);
}

inline void store(bf16* to, __m512 x) {
  const __m256bh rounded = _mm512_cvtneps_pbh(x);
  std::memcpy(to, &rounded, sizeof rounded);
}

// Memory of a thread, as large as its longest document asked for.
struct Room {
  std::vector<uint32_t> words;
  std::vector<float> floats;
  int64_t words_used = 0, floats_used = 0;

  void begin(int64_t num_words, int64_t num_floats) {
    if (static_cast<int64_t>(words.size()) < num_words) words.resize(num_words);
    if (static_cast<int64_t>(floats.size()) < num_floats) floats.resize(num_floats);
    words_used = floats_used = 0;
  }
  uint32_t* take_words(int64_t count) { return words.data() + std::exchange(words_used, words_used + count); }
  float* take_floats(int64_t count) { return floats.data() + std::exchange(floats_used, floats_used + count); }
};

struct Document {
  int64_t slot, length;
};

std::vector<Document> documents_of(const int64_t* counts, const int64_t* lengths, int64_t buckets) {
  std::vector<Document> found;
  int64_t slot = 0;
  for (int64_t b = 0; b < buckets; ++b)
    for (int64_t i = 0; i < counts[b]; ++i, slot += lengths[b]) found.push_back({slot, lengths[b]});
  return found;
}

void forward_of(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* log_sum, int64_t L, int64_t D, int64_t G,
                int64_t window, float scale, Room& room) {
  const int64_t width = up_to(L, 16), pairs = D / 2;
  room.begin(2 * width * pairs + ROWS * width / 2, ROWS * (width + D));
  uint32_t *keys = room.take_words(width * pairs), *values = room.take_words(width * pairs);
  bf16* weights = reinterpret_cast<bf16*>(room.take_words(ROWS * width / 2));
  float *scores = room.take_floats(ROWS * width), *sums = room.take_floats(ROWS * D);
  across(k, L, D, keys);
  along(v, L, D, values);
  for (int64_t g = 0; g < G; ++g)
    for (int64_t first = 0; first < L; first += ROWS) {
      const int64_t rows = std::min<int64_t>(ROWS, L - first), seen = first + rows, vectors = (seen + 15) / 16;
      const uint32_t* asked = reinterpret_cast<const uint32_t*>(q + (g * L + first) * D);
      product(rows, vectors, {asked, pairs, 1}, {keys, 16, 16 * pairs}, pairs, scores, width);
      float share[ROWS];
      for (int64_t r = 0; r < rows; ++r) {
        const Keys keys_seen = seen_by(first + r, window);
        const float* s = scores + r * width;
        bf16* w = weights + r * width;
        __m512 most_of = _mm512_set1_ps(-INFINITY), sum_of = _mm512_setzero_ps();
        for (int64_t j = 0; j < 16 * vectors; j += 16)
          most_of = _mm512_mask_max_ps(most_of, keys_seen.lanes(j), most_of, _mm512_loadu_ps(s + j));
        const float most = _mm512_reduce_max_ps(most_of);
        for (int64_t j = 0; j < 16 * vectors; j += 16) {
          const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(s + j), _mm512_set1_ps(most));
          const __m512 e = exp_of(_mm512_mul_ps(below, _mm512_set1_ps(scale)), keys_seen.lanes(j));
          sum_of = _mm512_add_ps(sum_of, e);
          store(w + j, e);
        }
        const float sum = _mm512_reduce_add_ps(sum_of);
        share[r] = 1.0f / sum;
        log_sum[g * L + first + r] = most * scale + std::log(sum);
      }
      const uint32_t* held = reinterpret_cast<const uint32_t*>(weights);
      product(rows, D / 16, {held, width / 2, 1}, {values, D, 16}, (seen + 1) / 2, sums, D);
      for (int64_t r = 0; r < rows; ++r) {
        bf16* to = out + (g * L + first + r) * D;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) store(to + d, sums[r * D + d] * share[r]);
      }
    }
}

// Two rows of weights as pairs of queries: word j holds (one[j], other[j]).
inline void pair_up(const bf16* one, const bf16* other, int64_t count, uint32_t* out) {
  if (other) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) out[j] = one[j].bits | static_cast<uint32_t>(other[j].bits) << 16;
  } else {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) out[j] = one[j].bits;
  }
}

void backward_of(const bf16* q, const bf16* k, const bf16* v, const bf16* grad, const float* log_sum, bf16* grad_q,
                 bf16* grad_k, bf16* grad_v, int64_t L, int64_t D, int64_t G, int64_t window, float scale, Room& room) {
  const int64_t pairs = D / 2, width = up_to(L, 16), tall = up_to(width, ROWS), vectors_of_head = D / 16;
  const int64_t line = up_to(tall, 16);
  room.begin(3 * width * pairs + CHUNK * line + CHUNK * D + ROWS * line, 2 * tall * D + ROWS * (2 * width + D));
  uint32_t *keys = room.take_words(width * pairs), *values = room.take_words(width * pairs);
  uint32_t* keys_along = room.take_words(width * pairs);
  uint32_t *weights_T = room.take_words(CHUNK / 2 * line), *slopes_T = room.take_words(CHUNK / 2 * line);
  uint32_t *asked_along = room.take_words(CHUNK / 2 * D), *grad_along = room.take_words(CHUNK / 2 * D);
  bf16* weights = reinterpret_cast<bf16*>(room.take_words(ROWS * line / 2));
  bf16* slopes = reinterpret_cast<bf16*>(room.take_words(ROWS * line / 2));
  float *sum_k = room.take_floats(tall * D), *sum_v = room.take_floats(tall * D);
  float *scores = room.take_floats(ROWS * width), *slope = room.take_floats(ROWS * width);
  float* sums = room.take_floats(ROWS * D);
  std::fill(sum_k, sum_k + tall * D, 0.0f);
  std::fill(sum_v, sum_v + tall * D, 0.0f);
  across(k, L, D, keys);
  across(v, L, D, values);
  along(k, L, D, keys_along);
  for (int64_t g = 0; g < G; ++g)
    for (int64_t begin_chunk = 0; begin_chunk < L; begin_chunk += CHUNK) {
      const int64_t end_chunk = std::min(L, begin_chunk + CHUNK), count = end_chunk - begin_chunk;
      const int64_t columns = up_to(up_to(end_chunk, 16), ROWS);
      along(q + (g * L + begin_chunk) * D, count, D, asked_along);
      along(grad + (g * L + begin_chunk) * D, count, D, grad_along);
      for (int64_t first = begin_chunk; first < end_chunk; first += ROWS) {
        const int64_t rows = std::min<int64_t>(ROWS, end_chunk - first), seen = first + rows, vectors = (seen + 15) / 16;
        const int64_t place = (g * L + first) * D;
        const uint32_t *asked = reinterpret_cast<const uint32_t*>(q + place),
                       *came = reinterpret_cast<const uint32_t*>(grad + place);
        product(rows, vectors, {asked, pairs, 1}, {keys, 16, 16 * pairs}, pairs, scores, width);
        product(rows, vectors, {came, pairs, 1}, {values, 16, 16 * pairs}, pairs, slope, width);
        for (int64_t r = 0; r < rows; ++r) {
          const Keys keys_seen = seen_by(first + r, window);
          const __m512 log_of_sum = _mm512_set1_ps(log_sum[g * L + first + r]), factor = _mm512_set1_ps(scale);
          float *s = scores + r * width, *t = slope + r * width;
          bf16 *w = weights + r * line, *u = slopes + r * line;
          __m512 total_of = _mm512_setzero_ps();
          for (int64_t j = 0; j < 16 * vectors; j += 16) {
            const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(s + j), factor, log_of_sum);
            const __m512 p = exp_of(x, keys_seen.lanes(j));
            total_of = _mm512_mask3_fmadd_ps(p, _mm512_loadu_ps(t + j), total_of, keys_seen.lanes(j));
            _mm512_storeu_ps(s + j, p);
            store(w + j, p);
          }
          const __m512 total = _mm512_set1_ps(_mm512_reduce_add_ps(total_of));
          for (int64_t j = 0; j < 16 * vectors; j += 16) {
            const __m512 off = _mm512_maskz_sub_ps(keys_seen.lanes(j), _mm512_loadu_ps(t + j), total);
            store(u + j, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(s + j), off), factor));
          }
          for (int64_t j = 16 * vectors; j < columns; ++j) w[j].bits = u[j].bits = 0;
        }
        const uint32_t* held = reinterpret_cast<const uint32_t*>(slopes);
        product(rows, vectors_of_head, {held, line / 2, 1}, {keys_along, D, 16}, (seen + 1) / 2, sums, D);
        for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) store(grad_q + place + r * D + d, sums[r * D + d]);
        }
        for (int64_t r = 0; r < rows; r += 2) {
          const int64_t pair = (first - begin_chunk + r) / 2;
          const bool is_whole = r + 1 < rows;
          pair_up(weights + r * line, is_whole ? weights + (r + 1) * line : nullptr, columns, weights_T + pair * line);
          pair_up(slopes + r * line, is_whole ? slopes + (r + 1) * line : nullptr, columns, slopes_T + pair * line);
        }
      }
      for (int64_t key = 0; key < columns; key += ROWS) {
        const int64_t skipped = std::max<int64_t>(0, (key - begin_chunk) / 2);  // queries before a key do not see it
        const int64_t left = (count + 1) / 2 - skipped;
        if (left <= 0) break;
        product(ROWS, vectors_of_head, {weights_T + skipped * line + key, 1, line}, {grad_along + skipped * D, D, 16}, left,
                sum_v + key * D, D, true);
        product(ROWS, vectors_of_head, {slopes_T + skipped * line + key, 1, line}, {asked_along + skipped * D, D, 16}, left,
                sum_k + key * D, D, true);
      }
    }
#pragma omp simd
  for (int64_t i = 0; i < L * D; ++i) store(grad_k + i, sum_k[i]);
#pragma omp simd
  for (int64_t i = 0; i < L * D; ++i) store(grad_v + i, sum_v[i]);
}

// Calls `work` for every document and head of keys, with where its queries and its keys begin, on all threads.
template <class Work>
void each_head(const void* counts, const void* lengths, int64_t buckets, int64_t H, int64_t K, int64_t D, Work work) {
  const auto held = documents_of(static_cast<const int64_t*>(counts), static_cast<const int64_t*>(lengths), buckets);
  const int64_t tasks = static_cast<int64_t>(held.size()) * K, G = H / K;
#pragma omp parallel
  {
    Room room;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const auto [slot, L] = held[task / K];
      const int64_t head = task % K;
      work((slot * H + head * G * L) * D, (slot * K + head * L) * D, L, G, room);
    }
  }
}

}  // namespace
#endif

extern "C" {

// Whether this processor computes them.
int64_t has_document_attention() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

#ifdef __AVX512BF16__
void document_attention_bf16(const void* q, const void* k, const void* v, void* out, void* log_sum, const void* counts,
                             const void* lengths, int64_t buckets, int64_t H, int64_t K, int64_t D, int64_t window,
                             float scale) {
  each_head(counts, lengths, buckets, H, K, D, [&](int64_t asked, int64_t known, int64_t L, int64_t G, Room& room) {
    forward_of(static_cast<const bf16*>(q) + asked, static_cast<const bf16*>(k) + known,
               static_cast<const bf16*>(v) + known, static_cast<bf16*>(out) + asked,
               static_cast<float*>(log_sum) + asked / D, L, D, G, window, scale, room);
  });
}

void document_attention_backward_bf16(const void* q, const void* k, const void* v, const void* grad, const void* log_sum,
                                      void* grad_q, void* grad_k, void* grad_v, const void* counts, const void* lengths,
                                      int64_t buckets, int64_t H, int64_t K, int64_t D, int64_t window, float scale) {
  each_head(counts, lengths, buckets, H, K, D, [&](int64_t asked, int64_t known, int64_t L, int64_t G, Room& room) {
    backward_of(static_cast<const bf16*>(q) + asked, static_cast<const bf16*>(k) + known,
                static_cast<const bf16*>(v) + known, static_cast<const bf16*>(grad) + asked,
                static_cast<const float*>(log_sum) + asked / D, static_cast<bf16*>(grad_q) + asked,
                static_cast<bf16*>(grad_k) + known, static_cast<bf16*>(grad_v) + known, L, D, G, window, scale, room);
  });
}
#endif
}
