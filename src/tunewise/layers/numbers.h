// The two kinds of numbers that the kernels read and write, a function for each of them, and the exponential.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace {

struct bf16 {
  uint16_t bits;
};

inline float load(const float* p) { return *p; }
inline float load(const bf16* p) { return std::bit_cast<float>(static_cast<uint32_t>(p->bits) << 16); }
inline void store(float* p, float x) { *p = x; }
inline void store(bf16* p, float x) {  // to nearest, ties to even
  uint32_t u = std::bit_cast<uint32_t>(x);
  p->bits = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// Cephes' expf (relative error 2e-7), written so that compilers vectorize it; NaN stays NaN. Beyond +-60 it is cut: what
// is below exp(-60) = 9e-27 is zero (what padding adds has probability zero, and Adam divides by the size of gradients),
// and what is computed in its place is no denormal number, which are 50 times slower (compilers compute for every
// element and choose afterwards).
inline float exp_of(float x) {
  const bool is_none = x < -60.0f;
  x = is_none ? -60.0f : x;
  x = x > 60.0f ? 60.0f : x;
  float n = std::floor(x * 1.44269504088896341f + 0.5f);
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  p = p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  return is_none ? 0.0f : p;
}

}  // namespace

#define FOR_BOTH(NAME, PARAMETERS, ...)                          \
  extern "C" void NAME##_fp32 PARAMETERS { using S = float; NAME<S> __VA_ARGS__; } \
  extern "C" void NAME##_bf16 PARAMETERS { using S = bf16; NAME<S> __VA_ARGS__; }

#define IN(p) static_cast<const S*>(p)
#define OUT(p) static_cast<S*>(p)
