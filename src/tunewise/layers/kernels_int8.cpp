// Products in 8-bit integers: rows rounded to int8 with one scale each, times a weight that is stored so, in fp32 or
// bf16 as they leave. Compiled with `kernels.cpp`; the plain twins are in `int8.py`.
//
//   out[m][n] = (sum over k of a[m][k] w[n][k]) * row_scale[m] * col_scale[n]      the sum exact, in int32
//
// The weight is stored once and read in either direction (w[n][k] forward, w[k][n] for the input's gradient): a piece of
// it is put in the order of the instructions on the way, which costs little beside the rows that meet it. AVX-512 VNNI
// multiplies unsigned by signed numbers, so the weight is shifted to w + 128 and 128 * sum(a) taken off again.
//
// M rows, N outputs, K inputs.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <omp.h>

#include "numbers.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t COLS = 64;            // outputs of a panel: four registers of 16
constexpr int ROWS = 6;                 // rows that meet a panel at once: 24 registers of sums
constexpr int64_t BLOCK_ROWS = 126;     // rows that a thread takes with a panel
constexpr int64_t DEPTH = 4096;         // inputs of a panel: it lies in a core's own cache, and its sums in int32
constexpr int64_t PARTIAL_ROWS = 1024;  // rows at once where sums of several panels are kept in fp32
constexpr int64_t ROOM = 4 << 20;       // bytes of panels that are made ready at once

// Panels are [K / 4][COLS][4], unsigned; where the weight ends there are zeros (128).
inline void panel_of_rows(const int8_t* w, int64_t ld, int64_t K, int64_t held, uint8_t* panel) {
  for (int64_t j = 0; j < COLS; ++j)
    for (int64_t k = 0; k < K; k += 4) {
      uint32_t four = 0;
      if (j < held && k + 4 <= K) std::memcpy(&four, w + j * ld + k, 4);
      else if (j < held) std::memcpy(&four, w + j * ld + k, K - k);
      four ^= 0x80808080u;
      std::memcpy(panel + k * COLS + j * 4, &four, 4);
    }
}

inline void panel_of_columns(const int8_t* w, int64_t ld, int64_t K, int64_t held, uint8_t* panel) {
  for (int64_t k = 0; k < K; k += 4) {
    uint8_t* out = panel + k * COLS;
    if (held == COLS && k + 4 <= K) {
      const int8_t *w0 = w + k * ld, *w1 = w0 + ld, *w2 = w1 + ld, *w3 = w2 + ld;
#pragma omp simd
      for (int64_t j = 0; j < COLS; ++j) {
        const uint32_t low = static_cast<uint8_t>(w0[j]) | static_cast<uint32_t>(static_cast<uint8_t>(w1[j])) << 8;
        const uint32_t high = static_cast<uint8_t>(w2[j]) | static_cast<uint32_t>(static_cast<uint8_t>(w3[j])) << 8;
        reinterpret_cast<uint32_t*>(out)[j] = (low | high << 16) ^ 0x80808080u;
      }
      continue;
    }
    for (int64_t j = 0; j < COLS; ++j)
      for (int64_t b = 0; b < 4; ++b)
        out[j * 4 + b] = (j < held && k + b < K ? static_cast<uint8_t>(w[(k + b) * ld + j]) : 0u) ^ 0x80u;
  }
}

// R rows times a panel: sums[R][COLS] of a * (w + 128).
#ifdef __AVX512VNNI__
// The intrinsic's result goes to another register, with a copy for each (gcc 12).
inline __m512i dot(__m512i sum, __m512i w, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}

// Every loop over the sums is unrolled and stands in this function, or gcc would keep them in memory.
template <int R>
inline void sums_of(const int8_t* a, int64_t lda, const uint8_t* panel, int64_t K, int32_t* sums) {
  __m512i sum[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_setzero_si512();
  const int64_t whole = K / 4 * 4;
  for (int64_t k = 0; k < whole; k += 4) {
    __m512i w[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) w[c] = _mm512_loadu_si512(panel + k * COLS + c * 64);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, a + r * lda + k, 4);
      const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sum[r][c] = dot(sum[r][c], w[c], x);
    }
  }
  if (whole < K) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t four = 0;
      std::memcpy(&four, a + r * lda + whole, K - whole);
      const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c)
        sum[r][c] = dot(sum[r][c], _mm512_loadu_si512(panel + whole * COLS + c * 64), x);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) _mm512_storeu_si512(sums + r * COLS + 16 * c, sum[r][c]);
}
#else
template <int R>
inline void sums_of(const int8_t* a, int64_t lda, const uint8_t* panel, int64_t K, int32_t* sums) {
  std::fill(sums, sums + R * COLS, 0);
  for (int64_t k = 0; k < K; k += 4)
    for (int r = 0; r < R; ++r) {
      int32_t x[4] = {0, 0, 0, 0};
      for (int64_t b = 0; b < 4 && k + b < K; ++b) x[b] = a[r * lda + k + b];
      const uint8_t* w = panel + k * COLS;
#pragma omp simd
      for (int64_t j = 0; j < COLS; ++j)
        sums[r * COLS + j] += x[0] * w[4 * j] + x[1] * w[4 * j + 1] + x[2] * w[4 * j + 2] + x[3] * w[4 * j + 3];
    }
}
#endif

// What happens to the sums of one piece of the inputs: `partial` keeps them in fp32 until the last piece.
template <class S>
struct Result {
  S* out;
  float* partial;
  const float *row_scale, *col_scale;
  bool is_first, is_last, adds;
  int64_t N;
};

template <class S>
inline void scaled(const float* number, const Result<S>& result, int64_t m, int64_t n, S* out, auto held) {
  const float scale = result.row_scale[m];
  const float* col_scale = result.col_scale ? result.col_scale + n : nullptr;
  if (result.adds) {
#pragma omp simd
    for (int64_t j = 0; j < held; ++j)
      store(out + j, load(out + j) + number[j] * scale * (col_scale ? col_scale[j] : 1.0f));
  } else {
#pragma omp simd
    for (int64_t j = 0; j < held; ++j) store(out + j, number[j] * scale * (col_scale ? col_scale[j] : 1.0f));
  }
}

template <class S>
inline void finish(const int32_t* sums, int32_t sum_of_row, int64_t m, int64_t partial_m, int64_t n, int64_t held,
                   const Result<S>& result) {
  const int32_t shift = 128 * sum_of_row;
  float number[COLS];
#pragma omp simd
  for (int64_t j = 0; j < COLS; ++j) number[j] = static_cast<float>(sums[j] - shift);
  if (result.partial) {
    float* kept = result.partial + partial_m * result.N + n;
    if (!result.is_first)
      for (int64_t j = 0; j < held; ++j) number[j] += kept[j];
    if (!result.is_last) {
      std::copy(number, number + held, kept);
      return;
    }
  }
  S* out = result.out + m * result.N + n;
  if (held == COLS) scaled(number, result, m, n, out, std::integral_constant<int64_t, COLS>());
  else scaled(number, result, m, n, out, held);
}

template <int R, class S>
inline void rows_with_panel(const int8_t* a, int64_t lda, const uint8_t* panel, int64_t K, const int32_t* sum_of_row,
                            int64_t m, int64_t first_m, int64_t n, int64_t held, const Result<S>& result) {
  alignas(64) int32_t sums[R * COLS];
  sums_of<R>(a + m * lda, lda, panel, K, sums);
  for (int r = 0; r < R; ++r)
    finish(sums + r * COLS, sum_of_row[m - first_m + r], m + r, m - first_m + r, n, held, result);
}

// `by_columns`: the weight is stored [K][N], else [N][K]. `adds`: onto what is in `out`.
template <class S>
void int8_matmul(const int8_t* a, const float* row_scale, const int8_t* weight, const float* col_scale, S* out,
                 int64_t M, int64_t N, int64_t K, int64_t by_columns, int64_t adds) {
  const int64_t panels = (N + COLS - 1) / COLS, pieces = (K + DEPTH - 1) / DEPTH;
  const int64_t rows = pieces > 1 ? std::min(M, PARTIAL_ROWS) : M;
  const int64_t panel_bytes = (std::min(K, DEPTH) + 3) / 4 * 4 * COLS;
  const int64_t panels_at_once = std::clamp<int64_t>(ROOM / panel_bytes, 1, panels);
  std::vector<uint8_t> held_panels(panels_at_once * panel_bytes + 64);
  uint8_t* ready = held_panels.data() + (64 - reinterpret_cast<uintptr_t>(held_panels.data()) % 64) % 64;
  std::vector<float> partial(pieces > 1 ? rows * N : 0);
  std::vector<int32_t> sum_of_row(rows);
#pragma omp parallel
  for (int64_t first_m = 0; first_m < M; first_m += rows) {
    const int64_t end_m = std::min(M, first_m + rows), blocks = (end_m - first_m + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (int64_t k = 0; k < K; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, K - k);
      const Result<S> result{out, pieces > 1 ? partial.data() : nullptr, row_scale, col_scale, k == 0,
                             k + DEPTH >= K, adds != 0, N};
#pragma omp for schedule(static)
      for (int64_t m = first_m; m < end_m; ++m) {
        int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < depth; ++d) sum += a[m * K + k + d];
        sum_of_row[m - first_m] = sum;
      }
      for (int64_t first = 0; first < panels; first += panels_at_once) {
        const int64_t end = std::min(panels, first + panels_at_once);
#pragma omp for schedule(static)
        for (int64_t p = first; p < end; ++p) {
          const int64_t n = p * COLS, held = std::min(COLS, N - n);
          uint8_t* panel = ready + (p - first) * panel_bytes;
          if (by_columns) panel_of_columns(weight + k * N + n, N, depth, held, panel);
          else panel_of_rows(weight + n * K + k, K, depth, held, panel);
        }
#pragma omp for schedule(static) collapse(2)
        for (int64_t block = 0; block < blocks; ++block)
          for (int64_t p = first; p < end; ++p) {
            const int64_t n = p * COLS, held = std::min(COLS, N - n);
            const uint8_t* panel = ready + (p - first) * panel_bytes;
            int64_t m = first_m + block * BLOCK_ROWS;
            const int64_t last = std::min(end_m, m + BLOCK_ROWS);
            for (; m + ROWS <= last; m += ROWS)
              rows_with_panel<ROWS>(a + k, K, panel, depth, sum_of_row.data(), m, first_m, n, held, result);
            for (; m < last; ++m)
              rows_with_panel<1>(a + k, K, panel, depth, sum_of_row.data(), m, first_m, n, held, result);
          }
      }
    }
  }
}

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

}  // namespace

FOR_BOTH(int8_matmul,
         (const void* a, const float* row_scale, const void* weight, const float* col_scale, void* out, int64_t M,
          int64_t N, int64_t K, int64_t by_columns, int64_t adds),
         (static_cast<const int8_t*>(a), row_scale, static_cast<const int8_t*>(weight), col_scale, OUT(out), M, N, K,
          by_columns, adds))
FOR_BOTH(quantize_rows, (const void* x, const float* col_scale, void* q, float* scale, int64_t M, int64_t K),
         (IN(x), col_scale, static_cast<int8_t*>(q), scale, M, K))
