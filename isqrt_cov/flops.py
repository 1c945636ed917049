"""Flops that N steps need, triangles of symmetric products counted once: what torch.utils.flop_counter counts for the
operators, and what the benchmarks' floor charges. Shapes are those of feature maps, (B, C, H, W) or (B, C, M).
"""

import math
from collections.abc import Sequence


def half_products(iterations: int, output: str) -> tuple[int, int]:
    """Symmetric C x C products of C^3 flops each (one triangle of 2 C^3) that N steps need: (forward, backward).

    All iterates are polynomials in A, hence symmetric, so that one triangle of a product suffices.

    Forward, a step is T = Z Y; Y <- 1.5 Y - 0.5 Y T; Z <- 1.5 Z - 0.5 T Z: 3 products. Two steps multiply Y and Z by a
    polynomial of degree four in T, which takes two squares, S = T T - 4.5 T and S S: T, S, S S, Y and Z, 5 products.
    The first ones need none for T = A nor for Z, which is a sum, and the last ones none for Z_N. With a single step
    first where N is odd that is 1, 3, 5, 7, 10 for N = 1, 2, 3, 4, 5.

    Backward, with x, mu and one C x C matrix kept, by the tangent of the forward in the direction of the symmetrised
    upstream gradient: each product A B becomes A B and A dB + dA B, the symmetric sum of two products, of which one
    triangle of each is needed: 3 half products for each one of the forward. (Recurrences that go backward need the
    iterates, and cost more where these are recomputed.)

    Output "mean" needs Y_N v alone: the products of the last forward step become matrix-vector ones, also that for Y_N
    in the backward, and those of the first tangent with an upstream gradient of rank 2, a step of its own, cost C^2.
    The rest is counted as it is for a full gradient.

    Where there are fewer positions than channels, the iteration may take their Gram matrix (csrc/gram.h), which has
    M - 1 rows, and as many products for Z_N: one less where all steps are the first ones and the last ones, for then
    Z_N is a sum.
    """
    if output != "mean":
        forward = _products(_steps_at_once(iterations), ends=True)
        return forward, 3 * forward
    backward = 3 * _products([1, *_steps_at_once(iterations - 1)], ends=True)
    return _products(_steps_at_once(iterations - 1), ends=False), backward - 3


def _steps_at_once(iterations: int) -> list[int]:
    return [1] * (iterations % 2) + [2] * (iterations // 2)


def _products(steps_at_once: list[int], ends: bool) -> int:
    """Products of the forward; where it ends with them, Z_N is not needed."""
    needed = 0
    for index, steps in enumerate(steps_at_once):
        is_first, is_last = index == 0, ends and index == len(steps_at_once) - 1
        needed += {1: 3, 2: 5}[steps] - is_first - (is_first or is_last)
    return needed


def of_pooling(shape: Sequence[int]) -> tuple[int, int]:
    """(forward, backward) of a covariance: one triangle of X X', 2 C C M / 2; dX = W (X - mu), 2 C C M."""
    batch, channels, *positions = shape
    product = batch * channels**2 * math.prod(positions)
    return product, 2 * product


def of_root(batch: int, side: int, iterations: int, inverse: bool = False) -> tuple[int, int]:
    """(forward, backward) of the square root, or its inverse, of matrices."""
    forward, backward = half_products(iterations, "matrix")
    is_sum = inverse and iterations <= 2
    return batch * (forward - is_sum) * side**3, batch * (backward - 3 * is_sum) * side**3


def by_channels(shape: Sequence[int], iterations: int, output: str) -> tuple[int, int]:
    """(forward, backward) of the root of the covariance: pooling; half products, C^3 each; three matrix-vector products
    for "mean", 2 C^2 each.
    """
    batch, channels = shape[:2]
    half, pooling = half_products(iterations, output), of_pooling(shape)
    vectors = 3 * 2 * channels**2 if output == "mean" else 0
    return pooling[0] + batch * (half[0] * channels**3 + vectors), pooling[1] + batch * half[1] * channels**3


def by_positions(shape: Sequence[int], iterations: int, output: str) -> tuple[int, int]:
    """The same from the side of the positions: the features F have n = M - 1 numbers a channel, the half products n^3
    flops, and the others are
      forward   one triangle of F' F: C n n; P = R F' and one triangle of F P: 2 C n n + C C n;
                for "mean" vectors instead, 1' F, R times that, and F times that: 4 C n + 2 n n, and three
                matrix-vector products for the last step
      backward  V = G F and one triangle of F' V: 2 C C n + C n n; V R and F dK: 4 C n n;
                for "mean" V has rank 2: F dK alone, 2 C n n, and vectors, some 8 C n
    """
    batch, channels, *positions = shape
    n = math.prod(positions) - 1
    if output == "mean":
        forward, backward = half_products(iterations, output)
        return (
            batch * (channels * n**2 + forward * n**3 + 4 * channels * n + 2 * n**2 + 3 * 2 * n**2),
            batch * (backward * n**3 + 2 * channels * n**2 + 8 * channels * n),
        )
    root = of_root(batch, n, iterations, inverse=True)
    return (
        root[0] + batch * (3 * channels * n**2 + channels**2 * n),
        root[1] + batch * (2 * channels**2 * n + 5 * channels * n**2),
    )
