// Stands in for CUDA's <cuda_fp16.h>: conversions.
#pragma once
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  _Float16 number;
  memcpy(&number, &x, sizeof number);
  return float(number);
}

inline __half __float2half_rn(float x) {
  const _Float16 number = static_cast<_Float16>(x);  // the compiler's own conversion, to nearest even
  __half result;
  memcpy(&result, &number, sizeof number);
  return result;
}

struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
