// What one SIMD level of the CPU engine offers: functions that do the work items [begin, end) on the calling thread.
#pragma once
#include "../tasks.h"

namespace isqrt::cpu {

template <class X> struct PoolKernels {
  void (*pool)(const PoolTask<X>&, int64_t begin, int64_t end);                   // item: sample * chunks + chunk
  void (*merge)(const PoolTask<X>&, int64_t begin, int64_t end);                  // item: sample
  void (*pool_backward)(const PoolBackwardTask<X>&, int64_t begin, int64_t end);  // item: sample * chunks + chunk
};

template <class X> struct RootKernels {
  void (*root)(const RootTask<X>&, int64_t begin, int64_t end);                   // item: sample
  void (*root_backward)(const RootBackwardTask<X>&, int64_t begin, int64_t end);  // item: sample
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
