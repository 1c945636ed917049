// What the emulation must find: kernels with one fault each, run as `faults NAME`, and the same without it, all of them
// run as `faults none`. A line that a report has to show ends with "fault: NAME".
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace {

constexpr unsigned kThreads = 64, kSpare = 4, kAllLanes = 0xffffffffu;

__device__ float* dynamic_shared() { return static_cast<float*>(emulation::dynamic_shared()); }

template <bool kFault> __global__ void read_too_early(float* y) {
  float* s = dynamic_shared();
  s[threadIdx.x] = float(threadIdx.x);
  if (!kFault) __syncthreads();
  y[threadIdx.x] = s[kThreads - 1 - threadIdx.x];  // fault: read_too_early
}

template <bool kFault> __global__ void write_too_early(float* y) {
  float* s = dynamic_shared();
  s[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  const float other = s[kThreads - 1 - threadIdx.x];
  if (!kFault) __syncthreads();
  s[threadIdx.x] = 2 * other;  // fault: write_too_early
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

template <bool kFault> __global__ void same_warp(float* y) {
  float* s = dynamic_shared();
  const unsigned first = threadIdx.x / 32 * 32;
  s[threadIdx.x] = float(threadIdx.x);
  if (!kFault) __syncwarp();
  y[threadIdx.x] = s[first + (threadIdx.x + 1) % 32];  // fault: same_warp
}

template <bool kFault> __global__ void global_bounds(float* y) {
  y[threadIdx.x + (kFault && threadIdx.x == kThreads - 1)] = 1;  // fault: global_bounds
}

template <bool kFault> __global__ void dynamic_bounds(float* y) {
  float* s = dynamic_shared();
  s[threadIdx.x + (kFault && threadIdx.x == kThreads - 1 ? kSpare + 1 : 0)] = 1;  // fault: dynamic_bounds
  y[threadIdx.x] = s[threadIdx.x];
}

template <bool kFault> __global__ void static_bounds(float* y) {
  __shared__ float s[kThreads];
  s[threadIdx.x + (kFault && threadIdx.x == kThreads - 1)] = 1;  // fault: static_bounds
  y[threadIdx.x] = s[threadIdx.x];
}

template <bool kFault> __global__ void misaligned(float* y) {
  float* s = dynamic_shared();
  s[threadIdx.x] = 1;
  __syncthreads();
  const unsigned first = threadIdx.x == 0 && kFault ? 1 : 0;
  const float4 four = *reinterpret_cast<const float4*>(s + first);  // fault: misaligned
  y[threadIdx.x] = four.x;
}

template <bool kFault> __global__ void uninitialised(float* y) {
  float* s = dynamic_shared();
  if (!kFault || threadIdx.x != 7) s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[kThreads - 1 - threadIdx.x];
}

template <bool kFault> __global__ void divergent_barrier(float* y) {
  if (kFault && threadIdx.x < 32)
    __syncthreads();  // fault: divergent_barrier
  else
    __syncthreads();
  y[threadIdx.x] = 1;
}

template <bool kFault> __global__ void early_return(float* y) {
  y[threadIdx.x] = 1;
  if (kFault && threadIdx.x == kThreads - 1) return;
  __syncthreads();  // fault: early_return
}

template <bool kFault> __global__ void missing_lane(float* y) {
  float value = 1;
  if (!kFault || threadIdx.x % 32 < 16) value = __shfl_xor_sync(kAllLanes, value, 1);  // fault: missing_lane
  y[threadIdx.x] = value;
}

template <bool kFault> __global__ void copy_without_wait(float* y, const float* x) {
  float* s = dynamic_shared();
  if (threadIdx.x < kThreads / 4) emulation::copy_async(s + 4 * threadIdx.x, x + 4 * threadIdx.x, 16, 16);
  emulation::copy_async_commit();
  if (!kFault) emulation::copy_async_wait(0);
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

template <bool kFault> __global__ void bulk_without_wait(float* y, const float* x) {
  float* s = dynamic_shared();
  uint64_t* barrier = reinterpret_cast<uint64_t*>(s + kThreads);
  if (threadIdx.x == 0) emulation::mbarrier_init(barrier, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    emulation::mbarrier_arrive(barrier, kThreads * sizeof(float));
    emulation::copy_bulk(s, x, kThreads * sizeof(float), barrier);
  }
  if (!kFault) emulation::mbarrier_wait(barrier, 0);
  y[threadIdx.x] = s[threadIdx.x];
  __syncthreads();
}

template <bool kFault> __global__ void block_for_cluster(float* y) {
  float* s = dynamic_shared();
  const auto cluster = cooperative_groups::this_cluster();
  s[threadIdx.x] = float(cluster.block_rank());
  if (kFault)
    __syncthreads();
  else
    cluster.sync();
  const float* other = cluster.map_shared_rank(s, 1 - cluster.block_rank());
  y[blockIdx.x * kThreads + threadIdx.x] = other[threadIdx.x];  // fault: block_for_cluster
  cluster.sync();
}

template <bool kFault> __global__ void between_blocks(float* y) {
  y[kFault ? threadIdx.x : blockIdx.x * kThreads + threadIdx.x] = float(blockIdx.x);  // fault: between_blocks
}

template <class... Parameters, class... Arguments>
std::vector<float> run(unsigned blocks, unsigned cluster, void (*kernel)(float*, Parameters...),
                       Arguments... arguments) {
  std::vector<float> y(blocks * kThreads);
  cudaLaunchAttribute attribute{cudaLaunchAttributeClusterDimension, {}};
  attribute.val.clusterDim = {cluster, 1, 1};
  const cudaLaunchConfig_t config{blocks, kThreads, (kThreads + kSpare) * sizeof(float), nullptr, &attribute, 1};
  cudaLaunchKernelEx(&config, kernel, y.data(), arguments...);
  return y;
}

template <bool kFault> std::map<std::string, std::function<std::vector<float>()>> kernels() {
  static const std::vector<float> x(kThreads, 1.0f);
  const float* data = x.data();
  return {
      {"read_too_early", [] { return run(1, 1, read_too_early<kFault>); }},
      {"write_too_early", [] { return run(1, 1, write_too_early<kFault>); }},
      {"same_warp", [] { return run(1, 1, same_warp<kFault>); }},
      {"global_bounds", [] { return run(1, 1, global_bounds<kFault>); }},
      {"dynamic_bounds", [] { return run(1, 1, dynamic_bounds<kFault>); }},
      {"static_bounds", [] { return run(1, 1, static_bounds<kFault>); }},
      {"misaligned", [] { return run(1, 1, misaligned<kFault>); }},
      {"uninitialised", [] { return run(1, 1, uninitialised<kFault>); }},
      {"divergent_barrier", [] { return run(1, 1, divergent_barrier<kFault>); }},
      {"early_return", [] { return run(1, 1, early_return<kFault>); }},
      {"missing_lane", [] { return run(1, 1, missing_lane<kFault>); }},
      {"copy_without_wait", [=] { return run(1, 1, copy_without_wait<kFault>, data); }},
      {"bulk_without_wait", [=] { return run(1, 1, bulk_without_wait<kFault>, data); }},
      {"block_for_cluster", [] { return run(2, 2, block_for_cluster<kFault>); }},
      {"between_blocks", [] { return run(2, 1, between_blocks<kFault>); }},
  };
}

/// In three orders of threads; false where a result is not finite or depends on the order.
bool check(const std::function<std::vector<float>()>& kernel) {
  using emulation::Order;
  std::vector<float> first;
  for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    emulation::options.order = order;
    const std::vector<float> y = kernel();
    for (const float value : y)
      if (!std::isfinite(value)) return std::puts("the result is not finite"), false;
    if (first.empty()) first = y;
    if (memcmp(first.data(), y.data(), y.size() * sizeof(float)) != 0)
      return std::puts("the result depends on the order of threads"), false;
  }
  return true;
}

}  // namespace

int main(int, char** argv) {
  const std::string name = argv[1];
  emulation::options.blocks_race = true;
  try {
    if (name != "none") return check(kernels<true>().at(name)) ? 0 : 1;
    for (const auto& [each, kernel] : kernels<false>()) {
      std::printf("%s\n", each.c_str());
      if (!check(kernel)) return 1;
    }
  } catch (const emulation::Error& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
