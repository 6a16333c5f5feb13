// What products put their operands into: memory that a thread keeps, and squares turned on their diagonal.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// Memory that a calling thread keeps from call to call, not cleared: new pages cost a hundredth of a product.
template <class T>
class Room {
 public:
  T* of(int64_t count) {
    if (count > held_) {
      memory_.reset(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))));
      held_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t held_ = 0;
};

#ifdef __AVX512F__
// 16 rows of 16 words, `ld` bytes from each other, become 16 rows of what were columns, `apart` bytes from each other;
// every word ^ `flip`.
inline void transpose_words(const void* from, int64_t ld, void* to, int64_t apart, __m512i flip) {
  const char* rows = static_cast<const char*>(from);
  char* out = static_cast<char*>(to);
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_xor_si512(_mm512_loadu_si512(rows + i * ld), flip);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // a[i + c]: column c of every quarter of the four rows
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), odd_low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_si512(out + c * apart, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    _mm512_storeu_si512(out + (4 + c) * apart, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_si512(out + (8 + c) * apart, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    _mm512_storeu_si512(out + (12 + c) * apart, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
}
#endif

}  // namespace
