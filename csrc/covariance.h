// Covariance pooling and its gradient, Eq. 9.
//
//     mu = X 1 / M,   Sigma = (X - mu 1^T)(X - mu 1^T)^T / M,   dX = (dSigma + dSigma^T)(X - mu 1^T) / M
//
// One pass over X and no cancellation. Positions are merged by Chan's update (Chan, Golub & LeVeque 1983), a tile of
// n_b positions at a time, each taken relative to the mean of the n_a positions before it. With delta the mean of that
// tile and n = n_a + n_b,
//
//     mean <- mean + delta n_b / n,   M2 <- M2 + tile tile^T - delta delta^T n_b^2 / n
//
// where n_b <= n_a, so that at most one bit is lost to the subtraction; the first tile is centred by its own mean.
// Means are kept relative to the sample's first position x_0: what engines call mu is the mean of x - x_0, or of
// s (x - x_0). What is rounded then is of the size of the spread, or sqrt(M) times that at most, where x_0 is far from
// all others, however large the mean beside it. A constant map has exactly zero differences, covariance and gradient.
#pragma once
#include <cmath>

#include "views.h"

namespace isqrt {

/// What the positions after some n_a others weigh in Chan's update.
template <class Weight> struct ChanWeights {
  Weight mean;   // n_b / n
  Weight shift;  // n_b^2 / n, of delta delta^T
};

template <class Weight> ISQRT_FN ChanWeights<Weight> chan_weights(int64_t n_a, int64_t n_b) {
  const Weight share = Weight(n_b) / Weight(n_a + n_b);
  return {share, share * Weight(n_b)};
}

/// How the M positions of a sample are split into `count` chunks, all of `length` but the last. It depends on the
/// shape alone, never on the number of workers, so that results are the same bits everywhere.
struct Chunks {
  int64_t positions, length, count;

  ISQRT_FN int64_t first(int64_t c) const { return c * length; }
  ISQRT_FN int64_t last(int64_t c) const { return (c + 1) * length < positions ? (c + 1) * length : positions; }
  ISQRT_FN int64_t size(int64_t c) const { return last(c) - first(c); }
};

/// Mean and M2 of the positions [first, last) of one sample, the mean being that of x - x_0. The Engine starts with
/// zeros, and offers
///     Weight                 the type of what follows from numbers of positions
///     load_tile(m, n)        tile = X[:, m : m + n] - (x_0 + mean) 1^T, at most tile_positions(); delta = its mean
///     center_tile(n)         mean += delta; tile -= delta 1^T; delta = 0
///     accumulate(n, weight)  M2 += tile tile^T - weight delta delta^T
///     move_mean(share)       mean += share delta
template <class Engine> ISQRT_FN void accumulate_covariance(Engine& e, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; m += e.tile_positions()) {
    const int64_t n_a = m - first, n_b = last - m < e.tile_positions() ? last - m : e.tile_positions();
    e.load_tile(m, n_b);
    const auto weights = chan_weights<typename Engine::Weight>(n_a, n_b);
    if (n_a == 0) e.center_tile(n_b);
    e.accumulate(n_b, weights.shift);
    e.move_mean(weights.mean);
  }
}

/// Sigma and mu of one sample from its chunks, of n_c positions each,
///
///     mu = mu_0 + sum n_c (mu_c - mu_0) / M,   M Sigma = sum M2_c + n_c (mu_c - mu)(mu_c - mu)^T
///
/// where no chunk waits for another. An engine that pools may do this for a single chunk itself. The Engine offers
///     average()        mu; that of a constant map is exact
///     add_moments()    M2 = M Sigma
///     finish(alpha)    Sigma = alpha M2, both triangles
template <class Engine> ISQRT_FN void merge_covariances(Engine& e, const Chunks& chunks) {
  e.average();
  e.add_moments();
  e.finish(1.0 / double(chunks.positions));
}

/// The squares of very large and very small numbers leave the range of T. True where they have not: a covariance of
/// that trace, and the sum over the positions that it came from, are as exact as any.
template <class T> ISQRT_FN bool is_in_range(T trace) {
  const T limit = sizeof(T) == 8 ? T(0x1p800) : T(0x1p80f);
  return trace >= 1 / limit && trace <= limit;
}

/// The power of two s that brings distances up to `distance` near 1. Of numbers up to `number`, s times each is finite.
template <class T> ISQRT_FN T scale_for(T distance, T number) {
  constexpr int kMost = sizeof(T) == 8 ? 1022 : 126;  // neither s nor its reciprocal is a denormal number
  constexpr int kMostOfNumbers = sizeof(T) == 8 ? 900 : 100;
  int exponent = -std::ilogb(distance);
  const int room = kMostOfNumbers - std::ilogb(number);
  exponent = exponent < room ? exponent : room;
  return std::ldexp(T(1), exponent < -kMost ? -kMost : exponent > kMost ? kMost : exponent);
}

/// False for float16, whose squares float32 holds.
template <class X> constexpr bool kMayLeaveRange = true;
template <> inline constexpr bool kMayLeaveRange<Half> = false;

/// A second pass for the samples whose covariance left its range: Sigma of s x for a power of two s. The Engine offers
///     trace()       of Sigma, as the first pass left it
///     largest(r)    half of the largest |x - r x_0| over channels and positions
///     rescale(s)    mu and Sigma anew, from s (x - x_0); of gram.h K alone
///     keep(s)       s is the scale of this sample; or, where none is wanted, mu and Sigma are taken back from it
/// It is 1 where all positions are the same, and where not all numbers are finite.
template <class X, class Engine> ISQRT_FN void rescue_covariance(Engine& e) {
  Compute<X> s = 1;
  if constexpr (kMayLeaveRange<X>) {
    if (!is_in_range(e.trace())) {
      const Compute<X> distance = e.largest(1);
      if (distance > 0 && distance - distance == 0) s = scale_for(distance, e.largest(0));
    }
    if (s != 1) e.rescale(s);
  }
  e.keep(s);
}

/// Eq. 9 over the positions [first, last), for a symmetric dSigma. The Engine holds W = 2 dSigma / M and offers
///     load_centered(m, n)     tile = s (X[:, m : m + n] - mu 1^T), s being the scale of the sample
///     store_gradient(m, n)    dX[:, m : m + n] = W tile
template <class Engine> ISQRT_FN void covariance_backward(Engine& e, int64_t first, int64_t last) {
  for (int64_t m = first; m < last; m += e.tile_positions()) {
    const int64_t n = last - m < e.tile_positions() ? last - m : e.tile_positions();
    e.load_centered(m, n);
    e.store_gradient(m, n);
  }
}

}  // namespace isqrt
