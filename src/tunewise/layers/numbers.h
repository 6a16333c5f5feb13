// The two kinds of numbers that the kernels read and write, and a function for each of them.
#pragma once

#include <bit>
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

}  // namespace

#define FOR_BOTH(NAME, PARAMETERS, ...)                          \
  extern "C" void NAME##_fp32 PARAMETERS { using S = float; NAME<S> __VA_ARGS__; } \
  extern "C" void NAME##_bf16 PARAMETERS { using S = bf16; NAME<S> __VA_ARGS__; }

#define IN(p) static_cast<const S*>(p)
#define OUT(p) static_cast<S*>(p)
