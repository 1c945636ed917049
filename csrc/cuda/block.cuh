// How the threads of a block share work: 16-byte accesses, 4 x 4 micro tiles, sums over the block.
#pragma once
#include "launch.cuh"

namespace isqrt::cuda {

constexpr int kWarp = 32;

/// Elements of one 16-byte access, the widest there is.
template <class T> struct alignas(16) Packet {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

template <class T> __device__ __forceinline__ void load4(T (&to)[4], const T* from) {
#pragma unroll
  for (int e = 0; e < 4; e += Packet<T>::kSize) {
    const Packet<T> packet = *reinterpret_cast<const Packet<T>*>(from + e);
#pragma unroll
    for (int v = 0; v < Packet<T>::kSize; ++v) to[e + v] = packet.value[v];
  }
}

template <class T> __device__ __forceinline__ void store4(T* to, const T (&from)[4]) {
#pragma unroll
  for (int e = 0; e < 4; e += Packet<T>::kSize) {
    Packet<T> packet;
#pragma unroll
    for (int v = 0; v < Packet<T>::kSize; ++v) packet.value[v] = from[e + v];
    *reinterpret_cast<Packet<T>*>(to + e) = packet;
  }
}

/// Where each of 16 neighbouring threads stands in a 4 x 4 arrangement: rows and columns alternate, bit by bit. Lane i
/// then shares its row with lane i ^ 1 and its column with lane i ^ 2, which is when the hardware serves the 16-byte
/// loads of half a warp in one cycle instead of two.
__device__ __forceinline__ int morton_row(int thread) { return (thread >> 1 & 1) | (thread >> 2 & 2); }
__device__ __forceinline__ int morton_column(int thread) { return (thread & 1) | (thread >> 1 & 2); }

/// Sum over all threads of the block in a fixed order, the same bits in each of them. `scratch` holds one element a
/// warp, in shared memory.
template <class T> __device__ T block_sum(T value, T* scratch) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  T sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += scratch[warp];
  __syncthreads();
  return sum;
}

}  // namespace isqrt::cuda
