// The coupled Newton-Schulz iteration, Eq. 1, and its derivative.
//
//     Y_0 = A, Z_0 = I;   T = Z Y,   Y <- a Y + b Y T,   Z <- a Z + b T Z        (a, b) = (1.5, -0.5)
//
// Y_N -> A^{1/2} and Z_N -> A^{-1/2} for a symmetric A with eigenvalues in (0, 1]. Y, Z and T are polynomials in A:
// they commute and are symmetric, so one triangle of each product is computed. Of T that is an approximation, as
// rounded Y and Z commute only nearly: harmless while few steps follow, but its errors grow in each of them. Y Z Y and
// Z Y Z, however, are symmetric for any symmetric Y and Z. So the later steps compute T = Z Y and U = Y Z = T' in full,
// Y <- a Y + b Y T and Z <- a Z + b Z U, and are stable.
//
// An Engine owns the C x C matrices of one sample (or of a batch) and offers
//     matrix()                                  a new one
//     product(D, alpha, beta, A, B)             D = alpha D + beta A B (in BLAS alpha and beta are the other way round)
//     products(D, alpha, beta, A1, B1, A2, B2)  D = alpha D + beta (A1 B1 + A2 B2)
//     identity_plus(D, alpha, beta, A)          D = alpha I + beta A
//     scale(D, alpha, A)                        D = alpha A
// where every result is known symmetric and D may also be an operand: it changes only when the whole result is known;
//     product(D, E, A, B, in_full)              D = A B; in full it is not symmetric, and E = D' = B A
//     products(D, E, A1, B1, A2, B2, in_full)   D = A1 B1 + A2 B2 likewise
// which return D', that is E or D itself. Both may be second operands of the products above;
//     product(D, alpha, F, beta, G, gamma, A, B)  D = alpha F + beta G + gamma A B, and products(...) likewise
//     release(A)                                A is not read any more before it is a result again
// which those have that take two steps at once (below), and a constant kTakesTwoSteps; others take single ones.
// Where only the mean of a root is wanted, its last step can act on a vector: on a CPU, whose engine offers
//     column()                                  a new vector
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
  int mirrored = 0;  // the steps before this one compute one triangle of T
  ISQRT_FN Step operator[](int n) const { return n >= 0 && n < tuned ? table[n] : Step{}; }
  ISQRT_FN bool in_full(int n) const { return n >= mirrored; }
  ISQRT_FN bool any_in_full() const { return mirrored < iterations; }
};

/// Minimax steps for eigenvalues of A in [floor, 1]: the square roots s of the eigenvalues of Z Y start in [l, 1],
/// l = sqrt(floor), and a step maps s to s (a + b s^2). Its (a, b) are those that bring the image of the present
/// interval [l, u] nearest to 1, as far below it as above. They tend to the paper's as the interval shrinks to 1.
inline void tune(Steps& steps, double floor) {
  double l = std::sqrt(floor), u = 1;
  for (; steps.tuned < steps.iterations && steps.tuned < Steps::kMaxTuned; ++steps.tuned) {
    const double q = l * l + l * u + u * u, m = std::sqrt(q / 3);
    const auto p = [q](double s) { return q * s - s * s * s; };
    const double k = 2 / (p(l) + p(m));
    steps.table[steps.tuned] = {k * q, -k};
    u = k * p(m);
    l = k * p(l);
  }
}

/// The paper's steps for a floor of 0, minimax ones for any other. What one triangle of T leaves out is of no account
/// (measured in float32, four spectra, up to 20 steps) as long as small eigenvalues have grown by no more than 24:
/// in 8 of the paper's steps, in 4 for a floor of 1e-3; and in one more where that is the last.
inline Steps choose_steps(int iterations, double floor) {
  Steps steps{iterations};
  if (floor != 0) tune(steps, floor);
  for (double growth = 1; growth <= 24 && steps.mirrored < iterations; ++steps.mirrored)
    growth *= steps[steps.mirrored].a;
  if (steps.mirrored == iterations - 1) ++steps.mirrored;
  return steps;
}

/// Which of the two limits is wanted: Y_N, the square root, or Z_N, the inverse square root.
enum class Root : int { kSquare = 0, kInverse = 1 };

/// Two steps at once. With W = a I + b T and W' = a' I + b' T W^2 they are Y <- Y W W' and Z <- Z W W', all being
/// polynomials in A. W W' has degree four in T, and takes two squares instead of three products:
///
///     S = T^2 + alpha T;   V = gamma T + epsilon S + zeta S^2 = W W' - eta I;   Y <- eta Y + Y V,   Z <- eta Z + Z V
///
/// Five half products instead of six. The identity is left out of V, beside which small eigenvalues of T would lose
/// their digits: rounding errors are about those of single steps (simulated in float32 up to 9 steps, for covariances
/// of photographs and with flat, decaying and deficient spectra).
struct TwoSteps {
  double eta, alpha, gamma, epsilon, zeta;

  ISQRT_FN TwoSteps(const Step& first, const Step& second) {
    const double a = first.a, b = first.b, a2 = second.a, b2 = second.b;
    eta = a * a2;
    alpha = 1.5 * a / b;
    gamma = a2 * b - a * a * a * b2 / 8;
    epsilon = 0.75 * a * a * b * b2;
    zeta = b * b * b * b2;
  }
};

template <class Engine> constexpr bool kTakesTwoSteps = requires { Engine::kTakesTwoSteps; };

/// How many steps are taken at once from step n on, of those before `end`: two where T is mirrored, after a single one
/// where their number is odd.
template <class Engine> ISQRT_FN int steps_at_once(const Steps& steps, int n, int end) {
  const int left = (end < steps.mirrored ? end : steps.mirrored) - n;
  return kTakesTwoSteps<Engine> && left > 0 && left % 2 == 0 ? 2 : 1;
}

/// The matrices of the iteration, or their derivatives. U is T' where T is computed in full, and S in two steps.
template <class Matrix> struct Iterates {
  Matrix Y, Z, T, U;
};

template <class Engine> ISQRT_FN auto make_iterates(Engine& e, const Steps& steps) {
  Iterates<decltype(e.matrix())> m{e.matrix(), e.matrix(), e.matrix(), {}};
  if (kTakesTwoSteps<Engine> || steps.any_in_full()) m.U = e.matrix();
  return m;
}

/// Step n of Eq. 1, the first one with Z = I, hence T = A. Y and Z are computed where they are wanted.
template <class Engine, class Matrix>
ISQRT_FN void newton_schulz_step(Engine& e, Iterates<Matrix>& m, const Steps& steps, int n, bool want_Y, bool want_Z) {
  const Step s = steps[n];
  if (n == 0) {
    if (want_Z) e.identity_plus(m.Z, s.a, s.b, m.Y);  // Z = a I + b A
    if (want_Y) e.product(m.Y, s.a, s.b, m.Y, m.Y);   // Y = a A + b A A
  } else {
    const auto U = e.product(m.T, m.U, m.Z, m.Y, steps.in_full(n));  // T = Z Y, U = T'
    if (want_Y) e.product(m.Y, s.a, s.b, m.Y, m.T);                  // Y = a Y + b Y T
    if (want_Z) e.product(m.Z, s.a, s.b, m.Z, U);                    // Z = a Z + b Z U
  }
}

/// Steps n and n + 1 at once.
template <class Engine, class Matrix>
ISQRT_FN void newton_schulz_two_steps(Engine& e, Iterates<Matrix>& m, const Steps& steps, int n, bool want_Y,
                                      bool want_Z) {
  const TwoSteps s(steps[n], steps[n + 1]);
  if (n > 0) e.product(m.T, m.U, m.Z, m.Y, false);  // T = Z Y
  const Matrix T = n > 0 ? m.T : m.Y;
  e.product(m.U, s.alpha, T, 0, T, 1, T, T);                     // S = alpha T + T T
  e.product(m.T, s.gamma, T, s.epsilon, m.U, s.zeta, m.U, m.U);  // V = gamma T + epsilon S + zeta S S
  e.release(m.U);
  if (want_Y) e.product(m.Y, s.eta, 1, m.Y, m.T);           // Y = eta Y + Y V
  if (want_Z && n > 0) e.product(m.Z, s.eta, 1, m.Z, m.T);  // Z = eta Z + Z V
  if (want_Z && n == 0) e.identity_plus(m.Z, s.eta, 1, m.T);
}

/// The steps before `end`; `want_Y` and `want_Z` tell what of their result is wanted.
template <class Engine, class Matrix>
ISQRT_FN void newton_schulz_steps(Engine& e, Iterates<Matrix>& m, const Steps& steps, int end, bool want_Y,
                                  bool want_Z) {
  for (int n = 0, taken; n < end; n += taken) {
    taken = steps_at_once<Engine>(steps, n, end);
    const bool last = n + taken == end;
    if constexpr (kTakesTwoSteps<Engine>)
      if (taken == 2) {
        newton_schulz_two_steps(e, m, steps, n, !last || want_Y, !last || want_Z);
        continue;
      }
    newton_schulz_step(e, m, steps, n, !last || want_Y, !last || want_Z);
  }
}

/// Eq. 1. On entry Y = A; on return Y = Y_N or Z = Z_N, whichever `root` names. The first step costs one product,
/// the last one two (the other root is not needed): 3 N - 3 half products in all, one for the square root of N = 1; one
/// more for each T in full; one less for each two steps at once, 10 for N = 5.
template <class Engine, class Matrix>
ISQRT_FN void newton_schulz(Engine& e, Iterates<Matrix>& m, const Steps& steps, Root root) {
  newton_schulz_steps(e, m, steps, steps.iterations, root == Root::kSquare, root == Root::kInverse);
}

/// sums = Y_N 1: the last step as matrix-vector products, which saves two of the 3 N - 3 products (one for N = 1).
template <class Engine, class Matrix, class Column>
ISQRT_FN void newton_schulz_sums(Engine& e, Iterates<Matrix>& m, const Steps& steps, Column& sums, Column& u,
                                 Column& v) {
  const int last = steps.iterations - 1;
  newton_schulz_steps(e, m, steps, last, true, true);
  e.sums(sums, m.Y);
  if (last > 0) e.multiply(u, m.Z, sums);        // u = T 1 = Z (Y 1)
  e.multiply(v, m.Y, last > 0 ? u : sums);       // v = Y (T 1)
  e.add(sums, steps[last].a, steps[last].b, v);  // Y_N 1 = a Y 1 + b Y T 1
}

/// Step n of the iteration and of its derivative, n > 0.
template <class Engine, class Matrix>
ISQRT_FN void tangent_step(Engine& e, Iterates<Matrix>& m, Iterates<Matrix>& d, const Steps& steps, int n, bool want_Y,
                           bool want_Z, bool want_Y_itself) {
  const Step s = steps[n];
  const bool in_full = steps.in_full(n);
  const auto dU = e.products(d.T, d.U, d.Z, m.Y, m.Z, d.Y, in_full);  // dT = dZ Y + Z dY, dU = dT'
  const auto U = e.product(m.T, m.U, m.Z, m.Y, in_full);              //  T = Z Y, U = T'
  if (want_Y) {
    e.products(d.Y, s.a, s.b, d.Y, m.T, m.Y, d.T);          // dY = a dY + b (dY T + Y dT)
    if (want_Y_itself) e.product(m.Y, s.a, s.b, m.Y, m.T);  //  Y = a Y + b Y T
  }
  if (want_Z) {
    e.products(d.Z, s.a, s.b, d.Z, U, m.Z, dU);  // dZ = a dZ + b (dZ U + Z dU)
    e.product(m.Z, s.a, s.b, m.Z, U);            //  Z = a Z + b Z U
  }
}

/// Steps n and n + 1 at once, and their derivative.
template <class Engine, class Matrix>
ISQRT_FN void tangent_two_steps(Engine& e, Iterates<Matrix>& m, Iterates<Matrix>& d, const Steps& steps, int n,
                                bool want_Y, bool want_Z, bool want_Y_itself) {
  const TwoSteps s(steps[n], steps[n + 1]);
  if (n > 0) {
    e.products(d.T, d.U, d.Z, m.Y, m.Z, d.Y, false);  // dT = dZ Y + Z dY
    e.product(m.T, m.U, m.Z, m.Y, false);             //  T = Z Y
  }
  const Matrix T = n > 0 ? m.T : m.Y, dT = n > 0 ? d.T : d.Y;
  e.products(d.U, s.alpha, dT, 0, dT, 1, dT, T, T, dT);  // dS = alpha dT + dT T + T dT
  e.product(m.U, s.alpha, T, 0, T, 1, T, T);             //  S = alpha T + T T
  // dV = gamma dT + epsilon dS + zeta (dS S + S dS), V = gamma T + epsilon S + zeta S S
  e.products(d.T, s.gamma, dT, s.epsilon, d.U, s.zeta, d.U, m.U, m.U, d.U);
  e.product(m.T, s.gamma, T, s.epsilon, m.U, s.zeta, m.U, m.U);
  e.release(d.U), e.release(m.U);
  if (want_Y) {
    e.products(d.Y, s.eta, 1, d.Y, m.T, m.Y, d.T);          // dY = eta dY + dY V + Y dV
    if (want_Y_itself) e.product(m.Y, s.eta, 1, m.Y, m.T);  //  Y = eta Y + Y V
  }
  if (want_Z && n > 0) {
    e.products(d.Z, s.eta, 1, d.Z, m.T, m.Z, d.T);  // dZ = eta dZ + dZ V + Z dV
    e.product(m.Z, s.eta, 1, m.Z, m.T);             //  Z = eta Z + Z V
  } else if (want_Z) {
    e.scale(d.Z, 1, d.T);
    e.identity_plus(m.Z, s.eta, 1, m.T);
  }
}

/// Eqs. 6-7 without their stored iterates. The derivative of a polynomial at a symmetric A is self-adjoint, so the
/// gradient with respect to A is the tangent of the iteration in the direction of the symmetric upstream gradient.
/// On entry Y = A and dY = sym(G); on return dY = dL/dA and Y = Y_N (dZ and Z for the inverse root). Every sum of two
/// products below is the derivative of a symmetric polynomial, hence symmetric: three half products for each one of
/// the iteration, 9 N - 9 with single steps and 30 for N = 5 with two at once, 3 more for each T in full.
template <class Engine, class Matrix>
ISQRT_FN void newton_schulz_tangent(Engine& e, Iterates<Matrix>& m, Iterates<Matrix>& d, const Steps& steps,
                                    Root root) {
  for (int n = 0, taken; n < steps.iterations; n += taken) {
    taken = steps_at_once<Engine>(steps, n, steps.iterations);
    const bool last = n + taken == steps.iterations;
    const bool want_Y = !last || root == Root::kSquare, want_Z = !last || root == Root::kInverse;
    if constexpr (kTakesTwoSteps<Engine>)
      if (taken == 2) {
        tangent_two_steps(e, m, d, steps, n, want_Y, want_Z, true);
        continue;
      }
    if (n > 0) {
      tangent_step(e, m, d, steps, n, want_Y, want_Z, true);
      continue;
    }
    const Step s = steps[n];
    // Z comes before dY, and Y after it: engines compute products that follow each other at the same time.
    if (want_Z) e.scale(d.Z, s.b, d.Y);  // dZ = b G
    newton_schulz_step(e, m, steps, n, false, want_Z);
    if (want_Y) e.products(d.Y, s.a, s.b, d.Y, m.Y, m.Y, d.Y);  // dY = a G + b (G A + A G)
    newton_schulz_step(e, m, steps, n, want_Y, false);
  }
}

/// The same for the square root where its mean alone is wanted, whose upstream gradient g makes G of rank two,
/// (g 1' + 1 g') / (2 C) with `share` = 1 / (2 C): the first step needs no product with it, and the last one none for
/// Y_N, of which only sums = Y_N 1 is needed.
template <class Engine, class Matrix, class Column>
ISQRT_FN void newton_schulz_tangent_sums(Engine& e, Iterates<Matrix>& m, Iterates<Matrix>& d, const Steps& steps,
                                         const Column& g, double share, Column& sums, Column& u, Column& v) {
  const int end = steps.iterations;
  const Step first = steps[0];
  if (end > 1) e.scale(d.Z, first.b, d.Y);
  e.sums(sums, m.Y);
  e.multiply(u, m.Y, g);
  // G A + A G = share (g (A 1)' + (A 1) g' + (A g) 1' + 1 (A g)')
  e.rank_two(d.Y, first.a, first.b * share, g, sums, u);
  if (end == 1) {
    e.multiply(v, m.Y, sums);
    return e.add(sums, first.a, first.b, v);
  }
  newton_schulz_step(e, m, steps, 0, true, true);
  for (int n = 1, taken; n < end; n += taken) {
    taken = steps_at_once<Engine>(steps, n, end);
    const bool last = n + taken == end;
    taken == 2 ? tangent_two_steps(e, m, d, steps, n, true, !last, !last)
               : tangent_step(e, m, d, steps, n, true, !last, !last);
    if (!last) continue;
    // Y_N 1 = a Y 1 + b Y Z Y 1, or eta Y 1 + Y V 1
    const Step s = taken == 2 ? Step{TwoSteps(steps[n], steps[n + 1]).eta, 1} : steps[n];
    e.sums(sums, m.Y);
    taken == 2 ? e.sums(u, m.T) : e.multiply(u, m.Z, sums);
    e.multiply(v, m.Y, u);
    e.add(sums, s.a, s.b, v);
  }
}

}  // namespace isqrt
