// Operands on their way from global memory to tensor cores: 64 vectors, some terms of each, in shared memory.
#pragma once
#include "block.cuh"
#include "number.cuh"
#include "tensor.cuh"

namespace isqrt::cuda {

/// 64 x 64 results of a block, 16 x 32 in each of its warps.
constexpr int kPanelVectors = 64, kPanelThreads = 256;

/// Terms of a panel: a row of each vector is 256 bytes long, or shorter.
template <class X> constexpr int kPanelTerms = sizeof(X) == 8 ? 32 : 64;

/// Elements of X as they are in memory, in rows of contiguous elements: the rows are the vectors where kTermsInRows,
/// else the terms. Rows are padded so that the lanes of a warp, reading an Operand, meet different banks.
template <class X, bool kTermsInRows> struct Panel {
  static constexpr int kRows = kTermsInRows ? kPanelVectors : kPanelTerms<X>,
                       kColumns = kTermsInRows ? kPanelTerms<X> : kPanelVectors;
  static constexpr int kPitch =
      kColumns + (sizeof(X) == 8 || (sizeof(X) == 4 && !kTermsInRows) ? 32 : 16) / int(sizeof(X));
  static constexpr int kBytes = kRows * kPitch * int(sizeof(X)), kPacket = kPacketBytes / int(sizeof(X));

  X* data;

  __device__ __forceinline__ const X& at(int vector, int term) const {
    return kTermsInRows ? data[vector * kPitch + term] : data[term * kPitch + vector];
  }

  /// Copies so many rows and columns of what begins at row(r), an address on 16 bytes, and zeros into the rest. The
  /// copy goes on until copy_async_wait.
  template <class Row> __device__ __forceinline__ void load_packets(const Row& row, int rows, int columns) const {
    constexpr int kPackets = kColumns / kPacket;
#pragma unroll 4
    for (int p = opaque(threadIdx.x); p < kRows * kPackets; p += kPanelThreads) {
      const int r = p / kPackets, c = p % kPackets * kPacket;
      const int wanted = r < rows ? columns - c : 0, elements = wanted < 0 ? 0 : wanted < kPacket ? wanted : kPacket;
      copy_async<kPacketBytes>(data + r * kPitch + c, elements ? row(r) + c : row(0), elements * int(sizeof(X)));
    }
  }

  /// The same of element(r, c), whatever their addresses.
  template <class Element>
  __device__ __forceinline__ void load_each(const Element& element, int rows, int columns) const {
#pragma unroll 4
    for (int p = opaque(threadIdx.x); p < kRows * kColumns; p += kPanelThreads) {
      const int r = p / kColumns, c = p % kColumns;
      data[r * kPitch + c] = r < rows && c < columns ? element(r, c) : X{};
    }
  }
};

/// Where in the 64 x 64 results a warp's two tiles begin.
struct WarpPlace {
  int row, column;
  __device__ WarpPlace() {
    const int warp = threadIdx.x / kWarp;
    row = warp / 2 * kTile;
    column = warp % 2 * 2 * kTile;
  }
};

/// Terms [term, term + 8) of the 16 vectors from `vector` on, each of them value(vector, term).
template <class T, class Value>
__device__ __forceinline__ Operand<T> operand(int vector, int term, const Value& value) {
  const Lane lane;
  Operand<T> result;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int s = 0; s < 2; ++s) result.value[h][s] = value(vector + lane.group + 8 * h, term + lane.quad + 4 * s, h, s);
  return result;
}

}  // namespace isqrt::cuda
