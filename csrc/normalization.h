// Pre-normalisation by the trace and post-compensation, Eqs. 2, 3, 5 and 8, around the iteration.
//
// Besides what newton_schulz.h asks of it, an Engine offers
//     load(A, source)            A = sym(source), the source being a sample of Sigma or of the upstream gradient
//     load_normalized(A, source) A = sym(source) / t, Eq. 2, and returns t = tr(source), as its Scalar; 1 divides for 0
//     inner(source, A), inner(source, A, s)   inner products, that of s source
//     result(beta, A), result(alpha, beta, A)  beta A and alpha I + beta A, in place of A: they are only written
//     load(g, source), dot(g, u) a mean's upstream gradient as a vector, inner products of vectors: on a CPU
// A Scalar is a number, or a class with arithmetic, sqrt(s) and nonzero(s) of its own.
#pragma once
#include <cmath>

#include "newton_schulz.h"

namespace isqrt {

/// t itself, 1 where t = 0.
ISQRT_FN float nonzero(float t) { return t == 0.0f ? 1.0f : t; }
ISQRT_FN double nonzero(double t) { return t == 0.0 ? 1.0 : t; }

/// <G, P> and <s Sigma, D>. Engines that can do both at once have functions of this name.
template <class Scalar> struct InnerProducts {
  Scalar of_gradient, of_sigma;
};
template <class Engine, class Matrix, class SigmaSource, class GradSource, class Scalar>
ISQRT_FN InnerProducts<Scalar> inner_products(Engine& e, const GradSource& grad, const Matrix& P,
                                              const SigmaSource& sigma, const Matrix& D, const Scalar& s) {
  const Scalar of_gradient = e.inner(grad, P);
  return {of_gradient, e.inner(sigma, D, s)};
}

/// What multiplies Y_N or Z_N, as a function of the trace: sqrt(t) or 1 / sqrt(t), and 0 for t = 0. There Sigma
/// vanishes, so that any divisor makes A = 0, and the root and its gradient are defined as 0.
template <class Scalar> ISQRT_FN Scalar compensation(const Scalar& t, Root root) {
  using std::sqrt;
  return root == Root::kSquare ? sqrt(t) : sqrt(t) / nonzero(t);
}

/// Eqs. 1-3: Yhat = sqrt(t) Y_N(Sigma / t), or Z_N(Sigma / t) / sqrt(t). Returns the result that it is.
template <class Engine, class Source>
ISQRT_FN auto matrix_root(Engine& e, const Source& sigma, const Steps& steps, Root root) {
  auto m = make_iterates(e, steps);
  const auto t = e.load_normalized(m.Y, sigma);                               // Eq. 2: t = tr(Sigma), A = Sigma / t
  newton_schulz(e, m, steps, root);                                           // Eq. 1
  return e.result(compensation(t, root), root == Root::kSquare ? m.Y : m.Z);  // Eq. 3: Yhat = sqrt(t) Y_N
}

/// Eqs. 1-3 for the mean of Yhat over its first channel index. Returns the vector that holds it.
template <class Engine, class Source>
ISQRT_FN auto matrix_root_mean(Engine& e, const Source& sigma, const Steps& steps, int64_t channels) {
  auto m = make_iterates(e, steps);
  auto sums = e.column(), u = e.column(), v = e.column();
  const auto t = e.load_normalized(m.Y, sigma);
  newton_schulz_sums(e, m, steps, sums, u, v);
  e.add(sums, compensation(t, Root::kSquare) / channels, 0, sums);
  return sums;
}

/// Eqs. 5 and 8, the end of both gradients: D = dL/dA becomes dL/dSigma. <G, P> is the inner product of the upstream
/// gradient and P = Y_N or Z_N; with s(t) the compensation, t s'(t) = s / 2 or -s / 2, and
///     dL/dSigma = s / t D + (s / t <G, P> t s'(t) / s - <s / t Sigma, D> / t) I
/// Nothing is divided by t^2, nor summed that is as small as Sigma: both would leave the range of float32 long before
/// the result does. `factor` is s / t.
template <class Engine, class Matrix, class Scalar>
ISQRT_FN auto normalization_backward(Engine& e, const Matrix& D, const Scalar& t, const Scalar& factor,
                                     const InnerProducts<Scalar>& inner, Root root) {
  const auto of_compensation = (root == Root::kSquare ? 0.5 : -0.5) * inner.of_gradient;  // Eq. 5
  const auto of_trace = inner.of_sigma / nonzero(t);                                      // <s / t D, A>
  return e.result(factor * of_compensation - of_trace, factor, D);                        // Eq. 8
}

struct Unwanted {
  template <class Scalar, class Matrix> ISQRT_FN void operator()(const Scalar&, Matrix&) const {}
};

/// Eqs. 4-8 for the upstream gradient G = dL/dYhat. Returns the result that is dL/dSigma, symmetric. The root itself is
/// s P, of which with_root(s, P) may make a result.
template <class Engine, class SigmaSource, class GradSource, class WithRoot = Unwanted>
ISQRT_FN auto matrix_root_backward(Engine& e, const SigmaSource& sigma, const GradSource& grad, const Steps& steps,
                                   Root root, const WithRoot& with_root = {}) {
  auto m = make_iterates(e, steps), d = make_iterates(e, steps);
  const auto t = e.load_normalized(m.Y, sigma);  // A = Sigma / t
  e.load(d.Y, grad);
  newton_schulz_tangent(e, m, d, steps, root);  // Eqs. 6-7
  auto P = root == Root::kSquare ? m.Y : m.Z;
  const auto D = root == Root::kSquare ? d.Y : d.Z;
  const auto s = compensation(t, root), factor = s / nonzero(t);
  const auto inner = inner_products(e, grad, P, sigma, D, factor);
  with_root(s, P);
  return normalization_backward(e, D, t, factor, inner, root);
}

/// The same for the upstream gradient g of the mean of Yhat.
template <class Engine, class SigmaSource, class GradSource>
ISQRT_FN auto matrix_root_mean_backward(Engine& e, const SigmaSource& sigma, const GradSource& grad, const Steps& steps,
                                        int64_t channels) {
  auto m = make_iterates(e, steps), d = make_iterates(e, steps);
  auto g = e.column(), sums = e.column(), u = e.column(), v = e.column();
  const auto t = e.load_normalized(m.Y, sigma);
  e.load(d.Y, grad);
  e.load(g, grad);
  newton_schulz_tangent_sums(e, m, d, steps, g, 0.5 / channels, sums, u, v);
  const auto factor = compensation(t, Root::kSquare) / nonzero(t);
  const auto of_gradient = e.dot(g, sums) / channels;  // <G, Y_N> = g' Y_N 1 / C
  return normalization_backward(e, d.Y, t, factor, {of_gradient, e.inner(sigma, d.Y, factor)}, Root::kSquare);
}

}  // namespace isqrt
