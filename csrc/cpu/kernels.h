// What one SIMD level of the CPU engine offers: functions that do work items on the calling thread.
#pragma once
#include "../tasks.h"
#include "threads.h"

namespace isqrt::cpu {

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
