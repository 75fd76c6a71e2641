// Stand-in for CUDA's bfloat16 type: storage and conversions (round to nearest even), no
// arithmetic.
#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float value) {
    unsigned u;
    __builtin_memcpy(&u, &value, 4);
    bits = (u & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  }
  operator float() const {
    const unsigned u = unsigned(bits) << 16;
    float value;
    __builtin_memcpy(&value, &u, 4);
    return value;
  }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

__forceinline__ float __bfloat162float(__nv_bfloat16 value) { return float(value); }
__forceinline__ __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
