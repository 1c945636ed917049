#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#if !defined(__CUDACC__)
#include <cstring>
#endif

namespace isqrt::cuda {

#if defined(__CUDACC__)
__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_f64(double* d, double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1},{%2},{%3},{%0,%1};"
      : "+d"(d[0]), "+d"(d[1])
      : "d"(a), "d"(b));
}
/// i, in a way that the compiler cannot see: what follows from it is computed anew, not kept in registers.
__device__ __forceinline__ int opaque(int i) {
  asm volatile("" : "+r"(i));
  return i;
}
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, int source_bytes = kBytes) {
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(source_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                 "r"(source_bytes)
                 : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending> __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
#else
inline int opaque(int i) { return i; }
inline uint32_t to_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & ~0x1fffu; }
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct In {
    uint32_t a[4], b[2];
  } in;
  memcpy(in.a, a, 16);
  memcpy(in.b, b, 8);
  const auto g = emulation::gather<In>(~0u, in, EMULATION_SITE("mma.sync"));
  const unsigned l = emulation::lane(), gr = l >> 2, t = l & 3;
  const auto tf = [](uint32_t u) { return __uint_as_float(u & ~0x1fffu); };
  for (int k = 0; k < 8; k++) {
    const In a0 = g[gr * 4 + (k & 3)], b0 = g[(2 * t) * 4 + (k & 3)], b1 = g[(2 * t + 1) * 4 + (k & 3)];
    const float lo = tf(a0.a[k < 4 ? 0 : 2]), hi = tf(a0.a[k < 4 ? 1 : 3]), c0 = tf(b0.b[k >> 2]),
                c1 = tf(b1.b[k >> 2]);
    d[0] += lo * c0;
    d[1] += lo * c1;
    d[2] += hi * c0;
    d[3] += hi * c1;
  }
}
inline void mma_f64(double* d, double a, double b) {
  struct In {
    double a, b;
  };
  const auto g = emulation::gather<In>(~0u, In{a, b}, EMULATION_SITE("mma.sync"));
  const unsigned l = emulation::lane(), gr = l >> 2, t = l & 3;
  for (unsigned k = 0; k < 4; k++) {
    d[0] += g[gr * 4 + k].a * g[2 * t * 4 + k].b;
    d[1] += g[gr * 4 + k].a * g[(2 * t + 1) * 4 + k].b;
  }
}
template <int kBytes> inline void copy_async(void* to, const void* from, int source_bytes = kBytes) {
  emulation::copy_async(to, from, kBytes, unsigned(source_bytes));
}
inline void copy_async_commit() { emulation::copy_async_commit(); }
template <int kPending> inline void copy_async_wait() { emulation::copy_async_wait(kPending); }
#endif

}  // namespace isqrt::cuda
