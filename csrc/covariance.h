// Covariance pooling and its gradient, Eq. 9.
//
//     mu = X 1 / M,   Sigma = (X - mu 1^T)(X - mu 1^T)^T / M,   dX = (dSigma + dSigma^T)(X - mu 1^T) / M
//
// Positions are taken relative to the sample's first one, so that a constant map has exactly zero differences, mean and
// covariance. One pass over X and no cancellation: each tile of positions is centred by its own mean, and sets of
// positions are merged by Chan's update (Chan, Golub & LeVeque 1983). With delta = mean_b - mean_a, n = n_a + n_b,
//
//     mean = mean_a + delta n_b / n,   M2 = M2_a + M2_b + delta delta^T n_a n_b / n
#pragma once
#include "views.h"

namespace isqrt {

/// The two weights of Chan's update when n_b positions join n_a.
struct ChanWeights {
  double mean, moment;
};

ISQRT_FN inline ChanWeights chan_weights(int64_t n_a, int64_t n_b) {
  const double share = double(n_b) / double(n_a + n_b);
  return {share, share * double(n_a)};
}

/// How the M positions of a sample are split into `count` chunks, all of `length` but the last. It depends on the
/// shape alone, never on the number of workers, so that results are the same bits everywhere.
struct Chunks {
  int64_t positions, length, count;

  ISQRT_FN int64_t first(int64_t c) const { return c * length; }
  ISQRT_FN int64_t last(int64_t c) const { return (c + 1) * length < positions ? (c + 1) * length : positions; }
};

/// Mean and M2 of the positions [first, last) of one sample. The Engine offers
///     load_tile(m, n)         tile = X[:, m : m + n], at most tile_positions()
///     center_tile(n)          tile -= X[:, 0] 1^T; tile -= tile_mean 1^T
///     merge_mean(weights, n)  delta = tile_mean - mean; mean += weights.mean delta; and sqrt(weights.moment) delta
///                             becomes column n of the tile, so that the rank-one term costs one position more
///     accumulate(n)           M2 += tile tile^T over n columns
template <class Engine> ISQRT_FN void accumulate_covariance(Engine& e, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; m += e.tile_positions()) {
    const int64_t n_a = m - first, n_b = last - m < e.tile_positions() ? last - m : e.tile_positions();
    e.load_tile(m, n_b);
    e.center_tile(n_b);
    e.merge_mean(chan_weights(n_a, n_b), n_b);
    e.accumulate(n_b + 1);
  }
}

/// Sigma and mu of one sample from its chunks, in their order. The Engine offers
///     take(c)                 mean and M2 are those of chunk c
///     merge(c, weights)       Chan's update with chunk c
///     finish(alpha)           Sigma = alpha M2, both triangles
template <class Engine> ISQRT_FN void merge_covariances(Engine& e, const Chunks& chunks) {
  e.take(0);
  for (int64_t c = 1; c < chunks.count; ++c)
    e.merge(c, chan_weights(chunks.first(c), chunks.last(c) - chunks.first(c)));
  e.finish(1.0 / double(chunks.positions));
}

/// Eq. 9 over the positions [first, last). The Engine holds W = (dSigma + dSigma^T) / M and offers
///     load_centered(m, n)     tile = X[:, m : m + n] - mu 1^T
///     store_gradient(m, n)    dX[:, m : m + n] = W tile
template <class Engine> ISQRT_FN void covariance_backward(Engine& e, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; m += e.tile_positions()) {
    const int64_t n = last - m < e.tile_positions() ? last - m : e.tile_positions();
    e.load_centered(m, n);
    e.store_gradient(m, n);
  }
}

}  // namespace isqrt
