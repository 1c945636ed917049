// The Engines of covariance.h for what follows the chunks: their merge, and the second pass of a sample that left its
// range. Neither is a product of matrices.
#pragma once
#include "../tasks.h"
#include "block.cuh"
#include "number.cuh"

namespace isqrt::cuda {

/// Merges the chunks of one sample for tile (I, J) of Sigma, I <= J. Each thread has kRows elements in a column; where
/// there are many chunks tiles are small, and groups of threads have every so many chunks each. Blocks live for about
/// as long as it takes to ask memory twice: for means and moments first, and for means again, which are near by then.
template <class X, bool kMany> class MergeEngine {
  using T = Compute<X>;
  static constexpr int kSide = kMany ? 8 : 32, kPitch = kSide + 1, kRows = kMany ? 1 : 4, kStep = kSide / kRows;
  static constexpr int kElements = kSide * kStep;     // threads of a group
  static constexpr int kAhead = kMany ? 8 : 2;        // chunks whose moments are asked for at once
  static constexpr int kMostGroups = kMany ? 16 : 1;

 public:
  static constexpr int kTile = kSide, kMostThreads = kMostGroups * kElements;
  /// Groups, a power of two of them, that have no more chunks each than are asked for at once.
  static ISQRT_FN int threads(int64_t chunks) {
    int groups = kMany ? 2 : 1;
    while (groups < kMostGroups && groups * kAhead < chunks) groups *= 2;
    return kElements * groups;
  }
  static ISQRT_FN int64_t shared_bytes(int threads) {
    return (2 * kSide + threads / kElements * kSide * kPitch) * int64_t(sizeof(T));
  }

  __device__ MergeEngine(const PoolTask<X>& task, int64_t sample, int I, int J)
      : C_(task.x.channels),
        chunks_(task.chunks),
        partial_mean_(task.partial_mean + sample * chunks_.count * C_),
        partial_moment_(task.partial_moment + sample * chunks_.count * C_ * C_),
        mean_(task.mean + sample * C_),
        sigma_(task.sigma + sample * C_ * C_),
        first_row_(I * kSide),
        first_column_(J * kSide) {
    load_ahead(group());
  }

  /// Of the rows' and the columns' means each is that of some lanes, which have some chunks each.
  __device__ void average() const {
    const int lanes = int(blockDim.x) / (2 * kSide) < kWarp ? int(blockDim.x) / (2 * kSide) : kWarp;
    const int vector = int(threadIdx.x) / lanes, lane = int(threadIdx.x) % lanes;
    if (vector < 2 * kSide) {
      const int own = vector < kSide ? first_row_ + vector : first_column_ + vector - kSide;
      const T* mean = partial_mean_ + (own < C_ ? own : C_ - 1);
      const T first = *mean;
      T sum = 0;
#pragma unroll 4
      for (int c = lane; c < count(); c += lanes) sum += size(c) * (mean[c * C_] - first);
      for (int other = lanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
      if (lane == 0) means()[vector] = first + sum / T(chunks_.positions);
    }
    __syncthreads();
  }

  __device__ void add_moments() {
    T sum[kRows] = {};
    for (int c = group();; load_ahead(c)) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[r] += ahead_[a][r];
      c += kAhead * groups();
      if (c >= count()) break;
    }
    if (count() > 1) {
      const T mean_j = means()[kSide + column()];
#pragma unroll 4
      for (int c = group(); c < count(); c += groups()) {
        const T* mean = partial_mean_ + c * C_;
        const T distance = size(c) * (j() < C_ ? mean[j()] - mean_j : T(0));
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (i(r) < C_) sum[r] += (mean[i(r)] - means()[row(r)]) * distance;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums(group())[row(r) * kPitch + column()] = sum[r];
    __syncthreads();
  }

  __device__ void finish(double alpha) const {
    const bool in_place = partial_mean_ == mean_;  // of a single chunk
    if (!in_place && first_row_ == first_column_ && threadIdx.x < kSide && first_row_ + int(threadIdx.x) < C_)
      mean_[first_row_ + threadIdx.x] = means()[threadIdx.x];
    if (group() > 0) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (upper(r)) sigma_[i(r) * C_ + j()] = T(alpha) * total(row(r), column());
      // Element (j', i') below the diagonal, i' along the threads.
      const int row_below = first_column_ + row(r), column_below = first_row_ + column();
      if (column_below < row_below && row_below < C_)
        sigma_[row_below * C_ + column_below] = T(alpha) * total(column(), row(r));
    }
  }

 private:
  __device__ int count() const { return int(chunks_.count); }
  __device__ T size(int c) const { return T(int(c + 1 < count() ? chunks_.length : chunks_.size(c))); }
  __device__ static int groups() { return int(blockDim.x) / kElements; }
  __device__ static int group() { return int(threadIdx.x) / kElements; }
  __device__ static int row(int r) { return int(threadIdx.x) % kElements / kSide + r * kStep; }
  __device__ static int column() { return int(threadIdx.x) % kSide; }
  __device__ int i(int r) const { return first_row_ + row(r); }
  __device__ int j() const { return first_column_ + column(); }
  __device__ bool upper(int r) const { return i(r) <= j() && j() < C_; }

  /// The moments of kAhead of this group's chunks, from c on.
  __device__ __forceinline__ void load_ahead(int c) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a, c += groups())
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        ahead_[a][r] = c < count() && upper(r) ? partial_moment_[c * C_ * C_ + i(r) * C_ + j()] : T(0);
  }

  /// mu of the tile's rows and columns; what each group has of its elements, and all of them together.
  __device__ static T* means() { return shared_memory<T>(); }
  __device__ static T* sums(int group) { return means() + 2 * kSide + group * kSide * kPitch; }
  __device__ static T total(int row, int column) {
    T sum = 0;
    for (int group = 0; group < groups(); ++group) sum += sums(group)[row * kPitch + column];
    return sum;
  }

  int64_t C_;
  const Chunks& chunks_;
  const T *partial_mean_, *partial_moment_;
  T *mean_, *sigma_;
  int first_row_, first_column_;
  T ahead_[kAhead][kRows];
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
