// The same root from the side of the positions, where a sample has fewer of them than channels. With
// F = s (X - mu 1^T), C x M, s being the sample's scale of covariance.h,
//
//     Sigma = F F^T / M   and   K = F^T F / M
//
// have the same nonzero eigenvalues and the same trace t. Y_N = A p(A) and Z_N = p(A) for one polynomial p, and
// F p(F^T F) = p(F F^T) F, so that what Eqs. 1-3 define is also, with an iteration of M x M matrices,
//
//     Yhat = F R F^T / (s M),   R = Z_N(K / t) / sqrt(t)
//
// For the upstream gradient G, symmetrised, let V = G F and H = F^T V / M, which is s dL/dR; dK follows from H by
// Eqs. 4-8, and
//
//     dX = 2 / M (V R + F dK)
//
// F 1 = 0 makes the rows of dX sum to zero: nothing is to be centred. Of the null space of Sigma, where rounding errors
// grow with the steps, K has one vector alone, 1, and F takes that to zero.
#pragma once
#include "views.h"

namespace isqrt {

/// mu and K of one sample; rescue_covariance() follows. For all here the Engine offers
///     load_features()      F
/// and for one each
///     store_gram(a)        K = a F^T F
///     multiply_root()      Q = R F^T
///     store_root(a)        Yhat = a / s F Q
///     multiply_gradient()  V = G F, kept
///     store_gradient(a)    H = a F^T V
///     store_features(a)    dX = a (V R + F dK)
template <class Engine> ISQRT_FN void pool_gram(Engine& e, int64_t positions) {
  e.load_features();
  e.store_gram(1.0 / double(positions));
}
template <class Engine> ISQRT_FN void expand_root(Engine& e, int64_t positions) {
  e.load_features();
  e.multiply_root();
  e.store_root(1.0 / double(positions));
}
template <class Engine> ISQRT_FN void contract_gradient(Engine& e, int64_t positions) {
  e.load_features();
  e.multiply_gradient();
  e.store_gradient(1.0 / double(positions));
}
template <class Engine> ISQRT_FN void gram_backward(Engine& e, int64_t positions) {
  e.load_features();
  e.store_features(2.0 / double(positions));
}

}  // namespace isqrt
