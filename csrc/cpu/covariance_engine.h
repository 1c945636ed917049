// The Engines of covariance.h on one CPU thread. A tile of positions is copied once into cache, in the orientation in
// which the product reads it, whatever the strides of x.
#pragma once
#include "simd.h"

namespace isqrt::cpu::ISQRT_LEVEL {

/// Positions of a tile: as many as keep it and the rows of the matrix near the first-level cache.
template <class T> inline int64_t tile_positions_for(int64_t channels) {
  const int64_t fitting = 48 * 1024 / (padded<T>(channels) * int64_t(sizeof(T))) / 16 * 16;
  return minimum<int64_t>(fitting < 64 ? 64 : fitting, 256);
}

/// Copies positions [m, m + n) of all channels between feature maps and a tile, run by run of one image row.
/// Tile element (position r, channel c) lies at r * tile_position + c * tile_channel.
template <class T, class Copy>
inline void for_each_run(const FeatureMaps<T>& x, int64_t m, int64_t n, const Copy& copy) {
  for (int64_t r = 0; r < n;) {
    const int64_t run = minimum(n - r, x.width - (m + r) % x.width);
    copy(x.offset(m + r), r, run);
    r += run;
  }
}

/// Pools one chunk: M2's upper triangle and the mean stay in cache until the chunk is done.
template <class T> class PoolEngine {
  using S = Simd<T>;

 public:
  static int64_t storage_size(int64_t channels) {
    const int64_t ld = padded<T>(channels);
    return ld * (ld + tile_positions_for<T>(channels) + 1 + 3);
  }

  PoolEngine(const FeatureMaps<const T>& x, int64_t sample, T* storage)
      : x_(x),
        sample_(x.sample(sample)),
        ld_(padded<T>(x.channels)),
        tile_positions_(tile_positions_for<T>(x.channels)),
        moment_(storage),
        tile_(moment_ + ld_ * ld_),
        mean_(tile_ + (tile_positions_ + 1) * ld_),
        tile_mean_(mean_ + ld_),
        origin_(tile_mean_ + ld_) {
    for (int64_t c = 0; c < x.channels; ++c) origin_[c] = sample_[c * x.stride_c];
  }

  int64_t tile_positions() const { return tile_positions_; }

  void load_tile(int64_t m, int64_t n) const {  // tile: [position, channel]
    for_each_run(x_, m, n, [&](int64_t offset, int64_t r, int64_t run) {
      copy_strided(tile_ + r * ld_, ld_, int64_t(1), sample_ + offset, x_.stride_w, x_.stride_c, run, x_.channels);
    });
  }

  void center_tile(int64_t n) const {
    for (int64_t c = 0; c < ld_; c += S::kWidth) {
      const Vector<T> origin = load_vector(origin_ + c);
      Vector<T> sum = {};
      for (int64_t r = 0; r < n; ++r) sum += load_vector(tile_ + r * ld_ + c) - origin;
      const Vector<T> mean = sum / T(n);
      store_vector(tile_mean_ + c, mean);
      for (int64_t r = 0; r < n; ++r) {
        T* at = tile_ + r * ld_ + c;
        store_vector(at, load_vector(at) - origin - mean);
      }
    }
  }

  void merge_mean(const ChanWeights& weights, int64_t n) const {
    const T share = T(weights.mean), root = T(__builtin_sqrt(weights.moment));
    for (int64_t c = 0; c < ld_; ++c) {
      const T delta = tile_mean_[c] - mean_[c];
      mean_[c] += share * delta;
      tile_[n * ld_ + c] = root * delta;
    }
  }

  void accumulate(int64_t n) const {
    for (int64_t j = 0; j < x_.channels; j += S::kColumns)
      for (int64_t i = 0; i < minimum(x_.channels, j + S::kColumns); i += S::kRows) {
        Tile<T> product;
        multiply_add(product, tile_ + i, ld_, tile_ + j, ld_, n);
#pragma GCC unroll 16
        for (int r = 0; r < S::kRows; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < S::kVectors; ++v) {
            T* at = moment_ + (i + r) * ld_ + j + v * S::kWidth;
            store_vector(at, load_vector(at) + product.sum[r][v]);
          }
      }
  }

  void clear() const {
    for (int64_t i = 0; i < ld_ * ld_; ++i) moment_[i] = 0;
    for (int64_t c = 0; c < ld_; ++c) mean_[c] = 0;
  }

  void write(T* mean, T* moment) const {
    const int64_t C = x_.channels;
    for (int64_t c = 0; c < C; ++c) mean[c] = origin_[c] + mean_[c];
    for (int64_t i = 0; i < C; ++i)
      copy_strided(moment + i * C + i, C, int64_t(1), moment_ + i * ld_ + i, ld_, int64_t(1), int64_t(1), C - i);
  }

 private:
  FeatureMaps<const T> x_;
  const T* sample_;
  int64_t ld_, tile_positions_;
  T *moment_, *tile_, *mean_, *tile_mean_;  // means relative to origin_
  T* origin_;
};

/// Merges the chunks of one sample in place: chunk 0's mean and moment are the running ones.
template <class T> class MergeEngine {
 public:
  MergeEngine(const PoolTask<T>& task, int64_t sample)
      : C_(task.x.channels),
        partial_mean_(task.partial_mean + sample * task.chunks.count * C_),
        partial_moment_(task.partial_moment + sample * task.chunks.count * C_ * C_),
        mean_(task.mean + sample * C_),
        sigma_(task.sigma + sample * C_ * C_) {}

  void take(int64_t) const {
    for (int64_t c = 0; c < C_; ++c) mean_[c] = partial_mean_[c];
  }

  void merge(int64_t chunk, const ChanWeights& weights) const {
    const T* other = partial_mean_ + chunk * C_;
    const T* other_moment = partial_moment_ + chunk * C_ * C_;
    for (int64_t i = 0; i < C_; ++i) {
      const T scaled = T(weights.moment) * (other[i] - mean_[i]);
      for (int64_t j = i; j < C_; ++j)
        partial_moment_[i * C_ + j] += other_moment[i * C_ + j] + scaled * (other[j] - mean_[j]);
    }
    for (int64_t c = 0; c < C_; ++c) mean_[c] += T(weights.mean) * (other[c] - mean_[c]);
  }

  void finish(double alpha) const {
    constexpr int64_t kBlock = 16;
    for (int64_t i0 = 0; i0 < C_; i0 += kBlock)
      for (int64_t j0 = i0; j0 < C_; j0 += kBlock)
        for (int64_t i = i0; i < minimum(i0 + kBlock, C_); ++i)
          for (int64_t j = j0 > i ? j0 : i; j < minimum(j0 + kBlock, C_); ++j)
            sigma_[i * C_ + j] = sigma_[j * C_ + i] = T(alpha) * partial_moment_[i * C_ + j];
  }

 private:
  int64_t C_;
  T *partial_mean_, *partial_moment_, *mean_, *sigma_;
};

/// dX = W (X - mu 1^T) for one chunk.
template <class T> class PoolBackwardEngine {
  using S = Simd<T>;

 public:
  static int64_t storage_size(int64_t channels) {
    const int64_t ld = padded<T>(channels);
    return ld * ld + 2 * ld * padded<T>(tile_positions_for<T>(channels));
  }

  PoolBackwardEngine(const PoolBackwardTask<T>& task, int64_t sample, T* storage)
      : x_(task.x),
        dx_(task.grad_x),
        sample_(x_.sample(sample)),
        gradient_(dx_.sample(sample)),
        mean_(task.mean + sample * x_.channels),
        ld_(padded<T>(x_.channels)),
        tile_positions_(tile_positions_for<T>(x_.channels)),
        ld_tile_(padded<T>(tile_positions_)),
        weight_(storage),
        tile_(weight_ + ld_ * ld_),
        result_(tile_ + ld_ * ld_tile_) {
    const int64_t C = x_.channels;
    const T* g = task.grad_sigma + sample * C * C;
    const T share = T(1) / T(x_.positions());
    constexpr int64_t kBlock = 16;
    for (int64_t i0 = 0; i0 < C; i0 += kBlock)
      for (int64_t j0 = i0; j0 < C; j0 += kBlock)
        for (int64_t i = i0; i < minimum(i0 + kBlock, C); ++i)
          for (int64_t j = j0 > i ? j0 : i; j < minimum(j0 + kBlock, C); ++j)
            weight_[i * ld_ + j] = weight_[j * ld_ + i] = (g[i * C + j] + g[j * C + i]) * share;
  }

  int64_t tile_positions() const { return tile_positions_; }

  void load_centered(int64_t m, int64_t n) const {  // tile: [channel, position]
    for_each_run(x_, m, n, [&](int64_t offset, int64_t r, int64_t run) {
      copy_strided(tile_ + r, ld_tile_, int64_t(1), sample_ + offset, x_.stride_c, x_.stride_w, x_.channels, run);
    });
    for (int64_t c = 0; c < x_.channels; ++c)
      for (int64_t r = 0; r < n; r += S::kWidth)
        store_vector(tile_ + c * ld_tile_ + r, load_vector(tile_ + c * ld_tile_ + r) - mean_[c]);
  }

  void store_gradient(int64_t m, int64_t n) const {
    for (int64_t j = 0; j < n; j += S::kColumns)
      for (int64_t i = 0; i < x_.channels; i += S::kRows) {
        Tile<T> product;
        multiply_add(product, weight_ + i, ld_, tile_ + j, ld_tile_, x_.channels);
#pragma GCC unroll 16
        for (int r = 0; r < S::kRows; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < S::kVectors; ++v)
            store_vector(result_ + (i + r) * ld_tile_ + j + v * S::kWidth, product.sum[r][v]);
      }
    for_each_run(dx_, m, n, [&](int64_t offset, int64_t r, int64_t run) {
      copy_strided(gradient_ + offset, dx_.stride_c, dx_.stride_w, static_cast<const T*>(result_ + r), ld_tile_,
                   int64_t(1), x_.channels, run);
    });
  }

 private:
  FeatureMaps<const T> x_;
  FeatureMaps<T> dx_;
  const T* sample_;
  T* gradient_;
  const T* mean_;
  int64_t ld_, tile_positions_, ld_tile_;
  T *weight_, *tile_, *result_;
};

}  // namespace isqrt::cpu::ISQRT_LEVEL
