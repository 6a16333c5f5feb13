// Loops over rows that torch's operators would do in several passes: norms, SwiGLU, cross entropy. Compiled on the user's
// machine by `native.py`; every function has its plain twin in tests/unit/layers/test_fused.py. Numbers are computed in
// fp32 and stored as they came, fp32 or bf16; for bf16, which compilers vectorize badly, sixteen at once where the
// processor has the instructions.
//
// T rows (tokens), D columns, V vocabulary. All tensors are contiguous unless a stride is given.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

#include "numbers.h"
#include "vectors.h"

namespace {

inline float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// y = w * x / sqrt(mean(x^2) + eps); keeps 1 / sqrt(...).
template <class S>
void rms_norm(const S* x, const S* w, S* y, float* scale, int64_t T, int64_t D, float eps) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const S* row = x + t * D;
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < D; ++d) squares += load(row + d) * load(row + d);
    const float r = 1.0f / std::sqrt(squares / static_cast<float>(D) + eps);
    scale[t] = r;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) store(y + t * D + d, load(w + d) * (load(row + d) * r));
  }
}

#ifdef __AVX512BF16__
template <>
void rms_norm(const bf16* x, const bf16* w, bf16* y, float* scale, int64_t T, int64_t D, float eps) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const bf16* row = x + t * D;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t d = 0; d < D; d += 16) {
      const __m512 a = load16(row + d, first_of(D - d));
      squares = _mm512_fmadd_ps(a, a, squares);
    }
    scale[t] = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(D) + eps);
    const __m512 r = all_of(scale[t]);
    for (int64_t d = 0; d < D; d += 16) {
      const __mmask16 lanes = first_of(D - d);
      const __m512 n = _mm512_mul_ps(load16(row + d, lanes), r);
      store16(y + t * D + d, _mm512_mul_ps(load16(w + d, lanes), n), lanes);
    }
  }
}
#endif

template <class S>
void rms_norm_row_backward(const S* grad, const S* row, const S* w, float r, S* dx, int64_t D) {
  float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
  for (int64_t d = 0; d < D; ++d) dot += load(grad + d) * load(w + d) * load(row + d);
  const float mean = dot * r / static_cast<float>(D);
#pragma omp simd
  for (int64_t d = 0; d < D; ++d)
    store(dx + d, r * (load(grad + d) * load(w + d) - load(row + d) * r * mean));
}

#ifdef __AVX512BF16__
template <>
void rms_norm_row_backward(const bf16* grad, const bf16* row, const bf16* w, float r, bf16* dx, int64_t D) {
  __m512 dots = _mm512_setzero_ps();
  const auto weighed = [&](int64_t d, __mmask16 lanes) {
    return _mm512_mul_ps(load16(grad + d, lanes), load16(w + d, lanes));
  };
  for (int64_t d = 0; d < D; d += 16) {
    const __mmask16 lanes = first_of(D - d);
    dots = _mm512_fmadd_ps(weighed(d, lanes), load16(row + d, lanes), dots);
  }
  const __m512 mean = all_of(_mm512_reduce_add_ps(dots) * r / static_cast<float>(D) * r);
  for (int64_t d = 0; d < D; d += 16) {
    const __mmask16 lanes = first_of(D - d);
    const __m512 off = _mm512_fnmadd_ps(load16(row + d, lanes), mean, weighed(d, lanes));
    store16(dx + d, _mm512_mul_ps(off, all_of(r)), lanes);
  }
}
#endif

// dx = r (g w - n mean(g w n)) with n = x r; dw = sum over rows of g n, where `weight_grad` is there.
template <class S>
void rms_norm_backward(const S* g, const S* x, const S* w, const float* scale, S* dx, float* weight_grad, int64_t T,
                       int64_t D) {
  std::vector<std::vector<float>> parts(omp_get_max_threads());
#pragma omp parallel
  {
    std::vector<float>& part = parts[omp_get_thread_num()];
    if (weight_grad) part.assign(D, 0.0f);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; ++t) {
      const S *grad = g + t * D, *row = x + t * D;
      const float r = scale[t];
      rms_norm_row_backward(grad, row, w, r, dx + t * D, D);
      if (weight_grad) {
        float* sum = part.data();
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) sum[d] += load(grad + d) * load(row + d) * r;
      }
    }
  }
  if (weight_grad)
    for (int64_t d = 0; d < D; ++d) {
      weight_grad[d] = 0.0f;
      for (const auto& part : parts)
        if (!part.empty()) weight_grad[d] += part[d];
    }
}

constexpr int64_t PIECE = 4096;  // what a thread takes at once of long rows of numbers

// y = silu(gate) * up, for N numbers.
template <class S>
void swiglu(const S* gate, const S* up, S* y, int64_t N) {
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < N; first += PIECE) {
    const int64_t end = first + PIECE < N ? first + PIECE : N;
#pragma omp simd
    for (int64_t n = first; n < end; ++n) {
      const float a = load(gate + n);
      store(y + n, a * sigmoid_of(a) * load(up + n));
    }
  }
}

#ifdef __AVX512BF16__
template <>
void swiglu(const bf16* gate, const bf16* up, bf16* y, int64_t N) {
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < N; first += PIECE)
    for (int64_t n = first; n < std::min(first + PIECE, N); n += 16) {
      const __mmask16 lanes = first_of(N - n);
      const __m512 a = load16(gate + n, lanes);
      store16(y + n, _mm512_mul_ps(_mm512_mul_ps(a, sigmoid_of(a)), load16(up + n, lanes)), lanes);
    }
}
#endif

// The gradients may take the places of gate and up.
template <class S>
void swiglu_backward(const S* g, const S* gate, const S* up, S* gate_grad, S* up_grad, int64_t N) {
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < N; first += PIECE) {
    const int64_t end = first + PIECE < N ? first + PIECE : N;
#pragma omp simd
    for (int64_t n = first; n < end; ++n) {
      const float a = load(gate + n), grad = load(g + n), s = sigmoid_of(a);
      const float gate_slope = grad * load(up + n) * s * (1.0f + a * (1.0f - s));
      store(up_grad + n, grad * a * s);
      store(gate_grad + n, gate_slope);
    }
  }
}

#ifdef __AVX512BF16__
template <>
void swiglu_backward(const bf16* g, const bf16* gate, const bf16* up, bf16* gate_grad, bf16* up_grad, int64_t N) {
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < N; first += PIECE)
    for (int64_t n = first; n < std::min(first + PIECE, N); n += 16) {
      const __mmask16 lanes = first_of(N - n);
      const __m512 a = load16(gate + n, lanes), grad = load16(g + n, lanes), u = load16(up + n, lanes);
      const __m512 s = sigmoid_of(a), one = all_of(1.0f);
      const __m512 slope = _mm512_fmadd_ps(a, _mm512_sub_ps(one, s), one), of_up = _mm512_mul_ps(grad, s);
      store16(up_grad + n, _mm512_mul_ps(of_up, a), lanes);
      store16(gate_grad + n, _mm512_mul_ps(_mm512_mul_ps(of_up, u), slope), lanes);
    }
}
#endif

// Cross entropy of each row with its gradient in the logits' place; the logits count `scale` times.
template <class S>
void cross_entropy(S* logits, const int64_t* labels, float* loss, int64_t T, int64_t V, float scale) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    S* row = logits + t * V;
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t v = 0; v < V; ++v) most = load(row + v) > most ? load(row + v) : most;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < V; ++v) sum += exp_of((load(row + v) - most) * scale);
    const float target = load(row + labels[t]), log_of_sum = std::log(sum);
    loss[t] = log_of_sum - (target - most) * scale;
    const float share = scale / sum;
#pragma omp simd
    for (int64_t v = 0; v < V; ++v) store(row + v, exp_of((load(row + v) - most) * scale) * share);
    store(row + labels[t], scale * std::expm1(-loss[t]));  // p - 1 without cancellation
  }
}

#ifdef __AVX512BF16__
template <>
void cross_entropy(bf16* logits, const int64_t* labels, float* loss, int64_t T, int64_t V, float scale) {
  const __m512 factor = all_of(scale * LOG2_E);
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    bf16* row = logits + t * V;
    __m512 most_of = all_of(-INFINITY), sum_of = _mm512_setzero_ps();
    for (int64_t v = 0; v < V; v += 16) {
      const __mmask16 lanes = first_of(V - v);
      most_of = _mm512_mask_max_ps(most_of, lanes, most_of, load16(row + v, lanes));
    }
    const float most = _mm512_reduce_max_ps(most_of);
    const __m512 top = all_of(most);
    const auto power = [&](int64_t v, __mmask16 lanes) {
      return exp2_of(_mm512_mul_ps(_mm512_sub_ps(load16(row + v, lanes), top), factor), lanes);
    };
    for (int64_t v = 0; v < V; v += 16) sum_of = _mm512_add_ps(sum_of, power(v, first_of(V - v)));
    const float sum = _mm512_reduce_add_ps(sum_of), target = load(row + labels[t]);
    loss[t] = std::log(sum) - (target - most) * scale;
    const __m512 share = all_of(scale / sum);
    for (int64_t v = 0; v < V; v += 16) {
      const __mmask16 lanes = first_of(V - v);
      store16(row + v, _mm512_mul_ps(power(v, lanes), share), lanes);
    }
    store(row + labels[t], scale * std::expm1(-loss[t]));  // p - 1 without cancellation
  }
}
#endif

}  // namespace

FOR_BOTH(rms_norm, (const void* x, const void* w, void* y, float* scale, int64_t T, int64_t D, float eps),
         (IN(x), IN(w), OUT(y), scale, T, D, eps))
FOR_BOTH(rms_norm_backward,
         (const void* g, const void* x, const void* w, const float* scale, void* dx, float* dw, int64_t T, int64_t D),
         (IN(g), IN(x), IN(w), scale, OUT(dx), dw, T, D))
FOR_BOTH(swiglu, (const void* gate, const void* up, void* y, int64_t N), (IN(gate), IN(up), OUT(y), N))
FOR_BOTH(swiglu_backward,
         (const void* g, const void* gate, const void* up, void* gate_grad, void* up_grad, int64_t N),
         (IN(g), IN(gate), IN(up), OUT(gate_grad), OUT(up_grad), N))
FOR_BOTH(cross_entropy, (void* logits, const int64_t* labels, float* loss, int64_t T, int64_t V, float scale),
         (OUT(logits), labels, loss, T, V, scale))
