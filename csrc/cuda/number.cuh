// Reading and writing elements in memory. To 16 bits they are rounded to nearest, ties to even.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "../tasks.h"

namespace isqrt::cuda {

__device__ inline float to_number(float x) { return x; }
__device__ inline double to_number(double x) { return x; }
__device__ inline float to_number(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float to_number(BFloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }

__device__ inline void store_number(float* to, float x) { *to = x; }
__device__ inline void store_number(double* to, double x) { *to = x; }
__device__ inline void store_number(Half* to, float x) { to->bits = __half_as_ushort(__float2half_rn(x)); }
__device__ inline void store_number(BFloat16* to, float x) { to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

/// Two neighbours in float16, the first one in the low half.
__device__ inline uint32_t pack_halves(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return __half_as_ushort(pair.x) | uint32_t(__half_as_ushort(pair.y)) << 16;
}

/// One of them.
__device__ inline float half_of(uint32_t pair, int which) {
  __half2 halves;
  memcpy(&halves, &pair, sizeof halves);
  return which ? __high2float(halves) : __low2float(halves);
}

/// The power of two that brings `largest` to 2^14 or above it, and to less than 2^15, and its reciprocal; both are
/// normal numbers. 1 where that is 0, infinite or no number. In float64 there is no need.
template <class T> struct Scale {
  T up = 1, down = 1;
  __device__ explicit Scale(T) {}
};
template <> struct Scale<float> {
  float up, down;
  __device__ explicit Scale(float largest) {
    constexpr uint32_t kBias = 127, kTop = 14, kInfinite = 255, kLeast = 15;
    const uint32_t exponent = __float_as_uint(largest) >> 23 & 255, bounded = exponent < kLeast ? kLeast : exponent;
    const bool plain = exponent == kInfinite || largest == 0;
    up = plain ? 1.0f : __uint_as_float((2 * kBias + kTop - bounded) << 23);
    down = plain ? 1.0f : __uint_as_float((bounded - kTop) << 23);
  }
};

/// Two neighbours as the sums of two numbers of float16 each.
struct SplitPair {
  uint32_t high, low;
  __device__ __forceinline__ SplitPair(float first, float second)
      : high(pack_halves(first, second)), low(pack_halves(first - half_of(high, 0), second - half_of(high, 1))) {}
};

/// A pointer to elements that are computed as T, const or not, and may lie in memory as 16 bits. The kernels of roots
/// read and write few of them: they are told which, where those of pooling are compiled for each.
template <class T> class Elements {
  template <class X> using Like = std::conditional_t<std::is_const_v<T>, const X, X>;

 public:
  Elements() = default;
  template <class X> explicit Elements(X* data) : data_(data), kind_(kind(data)) {}

  ISQRT_FN Elements operator+(int64_t n) const {
    Elements moved = *this;
    moved.data_ = reinterpret_cast<Like<char>*>(data_) + n * (kind_ == kOwn ? int64_t(sizeof(T)) : 2);
    return moved;
  }
  __device__ std::remove_const_t<T> operator[](int64_t i) const {
    if constexpr (sizeof(T) == 4) {
      if (kind_ == kHalf) return to_number(static_cast<Like<Half>*>(data_)[i]);
      if (kind_ == kBFloat16) return to_number(static_cast<Like<BFloat16>*>(data_)[i]);
    }
    return static_cast<T*>(data_)[i];
  }
  __device__ void store(T x) const {
    if constexpr (sizeof(T) == 4) {
      if (kind_ == kHalf) return store_number(static_cast<Half*>(data_), x);
      if (kind_ == kBFloat16) return store_number(static_cast<BFloat16*>(data_), x);
    }
    *static_cast<T*>(data_) = x;
  }

  /// f(pointer to the elements as they lie in memory)
  template <class F> __device__ __forceinline__ void visit(const F& f) const {
    if constexpr (sizeof(T) == 4) {
      if (kind_ == kHalf) return f(static_cast<Like<Half>*>(data_));
      if (kind_ == kBFloat16) return f(static_cast<Like<BFloat16>*>(data_));
    }
    f(static_cast<T*>(data_));
  }

 private:
  enum Kind { kOwn, kHalf, kBFloat16 };
  static Kind kind(const std::remove_const_t<T>*) { return kOwn; }
  static Kind kind(const Half*) { return kHalf; }
  static Kind kind(const BFloat16*) { return kBFloat16; }

  Like<void>* data_ = nullptr;
  Kind kind_ = kOwn;
};

template <class T> __device__ inline void store_number(const Elements<T>& to, T x) { to.store(x); }

template <class T, class F> __device__ __forceinline__ void with_pointer(T* data, const F& f) { f(data); }
template <class T, class F> __device__ __forceinline__ void with_pointer(const Elements<T>& data, const F& f) {
  data.visit(f);
}

/// A view, and a task, as the kernels take it.
template <class T, class X, class Pointer> RootView<T, Elements<T>> with_elements(const RootView<X, Pointer>& view) {
  return {Elements<T>(view.data), view.output, view.channels};
}
template <class X, class T = Compute<X>> RootTask<T, Elements<T>> with_elements(const RootTask<X>& task) {
  return {task.batch, task.sigma,     task.steps, task.root, with_elements<T>(task.result),
          task.scale, task.workspace, task.blocks};
}
template <class X, class T = Compute<X>>
RootBackwardTask<T, Elements<const T>> with_elements(const RootBackwardTask<X>& task) {
  return {task.batch,     with_elements<const T>(task.grad),
          task.sigma,     task.steps,
          task.root,      task.grad_sigma,
          task.workspace, task.blocks,
          task.value};
}

}  // namespace isqrt::cuda
