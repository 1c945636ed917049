"""Covariance pooling and matrix square roots by Newton-Schulz iteration, as functions."""

import importlib.metadata
import json
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import ops
from .ops import ENGINES, OUTPUTS, ROOTS, code, prefers_gram
from .transforms import autocast_is_enabled, compute_dtype, without_autocast

_ops = torch.ops.isqrt_cov
COEFFICIENTS = ("newton_schulz", "minimax")


def check_coefficients(coefficients: str, spectrum_floor: float) -> float:
    """The operators' argument ``spectrum_floor``: 0 stands for the paper's coefficients. Raises ValueError."""
    if isinstance(spectrum_floor, Tensor) and (spectrum_floor.numel() != 1 or spectrum_floor.requires_grad):
        raise ValueError(f"spectrum_floor: expected a number, which has no gradient, got {spectrum_floor!r}")
    if not isinstance(spectrum_floor, SupportsFloat) or not 1e-12 <= spectrum_floor < 1:
        raise ValueError(f"spectrum_floor: expected 1e-12 or more and less than 1, got {spectrum_floor!r}")
    if not code("coefficients", coefficients, COEFFICIENTS):
        return 0.0
    return spectrum_floor if type(spectrum_floor) in (float, torch.SymFloat) else float(spectrum_floor)


def _whole_number(value: Any) -> int | None:
    """As an int what Python, NumPy and others have for whole numbers, and None for anything else."""
    try:
        return operator.index(value)
    except TypeError:  # a tensor of several numbers, or of fractions, is a SupportsIndex, too
        return None


def check_count(name: str, value: Any) -> int:
    """How many there are of something. Raises ValueError where there can be none or it is no whole number."""
    number = _whole_number(value)
    if number is None or number < 1:
        raise ValueError(f"{name}: expected a whole number, 1 or more, got {value!r}")
    return number


def check_iterations(name: str, iterations: Any) -> int:
    """The number of steps. Raises ValueError where it is none."""
    number = _whole_number(iterations)
    if number is None or not 1 <= number <= 1000:
        raise ValueError(f"{name}: expected a whole number from 1 to 1000, got {iterations!r}")
    return number


def _steps(iterations: Any) -> Any:
    """As the operators take them: they would cut the fraction off a number that is not whole."""
    return iterations if type(iterations) in (int, torch.SymInt) else check_iterations("iterations", iterations)


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name}: expected a dense tensor, got one that is {kind}")


def _overridden(function: Callable[..., Tensor], name: str, value: Any, *arguments: Any) -> Any:
    """What ``value``, which is no tensor, makes of the call: a node of a graph where it is a Proxy of torch.fx."""
    if not has_torch_function_unary(value):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    return handle_torch_function(function, (value,), value, *arguments)


def _call(
    op: Callable[..., Any], x: Tensor, *arguments: Any, in_place: bool = True, further: tuple[Any, ...] = ()
) -> Any:
    """The operator, autocast included, whose own rule comes too late for the derivatives of torch.func: float32 is put
    out, for which 16-bit feature maps are read in place, and matrices are copied. ``further`` arguments follow wide.
    """
    if not autocast_is_enabled(x):
        return op(x, *arguments, 0, False, *further) if further else op(x, *arguments)
    with without_autocast(x):
        if in_place:
            return op(x, *arguments, 0, True, *further)  # engine, wide
        return op(x.to(compute_dtype(x.dtype)), *arguments)


def covariance_pool(x: Tensor) -> Tensor:
    r"""Channel covariance of feature maps, :math:`\Sigma = \frac1M (X - \mu 1^T)(X - \mu 1^T)^T`.

    Args:
        x: feature maps of shape (B, C, H, W) or (B, C, M), float32, float64, float16 or bfloat16, any strides, read in
            place. The 16-bit types are accumulated in float32.

    Returns:
        The biased covariances over the M = H W positions, (B, C, C), in the dtype of ``x``; under autocast in float32,
        as for all functions here.

    Raises:
        TypeError: ``x`` is no tensor, or not a dense one.
        RuntimeError: ``x`` has another rank or dtype, no channel or no position.
    """
    if not isinstance(x, Tensor):
        return _overridden(covariance_pool, "x", x)
    _check_dense("x", x)
    return _call(ops.covariance_pool, x)[0]


def matrix_sqrt(
    sigma: Tensor, iterations: int = 5, coefficients: str = "newton_schulz", spectrum_floor: float = 1e-3
) -> Tensor:
    r"""Approximate square root of symmetric positive semi-definite matrices by the coupled Newton-Schulz iteration.

    With :math:`t = \operatorname{tr}\Sigma`, :math:`Y_0 = \Sigma / t` and :math:`Z_0 = I`, each step is
    :math:`T = Z Y,\ Y \leftarrow \tfrac32 Y - \tfrac12 Y T,\ Z \leftarrow \tfrac32 Z - \tfrac12 T Z`, and the result is
    :math:`\sqrt t\, Y_N` (Li et al., CVPR 2018; Eqs. 1-3 of Dai et al., CVPR 2019). The gradient is the exact
    derivative of this truncated function, symmetric like the input.

    Args:
        sigma: (B, C, C), float32, float64, float16 or bfloat16 (iterated in float32). Its symmetric part is used.
        iterations: number of steps N, from 1 to 1000. More are nearer to the exact root until the iteration has
            converged (10 to 20 steps as printed). Where ``sigma`` is singular it does not converge: each step
            multiplies the rounding errors there by about 1.5 until, in float32 after some 25 steps, they are as large
            as the root; a few more leave the range. Derivatives of 10 or more (of ``"minimax"`` with a floor of 1e-3
            of 6 or more) are computed in float64.
        coefficients: ``"newton_schulz"``, the paper's 3/2 and -1/2 in each step; or ``"minimax"``, in each step the
            pair that is best for eigenvalues of ``sigma`` / trace between ``spectrum_floor`` and 1. The same number of
            products comes several times nearer to the exact root, unless a dozen eigenvalues or fewer make up the
            trace; those below the floor stay bounded.
        spectrum_floor: for ``"minimax"`` only, from 1e-12 to below 1. In float32 below 1e-4 the rounding errors of
            eigenvalues under the floor show: a rank-deficient ``sigma`` is then better served by more steps.

    Returns:
        (B, C, C). Zero, with zero gradient, where the trace of ``sigma`` is zero; NaN, gradient too, where it is
        negative or beyond the range of float32 (of float64 for that).

    Raises:
        TypeError: ``sigma`` is no tensor, or not a dense one.
        RuntimeError: ``sigma`` is not a batch of square matrices or has another dtype; or ``iterations`` is out of
            range.
        ValueError: other ``coefficients``, ``iterations`` is no whole number, or ``spectrum_floor`` is out of range,
            even where it is not used.
    """
    if not isinstance(sigma, Tensor):
        return _overridden(matrix_sqrt, "sigma", sigma, iterations, coefficients, spectrum_floor)
    floor = check_coefficients(coefficients, spectrum_floor)
    _check_dense("sigma", sigma)
    return _call(ops.matrix_root, sigma, _steps(iterations), ROOTS.index("square"), floor, in_place=False)


def matrix_inv_sqrt(
    sigma: Tensor, iterations: int = 5, coefficients: str = "newton_schulz", spectrum_floor: float = 1e-3
) -> Tensor:
    r"""Approximate inverse square root :math:`Z_N / \sqrt t` of the same iteration, (B, C, C) to (B, C, C).

    Zero, with zero gradient, where the trace is zero. Arguments and errors are those of :func:`matrix_sqrt`.
    """
    if not isinstance(sigma, Tensor):
        return _overridden(matrix_inv_sqrt, "sigma", sigma, iterations, coefficients, spectrum_floor)
    floor = check_coefficients(coefficients, spectrum_floor)
    _check_dense("sigma", sigma)
    return _call(ops.matrix_root, sigma, _steps(iterations), ROOTS.index("inverse"), floor, in_place=False)


def cov_sqrt(
    x: Tensor,
    iterations: int = 5,
    output: str = "matrix",
    coefficients: str = "newton_schulz",
    spectrum_floor: float = 1e-3,
) -> Tensor:
    """Square-root normalised covariance pooling: :func:`covariance_pool`, then :func:`matrix_sqrt`, fused.

    Keeps ``x`` and, per sample, one C x C matrix and the mean for the backward pass. Where there are clearly fewer
    positions than channels, on a CPU, the same function is computed from their Gram matrix, (M - 1) x (M - 1): in less
    time, and unless that is singular, too, without the rounding errors that many steps bring in the null space of a
    covariance (see :func:`plan`); not in programs that torch.export or torch.jit.trace made for open sizes.

    Args:
        x: feature maps of shape (B, C, H, W) or (B, C, M), float32, float64, float16 or bfloat16, any strides, read in
            place. The 16-bit types are computed in float32 without a copy of ``x``, under autocast, too.
        iterations: number of Newton-Schulz steps, from 1 to 1000.
        output: ``"matrix"`` (B, C, C); ``"triu"`` (B, C (C + 1) / 2), the upper triangle row by row; or ``"mean"``
            (B, C), the mean over dim 1, which is what second-order channel attention uses.
        coefficients, spectrum_floor: see :func:`matrix_sqrt`.

    Raises:
        TypeError: ``x`` is no tensor, or not a dense one.
        RuntimeError: ``x`` has another rank or dtype, no channel or no position; or ``iterations`` is out of range.
        ValueError: another ``output``, other ``coefficients``, ``iterations`` is no whole number, or ``spectrum_floor``
            is out of range.
    """
    if not isinstance(x, Tensor):
        return _overridden(cov_sqrt, "x", x, iterations, output, coefficients, spectrum_floor)
    floor = check_coefficients(coefficients, spectrum_floor)
    _check_dense("x", x)
    arguments = _steps(iterations), code("output", output, OUTPUTS), floor
    return _call(ops.cov_sqrt, x, *arguments, further=(True,) if prefers_gram(x.shape, x.device) else ())[0]


def triu_vector(y: Tensor) -> Tensor:
    """Upper triangle of (B, C, C) matrices, row by row: (B, C (C + 1) / 2).

    Raises:
        TypeError: ``y`` is no tensor, or not a dense one.
        ValueError: ``y`` is not a batch of square matrices.
    """
    if not isinstance(y, Tensor):
        return _overridden(triu_vector, "y", y)
    _check_dense("y", y)
    if y.dim() != 3 or y.shape[1] != y.shape[2]:
        raise ValueError(f"y: expected a batch of square matrices (B, C, C), got {tuple(y.shape)}")
    channels = y.shape[1]
    size = channels * (channels + 1) // 2
    # Before row i lie 0 + 1 + ... + i elements below the diagonal. (torch.triu_indices takes no symbolic sizes.)
    rows = torch.arange(channels, device=y.device)
    below = (rows * (rows + 1) // 2).repeat_interleave(channels - rows, output_size=size)
    return y.flatten(1).index_select(1, torch.arange(size, device=y.device) + below)


def plan(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    engine: str = "auto",
    iterations: int = 5,
    coefficients: str = "newton_schulz",
    spectrum_floor: float = 1e-3,
) -> dict[str, Any]:
    """Which engine :func:`cov_sqrt` uses for feature maps of this kind, and how it splits their positions.

    Args:
        shape: (B, C, H, W) or (B, C, M).
        dtype: float32, float64, float16 or bfloat16.
        device: where the feature maps lie.
        engine: ask for one of "library", "portable", "avx2", "avx512", "block" (one for each sample, no cluster) and
            "grid" instead of "auto", or for "warpgroup": in float32 either of them, "block" up to 64 channels, with the
            tensor core instructions that an H100 or H200 alone has. Only to ask: :func:`cov_sqrt` always takes "auto".
        iterations, coefficients, spectrum_floor: those of :func:`cov_sqrt`. Many steps need more memory on a GPU.

    Returns:
        A dictionary. ``gram`` tells whether the iteration takes (M - 1) x (M - 1) matrices, for there are clearly fewer
        positions M than channels;
        ``pooling``, ``forward`` and ``backward``: the engine of the covariance, of the root and of its gradient;
        ``pool_chunks`` and ``pool_backward_chunks``: independent pieces of one sample's positions;
        ``forward_blocks`` and ``backward_blocks``: blocks of a cluster of a GPU, which share the root of one sample.
    """
    whole = [_whole_number(size) for size in shape] if isinstance(shape, Sequence) else []
    sizes = [size for size in whole if size is not None]
    if len(whole) not in (3, 4) or len(sizes) < len(whole):
        raise ValueError(f"shape: expected (B, C, H, W) or (B, C, M), got {shape!r}")
    if min(sizes) < 0 or math.prod(sizes) > torch.iinfo(torch.int64).max:
        raise ValueError(f"shape: expected sizes that a tensor can have, got {tuple(shape)}")
    if dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected float32, float64, float16 or bfloat16, got {dtype}")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected a cpu or cuda device, got {device!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected a cpu or cuda device, got {str(device)!r}")
    on_cuda = device.type == "cuda"
    usable = on_cuda and torch.cuda.is_available()  # else the operator says what is missing
    index = device.index if device.index is not None else (torch.cuda.current_device() if usable else 0)
    batch, channels, *positions = sizes
    requested = code("engine", engine, ENGINES)
    problem = (on_cuda, index, batch, channels, math.prod(positions), compute_dtype(dtype).itemsize)
    floor = check_coefficients(coefficients, spectrum_floor)
    iterations = check_iterations("iterations", iterations)
    gram = prefers_gram(sizes, device)
    return {"gram": gram, **json.loads(_ops.plan(*problem, iterations, floor, requested, gram))}


def build_info() -> dict[str, Any]:
    """What was compiled and what is usable here.

    ``version``, ``torch`` (running) and ``torch_target`` (the oldest that this build loads in), ``compiler``,
    ``cuda_architectures`` ("" for a build without CUDA kernels), ``cuda_usable``, ``simd_compiled`` and
    ``simd_usable``, the best one first.
    """
    info = json.loads(_ops.build_info())
    return {
        "version": importlib.metadata.version("isqrt_cov"),
        "torch": torch.__version__,
        **info,
        "cuda_usable": bool(info["cuda_architectures"]) and torch.cuda.is_available(),
    }
