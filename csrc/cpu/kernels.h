// What one SIMD level of the CPU engine offers: functions that do work items on the calling thread.
#pragma once
#include "../tasks.h"

namespace isqrt::cpu {

/// Work items, which threads take from what is left: fewer where their core is slower, or used by others, too. First
/// they take several that follow each other, for the next one's data are asked for during the one before; in the end
/// single ones.
class Items {
 public:
  Items(int64_t count, int64_t threads) : count_(count), threads_(threads) {}

  /// f(item) for each that no other thread took.
  template <class F> inline __attribute__((always_inline)) void take(const F& f) {
    int64_t begin = __atomic_load_n(&next_, __ATOMIC_RELAXED);
    while (begin < count_) {
      const int64_t share = (count_ - begin) / (2 * threads_), end = begin + (share > 1 ? share : 1);
      if (!__atomic_compare_exchange_n(&next_, &begin, end, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
      for (; begin < end; ++begin) f(begin);
      begin = __atomic_load_n(&next_, __ATOMIC_RELAXED);
    }
  }

 private:
  const int64_t count_, threads_;
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
