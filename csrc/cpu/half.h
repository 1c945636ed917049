// Conversion of the 16-bit element types to and from float, a vector of floats of this SIMD level or one at a time.
// The same arithmetic on bits serves both: F is float or a vector of floats, U its unsigned 32-bit counterpart.
#pragma once
#include "kernels.h"

namespace isqrt::cpu::ISQRT_LEVEL {

template <class To, class From> inline To bits_of(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class F, class U> inline F widen(U half, Half) {
  const U magnitude = half & 0x7fff, normal = (magnitude << 13) + 0x38000000u;
  // Beside 0.5 a float has the digits of subnormal numbers; none is subnormal itself, which some threads take for 0.
  const U subnormal = bits_of<U>(F(bits_of<F>(U(magnitude | 0x3f000000u)) - 0.5f));
  const U scaled = magnitude < 0x400 ? subnormal : normal;
  const U number = magnitude >= 0x7c00 ? scaled | 0x7f800000u : scaled;  // Inf and NaN
  return bits_of<F>(U(number | (half & 0x8000) << 16));
}

template <class F, class U> inline U narrow(F number, Half) {  // to nearest, ties to even
  const U bits = bits_of<U>(number), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const U normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  const U subnormal = bits_of<U>(F(bits_of<F>(magnitude) + 0.5f)) - 0x3f000000u;  // the addition rounds
  const U finite = magnitude < 0x38800000u ? subnormal : normal;
  const U infinite = magnitude > 0x7f800000u ? magnitude * 0 + 0x7e00 : magnitude * 0 + 0x7c00;
  return sign | (magnitude >= 0x477ff000u ? infinite : finite);  // from 65520 on
}

template <class F, class U> inline F widen(U half, BFloat16) { return bits_of<F>(U(half << 16)); }

template <class F, class U> inline U narrow(F number, BFloat16) {  // to nearest, ties to even
  const U bits = bits_of<U>(number), rounding = (bits >> 16 & 1) + 0x7fff;
  // Of a NaN the first 16 bits: arithmetic has set the one that keeps it from becoming Inf.
  return (bits + (number == number ? rounding : bits * 0)) >> 16;
}

// One number; a float or double is its own.
template <class T> inline T to_number(T x) { return x; }
inline float to_number(Half x) { return widen<float, uint32_t>(x.bits, x); }
inline float to_number(BFloat16 x) { return widen<float, uint32_t>(x.bits, x); }

template <class T> inline void store_number(T* to, T x) { *to = x; }
inline void store_number(Half* to, float x) { to->bits = uint16_t(narrow<float, uint32_t>(x, *to)); }
inline void store_number(BFloat16* to, float x) { to->bits = uint16_t(narrow<float, uint32_t>(x, *to)); }

}  // namespace isqrt::cpu::ISQRT_LEVEL
