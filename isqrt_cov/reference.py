"""The mathematics of isqrt_cov in plain torch: the oracle of every test, and the baselines of every benchmark.

Dai et al., "Second-order Attention Network for Single Image Super-Resolution", CVPR 2019, after Li et al., "Towards
Faster Training of Global Covariance Pooling Networks by Iterative Matrix Square Root Normalization", CVPR 2018.

Per sample, X is C x M (channels x positions), ' a transpose, and dV stands for the gradient dL/dV::

    mu = X 1 / M,  Sigma = (X - mu)(X - mu)' / M                                         the biased covariance
    Y_n = Y_{n-1} (3I - Z_{n-1} Y_{n-1}) / 2,  Z_n = (3I - Z_{n-1} Y_{n-1}) Z_{n-1} / 2                Eq. 1
    t = tr(Sigma),  A = Sigma / t,  Y_0 = A,  Z_0 = I                                                 Eq. 2
    Yhat = sqrt(t) Y_N                                                                                Eq. 3
    dY_N = sqrt(t) dYhat                                                                              Eq. 4
    dt = tr(dYhat' Y_N) / (2 sqrt(t))                                                                 Eq. 5
    dY_{n-1} = (dY_n (3I - YZ) - Z dZ_n Z - ZY dY_n) / 2      Y, Z those of step n-1, n = N..2        Eq. 6
    dZ_{n-1} = ((3I - YZ) dZ_n - Y dY_n Y - dZ_n ZY) / 2      dZ_N = 0                                Eq. 6
    dA = (dY_1 (3I - A) - dZ_1 - A dY_1) / 2                                                          Eq. 7
    dSigma = dA / t - tr(dA' Sigma) / t^2 I + dt I                                                    Eq. 8
    dX = (dSigma + dSigma') (X - mu) / M                                                              Eq. 9

Functions compute in the dtype and on the device of their argument (eigen-decompositions exist in float32 and float64
only), take B = 0, and raise ValueError for an argument that they cannot use. Features x are (B, C, H, W) or (B, C, M);
Sigma has the square of x's unit, its root has x's unit.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

OUTPUTS = ("matrix", "triu", "mean")
PAPER_STEP = (1.5, -0.5)
Step = Sequence[float] | Sequence[Sequence[float]]  # one pair (a, b), or one for each step


# ---- Arguments


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _check_shape(tensor: Tensor, expected: Sequence[int], name: str) -> None:
    _require(tensor.shape == torch.Size(expected), f"{name} must be {tuple(expected)}, got shape {tuple(tensor.shape)}")


def _check_square(matrix: Tensor, name: str) -> None:
    square = matrix.dim() == 3 and matrix.shape[1] == matrix.shape[2] > 0
    _require(square, f"{name} must be (B, C, C) with C >= 1, got shape {tuple(matrix.shape)}")
    _require(matrix.is_floating_point(), f"{name} must have a floating-point dtype, got {matrix.dtype}")


def _features(x: Tensor) -> Tensor:
    """x as (B, C, M)."""
    usable = x.dim() in (3, 4) and 0 not in x.shape[1:]
    _require(usable, f"x must be (B, C, H, W) or (B, C, M) with C, M >= 1, got shape {tuple(x.shape)}")
    _require(x.is_floating_point(), f"x must have a floating-point dtype, got {x.dtype}")
    return x.flatten(2)


def _check_iterations(iterations: int) -> None:
    integer = isinstance(iterations, int) and not isinstance(iterations, bool)
    _require(integer and iterations >= 1, f"iterations must be an integer >= 1, got {iterations!r}")


def _check_output(output: str) -> None:
    _require(output in OUTPUTS, f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")


def _coefficients(step: Step, iterations: int) -> list[Sequence[float]]:
    _check_iterations(iterations)
    pairs = [pair for pair in step if isinstance(pair, Sequence)]
    numbers = [number for number in step if not isinstance(number, Sequence)]
    steps: list[Sequence[float]] = pairs if pairs else [numbers] * iterations
    usable = not (pairs and numbers) and len(steps) == iterations and all(len(pair) == 2 for pair in steps)
    _require(usable, f"step must be one pair (a, b) or iterations = {iterations} of them, got {step!r}")
    return steps


def _sym(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)


def _trace(matrix: Tensor) -> Tensor:
    """(B, C, C) -> (B, 1, 1)."""
    return matrix.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]


def _inner(p: Tensor, q: Tensor) -> Tensor:
    """tr(p' q): (B, C, C), (B, C, C) -> (B, 1, 1)."""
    return (p * q).sum((1, 2), keepdim=True)


def _centred(x: Tensor) -> Tensor:
    """X - mu, (B, C, M)."""
    # A mean is rounded, and a residue of one ulp in place of 0 has a huge gradient under the root. Any origin gives the
    # same X - mu; seen from its own first value a constant channel is exactly 0.
    x = x - x[:, :, :1].detach()
    return x - x.mean(2, keepdim=True)


def covariance_pool(x: Tensor) -> Tensor:
    """Biased channel covariance Sigma = (X - mu)(X - mu)' / M: (B, C, H, W) or (B, C, M) -> (B, C, C)."""
    centred = _centred(_features(x))
    return centred @ centred.mT / centred.shape[2]


def covariance_pool_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Eq. 9. grad = dSigma (B, C, C), symmetric or not -> dX in the shape of x."""
    centred = _centred(_features(x))
    _check_shape(grad, (x.shape[0], x.shape[1], x.shape[1]), "grad")
    return ((grad + grad.mT) @ centred / centred.shape[2]).reshape(x.shape)


def covariance_pool_tangent(tangent: Tensor, x: Tensor) -> Tensor:
    """Sigma's rate of change while x moves along ``tangent``, which has the shape of x -> (B, C, C)."""
    centred, moved = _centred(_features(x)), _centred(_features(tangent))
    _check_shape(tangent, x.shape, "tangent")
    product = moved @ centred.mT / centred.shape[2]
    return product + product.mT


def minimax_steps(iterations: int, floor: float) -> list[tuple[float, float]]:
    """Coefficients (a_n, b_n) of N steps that are best for eigenvalues of A in [floor, 1], 0 < floor < 1.

    A step maps the square root s of an eigenvalue of Z Y to s (a + b s^2). Of all cubics of this form, these bring the
    image of the interval [l, u] that holds the spectrum nearest to 1, as far below it as above.
    """
    _check_iterations(iterations)
    _require(0 < floor < 1, f"floor: expected more than 0 and less than 1, got {floor}")
    lower, upper, steps = math.sqrt(floor), 1.0, []
    for _ in range(iterations):
        q = lower**2 + lower * upper + upper**2
        at_lower, at_peak = (q * s - s**3 for s in (lower, math.sqrt(q / 3)))
        k = 2 / (at_lower + at_peak)
        steps.append((k * q, -k))
        lower, upper = k * at_lower, k * at_peak
    return steps


def newton_schulz(a: Tensor, iterations: int, step: Step = PAPER_STEP) -> tuple[Tensor, Tensor]:
    """Eq. 1 from Y_0 = a, Z_0 = I: Y_N -> a^(1/2) and Z_N -> a^(-1/2) for a spectrum in (0, 3). (B, C, C) each.

    ``step`` is (a, b) of Y <- a Y + b Y T, Z <- a Z + b T Z with T = Z Y; (1.5, -0.5) is the paper's. A sequence of
    ``iterations`` pairs gives every step its own. ``a`` is used as it is: nothing is symmetrised or scaled.
    """
    _check_square(a, "a")
    y, z = a, _eye(a)
    for alpha, beta in _coefficients(step, iterations):
        t = z @ y
        y, z = alpha * y + beta * (y @ t), alpha * z + beta * (t @ z)
    return y, z


def newton_schulz_backward(grad_y: Tensor, a: Tensor, iterations: int, grad_z: Tensor | None = None) -> Tensor:
    """Eqs. 6, 7 as printed, for a symmetric ``a``: dY_N (and dZ_N where Z_N is used) -> dA, (B, C, C).

    Exact for upstream gradients that are not symmetric, and then dA is not symmetric either.
    """
    _check_square(a, "a")
    _check_iterations(iterations)
    _check_shape(grad_y, a.shape, "grad_y")
    eye = _eye(a)
    states = [(a, eye)] + [newton_schulz(a, n) for n in range(1, iterations)]  # (Y_0, Z_0) .. (Y_{N-1}, Z_{N-1})
    dy, dz = grad_y, torch.zeros_like(a) if grad_z is None else grad_z
    for y, z in reversed(states[1:]):
        yz, zy = y @ z, z @ y
        dy, dz = (
            (dy @ (3 * eye - yz) - z @ dz @ z - zy @ dy) / 2,  # Eq. 6
            ((3 * eye - yz) @ dz - y @ dy @ y - dz @ zy) / 2,
        )
    return (dy @ (3 * eye - a) - dz - a @ dy) / 2  # Eq. 7


# ---- Matrix square root


def _pre_normalise(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 2: A (B, C, C), t (B, 1, 1), and which samples are not zero (B, 1, 1); a zero sample gets A = 0 and t = 1."""
    trace = _trace(sigma)
    nonzero = trace != 0
    trace = torch.where(nonzero, trace, 1.0)
    return sigma / trace, trace, nonzero


def _root_scale(trace: Tensor, nonzero: Tensor) -> Tensor:
    """sqrt(t) of Eqs. 3 and 4; for a zero sample a constant 0, hence a zero root with a zero gradient."""
    return torch.where(nonzero, trace.sqrt(), 0.0)


def matrix_sqrt(sigma: Tensor, iterations: int = 5, step: Step = PAPER_STEP) -> Tensor:
    """Eqs. 2, 1, 3: N Newton-Schulz steps towards sigma^(1/2), (B, C, C) -> (B, C, C).

    ``step`` is that of ``newton_schulz``. The symmetric part of ``sigma`` is used, so the gradient is symmetric. It
    should be positive semi-definite; a negative trace gives NaN. A zero sigma gives a zero root with a zero gradient.
    """
    _check_square(sigma, "sigma")
    a, trace, nonzero = _pre_normalise(_sym(sigma))
    y, _ = newton_schulz(a, iterations, step)
    return _root_scale(trace, nonzero) * y


def matrix_inv_sqrt(sigma: Tensor, iterations: int = 5, step: Step = PAPER_STEP) -> Tensor:
    """Z_N / sqrt(t), N steps towards sigma^(-1/2), (B, C, C) -> (B, C, C); a zero sigma gives 0 with a zero gradient.

    On the null space of a singular sigma it grows as 1.5^N.
    """
    _check_square(sigma, "sigma")
    a, trace, nonzero = _pre_normalise(_sym(sigma))
    _, z = newton_schulz(a, iterations, step)
    return torch.where(nonzero, trace.rsqrt(), 0.0) * z


def matrix_sqrt_backward(grad: Tensor, sigma: Tensor, iterations: int = 5) -> Tensor:
    """Eqs. 4-8 as printed. grad = dYhat (B, C, C), symmetric or not -> the symmetric dSigma (B, C, C)."""
    _check_square(sigma, "sigma")
    _check_shape(grad, sigma.shape, "grad")
    a, trace, nonzero = _pre_normalise(_sym(sigma))
    y, _ = newton_schulz(a, iterations)
    dy = _root_scale(trace, nonzero) * grad  # Eq. 4
    dtrace = _inner(grad, y) / (2 * trace.sqrt())  # Eq. 5
    da = newton_schulz_backward(dy, a, iterations)  # Eqs. 6, 7
    # Eq. 8 with A / t in place of Sigma / t^2: the square of a small trace is not representable.
    dsigma = da / trace - _inner(da, a) / trace * _eye(a) + dtrace * _eye(a)
    return _sym(dsigma)  # the chain through the symmetric part that the forward uses


# ---- Outputs and the whole layer


def triu_vector(y: Tensor) -> Tensor:
    """Upper triangle with the diagonal, row by row: (B, C, C) -> (B, C(C+1)/2)."""
    _check_square(y, "y")
    rows, columns = torch.triu_indices(y.shape[1], y.shape[1], device=y.device)
    return y[:, rows, columns]


def convert_output(y: Tensor, output: str) -> Tensor:
    """(B, C, C) -> "matrix" (B, C, C) | "triu" (B, C(C+1)/2) | "mean" (B, C), the mean over dim 1."""
    _check_output(output)
    _check_square(y, "y")
    if output == "triu":
        return triu_vector(y)
    return y.mean(1) if output == "mean" else y


def _convert_output_backward(grad: Tensor, y: Tensor, output: str) -> Tensor:
    """Gradient of ``convert_output`` with respect to y, (B, C, C); in general not symmetric."""
    _check_output(output)
    batch, channels, _ = y.shape
    if output == "triu":
        _check_shape(grad, (batch, channels * (channels + 1) // 2), "grad")
        rows, columns = torch.triu_indices(channels, channels, device=grad.device)
        matrix = grad.new_zeros(batch, channels, channels)
        matrix[:, rows, columns] = grad
        return matrix
    if output == "mean":
        _check_shape(grad, (batch, channels), "grad")
        return (grad / channels)[:, None, :].expand(batch, channels, channels)
    _check_shape(grad, (batch, channels, channels), "grad")
    return grad


def cov_sqrt(x: Tensor, iterations: int = 5, output: str = "matrix", step: Step = PAPER_STEP) -> Tensor:
    """Truncated root of the covariance of x, in the form ``output`` (see ``convert_output``)."""
    return convert_output(matrix_sqrt(covariance_pool(x), iterations, step), output)


def gram_features(x: Tensor) -> Tensor:
    """F = (X - mu) Q, (B, C, M - 1): Q has orthonormal columns orthogonal to 1, so F F' = (X - mu)(X - mu)'. M > 1."""
    centred = _centred(_features(x))
    _require(centred.shape[2] > 1, f"x must have M >= 2, got shape {tuple(x.shape)}")
    # Q is what a Householder reflection that takes 1 / sqrt(M) to the first unit vector leaves of the others.
    return centred[:, :, 1:] + centred[:, :, :1] / (math.sqrt(centred.shape[2]) - 1)


def gram_cov_sqrt(x: Tensor, iterations: int = 5, output: str = "matrix", step: Step = PAPER_STEP) -> Tensor:
    """``cov_sqrt`` by an iteration of the positions' matrices: F Z_N(F'F / M) F' / M with F of ``gram_features``.

    The same function, for F p(F'F) F' = F F' p(F F'), and where M - 1 < C the one without Sigma's null space.
    """
    features = gram_features(x)
    positions = features.shape[2] + 1
    root = matrix_inv_sqrt(features.mT @ features / positions, iterations, step)
    return convert_output(features @ root @ features.mT / positions, output)


def cov_sqrt_backward(grad: Tensor, x: Tensor, iterations: int = 5, output: str = "matrix") -> Tensor:
    """Eqs. 4-9 as printed: gradient with respect to ``cov_sqrt(x, iterations, output)`` -> dX in the shape of x."""
    sigma = covariance_pool(x)
    dyhat = _convert_output_backward(grad, sigma, output)
    return covariance_pool_backward(matrix_sqrt_backward(dyhat, sigma, iterations), x)


# ---- Baselines: what a user would otherwise run


def _eager_root(sigma: Tensor, iterations: int) -> Tensor:
    """Yhat in the 3N - 3 products that N steps need (1 where N = 1), each fused with its sum. Sigma is symmetric."""
    _check_iterations(iterations)
    trace = _trace(sigma).clamp_min(torch.finfo(sigma.dtype).tiny)  # one kernel that keeps a zero sigma from 0 / 0
    a = sigma / trace
    y = torch.baddbmm(a, a, a, beta=1.5, alpha=-0.5)  # first step: Z = I, so T = A
    if iterations > 1:
        z = 1.5 * _eye(a) - 0.5 * a
        for _ in range(iterations - 2):
            t = z.bmm(y)
            y, z = torch.baddbmm(y, y, t, beta=1.5, alpha=-0.5), torch.baddbmm(z, t, z, beta=1.5, alpha=-0.5)
        y = torch.baddbmm(y, y, z.bmm(y), beta=1.5, alpha=-0.5)  # last step: Z_N is not needed
    return trace.sqrt() * y


def baddbmm_cov_sqrt(x: Tensor, iterations: int = 5, output: str = "matrix") -> Tensor:
    """``cov_sqrt`` as a careful user of eager torch writes it: fused products, none that is not needed."""
    x = _features(x)
    centred = x - x.mean(2, keepdim=True)
    zero = x.new_zeros(1, 1, 1)
    sigma = torch.baddbmm(zero, centred, centred.mT, beta=0, alpha=1 / x.shape[2])
    return convert_output(_eager_root(sigma, iterations), output)


def mxm_covariance_pool(x: Tensor) -> Tensor:
    """Sigma = X Ibar X' with the centring matrix Ibar = (I - 11'/M) / M, one M x M copy a sample, as published."""
    x = _features(x)
    batch, _, m = x.shape
    centring = (torch.eye(m, dtype=x.dtype, device=x.device) - 1 / m) / m
    return x.bmm(centring.repeat(batch, 1, 1)).bmm(x.mT)


def mxm_cov_sqrt(x: Tensor, iterations: int = 5, output: str = "matrix") -> Tensor:
    """``baddbmm_cov_sqrt`` with the published pooling: what differs between the two is the M x M matrix alone."""
    return convert_output(_eager_root(mxm_covariance_pool(x), iterations), output)


# A symmetric matrix, (B, C, C) -> its eigenvalues (B, C) and eigenvectors, the columns of (B, C, C).
Eigh = Callable[[Tensor], Sequence[Tensor]]


class _ClampedEigenRoot(torch.autograd.Function):
    """f(A) of a symmetric A with f(l) = sqrt(max(l, floor)), by eigen-decomposition."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, floor: float, eigh: Eigh) -> Tensor:
        values, vectors = eigh(a)
        ctx.save_for_backward(values, vectors)
        ctx.floor = floor
        return (vectors * values.clamp_min(floor).sqrt()[:, None, :]) @ vectors.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Daleckii-Krein: dA = U (K o U' G U) U', K_ij = (f(l_i) - f(l_j)) / (l_i - l_j). For the root that is
        # 1 / (sqrt(l_i) + sqrt(l_j)), finite for equal eigenvalues, times the slope of the clamp between l_i and l_j:
        # 1 where neither is clamped, 0 where both are, and in [0, 1] between a clamped and a free one.
        values, vectors = ctx.saved_tensors
        clamped = values.clamp_min(ctx.floor)
        root, free = clamped.sqrt(), values > ctx.floor
        one_free = free[:, :, None] != free[:, None, :]
        both_free = free[:, :, None] & free[:, None, :]
        between = (clamped[:, :, None] - clamped[:, None, :]) / (values[:, :, None] - values[:, None, :])
        slope = torch.where(one_free, between, both_free.to(values.dtype))
        sums = root[:, :, None] + root[:, None, :]
        k = torch.where(slope > 0, slope / sums, 0.0)
        return vectors @ (k * (vectors.mT @ grad @ vectors)) @ vectors.mT, None, None


def eig_sqrt(sigma: Tensor, floor: float | None = None, eigh: Eigh = torch.linalg.eigh) -> Tensor:
    """EIG: the exact root by eigen-decomposition, (B, C, C) -> (B, C, C), with its exact symmetric gradient.

    Eigenvalues of sigma / tr(sigma) below ``floor`` count as ``floor``: those of a rank-deficient covariance come back
    as rounding noise of either sign, whose root is NaN or has an unbounded gradient. By default ``floor`` is the eps of
    sigma's dtype (1.2e-7 in float32, 2.2e-16 in float64), the size of that noise; a null direction then has the root
    sqrt(eps t), and no derivative of the clamped spectrum exceeds 1 / (2 sqrt(eps)). Once differentiable. float32 and
    float64; torch.linalg.LinAlgError where sigma is not finite, for the whole batch. ``eigh`` decomposes A in the place
    of torch's own.
    """
    _check_square(sigma, "sigma")
    if floor is None:
        floor = torch.finfo(sigma.dtype).eps
    _require(0 <= floor < float("inf"), f"floor must be finite and >= 0, got {floor!r}")
    a, trace, nonzero = _pre_normalise(_sym(sigma))
    return _root_scale(trace, nonzero) * _ClampedEigenRoot.apply(a, floor, eigh)


def eig_cov_sqrt(x: Tensor, output: str = "matrix", floor: float | None = None) -> Tensor:
    """EIG on the covariance of x, in the form ``output`` (see ``convert_output``)."""
    return convert_output(eig_sqrt(covariance_pool(x), floor), output)


@torch.no_grad()
def exact_sqrt(sigma: Tensor) -> Tensor:
    """The exact root in float64 whatever sigma's dtype, (B, C, C), without a gradient: to report a distance to."""
    _check_square(sigma, "sigma")
    values, vectors = torch.linalg.eigh(_sym(sigma.double()))
    return (vectors * values.clamp_min(0).sqrt()[:, None, :]) @ vectors.mT
