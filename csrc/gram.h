// The same root from the side of the positions, where a sample has fewer of them than channels. Centred features sum to
// zero over the positions: M - 1 numbers of each channel tell all,
//
//     F = s (X - mu 1^T) Q,   K = F^T F / M,   instead of   Sigma = (X - mu 1^T)(X - mu 1^T)^T / M = F F^T / (s^2 M)
//
// with orthonormal columns Q that are orthogonal to 1, C x (M - 1) and (M - 1) x (M - 1), and s the sample's scale, a
// power of two that brings the trace of K near 1, or that of covariance.h. K has the nonzero eigenvalues of s^2 Sigma
// and the same trace t. Y_N = A p(A) and Z_N = p(A) for one polynomial p, and F p(F^T F) = p(F F^T) F, so that what
// Eqs. 1-3 define is also, with an iteration of smaller matrices,
//
//     Yhat = F R F^T / (s M),   R = Z_N(K / t) / sqrt(t)
//
// For the upstream gradient G, symmetrised, let V = G F and H = F^T V / M, which is s dL/dR; dK follows from H by
// Eqs. 4-8, and
//
//     dX = 2 / M (V R + F dK) Q^T
//
// whose rows sum to zero as those of Q^T do: nothing is to be centred. Without Q, K would have the null vector 1 still,
// and rounding errors that grow with the steps as they do in the null space of Sigma.
//
// Q is what a Householder reflection that takes 1 / sqrt(M) to the first unit vector leaves of the others:
//
//     F_j = X_j + X_0 / (sqrt(M) - 1)   and back   dX_0 = S / sqrt(M),  dX_j = D_j - S / (M - sqrt(M)),   S = sum D_j
//
// for j = 1 to M - 1, X standing for s (X - mu 1^T), and D for what is multiplied by Q^T.
#pragma once
#include <cmath>

#include "views.h"

namespace isqrt {

/// Of F, from the positions.
ISQRT_FN int64_t gram_side(int64_t positions) { return positions - 1; }

/// What the first position counts in each column of F; and what the sum of D does in the first position and the others.
struct Reflection {
  double of_first, to_first, to_others;

  ISQRT_FN explicit Reflection(int64_t positions) {
    const double root = std::sqrt(double(positions));
    of_first = 1 / (root - 1), to_first = 1 / root, to_others = -1 / (double(positions) - root);
  }
};

/// K of one sample; rescue_covariance() follows. For all here the Engine offers
///     load_features()      F
/// and for one each
///     store_gram(a)        K = a F^T F
///     multiply_root()      P = R F^T
///     store_root(a)        Yhat = a / s F P
///     multiply_gradient()  V = G F, kept
///     store_contracted(a)  H = a F^T V
///     store_gradient(a)    dX = a (V R + F dK) Q^T
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
  e.store_contracted(1.0 / double(positions));
}
template <class Engine> ISQRT_FN void gram_backward(Engine& e, int64_t positions) {
  e.load_features();
  e.store_gradient(2.0 / double(positions));
}

}  // namespace isqrt
