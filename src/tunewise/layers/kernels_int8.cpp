// Products in 8-bit integers: rows that `kernels_rounding.cpp` has rounded, with one scale each, times a weight that is
// stored so, in fp32 or bf16 as they leave. Compiled with `kernels.cpp`; the plain twins are in `int8.py`.
//
//   out[m][n] = (sum over k of a[m][k] w[n][k]) * row_scale[m] * col_scale[n]      the sum exact, in int32
//
// The weight is stored once and read in either direction (w[n][k] forward, w[k][n] for the input's gradient): a piece of
// it is put in the order of the instructions on the way, which costs little beside the rows that meet it, unless these are
// few: for them, a weight can be stored as its panels (`int8_pack`), for one direction. AVX-512 VNNI
// multiplies unsigned by signed numbers, so beside signed rows the weight is shifted to w + 128 and 128 * sum(a) taken
// off again; unsigned rows (probabilities) meet it as it is.
//
// M rows, N outputs, K inputs.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <omp.h>

#include "numbers.h"
#include "panels.h"
#include "vectors.h"

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

// Panels are [K / 4][COLS][4], every number ^ `flip` (0x80 shifts it by 128); where the weight ends there are zeros.
inline void panel_of_rows(const int8_t* w, int64_t ld, int64_t K, int64_t held, uint32_t flip, uint8_t* panel) {
  int64_t done = 0;
#ifdef __AVX512VNNI__
  if (held == COLS)
    for (; done + 64 <= K; done += 64)
      for (int64_t j = 0; j < COLS; j += 16)
        transpose_words(w + j * ld + done, ld, panel + done * COLS + j * 4, 4 * COLS, _mm512_set1_epi32(flip));
#endif
  for (int64_t j = 0; j < COLS; ++j)
    for (int64_t k = done; k < K; k += 4) {
      uint32_t four = 0;
      if (j < held && k + 4 <= K) std::memcpy(&four, w + j * ld + k, 4);
      else if (j < held) std::memcpy(&four, w + j * ld + k, K - k);
      four ^= flip;
      std::memcpy(panel + k * COLS + j * 4, &four, 4);
    }
}

inline void panel_of_columns(const int8_t* w, int64_t ld, int64_t K, int64_t held, uint32_t flip, uint8_t* panel) {
  for (int64_t k = 0; k < K; k += 4) {
    uint8_t* out = panel + k * COLS;
    if (held == COLS && k + 4 <= K) {
      const int8_t *w0 = w + k * ld, *w1 = w0 + ld, *w2 = w1 + ld, *w3 = w2 + ld;
#pragma omp simd
      for (int64_t j = 0; j < COLS; ++j) {
        const uint32_t low = static_cast<uint8_t>(w0[j]) | static_cast<uint32_t>(static_cast<uint8_t>(w1[j])) << 8;
        const uint32_t high = static_cast<uint8_t>(w2[j]) | static_cast<uint32_t>(static_cast<uint8_t>(w3[j])) << 8;
        reinterpret_cast<uint32_t*>(out)[j] = (low | high << 16) ^ flip;
      }
      continue;
    }
    for (int64_t j = 0; j < COLS; ++j)
      for (int64_t b = 0; b < 4; ++b)
        out[j * 4 + b] = (j < held && k + b < K ? static_cast<uint8_t>(w[(k + b) * ld + j]) : 0u) ^ (flip & 0xffu);
  }
}

// R rows times a panel: sums[R][COLS] of a * (w + 128), or of a * w where the rows A are unsigned.
#ifdef __AVX512VNNI__
// The intrinsic's result goes to another register, with a copy for each (gcc 12).
template <class A>
inline __m512i dot(__m512i sum, __m512i w, __m512i x) {
  if constexpr (std::is_signed_v<A>) asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  else asm("vpdpbusd %1, %2, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}

// Every loop over the sums is unrolled and stands in this function, or gcc would keep them in memory.
template <int R, class A>
inline void sums_of(const A* a, int64_t lda, const uint8_t* panel, int64_t K, int32_t* sums) {
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
      for (int c = 0; c < 4; ++c) sum[r][c] = dot<A>(sum[r][c], w[c], x);
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
        sum[r][c] = dot<A>(sum[r][c], _mm512_loadu_si512(panel + whole * COLS + c * 64), x);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) _mm512_storeu_si512(sums + r * COLS + 16 * c, sum[r][c]);
}
#else
template <int R, class A>
inline void sums_of(const A* a, int64_t lda, const uint8_t* panel, int64_t K, int32_t* sums) {
  using W = std::conditional_t<std::is_signed_v<A>, uint8_t, int8_t>;
  std::fill(sums, sums + R * COLS, 0);
  for (int64_t k = 0; k < K; k += 4)
    for (int r = 0; r < R; ++r) {
      int32_t x[4] = {0, 0, 0, 0};
      for (int64_t b = 0; b < 4 && k + b < K; ++b) x[b] = a[r * lda + k + b];
      const W* w = reinterpret_cast<const W*>(panel + k * COLS);
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
inline void finish(const int32_t* sums, int32_t shift, int64_t m, int64_t partial_m, int64_t n, int64_t held,
                   const Result<S>& result) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<S, bf16>)
    if (!result.partial && held == COLS) {
      bf16* out = result.out + m * result.N + n;
      const __m512 row_scale = all_of(result.row_scale[m]);
      for (int64_t j = 0; j < COLS; j += 16) {
        const __m512 scale =
            result.col_scale ? _mm512_mul_ps(row_scale, _mm512_loadu_ps(result.col_scale + n + j)) : row_scale;
        const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums + j), _mm512_set1_epi32(shift));
        const __m512 before = result.adds ? load16(out + j) : _mm512_setzero_ps();
        store16(out + j, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, before));
      }
      return;
    }
#endif
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

template <class A>
struct Operands {
  const A* a;
  int64_t lda, K;
  const int32_t* shift;  // of the rows from `first_m` on, where they are signed
  int64_t first_m;
};

template <int R, class A, class S>
inline void rows_with_panel(const Operands<A>& of, const uint8_t* panel, int64_t m, int64_t n, int64_t held,
                            const Result<S>& result) {
  alignas(64) int32_t sums[R * COLS];
  for (int r = 0; r < R; ++r) {
    const char* out = reinterpret_cast<const char*>(result.out + (m + r) * result.N + n);
    for (size_t b = 0; b < COLS * sizeof(S); b += 64) __builtin_prefetch(out + b, 1);
  }
  sums_of<R>(of.a + m * of.lda, of.lda, panel, of.K, sums);
  for (int r = 0; r < R; ++r) {
    const int32_t shift = std::is_signed_v<A> ? of.shift[m - of.first_m + r] : 0;
    finish(sums + r * COLS, shift, m + r, m - of.first_m + r, n, held, result);
  }
}

template <class A, class S>
inline void block_with_panel(const Operands<A>& of, const uint8_t* panel, int64_t m, int64_t last, int64_t n,
                             int64_t held, const Result<S>& result) {
  for (; m + ROWS <= last; m += ROWS) rows_with_panel<ROWS>(of, panel, m, n, held, result);
  switch (last - m) {
    case 5: return rows_with_panel<5>(of, panel, m, n, held, result);
    case 4: return rows_with_panel<4>(of, panel, m, n, held, result);
    case 3: return rows_with_panel<3>(of, panel, m, n, held, result);
    case 2: return rows_with_panel<2>(of, panel, m, n, held, result);
    case 1: return rows_with_panel<1>(of, panel, m, n, held, result);
  }
}

enum Layout : int64_t { BY_ROWS, BY_COLUMNS, PACKED };

// The weight's inputs [k, k + depth) for a panel's outputs. `weight` is stored as `layout` says, which is not PACKED.
inline void fill_panel(const int8_t* weight, Layout layout, int64_t N, int64_t K, int64_t k, int64_t depth, int64_t n,
                       uint32_t flip, uint8_t* panel) {
  const int64_t held = std::min(COLS, N - n);
  if (layout == BY_COLUMNS) panel_of_columns(weight + k * N + n, N, depth, held, flip, panel);
  else panel_of_rows(weight + n * K + k, K, depth, held, flip, panel);
}

template <class A>
constexpr uint32_t FLIP = std::is_signed_v<A> ? 0x80808080u : 0u;

inline int64_t bytes_of(int64_t depth) { return (depth + 3) / 4 * 4 * COLS; }

// All panels of a weight, piece after piece of its inputs: PACKED.
void pack(const int8_t* weight, Layout layout, int64_t N, int64_t K, uint32_t flip, uint8_t* out) {
  const int64_t panels = (N + COLS - 1) / COLS;
#pragma omp parallel for schedule(static) collapse(2)
  for (int64_t k = 0; k < K; k += DEPTH)
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t depth = std::min(DEPTH, K - k);
      fill_panel(weight, layout, N, K, k, depth, p * COLS, flip, out + k * COLS * panels + p * bytes_of(depth));
    }
}

// `lda`: from one row of `a` to the next. `adds`: onto what is in `out`.
template <class S, class A>
void matmul(const A* a, int64_t lda, const float* row_scale, const void* weight, const float* col_scale, S* out,
            int64_t M, int64_t N, int64_t K, Layout layout, bool adds) {
  const int64_t panels = (N + COLS - 1) / COLS, pieces = (K + DEPTH - 1) / DEPTH;
  const int64_t rows = pieces > 1 ? std::min(M, PARTIAL_ROWS) : M;
  const int64_t most_bytes = bytes_of(std::min(K, DEPTH));
  const int64_t panels_at_once = layout == PACKED ? panels : std::clamp<int64_t>(ROOM / most_bytes, 1, panels);
  static thread_local Room<uint8_t> panel_room;
  static thread_local Room<float> partial_room;
  static thread_local Room<int32_t> shift_room;
  uint8_t* made = layout == PACKED ? nullptr : panel_room.of(panels_at_once * most_bytes);
  float* partial = pieces > 1 ? partial_room.of(rows * N) : nullptr;
  int32_t* shift = shift_room.of(rows);
#pragma omp parallel
  for (int64_t first_m = 0; first_m < M; first_m += rows) {
    const int64_t end_m = std::min(M, first_m + rows), blocks = (end_m - first_m + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t even = (end_m - first_m + blocks - 1) / blocks, block_rows = (even + ROWS - 1) / ROWS * ROWS;
    for (int64_t k = 0; k < K; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, K - k), bytes = bytes_of(depth);
      const Result<S> result{out, partial, row_scale, col_scale, k == 0, k + DEPTH >= K, adds, N};
      const Operands<A> of{a + k, lda, depth, shift, first_m};
      if constexpr (std::is_signed_v<A>) {
#pragma omp for schedule(static)
        for (int64_t m = first_m; m < end_m; ++m) {
          int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t d = 0; d < depth; ++d) sum += a[m * lda + k + d];
          shift[m - first_m] = 128 * sum;
        }
      }
      for (int64_t first = 0; first < panels; first += panels_at_once) {
        const int64_t end = std::min(panels, first + panels_at_once);
        const uint8_t* ready = layout == PACKED ? static_cast<const uint8_t*>(weight) + k * COLS * panels : made;
        if (layout != PACKED) {
#pragma omp for schedule(static)
          for (int64_t p = first; p < end; ++p)
            fill_panel(static_cast<const int8_t*>(weight), layout, N, K, k, depth, p * COLS, FLIP<A>,
                       made + (p - first) * bytes);
        }
#pragma omp for schedule(static) collapse(2)
        for (int64_t block = 0; block < blocks; ++block)
          for (int64_t p = first; p < end; ++p) {
            const int64_t n = p * COLS, m = first_m + block * block_rows;
            block_with_panel(of, ready + (p - first) * bytes, m, std::min(end_m, m + block_rows), n,
                             std::min(COLS, N - n), result);
          }
      }
    }
  }
}

template <class S>
void int8_matmul(const void* a, int64_t is_unsigned, int64_t lda, const float* row_scale, const void* weight,
                 const float* col_scale, S* out, int64_t M, int64_t N, int64_t K, int64_t layout, int64_t adds) {
  const auto multiply = [&](auto* rows) {
    matmul(rows, lda, row_scale, weight, col_scale, out, M, N, K, static_cast<Layout>(layout), adds != 0);
  };
  if (is_unsigned) multiply(static_cast<const uint8_t*>(a));
  else multiply(static_cast<const int8_t*>(a));
}

}  // namespace

FOR_BOTH(int8_matmul,
         (const void* a, int64_t is_unsigned, int64_t lda, const float* row_scale, const void* weight,
          const float* col_scale, void* out, int64_t M, int64_t N, int64_t K, int64_t layout, int64_t adds),
         (a, is_unsigned, lda, row_scale, weight, col_scale, OUT(out), M, N, K, layout, adds))

// Panels of N outputs and K inputs, 64 * ceil(N / 64) * ceil(K / 4) * 4 bytes, for unsigned rows or for signed ones.
extern "C" void int8_pack(const void* weight, void* out, int64_t N, int64_t K, int64_t layout, int64_t is_unsigned) {
  pack(static_cast<const int8_t*>(weight), static_cast<Layout>(layout), N, K, is_unsigned ? FLIP<uint8_t> : FLIP<int8_t>,
       static_cast<uint8_t*>(out));
}
