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

/// Whether a kernel may be brought to the multiprocessors while those before it still run: its code is of sm_90 or
/// later, where wait_for_kernels_before() does wait, and the driver can record such launches in graphs.
inline bool may_come_early(const void* kernel, const char* name) {
  constexpr int kSm90 = 90, kCuda12_3 = 12030;
  cudaFuncAttributes attributes = {};
  int driver = 0;
  check(cudaFuncGetAttributes(&attributes, kernel), name);
  check(cudaDriverGetVersion(&driver), name);
  return attributes.ptxVersion >= kSm90 && driver >= kCuda12_3;
}

/// Enqueues kernel(arguments...) with that many blocks; nothing for 0. `name` is what an error message calls it. Each
/// kernel begins with wait_for_kernels_before().
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            void* stream, const std::type_identity_t<Parameters>&... arguments) {
  constexpr int64_t kMaxBlocks = 0x7fffffff, kSharedBytesByDefault = 48 * 1024;
  if (blocks == 0) return;
  if (blocks > kMaxBlocks) throw std::runtime_error(std::string(name) + ": more blocks than a grid can have");
  const void* code = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kSharedBytesByDefault)
    check(cudaFuncSetAttribute(code, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = may_come_early(code, name) ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace isqrt::cuda
