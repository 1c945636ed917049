// Sums over the threads of a block.
#pragma once
#include "launch.cuh"
#include "tensor.cuh"

namespace isqrt::cuda {

/// Sum over a warp in a fixed order, the same bits in each lane.
template <class T> __device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

/// Sums over all threads of the block in a fixed order, the same bits in each of them. `scratch` holds kCount elements
/// a warp, in shared memory.
template <int kCount, class T> __device__ void block_sums(T (&values)[kCount], T* scratch) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    const T sum = warp_sum(values[n]);
    if (threadIdx.x % kWarp == 0) scratch[kCount * (threadIdx.x / kWarp) + n] = sum;
    values[n] = 0;
  }
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp)
#pragma unroll
    for (int n = 0; n < kCount; ++n) values[n] += scratch[kCount * warp + n];
  __syncthreads();
}
template <class T> __device__ T block_sum(T value, T* scratch) {
  T values[1] = {value};
  block_sums(values, scratch);
  return values[0];
}

}  // namespace isqrt::cuda
