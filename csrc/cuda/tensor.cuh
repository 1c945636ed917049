// Products on tensor cores: a warp computes 16 x 16 results, 8 terms at a time.
//
// Lane l has group g = l / 4 and quad q = l % 4. Of an operand, 16 vectors of 8 terms, it holds the terms q and q + 4
// of the vectors g and g + 8; of the result, columns 2 q and 2 q + 1 of both halves in rows g and g + 8. Both
// operands are "vectors times terms", A by its rows and B by its columns.
#pragma once
#include "ptx.cuh"

namespace isqrt::cuda {

constexpr int kWarp = 32, kTile = 16, kTerms = 8;

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

/// A float as the sum of two numbers of tf32's 11 bits. The larger one is rounded to nearest, so that the smaller one
/// has either sign: of it the hardware ignores the last bits, and what is lost, 2^-22 at most, does not add up.
struct SplitOperand {
  uint32_t high[2][2], low[2][2];
  SplitOperand() = default;
  __device__ __forceinline__ explicit SplitOperand(const Operand<float>& a) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        high[h][s] = opaque((__float_as_uint(a.value[h][s]) + 0x1000u) & 0xffffe000u);
        low[h][s] = opaque(__float_as_uint(a.value[h][s] - __uint_as_float(high[h][s])));
      }
  }
};

/// The sum of products A B, 16 x 16. In float32 three of the four products of the parts count, each with the accuracy
/// of float32. Tensor cores round their sums towards zero: the small products have a sum of their own, so that the
/// large one is rounded as seldom as can be.
template <class T> struct Accumulator;

template <> struct Accumulator<float> {
  using Factor = SplitOperand;
  WarpTile<float> large, small;

  __device__ __forceinline__ void multiply_add(const Factor& a, const Factor& b) {
    const uint32_t a_high[4] = {a.high[0][0], a.high[1][0], a.high[0][1], a.high[1][1]};
    const uint32_t a_low[4] = {a.low[0][0], a.low[1][0], a.low[0][1], a.low[1][1]};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      mma_tf32(small.sum[n], a_low, b.high[n]);
      mma_tf32(large.sum[n], a_high, b.high[n]);
      mma_tf32(small.sum[n], a_high, b.low[n]);
    }
  }

  __device__ __forceinline__ WarpTile<float> total() const {
    WarpTile<float> result;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int v = 0; v < 4; ++v) result.sum[n][v] = large.sum[n][v] + small.sum[n][v];
    return result;
  }
};

template <> struct Accumulator<double> {
  using Factor = Operand<double>;
  WarpTile<double> sum;

  __device__ __forceinline__ void multiply_add(const Factor& a, const Factor& b) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int s = 0; s < 2; ++s) mma_f64(sum.sum[n] + 2 * h, a.value[h][s], b.value[n][s]);
  }

  __device__ __forceinline__ WarpTile<double> total() const { return sum; }
};

}  // namespace isqrt::cuda
