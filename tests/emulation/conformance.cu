// Each wrapper of csrc/cuda/ptx.cuh compared with a plain loop: what the emulation says it does, and what a device
// does.
//
//     python tests/emulation/build.py plain                                       builds it for the emulation
//     nvcc -std=c++20 -O3 -arch=native -Icsrc tests/emulation/conformance.cu      builds it for the device that is
//     there; -arch=sm_90a where that is of sm_90
//
// The program names what it runs, and exits with 1 where a wrapper does something else.
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <random>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

using namespace isqrt::cuda;

namespace {

constexpr int kWarp = 32, kThreads = 128, kSharedBytes = 32 * 1024;

// ---- kernels --------------------------------------------------------------------------------------------------------

__global__ void opaque_kernel(const int* x, int* y) { y[threadIdx.x] = opaque(x[threadIdx.x]); }

/// y = 1 + x backwards, of the whole grid; a block takes the longer the higher its number.
__global__ void follower_kernel(const int* x, int* y) {
  wait_for_kernels_before(false);
  const unsigned at = blockIdx.x * kThreads + threadIdx.x;
  int value = 0;
  if (blockIdx.x % 2) let_next_kernel_come();
  for (unsigned turn = 0; turn <= 8 * blockIdx.x; ++turn) value = opaque(x[gridDim.x * kThreads - 1 - at]);
  y[at] = value + 1;
}

/// D += A B for one warp; A is 16 x 16 and B is 16 x 8, both row-major, as registers hold their elements.
__global__ void mma_f16_kernel(const uint16_t* A, const uint16_t* B, float* D) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pack = [](const uint16_t* first, int step) { return first[0] | uint32_t(first[step]) << 16; };
  uint32_t a[4], b[2];
  for (int r = 0; r < 4; ++r) a[r] = pack(A + (g + r % 2 * 8) * 16 + (t + r / 2 * 4) * 2, 1);
  for (int r = 0; r < 2; ++r) b[r] = pack(B + (t + r * 4) * 2 * 8 + g, 8);
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = D[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_f16(d, a, b);
  for (int i = 0; i < 4; ++i) D[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

/// Four 8 x 8 matrices, the rows of which lie in shared memory in reverse order.
template <bool kTransposed> __global__ void load_matrix_kernel(const uint16_t* x, uint32_t* y) {
  uint16_t* s = shared_memory<uint16_t>();
  for (int e = 0; e < 8; ++e) s[(kWarp - 1 - threadIdx.x) * 8 + e] = x[threadIdx.x * 8 + e];
  __syncthreads();
  uint32_t r[4];
  load_matrix_x4(r, s + (kWarp - 1 - threadIdx.x) * 8, kTransposed);
  for (int m = 0; m < 4; ++m) y[threadIdx.x * 4 + m] = r[m];
}

/// Two groups: of all bytes, and of fewer and fewer.
template <int kBytes> __global__ void copy_async_kernel(const unsigned char* x, unsigned char* y) {
  unsigned char *first = shared_memory<unsigned char>(), *second = first + kThreads * kBytes;
  const int at = threadIdx.x * kBytes;
  copy_async<kBytes>(first + at, x + at);
  copy_async_commit();
  copy_async<kBytes>(second + at, x + at, int(threadIdx.x) % (kBytes + 1));
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();
  const int other = (kThreads - 1 - threadIdx.x) * kBytes;
  for (int e = 0; e < kBytes; ++e) y[other + e] = first[other + e];
  copy_async_wait<0>();
  __syncthreads();
  for (int e = 0; e < kBytes; ++e) y[kThreads * kBytes + other + e] = second[other + e];
}

__global__ void transpose_matrix_kernel(const uint16_t* x, uint16_t* y) {
  const unsigned at = threadIdx.x * 2, transposed = transpose_matrix(x[at] | uint32_t(x[at + 1]) << 16);
  y[at] = uint16_t(transposed);
  y[at + 1] = uint16_t(transposed >> 16);
}

/// x is A, 64 x 16, and B, 16 x 64 or 16 x 32, row by row; y is A B, and 2 A B + A' B, where A' has A's rows in reverse
/// order. B's parts do not follow each other.
template <int kVectors, bool kByTerms> __global__ void warpgroup_kernel(const uint16_t* x, float* y) {
  require_warpgroups();
  if constexpr (kHasWarpgroups) {
    constexpr int kPart = 64, kToTerms = kPart + 8, kToVectors = 2 * kToTerms + 16, kFirst = 24;  // elements
    uint16_t* const s = shared_memory<uint16_t>() + kFirst;
    for (int i = threadIdx.x; i < 16 * kVectors; i += kThreads) {
      const int k = i / kVectors, n = i % kVectors, row = kByTerms ? k % 8 : n % 8, column = kByTerms ? n % 8 : k % 8;
      s[k / 8 * kToTerms + n / 8 * kToVectors + 8 * row + column] = x[64 * 16 + i];
    }
    fence_for_warpgroups();
    __syncthreads();
    const int lane = int(threadIdx.x) % kWarp, first = int(threadIdx.x) / kWarp * 16 + lane / 4;
    uint32_t a[2][4];
    for (int reverse = 0; reverse < 2; ++reverse)
      for (int r = 0; r < 4; ++r) {
        const int row = first + r % 2 * 8, column = 2 * (lane % 4) + r / 2 * 8;
        const uint16_t* const from = x + 16 * (reverse ? 63 - row : row) + column;
        a[reverse][r] = from[0] | uint32_t(from[1]) << 16;
      }
    const uint64_t b = describe_parts(shared_begin(), 2 * kToTerms, 2 * kToVectors) + in_description(2 * kFirst);
    constexpr int kSums = kVectors / 2;
    WarpgroupSums<kVectors> d, e;
    warpgroup_begin();
    multiply_warpgroup<false, kByTerms>(d, a[0], b);
    warpgroup_commit();
    warpgroup_wait(d, a[0], a[0]);
    for (int i = 0; i < kSums; ++i) e[i] = d[i];
    warpgroup_begin();
    multiply_warpgroup<true, kByTerms>(e, a[1], b);
    multiply_warpgroup<true, kByTerms>(e, a[0], b);
    warpgroup_commit();
    warpgroup_wait(e, a[1], a[0]);
    for (int i = 0; i < kSums; ++i) {
      const int at = kVectors * (first + i / 2 % 2 * 8) + i / 4 * 8 + 2 * (lane % 4) + i % 2;
      y[at] = d[i], y[64 * kVectors + at] = e[i];
    }
  }
}

/// Each block writes to the next one, around the cluster, three times: to places that its threads have just read.
__global__ void cluster_kernel(const int* x, int* y) {
  int* mailbox = shared_memory<int>();
  uint64_t* barrier = reinterpret_cast<uint64_t*>(mailbox + kThreads);
  const unsigned rank = cluster_rank(), size = cluster_size(), at = blockIdx.x * kThreads + threadIdx.x;
  if (threadIdx.x == 0)
    for (int phase = 0; phase < 2; ++phase) mbarrier_init(barrier + phase, size * kThreads);
  cluster_arrive();
  const int place = int(rank * 1000 + size);
  cluster_wait();
  int received = 0;
  for (unsigned step = 0; step < 3; ++step) {
    uint64_t* const here = barrier + step % 2;
    if (threadIdx.x == 0) mbarrier_expect(here, kThreads * sizeof(int));
    if (threadIdx.x % 4 == 0) {
      uint32_t words[4];
      for (unsigned w = 0; w < 4; ++w) words[w] = uint32_t(x[at + w]) + step;
      store_async(mailbox + threadIdx.x, (rank + 1) % size, words, here);
    }
    for (unsigned other = 0; other < size; ++other) mbarrier_arrive(here, other);
    mbarrier_wait(here, step / 2 % 2);
    received = 3 * received + mailbox[kThreads - 1 - threadIdx.x];
    cluster_sync();
  }
  y[3 * at] = received;
  y[3 * at + 1] = place;
  y[3 * at + 2] = int(blockIdx.x);
}

/// A block that is launched as any other. It cannot send to itself.
__global__ void no_cluster_kernel(const int*, int* y) {
  cluster_arrive();
  const int place = int(1000 * cluster_rank() + cluster_size());
  cluster_wait();
  cluster_sync();
  y[blockIdx.x * kThreads + threadIdx.x] = place;
}

/// Two halves of the block, each with a barrier of its own and each its own number of times.
__global__ void named_barrier_kernel(const int* x, int* y) {
  int* s = shared_memory<int>();
  const int half = threadIdx.x / 64, in_half = threadIdx.x % 64;
  s[threadIdx.x] = x[threadIdx.x];
  for (int step = 0; step < 3 + 2 * half; ++step) {
    named_barrier(1 + half, 64);
    const int neighbour = s[half * 64 + (in_half + 1) % 64];
    named_barrier(1 + half, 64);
    s[threadIdx.x] = neighbour;
  }
  named_barrier(3, kThreads);
  y[threadIdx.x] = s[kThreads - 1 - threadIdx.x];
}

// ---- what a plain loop says -----------------------------------------------------------------------------------------

/// A copy of `values` on the device, for one launch.
template <class T> class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& values) : size_(values.size()) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), size_ * sizeof(T)), "cudaMalloc");
    check(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;

  T* get() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> result(size_);
    check(cudaMemcpy(result.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return result;
  }

 private:
  T* data_;
  size_t size_;
};

template <class... Parameters>
void launch_clusters(void (*kernel)(Parameters...), unsigned blocks, unsigned cluster, int threads,
                     Parameters... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = kSharedBytes;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
  check(cudaDeviceSynchronize(), "kernel");
}

/// y after kernel(x, y), y being zeros before.
template <class X, class Y>
std::vector<Y> run(void (*kernel)(const X*, Y*), const std::vector<X>& x, size_t size, int threads, unsigned blocks = 1,
                   unsigned cluster = 1) {
  const DeviceArray<X> device_x(x);
  const DeviceArray<Y> device_y(std::vector<Y>(size, Y(0)));
  launch_clusters<const X*, Y*>(kernel, blocks, cluster, threads, device_x.get(), device_y.get());
  return device_y.values();
}

std::mt19937 generator;

template <class T> std::vector<T> counting(size_t size) {
  std::vector<T> result(size);
  for (size_t i = 0; i < size; ++i) result[i] = T(i);
  return result;
}

bool check_opaque() {
  const std::vector<int> x = counting<int>(kThreads);
  return run(opaque_kernel, x, kThreads, kThreads) == x;
}

/// One kernel after the other, each of which needs all blocks of the one before.
bool check_kernels_in_a_row() {
  constexpr int kKernels = 8, kBlocks = 32;
  const std::vector<int> x = counting<int>(kBlocks * kThreads);
  const DeviceArray<int> a(x), b(x);
  for (int number = 0; number < kKernels; ++number) {
    const DeviceArray<int>&from = number % 2 ? b : a, &to = number % 2 ? a : b;
    launch("follower", follower_kernel, kBlocks, kThreads, 0, nullptr, from.get(), to.get());
  }
  check(cudaDeviceSynchronize(), "kernel");
  const std::vector<int> y = a.values();
  for (size_t i = 0; i < x.size(); ++i)
    if (y[i] != x[i] + kKernels) return false;
  return true;
}

uint16_t encode(float x) { return __half_as_ushort(__float2half_rn(x)); }

/// Of numbers with 6 bits: integers, whose sums are exact, and multiples of powers of two.
bool check_mma_f16() {
  constexpr int K = 16;
  for (const bool exact : {true, false}) {
    std::vector<float> A(16 * K), B(K * 8), D(16 * 8);
    const auto number = [&] {
      return std::ldexp(float(int(generator() % 127) - 63), exact ? 0 : -int(generator() % 8));
    };
    for (auto* matrix : {&A, &B, &D})
      for (float& x : *matrix) x = number();
    std::vector<uint16_t> a, b;
    for (const float x : A) a.push_back(encode(x));
    for (const float x : B) b.push_back(encode(x));
    const DeviceArray<uint16_t> device_a(a), device_b(b);
    const DeviceArray<float> device_d(D);
    launch_clusters<const uint16_t*, const uint16_t*, float*>(mma_f16_kernel, 1, 1, kWarp, device_a.get(),
                                                              device_b.get(), device_d.get());
    const std::vector<float> result = device_d.values();
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j) {
        double sum = D[i * 8 + j], size = std::fabs(sum);
        for (int k = 0; k < K; ++k) {
          const double term = double(A[i * K + k]) * B[k * 8 + j];
          sum += term;
          size += std::fabs(term);
        }
        // Each of the K + 1 terms may lose what lies below the last place of the largest one.
        const double bound = exact ? 0 : (K + 1) * std::ldexp(size, -23);
        if (!(std::fabs(result[i * 8 + j] - sum) <= bound)) return false;
      }
  }
  return true;
}

template <bool kTransposed> bool check_load_matrix() {
  const std::vector<uint16_t> x = counting<uint16_t>(kWarp * 8);
  const std::vector<uint32_t> y = run(load_matrix_kernel<kTransposed>, x, kWarp * 4, kWarp);
  for (int lane = 0; lane < kWarp; ++lane)
    for (int m = 0; m < 4; ++m)
      for (int e = 0; e < 2; ++e) {
        const int g = lane / 4, t = 2 * (lane % 4) + e;
        const uint32_t expected = x[m * 64 + (kTransposed ? t * 8 + g : g * 8 + t)];
        if ((y[lane * 4 + m] >> (16 * e) & 0xffff) != expected) return false;
      }
  return true;
}

template <int kBytes> bool check_copy_async() {
  std::vector<unsigned char> x(kThreads * kBytes);
  for (unsigned char& byte : x) byte = static_cast<unsigned char>(1 + generator() % 255);
  const std::vector<unsigned char> y = run(copy_async_kernel<kBytes>, x, 2 * x.size(), kThreads);
  for (int i = 0; i < kThreads * kBytes; ++i) {
    const bool copied = i % kBytes < i / kBytes % (kBytes + 1);
    if (y[i] != x[i] || y[kThreads * kBytes + i] != (copied ? x[i] : 0)) return false;
  }
  return true;
}

bool check_transpose_matrix() {
  const std::vector<uint16_t> x = counting<uint16_t>(64), y = run(transpose_matrix_kernel, x, 64, kWarp);
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j)
      if (y[8 * i + j] != x[8 * j + i]) return false;
  return true;
}

template <int kVectors, bool kByTerms> bool check_warpgroup() {
  std::vector<float> X((64 + kVectors) * 16);
  std::vector<uint16_t> x;
  for (float& value : X) x.push_back(encode(value = float(int(generator() % 127) - 63)));
  const std::vector<float> y = run(warpgroup_kernel<kVectors, kByTerms>, x, 2 * 64 * kVectors, kThreads);
  const auto expected = [&](int i, int j) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += X[16 * i + k] * X[64 * 16 + kVectors * k + j];
    return sum;
  };
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < kVectors; ++j) {
      const float own = expected(i, j), both = 2 * own + expected(63 - i, j);
      if (y[kVectors * i + j] != own || y[64 * kVectors + kVectors * i + j] != both) return false;
    }
  return true;
}

bool check_cluster(unsigned size) {
  const unsigned blocks = 3 * size;
  const std::vector<int> x = counting<int>(blocks * kThreads);
  const std::vector<int> y = run(cluster_kernel, x, 3 * x.size(), kThreads, blocks, size);
  for (unsigned block = 0; block < blocks; ++block)
    for (int t = 0; t < kThreads; ++t) {
      const unsigned rank = block % size, previous = block - rank + (rank + size - 1) % size;
      const int sent = x[(previous + 1) * kThreads - 1 - t];
      const int expected[] = {9 * sent + 3 * (sent + 1) + sent + 2, int(rank * 1000 + size), int(block)};
      if (std::memcmp(expected, &y[3 * (block * kThreads + t)], sizeof expected) != 0) return false;
    }
  return true;
}

bool check_no_cluster() {
  for (const int place : run(no_cluster_kernel, counting<int>(1), 2 * kThreads, kThreads, 2))
    if (place != 1) return false;
  return true;
}

bool check_named_barrier() {
  const std::vector<int> x = counting<int>(kThreads), y = run(named_barrier_kernel, x, kThreads, kThreads);
  for (int t = 0; t < kThreads; ++t) {
    const int from = kThreads - 1 - t, half = from / 64;
    if (y[t] != x[half * 64 + (from % 64 + 3 + 2 * half) % 64]) return false;
  }
  return true;
}

/// x: A (8 x 4), B (4 x 8), then what is added to (8 x 8), row-major.
__global__ void mma_f64_kernel(const double* x, double* D) {
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
  double d[2] = {x[64 + g * 8 + 2 * t], x[64 + g * 8 + 2 * t + 1]};
  mma_f64(d, x[g * 4 + t], x[32 + t * 8 + g]);
  for (int e = 0; e < 2; ++e) D[g * 8 + 2 * t + e] = d[e];
}

bool check_mma_f64() {
  std::vector<double> x(128);
  for (double& v : x) v = double(generator() % 127) - 63;  // sums are exact
  const std::vector<double> D = run(mma_f64_kernel, x, 64, kWarp);
  bool same = true;
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) {
      double sum = x[64 + i * 8 + j];
      for (int k = 0; k < 4; ++k) sum += x[i * 4 + k] * x[32 + k * 8 + j];
      same &= D[i * 8 + j] == sum;
    }
  return same;
}

struct Check {
  const char* wrappers;
  int capability;  // the least compute capability
  std::function<bool()> holds;
  int most = 99;
};

#define CLUSTER_WRAPPERS                                                                                     \
  "cluster_rank, cluster_size, cluster_arrive, cluster_wait, cluster_sync, mbarrier_init, mbarrier_expect, " \
  "mbarrier_arrive, mbarrier_wait, store_async; "

#define WARPGROUP_WRAPPERS                                                      \
  "require_warpgroups, fence_for_warpgroups, warpgroup_begin, describe_parts, " \
  "in_description, multiply_warpgroup, warpgroup_commit, warpgroup_wait"

const Check kChecks[] = {
    {"opaque", 8, check_opaque},
    {"wait_for_kernels_before, let_next_kernel_come", 8, check_kernels_in_a_row},
    {"mma_f16", 8, check_mma_f16},
    {"mma_f64", 8, check_mma_f64},
    {"load_matrix_x4", 8, check_load_matrix<false>},
    {"load_matrix_x4; transposed", 8, check_load_matrix<true>},
    {"transpose_matrix", 8, check_transpose_matrix},
    {"copy_async<4>, copy_async_commit, copy_async_wait", 8, check_copy_async<4>},
    {"copy_async<8>, copy_async_commit, copy_async_wait", 8, check_copy_async<8>},
    {"copy_async<16>, copy_async_commit, copy_async_wait", 8, check_copy_async<16>},
    {"cluster_rank, cluster_size, cluster_arrive, cluster_wait, cluster_sync; no cluster", 8, check_no_cluster},
    {CLUSTER_WRAPPERS "2 blocks", 9, [] { return check_cluster(2); }},
    {CLUSTER_WRAPPERS "8 blocks", 9, [] { return check_cluster(8); }},
    {"named_barrier", 8, check_named_barrier},
    {WARPGROUP_WRAPPERS, 9, check_warpgroup<64, false>, 9},
    {WARPGROUP_WRAPPERS "; by terms", 9, check_warpgroup<64, true>, 9},
    {WARPGROUP_WRAPPERS "; 32 vectors", 9, check_warpgroup<32, false>, 9},
    {WARPGROUP_WRAPPERS "; 32 vectors by terms", 9, check_warpgroup<32, true>, 9},
};

/// The number of checks that fail.
int run_checks(int capability) {
  int failed = 0;
  for (const Check& each : kChecks) {
    const char* verdict = "ok";
    if (capability < each.capability || capability > each.most)
      verdict = "skipped: not on this device";
    else if (!each.holds())
      verdict = "FAILED", ++failed;
    std::printf("%s: %s\n", each.wrappers, verdict);
  }
  return failed;
}

}  // namespace

int main() try {
  int capability = 0;
  check(cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, 0), "compute capability");
#if defined(__CUDACC__)
  return run_checks(capability) == 0 ? 0 : 1;
#else
  int failed = 0;
  for (const auto order : {emulation::Order::kForward, emulation::Order::kReverse, emulation::Order::kRandom}) {
    emulation::options.order = order;
    failed += run_checks(capability);
  }
  return failed == 0 ? 0 : 1;
#endif
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
