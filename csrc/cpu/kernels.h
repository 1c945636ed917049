// What one SIMD level of the CPU engine offers: functions that do work items on the calling thread.
#pragma once
#include "../tasks.h"

namespace isqrt::cpu {

/// Work items, which threads take one by one: a thread whose core is slower, or used by others, too, takes fewer.
class Items {
 public:
  explicit Items(int64_t count) : count_(count) {}

  /// f(item) for each that no other thread took.
  template <class F> inline __attribute__((always_inline)) void take(const F& f) {
    for (int64_t item; (item = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED)) < count_;) f(item);
  }

 private:
  const int64_t count_;
  int64_t next_ = 0;
};

template <class X> struct PoolKernels {
  void (*pool)(const PoolTask<X>&, Items&);                   // item: sample * chunks + chunk
  void (*merge)(const PoolTask<X>&, Items&);                  // item: sample
  void (*pool_backward)(const PoolBackwardTask<X>&, Items&);  // item: sample * chunks + chunk
};

template <class X> struct RootKernels {
  void (*root)(const RootTask<X>&, Items&);                   // item: sample
  void (*root_backward)(const RootBackwardTask<X>&, Items&);  // item: sample
};

// One of each per level, in avx512.cpp, avx2.cpp and portable.cpp.
namespace avx512 {
template <class X> PoolKernels<X> pool_kernels();
template <class X> RootKernels<X> root_kernels();
}  // namespace avx512
namespace avx2 {
template <class X> PoolKernels<X> pool_kernels();
template <class X> RootKernels<X> root_kernels();
}  // namespace avx2
namespace portable {
template <class X> PoolKernels<X> pool_kernels();
template <class X> RootKernels<X> root_kernels();
}  // namespace portable

}  // namespace isqrt::cpu
