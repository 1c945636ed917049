// Stands in for CUDA's <cuda_runtime.h> where kernels run on the CPU: the language (keywords, built-in variables,
// barriers, warp functions, atomics) and the part of the runtime API that launchers call.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../emulation.h"

// ---- the language ---------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

// Static shared memory is one linker section, which is filled with NaN before each block; g++ keeps that of templates
// out of it. AddressSanitizer guards only ordinary variables, and those only in kernels of an anonymous namespace.
#if defined(EMULATION_ADDRESS_SANITIZER)
#define __shared__ static
#else
#define __shared__ static __attribute__((section("emulated_shared")))
#endif

static constexpr int warpSize = 32;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

inline unsigned __float_as_uint(float f) {
  unsigned u;
  memcpy(&u, &f, sizeof u);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> void __stwb(T* p, T value) { *p = value; }

// ---- barriers and warp functions ------------------------------------------------------------------------------------

#define EMULATION_SITE(what) (::emulation::Site{what, __FILE__, __LINE__})

#define __syncthreads() ::emulation::block_barrier(EMULATION_SITE("__syncthreads"))
#define __syncwarp(...) ::emulation::warp_barrier(EMULATION_SITE("__syncwarp") __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(mask, value, ...) \
  ::emulation::shuffle<::emulation::Shuffle::kIndex>(EMULATION_SITE("__shfl_sync"), mask, value, __VA_ARGS__)
#define __shfl_up_sync(mask, value, ...) \
  ::emulation::shuffle<::emulation::Shuffle::kUp>(EMULATION_SITE("__shfl_up_sync"), mask, value, __VA_ARGS__)
#define __shfl_down_sync(mask, value, ...) \
  ::emulation::shuffle<::emulation::Shuffle::kDown>(EMULATION_SITE("__shfl_down_sync"), mask, value, __VA_ARGS__)
#define __shfl_xor_sync(mask, value, ...) \
  ::emulation::shuffle<::emulation::Shuffle::kXor>(EMULATION_SITE("__shfl_xor_sync"), mask, value, __VA_ARGS__)
#define __reduce_max_sync(mask, value) ::emulation::reduce_max(EMULATION_SITE("__reduce_max_sync"), mask, value)
#define __ballot_sync(mask, predicate) ::emulation::ballot(EMULATION_SITE("__ballot_sync"), mask, predicate)
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) (__ballot_sync(mask, predicate) == (mask))

namespace emulation {

inline void warp_barrier(const Site& site, uint32_t mask = ~0u) { gather(mask, "", 1, true, site); }

/// One T of each lane.
template <class T> struct Gathered {
  const Slots& slots;
  T operator[](unsigned lane) const {
    T value;
    memcpy(&value, slots[lane], sizeof value);
    return value;
  }
};
template <class T> Gathered<T> gather(uint32_t mask, const T& value, const Site& site) {
  static_assert(sizeof(T) <= kSlotBytes);
  return {gather(mask, &value, sizeof value, false, site)};
}

enum class Shuffle { kIndex, kUp, kDown, kXor };

template <Shuffle kKind, class T> T shuffle(const Site& site, uint32_t mask, T value, int argument, int width = 32) {
  const Gathered<T> values = gather(mask, value, site);
  const int own = int(lane()), first = own & -width, inside = own & (width - 1);
  int source = inside;
  if (kKind == Shuffle::kIndex) source = argument & (width - 1);
  if (kKind == Shuffle::kUp) source = inside - argument;
  if (kKind == Shuffle::kDown) source = inside + argument;
  if (kKind == Shuffle::kXor) source = inside ^ argument;
  if (source < 0 || source >= width) source = inside;
  if (!(mask >> (first + source) & 1)) fail(std::string(site.what) + " reads a lane outside its mask", site);
  return values[first + source];
}

inline uint32_t ballot(const Site& site, uint32_t mask, int predicate) {
  const Gathered<int> values = gather(mask, predicate, site);
  uint32_t result = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) result |= uint32_t(values[lane] != 0) << lane;
  return result;
}

inline uint32_t reduce_max(const Site& site, uint32_t mask, uint32_t value) {
  const Gathered<uint32_t> values = gather(mask, value, site);
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1 && values[lane] > value) value = values[lane];
  return value;
}

template <class T, class Change> T atomic_change(T* address, const Change& change) {
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do after = change(before);
  while (!__atomic_compare_exchange(address, &before, &after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

}  // namespace emulation

template <class T> T atomicAdd(T* address, T value) {
  return emulation::atomic_change(address, [=](T before) { return T(before + value); });
}
template <class T> T atomicMax(T* address, T value) {
  return emulation::atomic_change(address, [=](T before) { return before < value ? value : before; });
}
template <class T> T atomicExch(T* address, T value) {
  return emulation::atomic_change(address, [=](T) { return value; });
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() {}

// ---- the runtime API ------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidClusterSize = 912
};
using cudaStream_t = struct CUstream_st*;

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaFuncAttributes {
  int ptxVersion;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaDriverGetVersion(int* version);

namespace emulation {
/// What CUDA would say to a launch, before anything runs, and its shape.
cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel, LaunchShape& shape);
}  // namespace emulation

/// Returns once the kernel has run.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulation::LaunchShape shape;
  const cudaError_t status = emulation::check_launch(*config, reinterpret_cast<const void*>(kernel), shape);
  if (status != cudaSuccess) return status;
  emulation::run(shape, [&] { kernel(static_cast<Parameters>(arguments)...); });
  return cudaSuccess;
}
