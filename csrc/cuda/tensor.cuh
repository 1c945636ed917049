// Products on tensor cores: a warp computes 16 x 16 results, 8 terms at a time.
//
// Lane l has group g = l / 4 and quad q = l % 4. Of an operand, 16 vectors of 8 terms, it holds the terms q and q + 4
// of the vectors g and g + 8; of the result, columns 2 q and 2 q + 1 of both halves in rows g and g + 8. Both
// operands are "vectors times terms", A by its rows and B by its columns.
#pragma once
#include "ptx.cuh"

namespace isqrt::cuda {

constexpr int kWarp = 32, kTile = 16;

/// Found out anew whenever it is asked for: kept, all that follows from it would take registers throughout a kernel.
struct Lane {
  int number, group, quad;
  __device__ Lane() : Lane(opaque(threadIdx.x) % kWarp) {}

 private:
  __device__ explicit Lane(unsigned n) : number(int(n)), group(int(n / 4)), quad(int(n % 4)) {}
};

/// value[h][s]: term quad + 4 s of vector group + 8 h.
template <class T> struct Operand {
  T value[2][2];
};

/// sum[n][2 h + e]: row group + 8 h, column 8 n + 2 quad + e.
template <class T> struct WarpTile {
  T sum[2][4] = {};

  /// f(element, row, column) for each of this lane's eight.
  template <class F> __device__ __forceinline__ void for_each(const F& f) {
    const Lane lane;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int v = 0; v < 4; ++v) f(sum[n][v], lane.group + v / 2 * 8, 8 * n + 2 * lane.quad + v % 2);
  }

  /// f(two elements, row, column of the first) for each of this lane's four pairs of neighbours.
  template <class F> __device__ __forceinline__ void for_each_pair(const F& f) {
    const Lane lane;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) f(sum[n] + 2 * h, lane.group + h * 8, 8 * n + 2 * lane.quad);
  }

  /// f(element, other's element)
  template <class F> __device__ __forceinline__ void combine(const WarpTile& other, const F& f) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int v = 0; v < 4; ++v) f(sum[n][v], other.sum[n][v]);
  }
};

}  // namespace isqrt::cuda
