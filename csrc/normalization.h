// Pre-normalisation by the trace and post-compensation, Eqs. 2, 3, 5 and 8, around the iteration.
//
// Besides what newton_schulz.h asks of it, an Engine offers
//     load(A, source, s)         A = sym(source) / s, the source being a sample of Sigma or of the upstream gradient
//     load_normalized(A, source) A = sym(source) / t, Eq. 2, and returns t = tr(source), as its Scalar; 1 divides for 0
//     inner(source, A), inner(source, A, s)   inner products, that of s (s source)
//     result(beta, A), result(alpha, beta, A)  beta A and alpha I + beta A, in place of A: they are only written
//     load(g, source), dot(g, u) a mean's upstream gradient as a vector, inner products of vectors: on a CPU
// A Scalar is a number, or a class that is made of one, with arithmetic, sqrt(s) and nonzero(s) of its own.
#pragma once
#include <cmath>

#include "newton_schulz.h"

namespace isqrt {

/// t itself, 1 where t = 0.
ISQRT_FN float nonzero(float t) { return t == 0.0f ? 1.0f : t; }
ISQRT_FN double nonzero(double t) { return t == 0.0 ? 1.0 : t; }

/// <G, P> and <s (s Sigma), D>. Engines that can do both at once have functions of this name.
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

/// What divides the upstream gradient before it enters the iteration, see below.
template <class Scalar> ISQRT_FN Scalar upstream_divisor(const Scalar& t, Root root) {
  return root == Root::kSquare ? Scalar(1) : nonzero(t);
}

/// Eqs. 5 and 8, the end of both gradients. With the compensation s(t), t s'(t) = s / 2 or -s / 2, and <G, P>, the
/// inner product of the upstream gradient and P = Y_N or Z_N,
///     dL/dSigma = s / t dL/dA + (s / t <G, P> t s'(t) / s - <s / t A, dL/dA>) I
/// For the inverse root s / t = t^(-3/2) leaves the range of float32 long before the gradients of Sigma and of the root
/// do, as do other products and quotients of these numbers. So G enters divided by u = 1, or t: D = dL/dA / u, and with
/// f = 1 / sqrt(t) for both roots
///     dL/dSigma = f D + f (<G, P> / u t s'(t) / s - <f (f Sigma), D>) I
/// where all that is computed on the way is of a size between those of its factors and of its result.
template <class Engine, class Matrix, class Scalar>
ISQRT_FN auto normalization_backward(Engine& e, const Matrix& D, const Scalar& u, const Scalar& f,
                                     const InnerProducts<Scalar>& inner, Root root) {
  const auto of_compensation = (root == Root::kSquare ? 0.5 : -0.5) * inner.of_gradient / u;  // Eq. 5
  return e.result(f * (of_compensation - inner.of_sigma), f, D);                              // Eq. 8
}

struct Unwanted {
  template <class Scalar, class Matrix> ISQRT_FN void operator()(const Scalar&, Matrix&) const {}
};

/// Eqs. 4-8 for the upstream gradient G = dL/dYhat. Returns the result that is dL/dSigma, symmetric. Eq. 4, by which G
/// is multiplied by the compensation first, is left to the end: what follows is linear. The root itself is s P, of
/// which with_root(s, P) may make a result.
template <class Engine, class SigmaSource, class GradSource, class WithRoot = Unwanted>
ISQRT_FN auto matrix_root_backward(Engine& e, const SigmaSource& sigma, const GradSource& grad, const Steps& steps,
                                   Root root, const WithRoot& with_root = {}) {
  auto m = make_iterates(e, steps), d = make_iterates(e, steps);
  const auto t = e.load_normalized(m.Y, sigma);  // A = Sigma / t
  const auto divisor = upstream_divisor(t, root);
  e.load(d.Y, grad, divisor);
  newton_schulz_tangent(e, m, d, steps, root);  // Eqs. 6-7
  auto P = root == Root::kSquare ? m.Y : m.Z;
  const auto D = root == Root::kSquare ? d.Y : d.Z;
  const auto f = compensation(t, Root::kInverse);
  const auto inner = inner_products(e, grad, P, sigma, D, f);
  with_root(compensation(t, root), P);
  return normalization_backward(e, D, divisor, f, inner, root);
}

/// The same for the upstream gradient g of the mean of Yhat.
template <class Engine, class SigmaSource, class GradSource>
ISQRT_FN auto matrix_root_mean_backward(Engine& e, const SigmaSource& sigma, const GradSource& grad, const Steps& steps,
                                        int64_t channels) {
  auto m = make_iterates(e, steps), d = make_iterates(e, steps);
  auto g = e.column(), sums = e.column(), u = e.column(), v = e.column();
  const auto t = e.load_normalized(m.Y, sigma), divisor = upstream_divisor(t, Root::kSquare);
  e.load(d.Y, grad, divisor);
  e.load(g, grad);
  newton_schulz_tangent_sums(e, m, d, steps, g, 0.5 / channels, sums, u, v);
  const auto f = compensation(t, Root::kInverse);
  const auto of_gradient = e.dot(g, sums) / channels;  // <G, Y_N> = g' Y_N 1 / C
  return normalization_backward(e, d.Y, divisor, f, {of_gradient, e.inner(sigma, d.Y, f)}, Root::kSquare);
}

}  // namespace isqrt
