// The Engines of covariance.h on one thread block: 64 x 64 results on tensor cores, whose operands pass through panels
// in shared memory. While one panel is multiplied, the next is on its way.
#pragma once
#include "../tasks.h"
#include "panel.cuh"

namespace isqrt::cuda {

/// Feature maps of one sample, as panels read them: along positions where kPositionsInRows, else along channels.
template <class X, bool kPositionsInRows> struct MapsReader {
  FeatureMaps<const X> x;
  const X* sample;
  bool packets;  // of 16 bytes may be read: they are aligned, and what they hold follows each other in memory

  __device__ MapsReader(const FeatureMaps<const X>& maps, int64_t number, int64_t first_position)
      : x(maps), sample(maps.sample(number)) {
    constexpr int64_t kPacket = kPacketBytes / sizeof(X);
    const bool contiguous = kPositionsInRows ? x.height == 1 && x.stride_w == 1 : x.stride_c == 1;
    const int64_t between_rows = kPositionsInRows ? x.stride_c | first_position : x.stride_w | x.stride_h;
    packets = contiguous && (between_rows | x.stride_b) % kPacket == 0 &&
              reinterpret_cast<uintptr_t>(x.data) % kPacketBytes == 0;
  }

  /// Channels from `channel` on and n positions from m on.
  template <bool kTermsInRows>
  __device__ __forceinline__ void load(const Panel<X, kTermsInRows>& panel, int64_t channel, int64_t m, int n) const {
    using Target = Panel<X, kTermsInRows>;
    constexpr int kChannels = kPositionsInRows ? Target::kRows : Target::kColumns;
    const int channels = int(x.channels - channel < kChannels ? x.channels - channel : kChannels);
    const X* first = sample + channel * x.stride_c;
    if constexpr (kPositionsInRows) {
      if (packets)
        panel.load_packets([&](int c) { return first + c * x.stride_c + m; }, channels, n);
      else
        panel.load_each([&](int c, int p) { return first[c * x.stride_c + x.offset(m + p)]; }, channels, n);
    } else {
      if (packets)
        panel.load_packets([&](int p) { return first + x.offset(m + p); }, n, channels);
      else
        panel.load_each([&](int p, int c) { return first[c * x.stride_c + x.offset(m + p)]; }, n, channels);
    }
  }
};

/// Pools a chunk of positions for the channels of tiles I and J, I <= J, 64 each: a 64 x 64 part of M2. The positions
/// are the terms; they are contiguous where kPositionsInRows, else the channels are.
template <class X, bool kPositionsInRows> class PoolEngine {
  using T = Compute<X>;
  using Maps = Panel<X, kPositionsInRows>;
  static constexpr int kParts = kPanelThreads / kPanelVectors;

 public:
  using Weight = T;
  static constexpr int kTilePositions = kPanelTerms<X>;

  /// Two stages of one panel where I = J, else of two.
  static ISQRT_FN constexpr int64_t shared_bytes(bool diagonal) {
    return (diagonal ? 2 : 4) * Maps::kBytes + 4 * kPanelVectors * int(sizeof(T));
  }

  __device__ PoolEngine(const FeatureMaps<const X>& x, int64_t sample, int64_t I, int64_t J, int64_t first,
                        int64_t last)
      : maps_(x, sample, first), first_row_(I * kPanelVectors), first_column_(J * kPanelVectors), last_(last) {
    if (part() == 0)
      for (int side = 0; side < sides(); ++side)
        mean(side)[vector()] =
            holds(side, vector()) ? to_number(maps_.sample[channel(side, vector()) * maps_.x.stride_c]) : T(0);
    start_loading(first);
  }

  __device__ int64_t tile_positions() const { return kTilePositions; }

  __device__ void load_tile(int64_t m, int64_t n) {
    copy_async_wait<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before it any more
    stage_ ^= 1;
    if (m + kTilePositions < last_) start_loading(m + kTilePositions);
    for (int side = 0; side < sides(); ++side) {
      const Maps tile = panel(side, stage_);
      const T shift = mean(side)[vector()];
      T sum = 0;
      for (int term = part(); term < n; term += kParts) sum += to_number(tile.at(vector(), term)) - shift;
      for (int distance = 1; distance < kParts; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (part() == 0) delta(side)[vector()] = sum / T(n);
    }
    __syncthreads();
  }

  __device__ void center_tile(int64_t) const {
    move_mean(1);
    if (part() == 0)
      for (int side = 0; side < sides(); ++side) delta(side)[vector()] = 0;
    __syncthreads();
  }

  /// What the tile holds is taken relative to the mean on its way to the product.
  __device__ void accumulate(int64_t n, T weight) {
    Accumulator<T> sum[2];
    T means[3][2];
#pragma unroll
    for (int v = 0; v < 3; ++v)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        means[v][h] = v == 0 ? mean(0)[own_.row + lane_.group + 8 * h]
                             : mean(sides() - 1)[own_.column + kTile * (v - 1) + lane_.group + 8 * h];
    const int whole = int(n) / kTerms * kTerms;
#pragma unroll 1
    for (int term = 0; term < whole; term += kTerms) multiply<false>(sum, means, term, int(n));
    if (whole < n) multiply<true>(sum, means, whole, int(n));
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (!upper(v)) continue;
      WarpTile<T> total = sum[v].total();
      total.for_each([&](T& a, int r, int c) {
        a -= weight * delta(0)[own_.row + r] * delta(sides() - 1)[own_.column + kTile * v + c];
      });
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int e = 0; e < 4; ++e) moment_[v].sum[h][e] += total.sum[h][e];
    }
    __syncthreads();  // before the means move
  }

  __device__ void move_mean(T share) const {
    if (part() == 0)
      for (int side = 0; side < sides(); ++side) mean(side)[vector()] += share * delta(side)[vector()];
  }

  /// Mean [C] and M2 [C, C] of the chunk; of M2 the upper triangle.
  __device__ void write(T* chunk_mean, T* chunk_moment) {
    const int64_t C = maps_.x.channels;
    if (sides() == 1 && part() == 0 && holds(0, vector())) chunk_mean[channel(0, vector())] = mean(0)[vector()];
#pragma unroll
    for (int v = 0; v < 2; ++v)
      moment_[v].for_each([&](T a, int r, int c) {
        const int64_t i = channel(0, own_.row + r), j = channel(1, own_.column + kTile * v + c);
        if (i <= j && j < C) chunk_moment[i * C + j] = a;
      });
  }

 private:
  /// Where I = J both operands are one panel.
  __device__ int sides() const { return first_row_ == first_column_ ? 1 : 2; }
  __device__ int64_t channel(int side, int v) const { return (side == 0 ? first_row_ : first_column_) + v; }
  __device__ bool holds(int side, int v) const { return channel(side, v) < maps_.x.channels; }
  /// Whether anything of this warp's tile v belongs to the upper triangle.
  __device__ bool upper(int v) const { return sides() == 2 || own_.row <= own_.column + kTile * v; }

  /// Each channel of a panel has kParts neighbouring threads, which share its positions; the first one has its mean.
  __device__ static int vector() { return threadIdx.x / kParts; }
  __device__ static int part() { return threadIdx.x % kParts; }

  __device__ void start_loading(int64_t m) const {
    const int n = int(last_ - m < kTilePositions ? last_ - m : kTilePositions);
    for (int side = 0; side < sides(); ++side) maps_.load(panel(side, stage_ ^ 1), channel(side, 0), m, n);
    copy_async_commit();
  }

  /// sum += tile tile^T, 8 positions of it; where kTail is set, of those only the ones before n.
  template <bool kTail>
  __device__ __forceinline__ void multiply(Accumulator<T> (&sum)[2], const T (&means)[3][2], int term, int n) const {
    using Factor = typename Accumulator<T>::Factor;
    if (!upper(1)) return;
    const auto load = [&](int side, int vector, const T(&mean)[2]) {
      const Maps tile = panel(side, stage_);
      return Factor(operand<T>(vector, term, [&](int v, int t, int h, int) {
        return kTail && t >= n ? T(0) : to_number(tile.at(v, t)) - mean[h];
      }));
    };
    const Factor rows = load(0, own_.row, means[0]);
#pragma unroll
    for (int v = 0; v < 2; ++v)
      if (upper(v)) sum[v].multiply_add(rows, load(sides() - 1, own_.column + kTile * v, means[1 + v]));
  }

  __device__ Maps panel(int side, int stage) const {
    return {reinterpret_cast<X*>(shared_memory<char>() + (stage * sides() + side) * Maps::kBytes)};
  }
  __device__ T* vectors(int number) const {
    return reinterpret_cast<T*>(shared_memory<char>() + 2 * sides() * Maps::kBytes) + number * kPanelVectors;
  }
  __device__ T* mean(int side) const { return vectors(side); }
  __device__ T* delta(int side) const { return vectors(2 + side); }

  MapsReader<X, kPositionsInRows> maps_;
  int64_t first_row_, first_column_, last_;
  int stage_ = 1;  // of the tile before the first one
  Lane lane_;
  WarpPlace own_;
  WarpTile<T> moment_[2];
};

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

/// dX = W (X - mu 1^T), W = 2 dSigma / M, for the 64 channels of tile I, 64 positions at a time. The terms are
/// channels; they are contiguous unless kPositionsInRows.
template <class X, bool kPositionsInRows> class PoolBackwardEngine {
  using T = Compute<X>;
  using Maps = Panel<X, !kPositionsInRows>;
  using Weights = Panel<T, true>;
  static constexpr int kPanelChannels = kPanelTerms<T>;
  static_assert(kPanelTerms<X> == kPanelTerms<T>);

 public:
  static constexpr int64_t kSharedBytes = 2 * (Maps::kBytes + Weights::kBytes + kPanelChannels * int(sizeof(T)));

  __device__ PoolBackwardEngine(const PoolBackwardTask<X>& task, int64_t sample, int64_t I, int64_t first, int64_t last)
      : maps_(task.x, sample, first),
        dx_(task.grad_x),
        gradient_(dx_.sample(sample)),
        mean_(task.mean + sample * dx_.channels),
        grad_sigma_(task.grad_sigma + sample * dx_.channels * dx_.channels),
        scale_(task.scale ? task.scale[sample] : T(1)),
        first_channel_(I * kPanelVectors),
        last_(last) {
    start_loading(first, 0);
  }

  __device__ int64_t tile_positions() const { return kPanelVectors; }

  /// All channels of a tile are more than shared memory holds: store_gradient loads it panel by panel.
  __device__ void load_centered(int64_t, int64_t) const {}

  __device__ void store_gradient(int64_t m, int64_t n) {
    const int64_t C = dx_.channels;
    Accumulator<T> sum[2];
    for (int64_t k = 0; k < C; k += kPanelChannels) {
      copy_async_wait<0>();
      __syncthreads();  // these panels are there, and nobody reads the ones before them any more
      stage_ ^= 1;
      if (k + kPanelChannels < C)
        start_loading(m, k + kPanelChannels);
      else if (m + kPanelVectors < last_)
        start_loading(m + kPanelVectors, 0);
      const int terms = int(C - k < kPanelChannels ? C - k : kPanelChannels);
#pragma unroll 1
      for (int term = 0; term < terms; term += kTerms) multiply(sum, term);
    }
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      WarpTile<T> total = sum[v].total();
      store(total, m, int(n), v);
    }
  }

 private:
  __device__ void start_loading(int64_t m, int64_t k) const {
    const int stage = stage_ ^ 1;
    const int64_t C = dx_.channels;
    const int n = int(last_ - m < kPanelVectors ? last_ - m : kPanelVectors);
    maps_.load(maps(stage), k, m, n);
    const int rows = int(C - first_channel_ < kPanelVectors ? C - first_channel_ : kPanelVectors);
    const int columns = int(C - k < kPanelChannels ? C - k : kPanelChannels);
    const T* W = grad_sigma_ + first_channel_ * C + k;
    if (C % Weights::kPacket == 0)
      weights(stage).load_packets([&](int r) { return W + r * C; }, rows, columns);
    else
      weights(stage).load_each([&](int r, int c) { return W[r * C + c]; }, rows, columns);
    if (threadIdx.x < kPanelChannels)
      mean(stage)[threadIdx.x] = k + threadIdx.x < C ? scale_ * mean_[k + threadIdx.x] : T(0);
    copy_async_commit();
  }

  /// sum += W s (X - mu 1^T), 8 channels of it.
  __device__ __forceinline__ void multiply(Accumulator<T> (&sum)[2], int term) const {
    using Factor = typename Accumulator<T>::Factor;
    const Weights W = weights(stage_);
    const Maps X_ = maps(stage_);
    const T means[2] = {mean(stage_)[term + lane_.quad], mean(stage_)[term + lane_.quad + 4]};
    const Factor rows = Factor(operand<T>(own_.row, term, [&](int v, int t, int, int) { return W.at(v, t); }));
#pragma unroll
    for (int v = 0; v < 2; ++v)
      sum[v].multiply_add(rows, Factor(operand<T>(own_.column + kTile * v, term, [&](int p, int t, int, int s) {
                            return scale_ * to_number(X_.at(p, t)) - means[s];
                          })));
  }

  __device__ __forceinline__ void store(WarpTile<T>& total, int64_t m, int n, int v) const {
    const T share = T(2) / T(dx_.positions());
    const auto put = [&](const auto& offset) {
      total.for_each([&](T a, int r, int c) {
        const int position = own_.column + kTile * v + c;
        const int64_t channel = first_channel_ + own_.row + r;
        if (position < n && channel < dx_.channels)
          store_number(&gradient_[offset(m + position) + channel * dx_.stride_c], share * a);
      });
    };
    // Apart, for the divisions of the other case are many instructions to be fetched.
    if (dx_.height == 1)
      put([&](int64_t position) { return position * dx_.stride_w; });
    else
      put([&](int64_t position) { return dx_.offset(position); });
  }

  __device__ static Maps maps(int stage) {
    return {reinterpret_cast<X*>(shared_memory<char>() + stage * Maps::kBytes)};
  }
  __device__ static Weights weights(int stage) {
    return {reinterpret_cast<T*>(shared_memory<char>() + 2 * Maps::kBytes + stage * Weights::kBytes)};
  }
  __device__ static T* mean(int stage) {
    return reinterpret_cast<T*>(shared_memory<char>() + 2 * (Maps::kBytes + Weights::kBytes)) + stage * kPanelChannels;
  }

  MapsReader<X, kPositionsInRows> maps_;
  FeatureMaps<X> dx_;
  X* gradient_;
  const T *mean_, *grad_sigma_;
  T scale_;
  int64_t first_channel_, last_;
  int stage_ = 1;  // of the panels before the first ones
  Lane lane_;
  WarpPlace own_;
};

}  // namespace isqrt::cuda
