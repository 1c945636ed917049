// What the engines of covariance.h and gram.h read of feature maps on one CPU thread: positions are copied once into
// cache, in the orientation in which products read them, whatever the strides of x.
#pragma once
#include <cstring>

#include "simd.h"

namespace isqrt::cpu::ISQRT_LEVEL {

/// Positions of a tile, whole panels: few enough to stay near the first-level cache, enough to outweigh a pass over M2.
template <class T> inline int64_t tile_positions_for(int64_t channels) {
  if (ISQRT_VECTOR_BYTES < 64) return 96;
  const int64_t fitting = 48 * 1024 / (round_up(channels, kPanel) * int64_t(sizeof(T))) / 32 * 32;
  return minimum<int64_t>(fitting < 128 ? 128 : fitting, 256);
}

/// Calls visit(offset, r, length) for each run of positions m + r, ... of one image row among [m, m + n).
template <class T, class Visit>
inline void for_each_run(const FeatureMaps<T>& x, int64_t m, int64_t n, const Visit& visit) {
  for (int64_t r = 0; r < n;) {
    const int64_t run = minimum(n - r, x.width - (m + r) % x.width);
    visit(x.offset(m + r), r, run);
    r += run;
  }
}

/// The same as visit(positions, strides from channel to channel and from position to position, r, length). Rows of
/// contiguous positions that are no whole panels, as those of a crop may be, begin and end amid vectors: what a tile
/// has of several is joined, in room for `channels` times round_up(n, kPanel) numbers; and so is what is contiguous
/// nowhere.
template <class X, class Visit>
inline void for_each_run(const FeatureMaps<const X>& x, const X* sample, int64_t m, int64_t n, X* joined,
                         const Visit& visit) {
  const bool in_vectors =
      x.stride_w == 1 ? x.width % kPanel == 0 || m % x.width + n <= x.width : x.stride_c == 1 || n < kPanel;
  if (in_vectors)
    return for_each_run(x, m, n, [&](int64_t offset, int64_t r, int64_t run) {
      visit(sample + offset, x.stride_c, x.stride_w, r, run);
    });
  const int64_t length = round_up(n, kPanel);
  for_each_run(x, m, n, [&](int64_t offset, int64_t r, int64_t run) {
    for (int64_t c = 0; c < x.channels; ++c) {
      const X* from = sample + c * x.stride_c + offset;
      X* to = joined + c * length + r;
      if (x.stride_w == 1)
        std::memcpy(to, from, run * sizeof(X));
      else
        for (int64_t i = 0; i < run; ++i) to[i] = from[i * x.stride_w];
    }
  });
  visit(joined, length, int64_t(1), int64_t(0), n);
}

/// The cache lines of the tile after this one, in rows of contiguous positions or channels. The hardware does not
/// foresee where they lie, and all at once are more than it can wait for: they are asked for a few at a time, between
/// products, and come into the second level, for the first one holds this tile.
template <class X> class Ahead {
  static constexpr int64_t kLine = 64 / sizeof(X);

 public:
  Ahead() = default;

  /// Of up to n positions of a sample from m on. None where they are no rows, nor nearly one.
  Ahead(const FeatureMaps<const X>& x, const X* sample, int64_t m, int64_t n) : row_(sample + x.offset(m)) {
    n = minimum(n, x.positions() - m);
    if (n <= 0) return;
    const int64_t along = x.offset(m + n - 1) - x.offset(m) + 1;  // of a crop with what lies between its rows
    if (x.stride_w == 1 && along > 0 && along <= 2 * n) stride_ = x.stride_c, length_ = along, rows_ = x.channels;
    if (x.stride_c == 1 && x.height == 1) stride_ = x.stride_w, length_ = x.channels, rows_ = n;
  }

  /// The share of rows [first, last) out of `all`.
  Ahead share(int64_t first, int64_t last, int64_t all) const {
    Ahead part = *this;
    part.row_ += rows_ * first / all * stride_;
    part.rows_ = rows_ * last / all - rows_ * first / all;
    return part;
  }

  /// As many of the lines as come while so many numbers are multiplied.
  void ask_for_during(int64_t products) {
    constexpr int64_t kProductsOfLine = 512;
    const X* row = row_;
    int64_t at = at_, rows = rows_;
    for (int64_t line = products / kProductsOfLine; line > 0 && rows > 0; --line) {
      __builtin_prefetch(row + at, 0, 2);
      at += kLine;
      if (at >= length_) at = 0, row += stride_, --rows;
    }
    row_ = row, at_ = at, rows_ = rows;
  }

 private:
  const X* row_ = nullptr;
  int64_t stride_ = 0, length_ = 0, rows_ = 0, at_ = 0;
};

/// A tile of positions, [position, channel], less the mean of those before it, and its own mean relative to that.
template <class X> class PositionTile {
  using T = Compute<X>;
  using S = Simd<T>;

 public:
  static int64_t storage_size(int64_t channels, int64_t positions) {
    return Panels<T>::size(positions, channels) + 3 * round_up(channels, kPanel);
  }

  /// Of at most so many positions of a sample. There is room for channels times round_up(positions, kPanel) numbers
  /// where `joined` is.
  PositionTile(const FeatureMaps<const X>& x, int64_t sample, int64_t positions, T* storage, T* joined)
      : x_(x),
        sample_(x.sample(sample)),
        padded_(round_up(x.channels, kPanel)),
        tile_{storage, Panels<T>::rows_for(positions)},
        joined_(reinterpret_cast<X*>(joined)),
        origin_(tile_.data + tile_.rows * padded_),
        mean_(origin_ + padded_),
        delta_(mean_ + padded_) {
    for (int64_t c = 0; c < padded_; ++c) mean_[c] = 0;
    for (int64_t c = 0; c < x.channels; ++c) origin_[c] = to_number(sample_[c * x.stride_c]);
  }

  void load_tile(int64_t m, int64_t n) {
    for (int64_t c = 0; c < padded_; ++c) delta_[c] = 0;
    for_each_run(x_, sample_, m, n, joined_, [&](auto... run) { load_run(run...); });
    for (int64_t c = 0; c < x_.channels; ++c) delta_[c] /= T(n);
  }

  void center_tile(int64_t n) const {
    for (int64_t c = 0; c < padded_; c += S::kWidth) {
      const Vector<T> delta = load_vector(delta_ + c);
      store_vector(mean_ + c, load_vector(mean_ + c) + delta);
      store_vector(delta_ + c, Vector<T>{});
      T* column = tile_.at(0, c);
      for (int64_t r = 0; r < n; ++r, column += kPanel) store_vector(column, load_vector(column) - delta);
    }
  }

 private:
  /// One run of positions, less the mean, into the tile's rows from `first` on; their sums into delta_. What cannot be
  /// transposed in whole blocks, or lies neither along positions nor along channels, is read element by element.
  void load_run(const X* x, int64_t stride_c, int64_t stride_w, int64_t first, int64_t run) const {
    constexpr int W = S::kWidth;
    const bool along_positions = stride_w == 1, along_channels = stride_c == 1 && !along_positions;
    const int64_t vector_channels = along_positions || along_channels ? x_.channels / W * W : 0;
    const int64_t vector_run = along_positions ? run / W * W : along_channels ? run : 0;
    if (along_channels) {
      int64_t c = 0;
      for (; c + 4 * W <= vector_channels; c += 4 * W) load_columns<4>(first, x, stride_w, c, run);
      for (; c < vector_channels; c += W) load_columns<1>(first, x, stride_w, c, run);
    }
    for (int64_t c = 0; along_positions && c < vector_channels; c += W) {
      const Vector<T> origin = load_vector(origin_ + c), mean = load_vector(mean_ + c);
      Vector<T> sum = {};
      T* tile = tile_.at(first, c);
      for (int64_t r = 0; r < vector_run; r += W) {
        Vector<T> positions[W];
        load_transposed(positions, x + c * stride_c + r, stride_c);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          const Vector<T> value = positions[i] - origin - mean;
          sum += value;
          store_vector(tile + (r + i) * kPanel, value);
        }
      }
      store_vector(delta_ + c, load_vector(delta_ + c) + sum);
    }
    for (int64_t c = 0; c < x_.channels; ++c) {
      int64_t r = c < vector_channels ? vector_run : 0;
      const X* from = x + c * stride_c + r * stride_w;
      const T origin = origin_[c], mean = mean_[c];
      T* to = tile_.at(first + r, c);
      T sum = 0;
      for (; r < run; ++r, from += stride_w, to += kPanel) {
        *to = to_number(*from) - origin - mean;
        sum += *to;
      }
      delta_[c] += sum;
    }
  }

  /// kVectors vectors of contiguous channels from c on, of each position of a run.
  template <int kVectors> void load_columns(int64_t first, const X* x, int64_t stride, int64_t c, int64_t run) const {
    Vector<T> origin[kVectors], mean[kVectors], sum[kVectors] = {};
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      origin[v] = load_vector(origin_ + c + v * S::kWidth);
      mean[v] = load_vector(mean_ + c + v * S::kWidth);
    }
    T* tile[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) tile[v] = tile_.at(first, c + v * S::kWidth);
    for (int64_t r = 0; r < run; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vector<T> value = load_vector(x + r * stride + c + v * S::kWidth) - origin[v] - mean[v];
        sum[v] += value;
        store_vector(tile[v] + r * kPanel, value);
      }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* delta = delta_ + c + v * S::kWidth;
      store_vector(delta, load_vector(delta) + sum[v]);
    }
  }

 protected:
  FeatureMaps<const X> x_;
  const X* sample_;
  int64_t padded_;
  Panels<T> tile_;
  X* joined_;
  T *origin_, *mean_, *delta_;
};

/// f(channel, position, (x - share x_0) / 2) for each number of a sample, x_0 being its first position: half of a
/// difference does not overflow.
template <class X, class F>
void for_each_distance(const FeatureMaps<const X>& x, const X* sample, Compute<X> share, const F& f) {
  using T = Compute<X>;
  for (int64_t c = 0; c < x.channels; ++c) {
    const X* row = sample + c * x.stride_c;
    const T first = T(0.5) * share * to_number(row[0]);
    for (int64_t h = 0, m = 0; h < x.height; ++h)
      for (int64_t w = 0; w < x.width; ++w, ++m)
        f(c, m, T(0.5) * to_number(row[h * x.stride_h + w * x.stride_w]) - first);
  }
}

/// A contiguous copy of s (x - x_0) / 2, for the samples whose squares leave the range of T.
template <class X> class Distances {
  using T = Compute<X>;

 public:
  Distances(const FeatureMaps<const X>& x, const X* sample, T s)
      : channels_(x.channels), positions_(x.positions()), copy_(channels_ * positions_) {
    T* copy = copy_.get();
    for_each_distance(x, sample, T(1),
                      [&](int64_t c, int64_t m, T distance) { copy[c * positions_ + m] = s * distance; });
  }
  FeatureMaps<const T> maps() const {
    return {copy_.get(), 1, channels_, 1, positions_, channels_ * positions_, positions_, 0, 1};
  }

 private:
  int64_t channels_, positions_;
  Scratch<T> copy_;
};

/// What rescue_covariance() asks of an engine that has made a matrix, size x size: rescale() aside.
template <class X> class SecondPass {
 protected:
  using T = Compute<X>;

  /// `matrix` and `scale`, which may be null, are those of all samples.
  SecondPass(const FeatureMaps<const X>& x, int64_t sample, T* matrix, int64_t size, T* scale)
      : x_(x),
        sample_(x.sample(sample)),
        matrix_(matrix + sample * size * size),
        size_(size),
        scale_(scale ? scale + sample : nullptr) {}

 public:
  T trace() const {
    T sum = 0;
    for (int64_t i = 0; i < size_; ++i) sum += matrix_[i * (size_ + 1)];
    return sum;
  }

  T largest(T share) const {
    T most = 0;
    for_each_distance(x_, sample_, share, [&](int64_t, int64_t, T distance) {
      const T size = distance < 0 ? -distance : distance;
      if (size > most || size != size) most = size;  // NaN is taken over, and stays
    });
    return most;
  }

  void keep(T s) const {
    if (scale_) {
      *scale_ = s;
    } else if (s != 1) {
      for (int64_t i = 0; i < size_ * size_; ++i) matrix_[i] = matrix_[i] / s / s;
    }
  }

 protected:
  FeatureMaps<const X> x_;
  const X* sample_;
  T* matrix_;
  int64_t size_;
  T* scale_;
};

}  // namespace isqrt::cpu::ISQRT_LEVEL
