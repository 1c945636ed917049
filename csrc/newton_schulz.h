// The coupled Newton-Schulz iteration, Eq. 1, and its derivative.
//
//     Y_0 = A, Z_0 = I;   T = Z Y,   Y <- a Y + b Y T,   Z <- a Z + b T Z        (a, b) = (1.5, -0.5)
//
// Y_N -> A^{1/2} and Z_N -> A^{-1/2} for a symmetric A with eigenvalues in (0, 1]. Y, Z and T are polynomials in A:
// they commute and are symmetric, so an engine computes one triangle of each product. The price: rounding errors, which
// the iteration with full products leaves alone once it has converged, grow by about 1.4 in each further step
// (measured, condition 100), so that steps beyond some 15 do not come nearer.
//
// An Engine owns the C x C matrices of one sample (or of a batch) and offers
//     product(D, A, B)                          D = A B
//     product(D, alpha, beta, A, B)             D = alpha D + beta A B
//     products(D, A1, B1, A2, B2)               D = A1 B1 + A2 B2
//     products(D, alpha, beta, A1, B1, A2, B2)  D = alpha D + beta (A1 B1 + A2 B2)
//     identity_plus(D, alpha, beta, A)          D = alpha I + beta A
//     scale(D, alpha, A)                        D = alpha A
// where every result is known symmetric and D may also be an operand: it changes only when the whole result is known.
// Where only the mean of a root is wanted, its last step acts on a vector, and the engine offers
//     sums(u, A), multiply(u, A, v)             u = A 1, u = A v
//     add(u, alpha, beta, v)                    u = alpha u + beta v
//     rank_two(D, alpha, beta, u, v, w)         D = alpha D + beta (u v' + v u' + w 1' + 1 w')
#pragma once
#include <cmath>

#include "views.h"

namespace isqrt {

/// The two coefficients of one step; the default is the paper's.
struct Step {
  double a = 1.5, b = -0.5;
};

/// N steps, the first `tuned` of which have coefficients of their own.
struct Steps {
  static constexpr int kMaxTuned = 32;
  int iterations;
  int tuned = 0;
  Step table[kMaxTuned] = {};
  ISQRT_FN Step operator[](int n) const { return n < tuned ? table[n] : Step{}; }
};

/// Minimax steps for eigenvalues of A in [floor, 1]: the square roots s of the eigenvalues of Z Y start in [l, 1],
/// l = sqrt(floor), and a step maps s to s (a + b s^2). Its (a, b) are those that bring the image of the present
/// interval [l, u] nearest to 1, as far below it as above. They tend to the paper's as the interval shrinks to 1.
inline Steps minimax_steps(int iterations, double floor) {
  Steps steps{iterations};
  double l = std::sqrt(floor), u = 1;
  for (; steps.tuned < iterations && steps.tuned < Steps::kMaxTuned; ++steps.tuned) {
    const double q = l * l + l * u + u * u, m = std::sqrt(q / 3);
    const auto p = [q](double s) { return q * s - s * s * s; };
    const double k = 2 / (p(l) + p(m));
    steps.table[steps.tuned] = {k * q, -k};
    u = k * p(m);
    l = k * p(l);
  }
  return steps;
}

/// Which of the two limits is wanted: Y_N, the square root, or Z_N, the inverse square root.
enum class Root : int { kSquare = 0, kInverse = 1 };

/// One step of Eq. 1, the first one with Z = I, hence T = A. Y and Z are computed where they are wanted.
template <class Engine, class Matrix>
ISQRT_FN void newton_schulz_step(Engine& e, Matrix& Y, Matrix& Z, Matrix& T, const Step& s, bool first, bool want_Y,
                                 bool want_Z) {
  if (first) {
    if (want_Z) e.identity_plus(Z, s.a, s.b, Y);  // Z = a I + b A
    if (want_Y) e.product(Y, s.a, s.b, Y, Y);     // Y = a A + b A A
  } else {
    e.product(T, Z, Y);                        // T = Z Y
    if (want_Y) e.product(Y, s.a, s.b, Y, T);  // Y = a Y + b Y T
    if (want_Z) e.product(Z, s.a, s.b, T, Z);  // Z = a Z + b T Z
  }
}

/// Eq. 1. On entry Y = A; on return Y = Y_N or Z = Z_N, whichever `root` names. The first step costs one product,
/// the last one two (the other root is not needed): 3 N - 3 half products in all.
template <class Engine, class Matrix>
ISQRT_FN void newton_schulz(Engine& e, Matrix& Y, Matrix& Z, Matrix& T, const Steps& steps, Root root) {
  const int last = steps.iterations - 1;
  for (int n = 0; n <= last; ++n)
    newton_schulz_step(e, Y, Z, T, steps[n], n == 0, n < last || root == Root::kSquare,
                       n < last || root == Root::kInverse);
}

/// sums = Y_N 1: the last step as matrix-vector products, which saves two of the 3 N - 3 products (one for N = 1).
template <class Engine, class Matrix, class Column>
ISQRT_FN void newton_schulz_sums(Engine& e, Matrix& Y, Matrix& Z, Matrix& T, const Steps& steps, Column& sums,
                                 Column& u, Column& v) {
  const int last = steps.iterations - 1;
  for (int n = 0; n < last; ++n) newton_schulz_step(e, Y, Z, T, steps[n], n == 0, true, true);
  e.sums(sums, Y);
  if (last > 0) e.multiply(u, Z, sums);          // u = T 1 = Z (Y 1)
  e.multiply(v, Y, last > 0 ? u : sums);         // v = Y (T 1)
  e.add(sums, steps[last].a, steps[last].b, v);  // Y_N 1 = a Y 1 + b Y T 1
}

/// One step of the iteration and its derivative, but the first one.
template <class Engine, class Matrix>
ISQRT_FN void newton_schulz_tangent_step(Engine& e, Matrix& Y, Matrix& Z, Matrix& T, Matrix& dY, Matrix& dZ, Matrix& dT,
                                         const Step& s, bool want_Y, bool want_Z, bool want_Y_itself) {
  e.products(dT, dZ, Y, Z, dY);  // dT = dZ Y + Z dY
  e.product(T, Z, Y);            //  T = Z Y
  if (want_Y) {
    e.products(dY, s.a, s.b, dY, T, Y, dT);           // dY = a dY + b (dY T + Y dT)
    if (want_Y_itself) e.product(Y, s.a, s.b, Y, T);  //  Y = a Y + b Y T
  }
  if (want_Z) {
    e.products(dZ, s.a, s.b, dT, Z, T, dZ);  // dZ = a dZ + b (dT Z + T dZ)
    e.product(Z, s.a, s.b, T, Z);            //  Z = a Z + b T Z
  }
}

/// Eqs. 6-7 without their stored iterates. The derivative of a polynomial at a symmetric A is self-adjoint, so the
/// gradient with respect to A is the tangent of the iteration in the direction of the symmetric upstream gradient.
/// On entry Y = A and dY = sym(G); on return dY = dL/dA and Y = Y_N (dZ and Z for the inverse root). Every sum of two
/// products below is the derivative of a symmetric polynomial, hence symmetric: 9 half products a step.
template <class Engine, class Matrix>
ISQRT_FN void newton_schulz_tangent(Engine& e, Matrix& Y, Matrix& Z, Matrix& T, Matrix& dY, Matrix& dZ, Matrix& dT,
                                    const Steps& steps, Root root) {
  const int last = steps.iterations - 1;
  for (int n = 0; n <= last; ++n) {
    const Step s = steps[n];
    const bool want_Y = n < last || root == Root::kSquare, want_Z = n < last || root == Root::kInverse;
    if (n > 0) {
      newton_schulz_tangent_step(e, Y, Z, T, dY, dZ, dT, s, want_Y, want_Z, true);
      continue;
    }
    if (want_Z) e.scale(dZ, s.b, dY);                    // dZ = b G
    if (want_Y) e.products(dY, s.a, s.b, dY, Y, Y, dY);  // dY = a G + b (G A + A G)
    newton_schulz_step(e, Y, Z, T, s, true, want_Y, want_Z);
  }
}

/// The same for the square root where its mean alone is wanted, whose upstream gradient g makes G of rank two,
/// (g 1' + 1 g') / (2 C) with `share` = 1 / (2 C): the first step needs no product with it, and the last one none for
/// Y_N, of which only sums = Y_N 1 is needed.
template <class Engine, class Matrix, class Column>
ISQRT_FN void newton_schulz_tangent_sums(Engine& e, Matrix& Y, Matrix& Z, Matrix& T, Matrix& dY, Matrix& dZ, Matrix& dT,
                                         const Steps& steps, const Column& g, double share, Column& sums, Column& u,
                                         Column& v) {
  const int last = steps.iterations - 1;
  for (int n = 0; n <= last; ++n) {
    const Step s = steps[n];
    if (n == 0) {
      if (n < last) e.scale(dZ, s.b, dY);
      e.sums(sums, Y);
      e.multiply(u, Y, g);
      e.rank_two(dY, s.a, s.b * share, g, sums, u);  // G A + A G = share (g (A 1)' + (A 1) g' + (A g) 1' + 1 (A g)')
      if (n < last) newton_schulz_step(e, Y, Z, T, s, true, true, true);
    } else {
      newton_schulz_tangent_step(e, Y, Z, T, dY, dZ, dT, s, true, n < last, n < last);
    }
    if (n < last) continue;
    if (n > 0) {
      e.sums(sums, Y);
      e.sums(u, T);
      e.multiply(v, Y, u);
    } else {
      e.multiply(v, Y, sums);
    }
    e.add(sums, s.a, s.b, v);
  }
}

}  // namespace isqrt
