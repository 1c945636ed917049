// Kernels whose use of memory is known, for the lint to be tested with.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "cuda/ptx.cuh"
#include "lint_recorder.h"

namespace {

constexpr int kSide = 32, kRows = 8;

/// A 32 x 32 transpose through shared memory: column reads meet in one bank unless rows are padded.
template <int kPitch> __global__ void transpose(const float* x, float* y) {
  float* s = static_cast<float*>(emulation::dynamic_shared());
  const int column = int(threadIdx.x) % kSide, row = int(threadIdx.x) / kSide;
  for (int i = row; i < kSide; i += kRows) s[i * kPitch + column] = x[i * kSide + column];
  __syncthreads();
  for (int i = row; i < kSide; i += kRows) y[i * kSide + column] = s[column * kPitch + i];  // seed: transpose
}

template <int kStride> __global__ void strided(const float* x, float* y) {
  y[threadIdx.x] = x[kStride * threadIdx.x];  // seed: strided
}

struct Half {
  uint16_t bits;
};
uint16_t bits_of(Half h) { return h.bits; }  // a structure passed by value, as to_number takes it

template <int kStride> __global__ void halves(const float* x, float* y) {
  y[threadIdx.x] = bits_of(reinterpret_cast<const Half*>(x)[kStride * threadIdx.x]);  // seed: halves
}

struct alignas(16) Four {
  float value[4];
};

/// kStride = 1 reads the whole of shared memory in order; 8 lanes, a quarter of a warp, are served together.
template <int kStride> __global__ void packets(const float* x, float* y) {
  Four* s = static_cast<Four*>(emulation::dynamic_shared());
  for (int i = 0; i < kStride; ++i) s[i * blockDim.x + threadIdx.x] = reinterpret_cast<const Four*>(x)[threadIdx.x];
  __syncthreads();
  const Four four = s[kStride * threadIdx.x];  // seed: packets
  y[threadIdx.x] = four.value[0] + four.value[3];
}

/// Asynchronous copies of 16 bytes a lane from every other 16 bytes of global memory.
__global__ void copies(const float* x, float* y) {
  float* s = static_cast<float*>(emulation::dynamic_shared());
  isqrt::cuda::copy_async<16>(s + 4 * threadIdx.x, x + 8 * threadIdx.x);  // seed: copies
  isqrt::cuda::copy_async_commit();
  isqrt::cuda::copy_async_wait<0>();
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

/// Every other word of the shared memory of the other block in the cluster.
__global__ void distributed(const float* x, float* y) {
  const auto cluster = cooperative_groups::this_cluster();
  float* s = static_cast<float*>(emulation::dynamic_shared());
  s[2 * threadIdx.x] = x[threadIdx.x];
  cluster.sync();
  const float* other = cluster.map_shared_rank(s, 1 - cluster.block_rank());
  y[blockIdx.x * blockDim.x + threadIdx.x] = other[2 * threadIdx.x];  // seed: distributed
  cluster.sync();
}

void run(const char* label, int threads, void (*kernel)(const float*, float*), unsigned cluster = 1) {
  constexpr int kElements = 4096;
  float* x = static_cast<float*>(lint::allocate(kElements * sizeof(float)));
  float* y = static_cast<float*>(lint::allocate(kElements * sizeof(float)));
  for (int i = 0; i < kElements; ++i) x[i] = float(i);
  cudaLaunchAttribute attribute{cudaLaunchAttributeClusterDimension, {}};
  attribute.val.clusterDim = {cluster, 1, 1};
  const cudaLaunchConfig_t config{cluster, unsigned(threads), kElements * sizeof(float), nullptr, &attribute, 1};
  lint::record(label, [&] { cudaLaunchKernelEx(&config, kernel, x, y); });
}

}  // namespace

int main() {
  run("transpose", kSide * kRows, transpose<kSide>);
  run("transpose padded", kSide * kRows, transpose<kSide + 1>);
  run("strided 1", kSide, strided<1>);
  run("strided 8", kSide, strided<8>);
  run("halves 1", kSide, halves<1>);
  run("halves 4", kSide, halves<4>);
  run("packets 1", kSide, packets<1>);
  run("packets 2", kSide, packets<2>);
  run("copies", kSide, copies);
  run("distributed", kSide, distributed, 2);
}
