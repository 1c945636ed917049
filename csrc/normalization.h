// Pre-normalisation by the trace and post-compensation, Eqs. 2, 3, 5 and 8, around the iteration.
//
// Besides what newton_schulz.h asks of it, an Engine offers
//     load(A, source)            A = sym(source), the source being a sample of Sigma or of the upstream gradient
//     trace(A), inner(source, A), inner products and traces as its Scalar
//     divide(A, s)               A = A / s
// A Scalar is a number, or a class with arithmetic, sqrt(s) and nonzero(s) of its own.
#pragma once
#include <cmath>

#include "newton_schulz.h"

namespace isqrt {

/// t itself, 1 where t = 0.
ISQRT_FN inline float nonzero(float t) { return t == 0.0f ? 1.0f : t; }
ISQRT_FN inline double nonzero(double t) { return t == 0.0 ? 1.0 : t; }

/// What multiplies Y_N or Z_N, as a function of the trace: sqrt(t) or 1 / sqrt(t), and 0 for t = 0. There Sigma
/// vanishes, so that any divisor makes A = 0, and the root and its gradient are defined as 0.
template <class Scalar> ISQRT_FN Scalar compensation(const Scalar& t, Root root) {
  using std::sqrt;
  return root == Root::kSquare ? sqrt(t) : sqrt(t) / nonzero(t);
}

/// Eqs. 1-3: Yhat = sqrt(t) Y_N(Sigma / t), or Z_N(Sigma / t) / sqrt(t). Returns the matrix that holds it.
template <class Engine, class Matrix, class Source>
ISQRT_FN Matrix matrix_root(Engine& e, const Source& sigma, Matrix& Y, Matrix& Z, Matrix& T, const Steps& steps,
                            Root root) {
  e.load(Y, sigma);
  const auto t = e.trace(Y);               // Eq. 2: t = tr(Sigma)
  e.divide(Y, nonzero(t));                 //        A = Sigma / t
  newton_schulz(e, Y, Z, T, steps, root);  // Eq. 1
  Matrix result = root == Root::kSquare ? Y : Z;
  e.scale(result, compensation(t, root), result);  // Eq. 3: Yhat = sqrt(t) Y_N
  return result;
}

/// Eqs. 4-8 for the upstream gradient G = dL/dYhat. With s(t) the compensation, P = Y_N or Z_N, D = P'(A)[sym G], and
/// t s'(t) = s / 2 or -s / 2,
///     dL/dSigma = s / t (D + (<G, P> t s'(t) / s - <D, A>) I)
/// Nothing is divided by t^2, which would leave the range of float32 long before the result does.
/// Returns the matrix that holds dL/dSigma, symmetric.
template <class Engine, class Matrix, class SigmaSource, class GradSource>
ISQRT_FN Matrix matrix_root_backward(Engine& e, const SigmaSource& sigma, const GradSource& grad, Matrix& Y, Matrix& Z,
                                     Matrix& T, Matrix& dY, Matrix& dZ, Matrix& dT, const Steps& steps, Root root) {
  e.load(Y, sigma);
  e.load(dY, grad);
  const auto t = e.trace(Y);
  const auto divisor = nonzero(t);
  e.divide(Y, divisor);                                        // A = Sigma / t
  newton_schulz_tangent(e, Y, Z, T, dY, dZ, dT, steps, root);  // Eqs. 6-7
  const Matrix P = root == Root::kSquare ? Y : Z;
  Matrix D = root == Root::kSquare ? dY : dZ;
  const auto factor = compensation(t, root) / divisor;
  const auto of_compensation = (root == Root::kSquare ? 0.5 : -0.5) * e.inner(grad, P);  // Eqs. 4-5
  const auto of_trace = e.inner(sigma, D) / divisor;                                     // <D, A>
  e.identity_plus(D, factor * (of_compensation - of_trace), factor, D);                  // Eq. 8
  return D;
}

}  // namespace isqrt
