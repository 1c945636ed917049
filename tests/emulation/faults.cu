// What the emulation must find: kernels with one fault each, run as `faults NAME`, and the same without it, all of them
// run as `faults none`. A line that a report has to show ends with "fault: NAME".
#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

using namespace isqrt::cuda;

namespace {

constexpr unsigned kThreads = 128, kSpare = 4, kAllLanes = 0xffffffffu;

template <bool kFault> __global__ void read_too_early(float* y) {
  float* s = shared_memory<float>();
  s[threadIdx.x] = float(threadIdx.x);
  if (!kFault) __syncthreads();
  y[threadIdx.x] = s[kThreads - 1 - threadIdx.x];  // fault: read_too_early
}

template <bool kFault> __global__ void write_too_early(float* y) {
  float* s = shared_memory<float>();
  s[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  const float other = s[kThreads - 1 - threadIdx.x];
  if (!kFault) __syncthreads();
  s[threadIdx.x] = 2 * other;  // fault: write_too_early
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

template <bool kFault> __global__ void same_warp(float* y) {
  float* s = shared_memory<float>();
  const unsigned first = threadIdx.x / 32 * 32;
  s[threadIdx.x] = float(threadIdx.x);
  if (!kFault) __syncwarp();
  y[threadIdx.x] = s[first + (threadIdx.x + 1) % 32];  // fault: same_warp
}

template <bool kFault> __global__ void global_bounds(float* y) {
  y[threadIdx.x + (kFault && threadIdx.x == kThreads - 1)] = 1;  // fault: global_bounds
}

template <bool kFault> __global__ void dynamic_bounds(float* y) {
  float* s = shared_memory<float>();
  s[threadIdx.x + (kFault && threadIdx.x == kThreads - 1 ? kSpare + 1 : 0)] = 1;  // fault: dynamic_bounds
  y[threadIdx.x] = s[threadIdx.x];
}

template <bool kFault> __global__ void static_bounds(float* y) {
  __shared__ float s[kThreads];
  s[threadIdx.x + (kFault && threadIdx.x == kThreads - 1)] = 1;  // fault: static_bounds
  y[threadIdx.x] = s[threadIdx.x];
}

template <bool kFault> __global__ void misaligned(float* y) {
  float* s = shared_memory<float>();
  s[threadIdx.x] = 1;
  __syncthreads();
  const unsigned first = threadIdx.x == 0 && kFault ? 1 : 0;
  const float4 four = *reinterpret_cast<const float4*>(s + first);  // fault: misaligned
  y[threadIdx.x] = four.x;
}

template <bool kFault> __global__ void uninitialised(float* y) {
  float* s = shared_memory<float>();
  if (!kFault || threadIdx.x != 7) s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[kThreads - 1 - threadIdx.x];  // fault: uninitialised
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

template <bool kFault> __global__ void unordered_kernel(float* y) {
  if (!kFault || threadIdx.x % 2) wait_for_kernels_before();
  y[threadIdx.x] = 1;
}

template <bool kFault> __global__ void missing_lane(float* y) {
  float value = 1;
  if (!kFault || threadIdx.x % 32 < 16) value = __shfl_xor_sync(kAllLanes, value, 1);  // fault: missing_lane
  y[threadIdx.x] = value;
}

template <bool kFault> __global__ void matrix_missing_lane(float* y) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (!kFault || threadIdx.x != 5) mma_f16(d, a, b);  // fault: matrix_missing_lane
  y[threadIdx.x] = d[0];
}

template <bool kFault> __global__ void matrix_misaligned(float* y) {
  float* s = shared_memory<float>();
  for (unsigned i = threadIdx.x; i < kThreads + kSpare; i += kThreads) s[i] = 1;
  __syncthreads();
  uint32_t r[4];
  load_matrix_x4(r, s + threadIdx.x % 8 * 4 + kFault, false);  // fault: matrix_misaligned
  y[threadIdx.x] = __uint_as_float(r[0]);
}

/// Each of the first threads copies 16 bytes.
__device__ void copy_all(float* s, const float* x) {
  if (threadIdx.x < kThreads / 4) copy_async<16>(s + 4 * threadIdx.x, x + 4 * threadIdx.x);
  copy_async_commit();
}

template <bool kFault> __global__ void copy_without_wait(float* y, const float* x) {
  float* s = shared_memory<float>();
  copy_all(s, x);
  if (!kFault) copy_async_wait<0>();
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];  // fault: copy_without_wait
}

template <bool kFault> __global__ void copy_without_barrier(float* y, const float* x) {
  float* s = shared_memory<float>();
  copy_all(s, x);
  copy_async_wait<0>();
  if (!kFault) __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];  // fault: copy_without_barrier
}

template <bool kFault> __global__ void copy_too_early(float* y, const float* x) {
  float* s = shared_memory<float>();
  s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[kThreads - 1 - threadIdx.x];
  if (!kFault) __syncthreads();
  if (threadIdx.x < kThreads / 4) copy_async<16>(s + 4 * threadIdx.x, x + 4 * threadIdx.x);  // fault: copy_too_early
  copy_async_commit();
  __syncthreads();
  copy_async_wait<0>();
}

template <bool kFault> __global__ void copy_bounds(float* y, const float* x) {
  float* s = shared_memory<float>();
  copy_async<4>(s + threadIdx.x, x + threadIdx.x + (kFault && threadIdx.x == kThreads - 1));  // fault: copy_bounds
  copy_async_commit();
  copy_async_wait<0>();
  y[threadIdx.x] = s[threadIdx.x];
}

template <bool kFault> __global__ void copy_misaligned(float* y, const float* x) {
  float* s = shared_memory<float>();
  if (threadIdx.x == 0) copy_async<16>(s + kFault, x);  // fault: copy_misaligned
  copy_async_commit();
  copy_async_wait<0>();
  y[threadIdx.x] = 1;
}

/// A product of copied numbers: its right operand is one part, wherever it is described.
enum class Warpgroup { kComplete, kNotBegun, kNotCommitted, kNotWaitedFor, kNotFenced, kStored, kNoBarrier, kNoWarp };
template <Warpgroup kFault> __global__ void warpgroup(float* y, const float* x) {
  float* s = shared_memory<float>();
  copy_all(s, x);
  copy_async_wait<0>();
  if (kFault != Warpgroup::kNotFenced) fence_for_warpgroups();
  if (kFault == Warpgroup::kStored) s[threadIdx.x] = 1;
  if (kFault != Warpgroup::kNoBarrier) __syncthreads();
  WarpgroupSums<64> d;
  const uint32_t a[4] = {};
  if (kFault != Warpgroup::kNotBegun) warpgroup_begin();
  if (kFault != Warpgroup::kNoWarp || threadIdx.x < 96)
    multiply_warpgroup<false, false>(d, a, describe_parts(shared_begin(), 0, 0));  // fault: warpgroup_no_barrier
  if (kFault != Warpgroup::kNotCommitted) warpgroup_commit();
  if (kFault != Warpgroup::kNotWaitedFor) warpgroup_wait(d, a, a);
  y[threadIdx.x] = d[0];
}
template <bool kFault, Warpgroup kKind>
constexpr auto* warpgroup_kernel = warpgroup<(kFault ? kKind : Warpgroup::kComplete)>;

template <bool kFault> __global__ void named_wrong_count(float* y) {
  if (threadIdx.x < 32) named_barrier(1, kFault ? kThreads : 32);  // fault: named_wrong_count
  y[threadIdx.x] = 1;
}

template <bool kFault> __global__ void named_missing_lane(float* y) {
  if (!kFault || threadIdx.x != 9) named_barrier(1, kThreads);  // fault: named_missing_lane
  y[threadIdx.x] = 1;
}

template <bool kFault> __global__ void named_for_block(float* y) {
  float* s = shared_memory<float>();
  s[threadIdx.x] = float(threadIdx.x);
  named_barrier(1 + (kFault ? threadIdx.x / 32 : 0), kFault ? 32 : kThreads);
  y[threadIdx.x] = s[kThreads - 1 - threadIdx.x];  // fault: named_for_block
}

/// Where shared memory has room for an mbarrier.
__device__ uint64_t* own_barrier() { return reinterpret_cast<uint64_t*>(shared_memory<float>() + kThreads); }

__device__ void init_barrier() {
  if (threadIdx.x == 0) mbarrier_init(own_barrier(), 1);  // fault: block_for_cluster
}

/// All of the other block's shared memory is written, and this block expects as much of it.
__device__ void exchange(unsigned other, unsigned expected = kThreads * sizeof(float)) {
  const uint32_t words[4] = {1, 2, 3, 4};
  if (threadIdx.x % 4 == 0) store_async(shared_memory<float>() + threadIdx.x, other, words, own_barrier());
  if (threadIdx.x > 0) return;
  mbarrier_expect(own_barrier(), expected);
  mbarrier_arrive(own_barrier(), cluster_rank());
}
__device__ void exchange() { exchange(1 - cluster_rank()); }

template <bool kFault> __global__ void store_without_wait(float* y) {
  init_barrier();
  cluster_sync();
  exchange();
  if (!kFault) mbarrier_wait(own_barrier(), 0);
  y[blockIdx.x * kThreads + threadIdx.x] = shared_memory<float>()[threadIdx.x];  // fault: store_without_wait
  cluster_sync();
  if (kFault) mbarrier_wait(own_barrier(), 0);
}

template <bool kFault> __global__ void store_without_cluster(float* y) {
  init_barrier();
  __syncthreads();
  if (kFault) exchange(0);
  y[threadIdx.x] = 1;
}

template <bool kFault> __global__ void store_wrong_size(float* y) {
  init_barrier();
  cluster_sync();
  exchange(1 - cluster_rank(), (kThreads + 4 * kFault) * sizeof(float));
  mbarrier_wait(own_barrier(), 0);  // fault: store_wrong_size
  y[blockIdx.x * kThreads + threadIdx.x] = 1;
}

template <bool kFault> __global__ void store_too_early(float* y) {
  float* s = shared_memory<float>();
  init_barrier();
  s[threadIdx.x] = 1;
  cluster_sync();
  y[blockIdx.x * kThreads + threadIdx.x] = s[kThreads - 1 - threadIdx.x];  // fault: store_too_early
  if (!kFault) cluster_sync();
  exchange();
  mbarrier_wait(own_barrier(), 0);
}

template <bool kFault> __global__ void block_for_cluster(float* y) {
  init_barrier();
  if (kFault)
    __syncthreads();
  else
    cluster_sync();
  exchange();
  mbarrier_wait(own_barrier(), 0);
  y[blockIdx.x * kThreads + threadIdx.x] = 1;
}

template <bool kFault> __global__ void returns_too_early(float* y) {
  init_barrier();
  cluster_sync();
  exchange();
  if (!kFault || cluster_rank() == 0) mbarrier_wait(own_barrier(), 0);
  y[blockIdx.x * kThreads + threadIdx.x] = 1;
}

template <bool kFault> __global__ void outside_cluster(float* y) {
  init_barrier();
  cluster_sync();
  exchange(1 - cluster_rank() + 2 * kFault);
  mbarrier_wait(own_barrier(), 0);
  y[blockIdx.x * kThreads + threadIdx.x] = 1;
}

template <bool kFault> __global__ void cluster_without_arrival(float* y) {
  if (!kFault) cluster_arrive();
  cluster_wait();  // fault: cluster_without_arrival
  y[blockIdx.x * kThreads + threadIdx.x] = 1;
}

template <bool kFault> __global__ void cluster_without_wait(float* y) {
  cluster_arrive();
  if (!kFault) cluster_wait();
  y[blockIdx.x * kThreads + threadIdx.x] = 1;
}

// No template: g++ keeps the static variables of those out of the section that the emulation watches.
__global__ void static_in_cluster(float* y, bool fault) {
  __shared__ float s[kThreads];
  float* own = fault ? s : shared_memory<float>();
  own[threadIdx.x] = 1;
  __syncthreads();
  y[blockIdx.x * kThreads + threadIdx.x] = own[threadIdx.x];
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

/// As the launchers do it.
template <class... Parameters> std::vector<float> run_early(void (*kernel)(float*, Parameters...)) {
  std::vector<float> y(kThreads);
  launch("kernel", kernel, 1, kThreads, 0, nullptr, y.data());
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
      {"unordered_kernel", [] { return run_early(unordered_kernel<kFault>); }},
      {"missing_lane", [] { return run(1, 1, missing_lane<kFault>); }},
      {"matrix_missing_lane", [] { return run(1, 1, matrix_missing_lane<kFault>); }},
      {"matrix_misaligned", [] { return run(1, 1, matrix_misaligned<kFault>); }},
      {"named_wrong_count", [] { return run(1, 1, named_wrong_count<kFault>); }},
      {"named_missing_lane", [] { return run(1, 1, named_missing_lane<kFault>); }},
      {"named_for_block", [] { return run(1, 1, named_for_block<kFault>); }},
      {"copy_without_wait", [=] { return run(1, 1, copy_without_wait<kFault>, data); }},
      {"copy_without_barrier", [=] { return run(1, 1, copy_without_barrier<kFault>, data); }},
      {"copy_too_early", [=] { return run(1, 1, copy_too_early<kFault>, data); }},
      {"copy_bounds", [=] { return run(1, 1, copy_bounds<kFault>, data); }},
      {"copy_misaligned", [=] { return run(1, 1, copy_misaligned<kFault>, data); }},
      {"warpgroup_not_begun", [=] { return run(1, 1, warpgroup_kernel<kFault, Warpgroup::kNotBegun>, data); }},
      {"warpgroup_not_committed", [=] { return run(1, 1, warpgroup_kernel<kFault, Warpgroup::kNotCommitted>, data); }},
      {"warpgroup_not_waited_for", [=] { return run(1, 1, warpgroup_kernel<kFault, Warpgroup::kNotWaitedFor>, data); }},
      {"warpgroup_not_fenced", [=] { return run(1, 1, warpgroup_kernel<kFault, Warpgroup::kNotFenced>, data); }},
      {"warpgroup_stored", [=] { return run(1, 1, warpgroup_kernel<kFault, Warpgroup::kStored>, data); }},
      {"warpgroup_no_barrier", [=] { return run(1, 1, warpgroup_kernel<kFault, Warpgroup::kNoBarrier>, data); }},
      {"warpgroup_no_warp", [=] { return run(1, 1, warpgroup_kernel<kFault, Warpgroup::kNoWarp>, data); }},
      {"store_without_wait", [] { return run(2, 2, store_without_wait<kFault>); }},
      {"store_without_cluster", [] { return run(1, 1, store_without_cluster<kFault>); }},
      {"store_wrong_size", [] { return run(2, 2, store_wrong_size<kFault>); }},
      {"store_too_early", [] { return run(2, 2, store_too_early<kFault>); }},
      {"block_for_cluster", [] { return run(2, 2, block_for_cluster<kFault>); }},
      {"returns_too_early", [] { return run(2, 2, returns_too_early<kFault>); }},
      {"outside_cluster", [] { return run(2, 2, outside_cluster<kFault>); }},
      {"cluster_without_arrival", [] { return run(2, 2, cluster_without_arrival<kFault>); }},
      {"cluster_without_wait", [] { return run(2, 2, cluster_without_wait<kFault>); }},
      {"static_in_cluster", [] { return run(2, 2, static_in_cluster, kFault); }},
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
