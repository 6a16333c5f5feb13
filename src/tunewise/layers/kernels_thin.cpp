// Products with a thin matrix in bf16, as LoRA's factors are: R columns, few. Sums are made in fp32.
//
//   product    low[T][R] = x[T][K] F                F stored [R][K]
//   gradient   grad[R][K] = scale low^T x           in fp32; where it is asked for, scale x F on the way, F [K][R]
//   update     out[T][N] += scale low F             F stored [N][R], or [R][N] (`by_columns`)
//
// General products put every operand in another order first, which for these costs as much as the product: here x is read
// as it lies, or a few rows of it at a time. For processors with AVX-512 BF16; the twins are torch's own products.
//
// K and N are multiples of 16, R is at most MOST.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include <omp.h>

#include "pairs.h"

#ifdef __AVX512BF16__

namespace {

constexpr int64_t MOST = 64;     // columns of a thin matrix
constexpr int TALL = 12;         // rows of x that meet one or two vectors of columns at once
constexpr int64_t TOKENS = 96;   // rows of x that a thread takes at once, and whose pairs it makes

inline int64_t wide(int64_t R) { return up_to(R, 16); }

// F as what is multiplied with words of x: [K / 2][wide(R)], zeros behind the last column.
void panel_of(const bf16* f, int64_t K, int64_t R, bool by_columns, uint32_t* panel) {
  const int64_t W = wide(R);
  for (int64_t p = 0; p < K / 2; ++p)
    for (int64_t r = 0; r < W; ++r) {
      uint32_t both = 0;
      if (r < R && by_columns) both = f[2 * p * R + r].bits | static_cast<uint32_t>(f[(2 * p + 1) * R + r].bits) << 16;
      else if (r < R) std::memcpy(&both, f + r * K + 2 * p, 4);
      panel[p * W + r] = both;
    }
}

// A product whose F is in order, with where its result goes.
struct Product {
  const uint32_t* panel;
  bf16* low;
  int64_t ldlow, K, R;
  float scale;

  void rows(const bf16* x, int64_t ldx, int64_t first, int64_t end) const {
    const int64_t W = wide(R), vectors = W / 16, step = vectors <= 2 ? TALL : ROWS;
    for (; first < end; first += step) {
      alignas(64) float sums[TALL * MOST];
      const int64_t count = std::min(step, end - first);
      const Left left{reinterpret_cast<const uint32_t*>(x + first * ldx), ldx / 2, 1};
      const Right right{panel, W, 16};
      if (count == TALL && vectors == 1) block<TALL, 1>(left, right, K / 2, sums, W, false);
      else if (count == TALL && vectors == 2) block<TALL, 2>(left, right, K / 2, sums, W, false);
      else
        for (int64_t r = 0; r < count; r += ROWS)
          product(std::min<int64_t>(ROWS, count - r), vectors, {left.words + r * left.row, left.row, 1}, right, K / 2,
                  sums + r * W, W);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < R; c += 16)
          store16(low + (first + r) * ldlow + c, _mm512_mul_ps(_mm512_load_ps(sums + r * W + c), all_of(scale)),
                  first_of(R - c));
    }
  }
};

const uint32_t* panel_in_room(const bf16* f, int64_t K, int64_t R, bool by_columns) {
  static thread_local Room<uint32_t> room;
  uint32_t* panel = room.of(K / 2 * wide(R));
  panel_of(f, K, R, by_columns, panel);
  return panel;
}

void thin_product(const bf16* x, int64_t ldx, const Product& wanted, int64_t T) {
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < T; first += TOKENS) wanted.rows(x, ldx, first, std::min(T, first + TOKENS));
}

void thin_gradient(const bf16* x, int64_t ldx, const bf16* low, int64_t ldlow, float* grad, int64_t T, int64_t K,
                   int64_t R, float scale, const Product* wanted) {
  const int64_t size = R * K;
  static thread_local Room<float> room;
  float* all = room.of(omp_get_max_threads() * size);
#pragma omp parallel
  {
    static thread_local Room<uint32_t> pairs_room;
    uint32_t *pairs = pairs_room.of(TOKENS / 2 * (K + MOST)), *low_pairs = pairs + TOKENS / 2 * K;
    float* own = all + omp_get_thread_num() * size;
    std::fill(own, own + size, 0.0f);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < T; first += TOKENS) {
      const int64_t rows = std::min(TOKENS, T - first);
      if (wanted) wanted->rows(x, ldx, first, first + rows);
      along(x + first * ldx, ldx, rows, K, pairs);
      along(low + first * ldlow, ldlow, rows, R, low_pairs);
      for (int64_t c = 0; c < R; c += ROWS)
        product(std::min<int64_t>(ROWS, R - c), K / 16, {low_pairs + c, 1, R}, {pairs, K, 16}, (rows + 1) / 2,
                own + c * K, K, true);
    }
    const int threads = omp_get_num_threads();
#pragma omp for schedule(static)
    for (int64_t first = 0; first < size; first += 16)
      for (int64_t i = first; i < first + 16; ++i) {
        float sum = all[i];
        for (int other = 1; other < threads; ++other) sum += all[other * size + i];
        grad[i] = sum * scale;
      }
  }
}

void thin_update(bf16* out, int64_t ldout, const bf16* low, int64_t ldlow, const bf16* f, int64_t T, int64_t N, int64_t R,
                 bool by_columns, float scale) {
  const int64_t P = (R + 1) / 2;
  static thread_local Room<uint32_t> room;
  uint32_t* panel = room.of(P * N);  // [P][N]
  const auto scaled = [scale](bf16 x) {
    bf16 y;
    store(&y, load(&x) * scale);
    return static_cast<uint32_t>(y.bits);
  };
  for (int64_t p = 0; p < P; ++p) {
    const bool has_other = 2 * p + 1 < R;
    for (int64_t n = 0; n < N; ++n) {
      const bf16* one = by_columns ? f + 2 * p * N + n : f + n * R + 2 * p;
      panel[p * N + n] = scaled(*one) | (has_other ? scaled(one[by_columns ? N : 1]) << 16 : 0u);
    }
  }
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < T; first += ROWS) {
    const int64_t rows = std::min<int64_t>(ROWS, T - first);
    uint32_t left[ROWS * MOST / 2];
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t p = 0; p < P; ++p) {
        const bf16* one = low + (first + r) * ldlow + 2 * p;
        left[r * P + p] = one->bits | (2 * p + 1 < R ? static_cast<uint32_t>(one[1].bits) << 16 : 0u);
      }
    product(rows, N / 16, {left, P, 1}, {panel, N, 16}, P, out + first * ldout, ldout, true);
  }
}

}  // namespace

extern "C" {
void thin_product_bf16(const void* x, int64_t ldx, const void* f, void* low, int64_t T, int64_t K, int64_t R) {
  const uint32_t* panel = panel_in_room(static_cast<const bf16*>(f), K, R, false);
  thin_product(static_cast<const bf16*>(x), ldx, {panel, static_cast<bf16*>(low), R, K, R, 1.0f}, T);
}

// `f` and `wanted`, both or none: the product of x with f, stored by columns, of the same size.
void thin_gradient_bf16(const void* x, int64_t ldx, const void* low, int64_t ldlow, void* grad, const void* f,
                        void* wanted, int64_t ldwanted, int64_t T, int64_t K, int64_t R, float scale) {
  Product product{nullptr, static_cast<bf16*>(wanted), ldwanted, K, R, scale};
  if (f) product.panel = panel_in_room(static_cast<const bf16*>(f), K, R, true);
  thin_gradient(static_cast<const bf16*>(x), ldx, static_cast<const bf16*>(low), ldlow, static_cast<float*>(grad), T, K,
                R, scale, f ? &product : nullptr);
}

void thin_update_bf16(void* out, int64_t ldout, const void* low, int64_t ldlow, const void* f, int64_t T, int64_t N,
                      int64_t R, int64_t by_columns, float scale) {
  thin_update(static_cast<bf16*>(out), ldout, static_cast<const bf16*>(low), ldlow, static_cast<const bf16*>(f), T, N, R,
              by_columns != 0, scale);
}
}
#endif
