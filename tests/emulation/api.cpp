// The part of CUDA's runtime API that launchers call, as it answers before anything runs.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <utility>

namespace emulation {
namespace {
cudaError_t last_error = cudaSuccess;
cudaError_t remember(cudaError_t error) { return error == cudaSuccess ? error : last_error = error; }

constexpr size_t kSharedByDefault = 48 * 1024;
constexpr uint64_t kPortableCluster = 8, kLargestCluster = 16;

/// What cudaFuncSetAttribute allowed a kernel.
struct Allowed {
  size_t shared_bytes = kSharedByDefault;
  bool large_clusters = false;
};
std::map<const void*, Allowed> allowed;

uint64_t volume(const dim3& d) { return uint64_t(d.x) * d.y * d.z; }
}  // namespace

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel, LaunchShape& shape) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  if (volume(block) == 0 || volume(block) > 1024 || volume(grid) == 0) return remember(cudaErrorInvalidConfiguration);
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return remember(cudaErrorInvalidConfiguration);
  const Allowed& limits = allowed[kernel];
  if (config.dynamicSmemBytes > limits.shared_bytes) return remember(cudaErrorInvalidValue);
  shape = {grid, block, config.dynamicSmemBytes};
  for (unsigned a = 0; a < config.numAttrs; ++a) {
    if (config.attrs[a].id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      shape.early = config.attrs[a].val.programmaticStreamSerializationAllowed != 0;
      if (shape.early && options.capability_major < 9) throw std::logic_error("no device before sm_90 can do that");
    }
    if (config.attrs[a].id == cudaLaunchAttributeClusterDimension) {
      const auto& dim = config.attrs[a].val.clusterDim;
      const uint64_t blocks = uint64_t(dim.x) * dim.y * dim.z;
      if (dim.y != 1 || dim.z != 1) throw std::logic_error("the emulation knows clusters along x only");
      if (blocks > 1 && options.capability_major < 9) return remember(cudaErrorInvalidClusterSize);
      if (blocks == 0 || blocks > (limits.large_clusters ? kLargestCluster : kPortableCluster))
        return remember(cudaErrorInvalidClusterSize);
      if (grid.x % dim.x != 0) return remember(cudaErrorInvalidConfiguration);
      shape.cluster_size = unsigned(blocks);
    }
  }
  return cudaSuccess;
}

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidClusterSize:
      return "cluster size is not supported";
    default:
      return "invalid configuration argument";
  }
}

cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  *device = emulation::options.device();
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulation::options.capability_major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emulation::options.capability_minor;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 132;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(emulation::options.shared_limit);
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  using namespace emulation;
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || size_t(value) > options.shared_limit) return remember(cudaErrorInvalidValue);
      allowed[kernel].shared_bytes = std::max(kSharedByDefault, size_t(value));
      break;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      allowed[kernel].large_clusters = value != 0;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 10 * emulation::options.capability_major + emulation::options.capability_minor;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

// Device memory is the host's, and a kernel has run when its launch returns.

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = malloc(bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
