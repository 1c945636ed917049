// What the kernels and launchers of this folder ask of CUDA beyond the language. The same source also runs on a CPU:
// there <cuda_runtime.h> is the emulation's own, and __CUDACC__ is not defined.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda.h"

namespace isqrt::cuda {

/// The dynamic shared memory of the running block. Taken anew wherever it is used, so that the compiler always sees
/// shared memory and never a generic pointer.
template <class T> __device__ __forceinline__ T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#else
  return static_cast<T*>(emulation::dynamic_shared());
#endif
}

/// The 32-bit address at which it begins, and what lies at such an address. Where many addresses are sums of the same
/// parts, those of pointers would take twice the instructions.
__device__ __forceinline__ int shared_begin() {
#if defined(__CUDACC__)
  return int(__cvta_generic_to_shared(shared_memory<char>()));
#else
  return 0;
#endif
}
template <class T> __device__ __forceinline__ T& at_shared(int address) {
#if defined(__CUDACC__)
  return *static_cast<T*>(__cvta_shared_to_generic(unsigned(address)));
#else
  return *reinterpret_cast<T*>(shared_memory<char>() + address);
#endif
}

/// Throws std::runtime_error with CUDA's own message, and leaves no error behind for the next caller to find.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline int current_device(const char* name) {
  int device = 0;
  check(cudaGetDevice(&device), name);
  return device;
}

/// The limits() of cuda.h, asked of each device once. The kernel is any one: all have code for the same architectures,
/// and a later device may run that of an older one.
inline const Limits& limits(int device, const void* kernel, const char* name) {
  static std::mutex mutex;
  static std::map<int, Limits> known;  // stay where they are while others are added
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(device); found != known.end()) return found->second;
  const auto get = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), name);
    return value;
  };
  constexpr int kCuda12_3 = 12030;
  int driver = 0;
  check(cudaDriverGetVersion(&driver), name);
  cudaFuncAttributes code = {};
  check(cudaFuncGetAttributes(&code, kernel), name);
  const bool sm90 = code.ptxVersion >= 90;
  return known[device] = {get(cudaDevAttrMaxSharedMemoryPerBlockOptin), get(cudaDevAttrMultiProcessorCount), sm90,
                          get(cudaDevAttrComputeCapabilityMajor) == 9, sm90 && driver >= kCuda12_3};
}

/// Enqueues kernel(arguments...) with so many clusters of `blocks` blocks each; nothing for 0. `name` is what an error
/// message calls it. Each kernel begins with wait_for_kernels_before().
template <class... Parameters>
void launch_clusters(const char* name, void (*kernel)(Parameters...), int64_t clusters, int blocks, int threads,
                     int64_t shared_bytes, void* stream, const std::type_identity_t<Parameters>&... arguments) {
  constexpr int64_t kMaxBlocks = 0x7fffffff, kSharedBytesByDefault = 48 * 1024;
  if (clusters == 0) return;
  if (clusters > kMaxBlocks / blocks) throw std::runtime_error(std::string(name) + ": too many blocks for a grid");
  const void* code = reinterpret_cast<const void*>(kernel);
  const Limits& device = limits(current_device(name), code, name);
  if (shared_bytes > kSharedBytesByDefault)
    // All that there is, each time: another thread may be about to launch the same kernel with more than this one.
    check(cudaFuncSetAttribute(code, cudaFuncAttributeMaxDynamicSharedMemorySize, int(device.shared_bytes)), name);
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  if (device.early) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (blocks > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {unsigned(blocks), 1, 1};
  }
  config.gridDim = dim3(unsigned(clusters * blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

/// The same of blocks that are no clusters.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            void* stream, const std::type_identity_t<Parameters>&... arguments) {
  launch_clusters(name, kernel, blocks, 1, threads, shared_bytes, stream, arguments...);
}

}  // namespace isqrt::cuda
