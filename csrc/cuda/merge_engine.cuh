// The Engines of covariance.h for what follows the chunks: their merge, and the second pass of a sample that left its
// range. Neither is a product of matrices.
#pragma once
#include "../tasks.h"
#include "block.cuh"
#include "number.cuh"

namespace isqrt::cuda {

/// Merges the chunks of one sample for tile (I, J) of Sigma, I <= J. Of the means each warp has some channels and each
/// of its lanes some chunks. Of the elements each thread has kRows in a column and every kGroups-th chunk: one group
/// where there are few chunks, then in larger tiles, for blocks that have little to do take their time, too.
template <class X, int kGroups> class MergeEngine {
  using T = Compute<X>;
  static constexpr int kElements = 256, kSide = kGroups == 1 ? 32 : 16, kPitch = kSide + 1;
  static constexpr int kRows = kSide * kSide / kElements, kStep = kSide / kRows;

 public:
  static constexpr int kThreads = kGroups * kElements, kTile = kSide;
  static constexpr int64_t kSharedBytes = (2 * kSide + kGroups * kSide * kPitch) * sizeof(T);

  __device__ MergeEngine(const PoolTask<X>& task, int64_t sample, int64_t I, int64_t J)
      : C_(task.x.channels),
        chunks_(task.chunks),
        partial_mean_(task.partial_mean + sample * chunks_.count * C_),
        partial_moment_(task.partial_moment + sample * chunks_.count * C_ * C_),
        mean_(task.mean + sample * C_),
        sigma_(task.sigma + sample * C_ * C_),
        first_row_(I * kSide),
        first_column_(J * kSide) {}

  __device__ void average() const {
    const int lane = threadIdx.x % kWarp;
    for (int vector = threadIdx.x / kWarp; vector < 2 * kSide; vector += kThreads / kWarp) {  // rows, then columns
      const int64_t channel = vector < kSide ? first_row_ + vector : first_column_ + vector - kSide;
      if (channel >= C_) continue;
      const T first = partial_mean_[channel];
      T sum = 0;
      for (int64_t c = lane; c < chunks_.count; c += kWarp)
        sum += T(chunks_.size(c)) * (partial_mean_[c * C_ + channel] - first);
      for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (lane == 0) means()[vector] = first + sum / T(chunks_.positions);
    }
    __syncthreads();
  }

  __device__ void add_moments() const {
    T sum[kRows] = {};
    const T* mean = partial_mean_ + group() * C_;
    const T* moment = partial_moment_ + group() * C_ * C_;
#pragma unroll(4 / kRows)  // so many chunks are asked for before the first of them is there
    for (int64_t c = group(); c < chunks_.count; c += kGroups, mean += kGroups * C_, moment += kGroups * C_ * C_) {
      const T size = T(chunks_.size(c));
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (upper(r))
          sum[r] +=
              moment[i(r) * C_ + j()] + size * (mean[i(r)] - means()[row(r)]) * (mean[j()] - means()[kSide + column()]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums(group())[row(r) * kPitch + column()] = sum[r];
    __syncthreads();
  }

  __device__ void finish(double alpha) const {
    const bool in_place = partial_mean_ == mean_;  // of a single chunk
    if (!in_place && first_row_ == first_column_ && threadIdx.x < kSide && first_row_ + threadIdx.x < C_)
      mean_[first_row_ + threadIdx.x] = means()[threadIdx.x];
    if (group() > 0) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (upper(r)) sigma_[i(r) * C_ + j()] = T(alpha) * total(row(r), column());
      // Element (j', i') below the diagonal, i' along the threads.
      const int64_t row_below = first_column_ + row(r), column_below = first_row_ + column();
      if (column_below < row_below && row_below < C_)
        sigma_[row_below * C_ + column_below] = T(alpha) * total(column(), row(r));
    }
  }

 private:
  __device__ static int group() { return threadIdx.x / kElements; }
  __device__ static int row(int r) { return threadIdx.x % kElements / kSide + r * kStep; }
  __device__ static int column() { return threadIdx.x % kSide; }
  __device__ int64_t i(int r) const { return first_row_ + row(r); }
  __device__ int64_t j() const { return first_column_ + column(); }
  __device__ bool upper(int r) const { return i(r) <= j() && j() < C_; }

  /// mu of the tile's rows and columns; what each group has of its elements, and all of them together.
  __device__ static T* means() { return shared_memory<T>(); }
  __device__ static T* sums(int group) { return means() + 2 * kSide + group * kSide * kPitch; }
  __device__ static T total(int row, int column) {
    T sum = 0;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) sum += sums(group)[row * kPitch + column];
    return sum;
  }

  int64_t C_;
  Chunks chunks_;
  const T *partial_mean_, *partial_moment_;
  T *mean_, *sigma_;
  int64_t first_row_, first_column_;
};

/// The second pass of one sample, where it needs one: a block, and no haste. A warp has an entry of Sigma at a time.
template <class X> class RescueEngine {
  using T = Compute<X>;

 public:
  static constexpr int kThreads = 256;
  static constexpr int64_t kSharedBytes = kThreads / kWarp * sizeof(T);

  __device__ RescueEngine(const PoolTask<X>& task, int64_t sample)
      : x_(task.x),
        C_(task.x.channels),
        sample_(task.x.sample(sample)),
        mean_(task.mean + sample * C_),
        sigma_(task.sigma + sample * C_ * C_),
        scale_(task.scale ? task.scale + sample : nullptr) {}

  __device__ T trace() const {
    T sum = 0;
    for (int64_t c = threadIdx.x; c < C_; c += kThreads) sum += sigma_[c * (C_ + 1)];
    return block_sum(sum, shared_memory<T>());
  }

  __device__ T largest(T share) const {
    T most = 0;
    for (int64_t c = 0; c < C_; ++c)
#pragma unroll 1
      for (int64_t m = threadIdx.x; m < x_.positions(); m += kThreads) {
        const T distance = half_distance(c, m, share);
        if (!(fabs(distance) <= most)) most = fabs(distance);
      }
    for (int lane = kWarp / 2; lane > 0; lane /= 2) most = larger(most, __shfl_xor_sync(0xffffffffu, most, lane));
    T* of_warps = shared_memory<T>();
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = most;
    __syncthreads();
    for (int warp = 0; warp < kThreads / kWarp; ++warp) most = larger(most, of_warps[warp]);
    __syncthreads();
    return most;
  }

  /// Means of 2 s (x - x_0) / 2 first, kept in mean_ until the entries of Sigma are there.
  __device__ void rescale(T s) const {
    const int64_t M = x_.positions();
    for_each_of_warp(C_, [&](int64_t c) {
      const T mean = warp_sum([&](int64_t m) { return 2 * (s * half_distance(c, m)); }) / T(M);
      if (threadIdx.x % kWarp == 0) mean_[c] = mean;
    });
    __syncthreads();
    for_each_of_warp(C_ * C_, [&](int64_t entry) {
      const int64_t i = entry / C_, j = entry % C_;
      if (i > j) return;
      const T mean_i = mean_[i], mean_j = mean_[j];
      const T sum = warp_sum([&](int64_t m) {
        return (2 * (s * half_distance(i, m)) - mean_i) * (2 * (s * half_distance(j, m)) - mean_j);
      });
      if (threadIdx.x % kWarp == 0) sigma_[i * C_ + j] = sigma_[j * C_ + i] = sum / T(M);
    });
    __syncthreads();
    for (int64_t c = threadIdx.x; c < C_; c += kThreads) mean_[c] = to_number(sample_[c * x_.stride_c]) + mean_[c] / s;
  }

  __device__ void keep(T s) const {
    if (scale_) {
      if (threadIdx.x == 0) *scale_ = s;
    } else if (s != 1) {
      for (int64_t i = threadIdx.x; i < C_ * C_; i += kThreads) sigma_[i] = sigma_[i] / s / s;
    }
  }

 private:
  /// NaN where one of them is.
  __device__ static T larger(T a, T b) { return a >= b || a != a ? a : b; }

  /// (x - share x_0) / 2: half of a difference does not overflow.
  __device__ T half_distance(int64_t c, int64_t m, T share = 1) const {
    const X* row = sample_ + c * x_.stride_c;
    return T(0.5) * to_number(row[x_.offset(m)]) - T(0.5) * share * to_number(row[0]);
  }

  template <class F> __device__ static void for_each_of_warp(int64_t n, const F& f) {
    for (int64_t i = threadIdx.x / kWarp; i < n; i += kThreads / kWarp) f(i);
  }
  template <class F> __device__ T warp_sum(const F& f) const {
    T sum = 0;
#pragma unroll 1
    for (int64_t m = threadIdx.x % kWarp; m < x_.positions(); m += kWarp) sum += f(m);
    for (int lane = kWarp / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
    return sum;
  }

  FeatureMaps<const X> x_;
  int64_t C_;
  const X* sample_;
  T *mean_, *sigma_, *scale_;
};

}  // namespace isqrt::cuda
