// Sums over the threads of a block.
#pragma once
#include "launch.cuh"
#include "tensor.cuh"

namespace isqrt::cuda {

/// Sum over a warp in a fixed order, the same bits in each lane.
template <class T> __device__ __forceinline__ T warp_sum(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

/// Sum over all threads of the block in a fixed order, the same bits in each of them. `scratch` holds one element a
/// warp, in shared memory.
template <class T> __device__ T block_sum(T value, T* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  T sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += scratch[warp];
  __syncthreads();
  return sum;
}

}  // namespace isqrt::cuda
