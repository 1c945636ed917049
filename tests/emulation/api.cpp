// The part of CUDA's runtime API that launchers call, as it answers before anything runs.
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <utility>

namespace emulation {
namespace {
cudaError_t last_error = cudaSuccess;
cudaError_t remember(cudaError_t error) { return error == cudaSuccess ? error : last_error = error; }

/// What cudaFuncSetAttribute allowed a kernel.
std::map<const void*, size_t> shared_allowed;
constexpr size_t kSharedByDefault = 48 * 1024;
}  // namespace

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0)
    return remember(cudaErrorInvalidConfiguration);
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return remember(cudaErrorInvalidConfiguration);
  const auto allowed = shared_allowed.find(kernel);
  if (config.dynamicSmemBytes > (allowed == shared_allowed.end() ? kSharedByDefault : allowed->second))
    return remember(cudaErrorInvalidValue);
  return cudaSuccess;
}

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "invalid configuration argument";
  }
}

cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = int(emulation::options.shared_limit);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  using namespace emulation;
  if (value < 0 || size_t(value) > options.shared_limit) return remember(cudaErrorInvalidValue);
  shared_allowed[kernel] = std::max(kSharedByDefault, size_t(value));
  return cudaSuccess;
}
