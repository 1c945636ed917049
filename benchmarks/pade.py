"""The matrix root by a Pade approximant, and its gradient by a Lyapunov equation, after the published formulas.

Song, Sebe, Wang: Fast Differentiable Matrix Square Root, ICLR 2022 ("MPA" with the Newton-Schulz Lyapunov solver).
"""

import functools

import numpy as np
import torch
from torch import Tensor


@functools.cache
def coefficients(order: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """p and q of sqrt(1 - z) ~ (sum p_k z^k) / (sum q_k z^k), both of that degree: the diagonal Pade approximant.

    Its partial fractions are known: 1 - sum_j a_j z / (1 - b_j z) with a_j = 2 sin^2(t_j) / (2 n + 1),
    b_j = cos^2(t_j) and t_j = j pi / (2 n + 1).
    """
    t = np.arange(1, order + 1) * np.pi / (2 * order + 1)
    a, b = 2 / (2 * order + 1) * np.sin(t) ** 2, np.cos(t) ** 2
    factors = [np.polynomial.Polynomial([1, -root]) for root in b]
    q = np.prod(factors)
    p = q
    for j in range(order):
        p = p - np.polynomial.Polynomial([0, a[j]]) * np.prod(factors[:j] + factors[j + 1 :], initial=1)
    return tuple(p.coef), tuple(q.coef)


def solve_lyapunov(b: Tensor, c: Tensor, iterations: int) -> Tensor:
    """X with B X + X B = C for positive definite B, [B, C, C]: the sign of [[B, C], [0, -B]] by Newton-Schulz."""
    norm = torch.linalg.matrix_norm(b, keepdim=True)
    b, c = b / norm, c / norm
    eye3 = 3 * torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
    for _ in range(iterations):
        square = b @ b
        rest = eye3 - square
        c = 0.5 * (b @ c @ b - square @ c + c @ rest)
        b = 0.5 * (b @ rest)
    return 0.5 * c


class PadeRoot(torch.autograd.Function):
    """The root of matrices [B, C, C] with eigenvalues of 0 and more."""

    @staticmethod
    def forward(ctx, a: Tensor, order: int, iterations: int) -> Tensor:
        ctx.iterations = iterations
        norm = torch.linalg.matrix_norm(a, keepdim=True)
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        z = eye - a / norm
        p, q = coefficients(order)
        numerator, denominator, power = p[0] * eye, q[0] * eye, eye
        for k in range(1, order + 1):
            power = power @ z
            numerator, denominator = numerator + p[k] * power, denominator + q[k] * power
        root = norm.sqrt() * torch.linalg.solve(denominator, numerator)
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (root,) = ctx.saved_tensors
        return solve_lyapunov(root, (grad + grad.mT) / 2, ctx.iterations), None, None


def pade_sqrt(a: Tensor, order: int = 5, iterations: int = 8) -> Tensor:
    """The root of [B, C, C], with the publication's order and number of steps of the Lyapunov solver."""
    return PadeRoot.apply(a, order, iterations)
