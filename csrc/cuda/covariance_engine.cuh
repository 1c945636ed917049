// The Engines of covariance.h on one thread block: products on tensor cores, of panels in shared memory.
#pragma once
#include "../tasks.h"
#include "panel.cuh"

namespace isqrt::cuda {

/// Whether the numbers of all chunks can be read and written in packets: they follow each other in memory, along
/// positions or along channels, and are aligned.
template <bool kPositionsInRows, class X> bool in_packets(const FeatureMaps<X>& x, const Chunks& chunks) {
  constexpr int64_t kEach = kPacketTerms<Compute<std::remove_const_t<X>>>;
  const bool contiguous = kPositionsInRows ? x.height == 1 && x.stride_w == 1 : x.stride_c == 1;
  const int64_t steps = kPositionsInRows ? x.stride_c | chunks.positions | (chunks.count > 1 ? chunks.length : 0)
                                         : x.stride_w | x.stride_h | x.channels;
  return contiguous && (steps | x.stride_b) % kEach == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % sizeof(Packet<std::remove_const_t<X>, int(kEach)>) == 0;
}

/// So many numbers from `first` on, or a panel full of them.
template <int kMost> __device__ inline int at_most(int64_t number, int64_t first) {
  return number - first < kMost ? int(number - first) : kMost;
}

/// Feature maps of one sample, as panels take them: along positions where kPositionsInRows, else along channels.
template <class X, bool kPositionsInRows> struct MapsReader {
  const FeatureMaps<const X>& x;
  const X* sample;
  bool packets;

  __device__ MapsReader(const FeatureMaps<const X>& maps, int64_t number, bool packets)
      : x(maps), sample(maps.sample(number)), packets(packets) {}

  /// Channels from `channel` on and n positions from m on.
  template <class Maps>
  __device__ __forceinline__ void load(const Maps& panel, int64_t channel, int64_t m, int n) const {
    const int channels = at_most<kPanelVectors>(x.channels, channel);
    const X* first = sample + channel * x.stride_c;
    const auto position = [&](int p) { return first + x.offset(m + p); };
    if (!packets)
      panel.load_each(position, x.stride_c, channels, n);
    else if constexpr (kPositionsInRows)
      panel.load_packets(first + m, x.stride_c, channels, n);
    else
      panel.load_columns(position, channels, n);
  }
};

/// Pools a chunk of positions for the channels of tiles I and J, I <= J, 64 each: a 64 x 64 part of M2. The positions
/// are the terms; they are contiguous where kPositionsInRows, else the channels are.
///
/// A tile is relative to its own mean always, for all of it passes through registers. Its M2 relative to the mean of
/// the positions before it, as Chan's update takes it, is n delta delta^T more. M2 is kept in multiples of powers of
/// two for each channel, those of the largest numbers so far.
template <class X, bool kPositionsInRows> class PoolEngine {
  using T = Compute<X>;
  using Maps = Panel<X, T, kPanelTerms<T>>;
  /// Of a side's channels, after the panels.
  enum Vector { kOrigin, kMean, kDelta, kMost, kChange, kStep, kDown, kFirst, kUp, kCenter, kVectors };

 public:
  using Weight = T;

  /// One panel where I = J, else two.
  static ISQRT_FN constexpr int64_t shared_bytes(bool diagonal) {
    return (diagonal ? 1 : 2) * (Maps::kBytes + kVectors * kPanelVectors * int(sizeof(T)));
  }

  __device__ PoolEngine(const FeatureMaps<const X>& x, int64_t sample, int I, int J, int64_t first, bool packets)
      : maps_(x, sample, packets),
        first_row_(I * kPanelVectors),
        first_column_(J * kPanelVectors),
        first_(first),
        own_(I == J) {}

  __device__ int64_t tile_positions() const { return kPanelTerms<T>; }

  __device__ void load_tile(int64_t m, int64_t n) const {
    if (m != first_) __syncthreads();  // nobody reads the tile before this one any more
#pragma unroll 1
    for (int side = 0; side < sides(); ++side)
      maps_.load(panel(side), side == 0 ? first_row_ : first_column_, m, int(n));
#pragma unroll 1
    for (int side = 0; side < sides(); ++side) center(side, m, int(n));
    __syncthreads();
  }

  /// It is: move_mean() will move the mean to that of the first tile, and its delta weighs nothing in accumulate().
  __device__ void center_tile(int64_t) const {}

  __device__ void accumulate(int64_t n, T weight) {
    const T rest = T(int(n)) - weight;
    if (rest != 0) scale_moment(rest);
    const int steps = int(n + kStepTerms - 1) / kStepTerms;
    const int left = Maps::template place_of<Maps::kLeft>(own_.row),
              right = Maps::template place_of<Maps::kRight>(own_.column);
    if (!upper(1)) return;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const Maps columns = panel(last());
      const Factor<T> rows = panel(0).template factor<Maps::kLeft>(left, step),
                      both[2] = {columns.template factor<Maps::kRight>(right, step),
                                 columns.template factor<Maps::kRight>(right, step, 1)};
      WarpTile<T> terms[2];  // few, for there may be many of them in a chunk, and what is lost of each adds up
      multiply_add(terms, rows, both, upper(0) ? 0 : 1);
#pragma unroll
      for (int v = 0; v < 2; ++v) moment_[v].combine(terms[v], [](T& a, T b) { a += b; });
    }
  }

  /// Of a channel the threads that look at it know the mean.
  __device__ void move_mean(T share) const {
#pragma unroll 1
    for (int side = 0; side < sides(); ++side)
      if (is_first()) vector(kMean, side)[own()] += share * vector(kDelta, side)[own()];
  }

  /// Mean [C] and alpha M2 [C, C] of the chunk; of M2 the upper triangle, or both. Below it anything may be written.
  __device__ void write(T* chunk_mean, T* chunk_moment, T alpha, bool both) {
    const int C = int(maps_.x.channels);
    if (sides() == 1 && is_first() && first_row_ + own() < C) chunk_mean[first_row_ + own()] = vector(kMean, 0)[own()];
#pragma unroll
    for (int v = 0; v < 2; ++v)
      for_each_four(moment_[v], [&](const T(&a)[4], int at_row, int at_column) {
        const int r = own_.row + at_row, c = own_.column + kTile * v + at_column;
        const int i = first_row_ + r, j = first_column_ + c;
        if (i >= C || j >= C || !upper(v)) return;
        const T factor = alpha * vector(kDown, 0)[r];
        T result[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) result[e] = factor * vector(kDown, last())[c + e] * a[e];
        T* to = chunk_moment + int64_t(i) * C + j;
        if (C % 4 == 0 && !both) return store_packet(to, result);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (j + e >= C || (both && i > j + e)) continue;
          to[e] = result[e];
          if (both) chunk_moment[int64_t(j + e) * C + i] = result[e];
        }
      });
  }

 private:
  /// Where I = J both operands are one panel.
  __device__ int sides() const { return first_row_ == first_column_ ? 1 : 2; }
  __device__ int last() const { return sides() - 1; }

  /// Whether anything of this warp's tile v belongs to the upper triangle.
  __device__ bool upper(int v) const { return sides() == 2 || own_.row <= own_.column + kTile * v; }

  /// Where a warp's two tiles begin. Of the 64 x 64 results on the diagonal some have one or none; a scheduler has
  /// those of every fourth warp, two or three of the ten in this order.
  struct Place {
    int row, column;
    __device__ explicit Place(bool diagonal) {
      constexpr unsigned kOrder = 0x64725310;
      const unsigned warp = threadIdx.x / kWarp, place = diagonal ? kOrder >> 4 * warp & 7 : warp;
      row = int(place / 2) * kTile;
      column = int(place % 2) * 2 * kTile;
    }
  };

  /// Takes M2 relative to this tile's scales, and adds what the distance between the means adds.
  __device__ __forceinline__ void scale_moment(T rest) {
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int c = own_.column + kTile * v + of_half(half, 2 * lane_.quad + odd);
          const T change = vector(kChange, last())[c], step = rest * vector(kStep, last())[c];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int r = own_.row + of_half(h, lane_.group);
            T& a = moment_[v].sum[half][2 * h + odd];
            a = change * vector(kChange, 0)[r] * a + step * vector(kStep, 0)[r];
          }
        }
  }

  /// The channel that this thread looks at, and whether it is the first one of those that do.
  __device__ static int own() { return Maps::own_vector(); }
  __device__ static bool is_first() { return threadIdx.x % kVectorThreads == 0; }

  /// Numbers are taken relative to the tile's first position first: equal ones differ by nothing, and the mean of
  /// differences is more exact than that of numbers.
  __device__ __forceinline__ void center(int side, int64_t m, int n) const {
    const int channel = (side == 0 ? first_row_ : first_column_) + own();
    T origin = 0, before = 0;
    if (is_first()) {
      if (m != first_)
        origin = vector(kOrigin, side)[own()], before = vector(kMean, side)[own()];
      else if (channel < maps_.x.channels)
        origin = to_number(maps_.sample[channel * maps_.x.stride_c]);
    }
    const Maps tile = panel(side);
    tile.wait();
    const T first = tile.first();
    tile.fill(n);
    T sums[4] = {}, most = 0;
    tile.look(n, [&](T a, int, int e) {
      const T distance = a - first;
      sums[e] += distance;
      most = fmax(most, fabs(distance));
    });
    T sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma unroll
    for (int other = 1; other < kVectorThreads; other *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, other);
      most = fmax(most, __shfl_xor_sync(0xffffffffu, most, other));
    }
    if (is_first()) {
      const T mean = sum / T(n), delta = (first - origin - before) + mean;
      most *= 2;  // no distance from the mean is larger than that
      if (m != first_) most = fmax(fmax(most, fabs(delta)), vector(kMost, side)[own()]);
      const Scale<T> scale(most);
      vector(kChange, side)[own()] = m != first_ ? vector(kDown, side)[own()] * scale.up : T(1);
      vector(kOrigin, side)[own()] = origin;
      vector(kMean, side)[own()] = before;
      vector(kDelta, side)[own()] = delta;
      vector(kStep, side)[own()] = delta * scale.up;
      vector(kMost, side)[own()] = most;
      vector(kDown, side)[own()] = scale.down;
      vector(kFirst, side)[own()] = first;
      vector(kUp, side)[own()] = scale.up;
      vector(kCenter, side)[own()] = mean * scale.up;
    }
    tile.convert([&](int c) {
      const T* of_channel = vector(kFirst, side) + c;
      const T first = of_channel[0], up = of_channel[kPanelVectors], center = of_channel[2 * kPanelVectors];
      return [=](T a, int) { return (a - first) * up - center; };
    });
    tile.clear(n);
  }

  __device__ static Maps panel(int side) { return {shared_begin() + side * Maps::kBytes}; }
  __device__ T* vector(Vector which, int side) const {
    return reinterpret_cast<T*>(shared_memory<char>() + sides() * Maps::kBytes) +
           (kVectors * side + which) * kPanelVectors;
  }

  MapsReader<X, kPositionsInRows> maps_;
  int first_row_, first_column_;
  int64_t first_;
  Lane lane_;
  Place own_;
  WarpTile<T> moment_[2];
};

/// dX = W (X - mu 1^T), W = 2 dSigma / M, for the 64 channels of tile I, a panel of positions at a time. The terms are
/// channels, in panels of 64; x is contiguous along positions where kPositionsInRows, else along channels.
template <class X, bool kPositionsInRows> class PoolBackwardEngine {
  using T = Compute<X>;
  using Maps = Panel<X, T, kPanelTerms<T>>;
  using Weights = Panel<T, T, kPanelVectors>;
  static constexpr int kColumns = kPanelTerms<T> / 4, kTiles = kColumns / kTile;  // of a warp, in two rows

 public:
  /// Of channels, after the panels.
  enum Vector { kOrigin, kMean, kUp, kDown, kMost, kChange, kRowUp, kRowDown, kVectors };

  static constexpr int64_t kSharedBytes = Maps::kBytes + Weights::kBytes + kVectors * kPanelVectors * int(sizeof(T));

  __device__ PoolBackwardEngine(const PoolBackwardTask<X>& task, int64_t sample, int I, bool packets, bool packets_out)
      : maps_(task.x, sample, packets),
        dx_(task.grad_x),
        gradient_(dx_.sample(sample)),
        mean_(task.mean + sample * dx_.channels),
        grad_sigma_(task.grad_sigma + sample * dx_.channels * dx_.channels),
        scale_(task.scale ? task.scale + sample : nullptr),
        first_channel_(I * kPanelVectors),
        packets_(packets_out) {}

  __device__ int64_t tile_positions() const { return kPanelTerms<T>; }

  /// All channels of a tile are more than shared memory holds: store_gradient loads it panel by panel.
  __device__ void load_centered(int64_t, int64_t) const {}

  __device__ void store_gradient(int64_t m, int64_t n) const {
    WarpTile<T> sum[2][kTiles];
#pragma unroll 1
    for (int64_t k = 0; k < dx_.channels; k += kPanelVectors) {
      load_panels(k, m, int(n));
      if (k > 0) scale_sums(sum);
      multiply(sum, int(dx_.channels - k < kPanelVectors ? dx_.channels - k : kPanelVectors));
      __syncthreads();  // nobody reads these panels any more
    }
    store(sum, m, int(n));
  }

 private:
  /// Each channel of x is multiplied by a power of two, and its column of W divided by it, before they become pairs:
  /// what is small in the one, and large in the other, counts in the sum.
  __device__ __forceinline__ void load_panels(int64_t k, int64_t m, int n) const {
    const int64_t C = dx_.channels;
    const int rows = at_most<kPanelVectors>(C, first_channel_), terms = at_most<kPanelVectors>(C, k);
    const T* W = grad_sigma_ + first_channel_ * C + k;
    if (C % kPacketTerms<T> == 0)
      weights().load_packets(W, C, rows, terms);
    else
      weights().load_each([&](int t) { return W + t; }, C, rows, terms);
    maps_.load(maps(), k, m, n);
    const int own = opaque(Maps::own_vector());
    const T size = scale_ ? *scale_ : T(1), mean = own < terms ? mean_[k + own] : T(0),
            origin = own < terms ? size * T(to_number(maps_.sample[(k + own) * maps_.x.stride_c])) : T(0);
    maps().wait();
    maps().fill(n);
    const bool is_first = threadIdx.x % kVectorThreads == 0;
    const auto largest = [&](const auto& panel, int terms, const auto& number) {
      T most = 0;
      panel.look(terms, [&](T a, int t, int) { most = fmax(most, fabs(number(a, t))); });
#pragma unroll
      for (int other = 1; other < kVectorThreads; other *= 2)
        most = fmax(most, __shfl_xor_sync(0xffffffffu, most, other));
      return most;
    };
    const T distance = largest(maps(), n, [&](T a, int) { return size * a - origin - mean; });
    const Scale<T> of_map(distance);
    if (is_first) {
      vector(kOrigin)[own] = origin;
      vector(kMean)[own] = mean;
      vector(kUp)[own] = of_map.up;
      vector(kDown)[own] = distance == 0 ? T(0) : of_map.down;  // what is multiplied by zeros is not the largest
    }
    maps().convert([&](int c) {
      const T origin = vector(kOrigin)[c], mean = vector(kMean)[c], up = vector(kUp)[c];
      return [=](T a, int) { return (size * a - origin - mean) * up; };
    });
    __syncthreads();
    T most = largest(weights(), kPanelVectors, [&](T a, int t) { return a * vector(kDown)[t]; });
    if (is_first) {
      if (k > 0) most = fmax(most, vector(kMost)[own]);
      const Scale<T> of_row(most);
      vector(kMost)[own] = most;
      vector(kChange)[own] = k > 0 ? vector(kRowDown)[own] * of_row.up : T(1);
      vector(kRowUp)[own] = of_row.up;
      vector(kRowDown)[own] = of_row.down;
    }
    weights().convert([&](int r) {
      const T up = vector(kRowUp)[r];
      return [=](T a, int t) { return a * vector(kDown)[t] * up; };
    });
    __syncthreads();
  }

  /// Takes the sums, which are multiples of powers of two for each row, relative to those of these panels.
  __device__ __forceinline__ void scale_sums(WarpTile<T> (&sum)[2][kTiles]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const T change = vector(kChange)[row() + kTile * r + of_half(h, lane_.group)];
#pragma unroll
        for (int v = 0; v < kTiles; ++v)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[r][v].sum[i / 2][2 * h + i % 2] *= change;
      }
  }

  __device__ __forceinline__ void multiply(WarpTile<T> (&sum)[2][kTiles], int terms) const {
    const int steps = (terms + kStepTerms - 1) / kStepTerms;
    const int left = Weights::template place_of<Weights::kLeft>(row()),
              right = Maps::template place_of<Maps::kAcross>(column());
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      Factor<T> columns[kTiles];
#pragma unroll
      for (int v = 0; v < kTiles; ++v) columns[v] = maps().template factor<Maps::kAcross>(right, step, v);
#pragma unroll
      for (int r = 0; r < 2; ++r)
        multiply_add(sum[r], weights().template factor<Weights::kLeft>(left, step, r), columns);
    }
  }

  __device__ __forceinline__ void store(const WarpTile<T> (&sum)[2][kTiles], int64_t m, int n) const {
    const T share = T(2) / T(dx_.positions());
    const auto put = [&](const auto& store_four) {
#pragma unroll
      for (int v = 0; v < 2 * kTiles; ++v)
        for_each_four(sum[v / kTiles][v % kTiles], [&](const T(&a)[4], int r, int c) {
          const int own = row() + v / kTiles * kTile + r, channel = first_channel_ + own;
          const int position = opaque(column()) + v % kTiles * kTile + c;
          if (channel >= dx_.channels || position >= n) return;
          const T factor = share * vector(kRowDown)[own];
          const T result[4] = {factor * a[0], factor * a[1], factor * a[2], factor * a[3]};
          store_four(gradient_ + channel * dx_.stride_c, position, result);
        });
    };
    if constexpr (kPositionsInRows) {
      constexpr int kEach = kPacketTerms<T>;
      if (packets_)
        return put([&](X* to, int position, const T(&a)[4]) {
#pragma unroll
          for (int e = 0; e < 4; e += kEach) {
            T packet[kEach];
#pragma unroll
            for (int i = 0; i < kEach; ++i) packet[i] = a[e + i];
            if (position + e < n) store_packet(to + m + position + e, packet);
          }
        });
    }
    put([&](X* to, int position, const T(&a)[4]) {
      int64_t row = 0, column = m + position;
      if (dx_.height > 1) row = column / dx_.width, column %= dx_.width;  // divisions take time: one for all four
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (position + e < n) store_number(to + row * dx_.stride_h + column * dx_.stride_w, a[e]);
        if (++column == dx_.width) column = 0, ++row;
      }
    });
  }

  /// Where this warp's tiles begin.
  __device__ static int row() { return threadIdx.x / kWarp / 4 * 2 * kTile; }
  __device__ static int column() { return threadIdx.x / kWarp % 4 * kColumns; }

  __device__ static Maps maps() { return {shared_begin()}; }
  __device__ static Weights weights() { return {shared_begin() + Maps::kBytes}; }
  __device__ static T* vector(Vector which) {
    return reinterpret_cast<T*>(shared_memory<char>() + Maps::kBytes + Weights::kBytes) + which * kPanelVectors;
  }

  MapsReader<X, kPositionsInRows> maps_;
  const FeatureMaps<X>& dx_;
  X* gradient_;
  const T *mean_, *grad_sigma_, *scale_;
  int first_channel_;
  bool packets_;  // of dx
  Lane lane_;
};

}  // namespace isqrt::cuda
