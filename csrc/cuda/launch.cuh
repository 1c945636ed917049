// What the kernels and launchers of this folder ask of CUDA beyond the language. The same source also runs on a CPU:
// there <cuda_runtime.h> is the emulation's own, and __CUDACC__ is not defined.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

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

/// Whether the code that this device has of a kernel is of sm_90 or later: a later device may run code of an older one.
inline bool is_of_sm90(const void* kernel, const char* name) {
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, kernel), name);
  return attributes.ptxVersion >= 90;
}

/// Whether a kernel may be brought to the multiprocessors while those before it still run: wait_for_kernels_before()
/// does wait, and the driver can record such launches in graphs.
inline bool may_come_early(const void* kernel, const char* name) {
  constexpr int kCuda12_3 = 12030;
  int driver = 0;
  check(cudaDriverGetVersion(&driver), name);
  return is_of_sm90(kernel, name) && driver >= kCuda12_3;
}

/// The most shared memory that a block of the current device can have.
inline int64_t most_shared_bytes(const char* name) {
  int device = 0, most = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  return most;
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
  if (shared_bytes > kSharedBytesByDefault)
    // All that there is, each time: another thread may be about to launch the same kernel with more than this one.
    check(cudaFuncSetAttribute(code, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most_shared_bytes(name))), name);
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  if (may_come_early(code, name)) {
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
