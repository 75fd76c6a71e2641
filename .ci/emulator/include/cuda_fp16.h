// Stand-in for CUDA's half precision type: storage and conversions (round to nearest even), no
// arithmetic.
#pragma once
#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
  __half() = default;
  __half(float value) {
    unsigned u;
    __builtin_memcpy(&u, &value, 4);
    const unsigned sign = u >> 16 & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u)
      bits = 0x7fff;  // NaN, as the GPU writes it
    else if (u >= 0x477ff000u)
      bits = sign | 0x7c00;  // from 65520 on: infinity
    else if (u >= 0x38800000u)
      bits = sign | ((u - 0x38000000u + 0xfffu + (u >> 13 & 1u)) >> 13);
    else {  // subnormal: the adder rounds to multiples of 2^-24
      float shifted = __builtin_fabsf(value) + 0.5f;
      __builtin_memcpy(&u, &shifted, 4);
      bits = sign | (u - 0x3f000000u);
    }
  }
  operator float() const {
    const unsigned exponent = bits >> 10 & 31u, fraction = bits & 1023u;
    unsigned u =
        exponent == 31 ? 0x7f800000u | fraction << 13 : (exponent + 112) << 23 | fraction << 13;
    float value;
    if (exponent == 0)
      value = float(fraction) * 0x1p-24f;
    else
      __builtin_memcpy(&value, &u, 4);
    return bits & 0x8000 ? -value : value;
  }
};
struct alignas(4) __half2 {
  __half x, y;
};

__forceinline__ float __half2float(__half value) { return float(value); }
__forceinline__ __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
