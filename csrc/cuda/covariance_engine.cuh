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
