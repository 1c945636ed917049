// What one SIMD level of the CPU engine offers: functions that do the work items [begin, end) on the calling thread.
#pragma once
#include "../tasks.h"

namespace isqrt::cpu {

template <class T> struct Kernels {
  const char* level;
  void (*pool)(const PoolTask<T>&, int64_t begin, int64_t end);                   // item: sample * chunks + chunk
  void (*merge)(const PoolTask<T>&, int64_t begin, int64_t end);                  // item: sample
  void (*pool_backward)(const PoolBackwardTask<T>&, int64_t begin, int64_t end);  // item: sample * chunks + chunk
  void (*root)(const RootTask<T>&, int64_t begin, int64_t end);                   // item: sample
  void (*root_backward)(const RootBackwardTask<T>&, int64_t begin, int64_t end);  // item: sample
};

// One of each per level, in avx512.cpp, avx2.cpp and portable.cpp.
namespace avx512 {
template <class T> const Kernels<T>& kernels();
}
namespace avx2 {
template <class T> const Kernels<T>& kernels();
}
namespace portable {
template <class T> const Kernels<T>& kernels();
}

}  // namespace isqrt::cpu
