// Products of bf16 in pairs, added up in fp32, for processors with AVX-512 BF16: `pair` means two bf16 in a word of 32
// bits. The pieces that `kernels_attention.cpp` is made of.
#pragma once

#ifdef __AVX512BF16__

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "panels.h"
#include "vectors.h"

namespace {

constexpr int ROWS = 6;  // rows of a product that are held in registers, with four vectors each
constexpr int VECTORS = 4;

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

// out[R][16 V] = (out +) left right, out fp32 or bf16. Every loop over the sums is unrolled and stands here, or gcc keeps
// them in memory.
template <int R, int V, class S>
void block(Left left, Right right, int64_t pairs, S* out, int64_t out_row, bool adds) {
  __m512 sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = adds ? load16(out + r * out_row + 16 * v) : _mm512_setzero_ps();
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
    for (int v = 0; v < V; ++v) store16(out + r * out_row + 16 * v, sum[r][v]);
}

template <class S>
using Block = void (*)(Left, Right, int64_t, S*, int64_t, bool);
template <int R, class S>
constexpr Block<S> OF_ROWS[VECTORS] = {block<R, 1, S>, block<R, 2, S>, block<R, 3, S>, block<R, 4, S>};
template <class S>
constexpr const Block<S>* BLOCKS[ROWS] = {OF_ROWS<1, S>, OF_ROWS<2, S>, OF_ROWS<3, S>,
                                          OF_ROWS<4, S>, OF_ROWS<5, S>, OF_ROWS<6, S>};

// `rows` <= ROWS rows times `vectors` vectors of 16 columns.
template <class S>
inline void product(int64_t rows, int64_t vectors, Left left, Right right, int64_t pairs, S* out, int64_t out_row,
                    bool adds = false) {
  for (int64_t v = 0; v < vectors; v += VECTORS) {
    const int64_t held = std::min<int64_t>(VECTORS, vectors - v);
    const Right from{right.words + v * right.vector, right.pair, right.vector};
    BLOCKS<S>[rows - 1][held - 1](left, from, pairs, out + 16 * v, out_row, adds);
  }
}

// Up to 16 rows as columns of a product: [D / 2][16], pairs along D; zeros behind the last row.
inline void across(const bf16* x, int64_t rows, int64_t D, uint32_t* out) {
  if (rows >= 16) {
    int64_t p = 0;
    for (; p + 16 <= D / 2; p += 16) transpose_words(x + 2 * p, D * 2, out + p * 16, 64, _mm512_setzero_si512());
    for (; p < D / 2; ++p)
      for (int64_t r = 0; r < 16; ++r) std::memcpy(out + p * 16 + r, x + r * D + 2 * p, 4);
    return;
  }
  std::memset(out, 0, D / 2 * 64);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t p = 0; p < D / 2; ++p) std::memcpy(out + p * 16 + r, x + r * D + 2 * p, 4);
}

// Rows that are summed over, `ld` numbers from each other: [rows / 2][D], pairs of rows; zeros behind the last.
inline void along(const bf16* x, int64_t ld, int64_t rows, int64_t D, uint32_t* out) {
  for (int64_t r = 0; r < rows; r += 2) {
    const bf16 *one = x + r * ld, *other = one + ld;
    uint32_t* pairs = out + r / 2 * D;
    if (r + 1 < rows) {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) pairs[d] = one[d].bits | static_cast<uint32_t>(other[d].bits) << 16;
    } else {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) pairs[d] = one[d].bits;
    }
  }
}

// Sixteen of one row and of another, rounded: first those of the one, then those of the other.
inline __m512i both_of(__m512 one, __m512 other) { return (__m512i)_mm512_cvtne2ps_pbh(other, one); }

// The same as pairs: word j holds (one[j], other[j]).
inline __m512i paired(__m512i both) {
  alignas(64) static constexpr uint16_t PLACES[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(PLACES), both);
}

}  // namespace
#endif
