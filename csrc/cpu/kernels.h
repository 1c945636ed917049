// What one SIMD level of the CPU engine offers: functions that do work items on the calling thread.
#pragma once
#include <sched.h>

#include "../tasks.h"

namespace isqrt::cpu {

/// The work items of a stage, so many for each sample, which threads take from what is left: fewer where their core is
/// slower, or used by others, too. First they take several that follow each other, for the next one's data are asked
/// for during the one before; in the end single ones. A sample's begin when the stage before has done its own.
class Items {
 public:
  /// `left` [samples] counts what is not done, `before` is null for the first stage.
  Items(int64_t samples, int64_t per_sample, int64_t threads, int64_t* left, const Items* before)
      : count_(samples * per_sample), per_sample_(per_sample), threads_(threads), left_(left), before_(before) {}

  /// f(item) for each that no other thread took.
  template <class F> inline __attribute__((always_inline)) void take(const F& f) {
    int64_t begin = __atomic_load_n(&next_, __ATOMIC_RELAXED);
    while (begin < count_) {
      const int64_t share = (count_ - begin) / (2 * threads_), end = begin + (share > 1 ? share : 1);
      if (!__atomic_compare_exchange_n(&next_, &begin, end, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
      for (; begin < end; ++begin) run(f, begin);
      begin = __atomic_load_n(&next_, __ATOMIC_RELAXED);
    }
  }

 private:
  template <class F> inline __attribute__((always_inline)) void run(const F& f, int64_t item) {
    const int64_t sample = item / per_sample_;
    while (before_ && !before_->has_done(sample)) ::sched_yield();
    try {
      f(item);
    } catch (...) {  // what waits for it goes on, to no purpose, and the call ends with the exception
      __atomic_store_n(&failed_, true, __ATOMIC_RELEASE);
      throw;
    }
    __atomic_fetch_sub(left_ + sample, 1, __ATOMIC_RELEASE);
  }

  inline __attribute__((always_inline)) bool has_done(int64_t sample) const {
    return __atomic_load_n(left_ + sample, __ATOMIC_ACQUIRE) == 0 || __atomic_load_n(&failed_, __ATOMIC_ACQUIRE);
  }

  const int64_t count_, per_sample_, threads_;
  int64_t* const left_;
  const Items* const before_;
  int64_t next_ = 0;
  bool failed_ = false;
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

/// Of gram.h; item: sample.
template <class X> struct GramKernels {
  void (*pool)(const GramTask<X>&, Items&);
  void (*expand)(const ExpandTask<X>&, Items&);
  void (*contract)(const ContractTask<X>&, Items&);
  void (*backward)(const GramBackwardTask<X>&, Items&);
};

// One of each per level, in avx512.cpp, avx2.cpp and portable.cpp.
namespace avx512 {
template <class X> PoolKernels<X> pool_kernels();
template <class X> RootKernels<X> root_kernels();
template <class X> GramKernels<X> gram_kernels();
}  // namespace avx512
namespace avx2 {
template <class X> PoolKernels<X> pool_kernels();
template <class X> RootKernels<X> root_kernels();
template <class X> GramKernels<X> gram_kernels();
}  // namespace avx2
namespace portable {
template <class X> PoolKernels<X> pool_kernels();
template <class X> RootKernels<X> root_kernels();
template <class X> GramKernels<X> gram_kernels();
}  // namespace portable

}  // namespace isqrt::cpu
