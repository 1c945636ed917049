// The Engines of covariance.h on one thread block. 64 x 64 results lie in registers, 4 x 4 in each of 256 threads.
// Their operands pass through shared memory in panels of 32 x 64 elements, whose row is the index that is summed over.
#pragma once
#include "../tasks.h"
#include "block.cuh"
#include "number.cuh"

namespace isqrt::cuda {

constexpr int kPanelRows = 32, kPanelColumns = 64, kPanelThreads = 256;

/// A panel row and 16 bytes more: 16-byte accesses of one column by neighbouring rows then meet no bank conflict.
template <class T> constexpr int kPanelPitch = kPanelColumns + Packet<T>::kSize;
template <class T> constexpr int kPanelSize = kPanelRows * kPanelPitch<T>;

/// panel[r][c] = value(r, c), or += where kAdd is set. What value reads is coalesced for either memory order: it is
/// called by neighbouring threads for neighbouring rows, or else for neighbouring columns.
template <bool kAdd = false, class T, class Value>
__device__ __forceinline__ void fill_panel(T* panel, bool neighbours_in_rows, const Value& value) {
  if (neighbours_in_rows) {
    const int r = threadIdx.x % kPanelRows;
#pragma unroll
    for (int c = threadIdx.x / kPanelRows * 4; c < kPanelColumns; c += kPanelThreads / kPanelRows * 4) {
      T* at = panel + r * kPanelPitch<T> + c;
      T quad[4] = {};
      if (kAdd) load4(quad, at);
#pragma unroll
      for (int e = 0; e < 4; ++e) quad[e] += value(r, c + e);
      store4(at, quad);
    }
  } else {
    const int c = threadIdx.x % kPanelColumns;
#pragma unroll
    for (int r = threadIdx.x / kPanelColumns; r < kPanelRows; r += kPanelThreads / kPanelColumns) {
      T& at = panel[r * kPanelPitch<T> + c];
      at = (kAdd ? at : T(0)) + value(r, c);
    }
  }
}

/// The 4 x 4 elements of a 64 x 64 result that belong to this thread begin at (row, column). A warp has 16 x 32.
struct MicroTile {
  int row, column;
  __device__ MicroTile() {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    row = 4 * (warp / 2 * 4 + morton_row(lane % 16));
    column = 4 * (warp % 2 * 8 + lane / 16 * 4 + morton_column(lane % 16));
  }
};

/// sum += A' B for this thread's micro tile, A and B being panels of which only `rows` rows count.
template <class T>
__device__ __forceinline__ void multiply_panels(T (&sum)[4][4], const MicroTile& own, const T* A, const T* B,
                                                int rows) {
#pragma unroll 4
  for (int k = 0; k < rows; ++k) {
    T a[4], b[4];
    load4(a, A + k * kPanelPitch<T> + own.row);
    load4(b, B + k * kPanelPitch<T> + own.column);
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[r][c] += a[r] * b[c];
  }
}

/// True where neighbouring positions lie nearer to each other than neighbouring channels.
template <class T> __device__ __forceinline__ bool along_positions(const FeatureMaps<T>& x) {
  const int64_t w = x.stride_w < 0 ? -x.stride_w : x.stride_w, c = x.stride_c < 0 ? -x.stride_c : x.stride_c;
  return w <= c;
}

/// Pools a chunk of positions for the channels of tiles I and J, I <= J, 64 each: a 64 x 64 part of M2.
template <class X> class PoolEngine {
  using T = Compute<X>;
  static constexpr int kParts = kPanelThreads / kPanelColumns;

 public:
  static constexpr int64_t kSharedBytes =
      kPanelRows * sizeof(int64_t) + 2 * (kPanelSize<T> + (kParts + 2) * kPanelColumns) * sizeof(T);

  __device__ PoolEngine(const FeatureMaps<const X>& x, int64_t sample, int64_t I, int64_t J)
      : x_(x), sample_(x.sample(sample)), first_row_(I * kPanelColumns), first_column_(J * kPanelColumns) {
    if (part() == 0)
      for (int side = 0; side < sides(); ++side)
        mean(side)[column()] = holds(side, column()) ? to_number(sample_[channel(side, column()) * x_.stride_c]) : T(0);
  }

  __device__ int64_t tile_positions() const { return kPanelRows; }

  __device__ void load_tile(int64_t m, int64_t n) const {  // panels: [position, channel]
    if (threadIdx.x < n) offsets()[threadIdx.x] = x_.offset(m + threadIdx.x);
    __syncthreads();  // and nobody reads the panels any more
    for (int side = 0; side < sides(); ++side)
      fill_panel(panel(side), along_positions(x_), [&](int r, int c) {
        return r < n && holds(side, c)
                   ? to_number(sample_[offsets()[r] + channel(side, c) * x_.stride_c]) - mean(side)[c]
                   : T(0);
      });
    __syncthreads();
    for (int side = 0; side < sides(); ++side) {
      T sum = 0;
#pragma unroll
      for (int r = part(); r < kPanelRows; r += kParts) sum += panel(side)[r * kPanelPitch<T> + column()];
      part_sum(side, part())[column()] = sum;
    }
    __syncthreads();
    if (part() == 0)
      for (int side = 0; side < sides(); ++side) {
        T sum = 0;
        for (int p = 0; p < kParts; ++p) sum += part_sum(side, p)[column()];
        delta(side)[column()] = sum / T(n);
      }
    __syncthreads();
  }

  __device__ void center_tile(int64_t n) const {
    for (int side = 0; side < sides(); ++side)
      for (int r = part(); r < n; r += kParts) panel(side)[r * kPanelPitch<T> + column()] -= delta(side)[column()];
    __syncthreads();
    move_mean(1.0);
    if (part() == 0)
      for (int side = 0; side < sides(); ++side) delta(side)[column()] = 0;
    __syncthreads();
  }

  __device__ void accumulate(int64_t n, double weight) {
    T sum[4][4] = {}, rows[4], columns[4];
    multiply_panels(sum, own_, panel(0), panel(sides() - 1), int(n));
    load4(rows, delta(0) + own_.row);
    load4(columns, delta(sides() - 1) + own_.column);
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) moment_[r][c] += sum[r][c] - T(weight) * rows[r] * columns[c];
  }

  __device__ void move_mean(double share) const {
    if (part() == 0)
      for (int side = 0; side < sides(); ++side) mean(side)[column()] += T(share) * delta(side)[column()];
  }

  /// Mean [C] and M2 [C, C] of the chunk; of M2 the upper triangle.
  __device__ void write(T* chunk_mean, T* chunk_moment) const {
    const int64_t C = x_.channels;
    if (sides() == 1 && part() == 0 && holds(0, column())) chunk_mean[channel(0, column())] = mean(0)[column()];
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int64_t i = channel(0, own_.row + r), j = channel(1, own_.column + c);
        if (i <= j && j < C) chunk_moment[i * C + j] = moment_[r][c];
      }
  }

 private:
  /// Where I = J both operands are one panel.
  __device__ int sides() const { return first_row_ == first_column_ ? 1 : 2; }
  __device__ int64_t channel(int side, int c) const { return (side == 0 ? first_row_ : first_column_) + c; }
  __device__ bool holds(int side, int c) const { return channel(side, c) < x_.channels; }

  /// Each channel of a panel has kParts threads, which share its positions; the first one has its mean.
  __device__ static int column() { return threadIdx.x % kPanelColumns; }
  __device__ static int part() { return threadIdx.x / kPanelColumns; }

  __device__ static int64_t* offsets() { return shared_memory<int64_t>(); }  // of the tile's positions in their sample
  __device__ static T* panel(int side) { return reinterpret_cast<T*>(offsets() + kPanelRows) + side * kPanelSize<T>; }
  __device__ static T* part_sum(int side, int p) { return panel(2) + (side * kParts + p) * kPanelColumns; }
  __device__ static T* mean(int side) { return part_sum(2, side); }
  __device__ static T* delta(int side) { return part_sum(2, 2 + side); }

  FeatureMaps<const X> x_;
  const X* sample_;
  int64_t first_row_, first_column_;
  MicroTile own_;
  T moment_[4][4] = {};
};

/// Merges the chunks of one sample for tile (I, J) of Sigma, I <= J, 32 x 32. Each thread has four of a column.
template <class X> class MergeEngine {
  using T = Compute<X>;
  static constexpr int kSide = 32, kRows = 4, kStep = kSide / kRows, kPitch = kSide + 1;

 public:
  static constexpr int kThreads = kSide * kStep, kTile = kSide;
  static constexpr int64_t kSharedBytes = kSide * kPitch * sizeof(T);

  __device__ MergeEngine(const PoolTask<X>& task, int64_t sample, int64_t I, int64_t J)
      : C_(task.x.channels),
        partial_mean_(task.partial_mean + sample * task.chunks.count * C_),
        partial_moment_(task.partial_moment + sample * task.chunks.count * C_ * C_),
        mean_(task.mean + sample * C_),
        sigma_(task.sigma + sample * C_ * C_),
        first_row_(I * kSide),
        first_column_(J * kSide) {}

  __device__ void take(int64_t chunk) {
    column_mean_ = j() < C_ ? partial_mean_[chunk * C_ + j()] : T(0);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      row_mean_[r] = i(r) < C_ ? partial_mean_[chunk * C_ + i(r)] : T(0);
      moment_[r] = upper(r) ? partial_moment_[(chunk * C_ + i(r)) * C_ + j()] : T(0);
    }
  }

  __device__ void merge(int64_t chunk, const ChanWeights& weights) {
    MergeEngine other = *this;
    other.take(chunk);
    const T column_delta = other.column_mean_ - column_mean_;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const T row_delta = other.row_mean_[r] - row_mean_[r];
      moment_[r] += other.moment_[r] + T(weights.moment) * row_delta * column_delta;
      row_mean_[r] += T(weights.mean) * row_delta;
    }
    column_mean_ += T(weights.mean) * column_delta;
  }

  __device__ void finish(double alpha) const {
    const bool in_place = partial_mean_ == mean_;  // of a single chunk
    if (!in_place && first_row_ == first_column_ && row() == 0 && j() < C_) mean_[j()] = column_mean_;
    T* transposed = shared_memory<T>();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const T value = T(alpha) * moment_[r];
      if (upper(r)) sigma_[i(r) * C_ + j()] = value;
      transposed[column() * kPitch + row() + r * kStep] = value;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // element (j', i') below the diagonal, i' along the threads
      const int64_t row_below = first_column_ + row() + r * kStep, column_below = first_row_ + column();
      if (column_below < row_below && row_below < C_)
        sigma_[row_below * C_ + column_below] = transposed[(row() + r * kStep) * kPitch + column()];
    }
  }

 private:
  __device__ static int column() { return threadIdx.x % kSide; }
  __device__ static int row() { return threadIdx.x / kSide; }
  __device__ int64_t i(int r) const { return first_row_ + row() + r * kStep; }
  __device__ int64_t j() const { return first_column_ + column(); }
  __device__ bool upper(int r) const { return i(r) <= j() && j() < C_; }

  int64_t C_;
  T *partial_mean_, *partial_moment_, *mean_, *sigma_;
  int64_t first_row_, first_column_;
  T row_mean_[kRows], column_mean_, moment_[kRows];
};

/// dX = W (X - mu 1^T) for the 64 channels of tile I, 64 positions at a time.
template <class X> class PoolBackwardEngine {
  using T = Compute<X>;

 public:
  static constexpr int64_t kSharedBytes = 2 * (kPanelColumns * sizeof(int64_t) + kPanelSize<T> * sizeof(T));

  __device__ PoolBackwardEngine(const PoolBackwardTask<X>& task, int64_t sample, int64_t I)
      : x_(task.x),
        dx_(task.grad_x),
        sample_(x_.sample(sample)),
        gradient_(dx_.sample(sample)),
        mean_(task.mean + sample * x_.channels),
        grad_sigma_(task.grad_sigma + sample * x_.channels * x_.channels),
        first_channel_(I * kPanelColumns) {}

  __device__ int64_t tile_positions() const { return kPanelColumns; }

  /// All channels of a tile are more than shared memory holds. Here it is noted where its positions lie, and
  /// store_gradient loads it panel by panel.
  __device__ void load_centered(int64_t m, int64_t n) const {
    if (threadIdx.x < n) {
      offsets()[threadIdx.x] = x_.offset(m + threadIdx.x);
      gradient_offsets()[threadIdx.x] = dx_.offset(m + threadIdx.x);
    }
    __syncthreads();
  }

  __device__ void store_gradient(int64_t, int64_t n) const {
    const int64_t C = x_.channels;
    T sum[4][4] = {};
    for (int64_t k0 = 0; k0 < C; k0 += kPanelRows) {
      const int rows = int(C - k0 < kPanelRows ? C - k0 : kPanelRows);
      load_panels(n, k0, rows);
      multiply_panels(sum, own_, weight(), tile(), rows);
      __syncthreads();
    }
    const T share = T(1) / T(x_.positions());
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[r][c] *= share;
    store(sum, n);
  }

 private:
  /// Rows k0, k0 + 1, ... of dSigma + dSigma^T, its columns being this tile's channels, and of X - mu 1^T.
  __device__ __forceinline__ void load_panels(int64_t n, int64_t k0, int rows) const {
    const int64_t C = x_.channels;
    fill_panel(weight(), false, [&](int k, int c) {
      return k < rows && first_channel_ + c < C ? grad_sigma_[(k0 + k) * C + first_channel_ + c] : T(0);
    });
    fill_panel(tile(), !along_positions(x_), [&](int k, int c) {
      return k < rows && c < n ? to_number(sample_[offsets()[c] + (k0 + k) * x_.stride_c]) - mean_[k0 + k] : T(0);
    });
    __syncthreads();
    fill_panel<true>(weight(), true, [&](int k, int c) {
      return k < rows && first_channel_ + c < C ? grad_sigma_[(first_channel_ + c) * C + k0 + k] : T(0);
    });
    __syncthreads();
  }

  /// Through shared memory, 64 x 64 in the place of the panels, in the order in which dX lies in memory.
  __device__ __forceinline__ void store(const T (&gradient)[4][4], int64_t n) const {
    T* result = weight();
    const bool positions_in_rows = !along_positions(dx_);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (positions_in_rows) {
        const T column[4] = {gradient[0][r], gradient[1][r], gradient[2][r], gradient[3][r]};
        store4(result + (own_.column + r) * kPanelPitch<T> + own_.row, column);
      } else {
        store4(result + (own_.row + r) * kPanelPitch<T> + own_.column, gradient[r]);
      }
    }
    __syncthreads();
    const int column = threadIdx.x % kPanelColumns;
    for (int row = threadIdx.x / kPanelColumns; row < 2 * kPanelRows; row += kPanelThreads / kPanelColumns) {
      const int position = positions_in_rows ? row : column;
      const int64_t channel = first_channel_ + (positions_in_rows ? column : row);
      if (position < n && channel < dx_.channels)
        store_number(&gradient_[gradient_offsets()[position] + channel * dx_.stride_c],
                     result[row * kPanelPitch<T> + column]);
    }
    __syncthreads();
  }

  /// Of the tile's positions in their sample of x and of dX.
  __device__ static int64_t* offsets() { return shared_memory<int64_t>(); }
  __device__ static int64_t* gradient_offsets() { return offsets() + kPanelColumns; }
  /// [channel k, channel of tile I] and [channel k, position]
  __device__ static T* weight() { return reinterpret_cast<T*>(offsets() + 2 * kPanelColumns); }
  __device__ static T* tile() { return weight() + kPanelSize<T>; }

  FeatureMaps<const X> x_;
  FeatureMaps<X> dx_;
  const X* sample_;
  X* gradient_;
  const T *mean_, *grad_sigma_;
  int64_t first_channel_;
  MicroTile own_;
};

}  // namespace isqrt::cuda
