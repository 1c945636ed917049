// The Engines of covariance.h for what follows the chunks: their merge, and the second pass of a sample that left its
// range. Neither is a product of matrices.
#pragma once
#include "../tasks.h"
#include "block.cuh"
#include "number.cuh"

namespace isqrt::cuda {

/// Merges the chunks of one sample for 8 x 16 elements of Sigma. Each warp has all of them, a row of four in each lane,
/// of every so many chunks. All that a block takes from memory is asked for at once, and the means, which are near by
/// then, a second time when mu is known.
template <class X> class MergeEngine {
  using T = Compute<X>;
  static constexpr int kRows = 8, kColumns = 16, kMeans = kRows + kColumns, kAhead = 2,
                       kMostWarps = sizeof(T) == 8 ? 16 : 32;  // as many as there are registers for
  static_assert(kRows * kColumns == 4 * kWarp);

 public:
  static constexpr int kMostThreads = kMostWarps * kWarp;
  /// A power of two of warps that have few chunks each.
  static ISQRT_FN int warps(int64_t chunks) {
    int warps = 2;
    while (warps < kMostWarps && 2 * kAhead * warps < chunks) warps *= 2;
    return warps;
  }
  static ISQRT_FN int64_t shared_bytes(int warps) { return (warps + 1) * (kMeans + kRows * kColumns) * sizeof(T); }
  /// Tiles that have an element of the upper triangle: of column J of tiles the first 2 J + 2, or all there are.
  static ISQRT_FN int tiles(int64_t channels) {
    const int rows = int((channels + kRows - 1) / kRows), columns = int((channels + kColumns - 1) / kColumns);
    return columns * (columns + 1) - rows % 2;
  }

  __device__ MergeEngine(const PoolTask<X>& task, int tile, int64_t sample)
      : C_(int(task.x.channels)),
        chunks_(task.chunks),
        partial_mean_(task.partial_mean + sample * chunks_.count * C_),
        partial_moment_(task.partial_moment + sample * chunks_.count * C_ * C_),
        mean_(task.mean + sample * C_),
        sigma_(task.sigma + sample * C_ * C_),
        length_(T(int(chunks_.length))),
        last_length_(T(int(chunks_.size(chunks_.count - 1)))) {
    int J = 0;
    for (; tile >= 2 * J + 2; ++J) tile -= 2 * J + 2;
    first_row_ = kRows * tile;
    first_column_ = kColumns * J;
  }

  /// Sums of moments and of the means' distances from the first chunk's: that of a constant map is exact.
  __device__ void average() {
    T sum = 0, sums[4] = {};
    in_packets_or_not([&](auto ahead, auto load) {
      constexpr int kAhead = decltype(ahead)::value;
      const T first = mean_of_row(0);
      T firsts[4];
      load(partial_mean_, firsts);
#pragma unroll 1
      for (int from = warp(); from < count(); from += kAhead * warps()) {
        T moments[kAhead][4] = {}, means[kAhead][4] = {}, mean[kAhead] = {};
#pragma unroll
        for (int a = 0; a < kAhead; ++a)
          if (const int c = from + a * warps(); c < count()) {
            load(partial_moment_ + (int64_t(c) * C_ + clamped(i())) * C_, moments[a]);
            load(partial_mean_ + int64_t(c) * C_, means[a]);
            mean[a] = mean_of_row(c);
          }
#pragma unroll
        for (int a = 0; a < kAhead; ++a)
          if (const int c = from + a * warps(); c < count()) {
            sum += size(c) * (mean[a] - first);
#pragma unroll
            for (int e = 0; e < 4; ++e) moment_[e] += moments[a][e], sums[e] += size(c) * (means[a][e] - firsts[e]);
          }
      }
    });
    if (lane() % 4 == 0) of_warp(warp())[row()] = sum;
    if (lane() < 4)
#pragma unroll
      for (int e = 0; e < 4; ++e) of_warp(warp())[kRows + column() + e] = sums[e];
    __syncthreads();
    if (threadIdx.x < kMeans) {  // of rows and of columns
      T total = 0;
#pragma unroll 4
      for (int w = 0; w < warps(); ++w) total += of_warp(w)[threadIdx.x];
      const int own = int(threadIdx.x), channel = own < kRows ? first_row_ + own : first_column_ + own - kRows;
      of_warp(warps())[own] = partial_mean_[clamped(channel)] + total / T(chunks_.positions);
    }
    __syncthreads();
  }

  __device__ void add_moments() {
    const T* mean = of_warp(warps());
    T* sums = of_warp(warp()) + kMeans;
    in_packets_or_not([&](auto, auto load) {
#pragma unroll 2
      for (int c = warp(); c < count(); c += warps()) {
        T means[4];
        load(partial_mean_ + int64_t(c) * C_, means);
        const T distance = size(c) * (mean_of_row(c) - mean[row()]);
#pragma unroll
        for (int e = 0; e < 4; ++e) moment_[e] += distance * (means[e] - mean[kRows + column() + e]);
      }
    });
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[kColumns * row() + column() + e] = moment_[e];
    if (first_row_ == first_column_ && threadIdx.x < kColumns && first_column_ + int(threadIdx.x) < C_)
      mean_[first_column_ + threadIdx.x] = mean[kRows + threadIdx.x];
    __syncthreads();
  }

  __device__ void finish(double alpha) const {
    for (int own = threadIdx.x; own < kRows * kColumns; own += blockDim.x) {
      T sum = 0;
#pragma unroll 4
      for (int w = 0; w < warps(); ++w) sum += of_warp(w)[kMeans + own];
      const int i = first_row_ + own / kColumns, j = first_column_ + own % kColumns;
      if (i <= j && j < C_) sigma_[int64_t(i) * C_ + j] = sigma_[int64_t(j) * C_ + i] = T(alpha) * sum;
    }
  }

 private:
  __device__ static int warp() { return int(threadIdx.x) / kWarp; }
  __device__ static int warps() { return int(blockDim.x) / kWarp; }
  __device__ static int lane() { return int(threadIdx.x) % kWarp; }
  __device__ static int row() { return lane() / 4; }
  __device__ static int column() { return lane() % 4 * 4; }
  __device__ int i() const { return first_row_ + row(); }
  __device__ int j() const { return first_column_ + column(); }
  __device__ int count() const { return int(chunks_.count); }
  __device__ T size(int c) const { return c + 1 < count() ? length_ : last_length_; }
  /// What is outside is read from within, and not written.
  __device__ int clamped(int channel) const { return channel < C_ ? channel : C_ - 1; }

  __device__ T mean_of_row(int c) const { return partial_mean_[int64_t(c) * C_ + clamped(i())]; }
  /// f(chunks to be asked for at once, load) with load(row of C numbers, this lane's four columns of them)
  template <class F> __device__ __forceinline__ void in_packets_or_not(const F& f) const {
    struct alignas(kPacketBytes) Four {
      T of[4];
    };
    if (C_ % 4 == 0)
      f(std::integral_constant<int, kAhead>(), [&](const T* from, T(&four)[4]) {
        const Four packet =
            *reinterpret_cast<const Four*>(from + (j() < C_ ? j() : C_ - 4));  // where there is something
#pragma unroll
        for (int e = 0; e < 4; ++e) four[e] = packet.of[e];
      });
    else
      f(std::integral_constant<int, 1>(), [&](const T* from, T(&four)[4]) {
#pragma unroll
        for (int e = 0; e < 4; ++e) four[e] = from[clamped(j() + e)];
      });
  }

  /// Of each warp sums of means and of elements; after those of the last one mu.
  __device__ static T* of_warp(int warp) { return shared_memory<T>() + warp * (kMeans + kRows * kColumns); }

  int C_;
  const Chunks& chunks_;
  const T *partial_mean_, *partial_moment_;
  T *mean_, *sigma_;
  T length_, last_length_;
  int first_row_, first_column_;
  T moment_[4] = {};
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
      for (int64_t m = threadIdx.x; m < x_.positions(); m += kThreads)
        most = larger(most, fabs(half_distance(c, m, share)));
    for (int lane = kWarp / 2; lane > 0; lane /= 2) most = larger(most, __shfl_xor_sync(0xffffffffu, most, lane));
    T* of_warps = shared_memory<T>();
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = most;
    __syncthreads();
    for (int warp = 0; warp < kThreads / kWarp; ++warp) most = larger(most, of_warps[warp]);
    __syncthreads();
    return most;
  }

  /// From 2 s (x - x_0) / 2.
  __device__ void rescale(T s) const {
    const int64_t M = x_.positions();
    for_each_of_warp(C_, [&](int64_t c) {
      const T mean = sum_over_positions([&](int64_t m) { return 2 * (s * half_distance(c, m)); }) / T(M);
      if (threadIdx.x % kWarp == 0) mean_[c] = mean;
    });
    __syncthreads();
    for_each_of_warp(C_ * C_, [&](int64_t entry) {
      const int64_t i = entry / C_, j = entry % C_;
      if (i > j) return;
      const T mean_i = mean_[i], mean_j = mean_[j];
      const T sum = sum_over_positions([&](int64_t m) {
        return (2 * (s * half_distance(i, m)) - mean_i) * (2 * (s * half_distance(j, m)) - mean_j);
      });
      if (threadIdx.x % kWarp == 0) sigma_[i * C_ + j] = sigma_[j * C_ + i] = sum / T(M);
    });
    __syncthreads();
  }

  __device__ void keep(T s) const {
    if (scale_) {
      if (threadIdx.x == 0) *scale_ = s;
    } else if (s != 1) {
      for (int64_t i = threadIdx.x; i < C_ * C_; i += kThreads) sigma_[i] = sigma_[i] / s / s;
      for (int64_t c = threadIdx.x; c < C_; c += kThreads) mean_[c] /= s;
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
  template <class F> __device__ T sum_over_positions(const F& f) const {
    T sum = 0;
#pragma unroll 1
    for (int64_t m = threadIdx.x % kWarp; m < x_.positions(); m += kWarp) sum += f(m);
    return warp_sum(sum);
  }

  FeatureMaps<const X> x_;
  int64_t C_;
  const X* sample_;
  T *mean_, *sigma_, *scale_;
};

}  // namespace isqrt::cuda
