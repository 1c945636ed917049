"""The operators of ``torch.ops.isqrt_cov``: their shapes under tracing, their gradients and their tangents.

Schemas, argument checks and implementations are in ``csrc/ops.cpp``. A gradient is an operator of its own, and what is
kept for it is x, mu and Sigma. A tangent is composed from these operators, and whatever is differentiated more than
once from :mod:`isqrt_cov.reference`. Under autocast the operators compute and return float32; feature maps of 16 bits
are read in place all the same, as they are with ``wide``, and their gradient has their dtype.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch.utils.flop_counter import register_flop_formula

from . import flops, reference, transforms
from .transforms import compute_dtype, without_autocast

# The enumerations of csrc, in their order.
OUTPUTS = ("matrix", "triu", "mean")
ROOTS = ("square", "inverse")
ENGINES = ("auto", "library", "portable", "avx2", "avx512", "block", "grid", "warpgroup")


def code(argument: str, value: str, names: tuple[str, ...]) -> int:
    """Number of ``value`` among ``names``. Raises ValueError naming the argument and what it was."""
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, names))}, got {value!r}")
    return names.index(value)


def _load() -> None:
    library = Path(__file__).with_name("_C.so")
    if not library.exists():
        raise ImportError(
            f"isqrt_cov is imported from {library.parent}, which holds no compiled library:"
            " leave the source tree, or build it in place with `pip install -e .`"
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        reason = error.__cause__ or error
        raise ImportError(f"isqrt_cov needs torch 2.10 or later, and this is {torch.__version__}: {reason}") from error


_load()
_ops = torch.ops.isqrt_cov
_has_cuda = bool(json.loads(_ops.build_info())["cuda_architectures"])


def _second_order(function, x, upstream, direction):
    """Gradient of <vjp(function, x)(upstream), direction> with respect to upstream and x."""
    dtype = compute_dtype(x.dtype)

    def variable(tensor):
        # A node of its own, that it may depend on the other one; and not detached, for the orders that follow.
        tensor = tensor.to(dtype).view_as(tensor)
        return tensor if tensor.requires_grad else tensor.requires_grad_()

    further = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(x), enable_inplace_requires_grad(True):
        x_, upstream_ = variable(x), variable(upstream)
        (vjp,) = torch.autograd.grad(function(x_), x_, upstream_, create_graph=True)
        grads = torch.autograd.grad(vjp, (upstream_, x_), direction.to(dtype), create_graph=further)
        return grads[0].to(upstream.dtype), grads[1].to(x.dtype)


def _steps(iterations, spectrum_floor):
    return reference.PAPER_STEP if spectrum_floor == 0 else reference.minimax_steps(iterations, spectrum_floor)


def _times(scale, x):
    """Each sample of x times its number."""
    return x * scale.view(-1, *(1,) * (x.dim() - 1))


def _derivative_dtype(dtype, iterations, spectrum_floor):
    """What derivatives of roots are computed in: float64 where choose_steps() of newton_schulz.h has steps in full."""
    growth = 1.0
    for n, (a, _) in enumerate(reference._coefficients(_steps(iterations, spectrum_floor), iterations)):
        if growth > 24 and n < iterations - 1:
            return torch.float64
        growth *= a
    return compute_dtype(dtype)


def _half_from_first(x):
    """Half of each position's difference from the first one, (B, C, M): neither leaves x's range where x does not."""
    halves = x.flatten(2) / 2
    return halves - halves[..., :1].detach()  # a constant of each channel, on which no covariance depends


# What ``csrc/ops.cpp`` says of wrong arguments is said while tracing, too: of those that a gradient is given, which are
# results, the kernels alone see to it.


def _check_number(name, number, least, most):
    torch._check(least <= number <= most, lambda: f"{name}: expected {least} to {most}, got {number}")


def _check_tensor(name, tensor):
    torch._check(
        tensor.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16),
        lambda: f"{name}: expected a float32, float64, float16 or bfloat16 tensor, got {tensor.dtype}",
    )
    torch._check(tensor.shape[1] > 0, lambda: f"{name}: expected at least one channel, got shape {tuple(tensor.shape)}")


def _check_maps(x):
    torch._check(x.dim() in (3, 4), lambda: f"x: expected shape (B, C, H, W) or (B, C, M), got {tuple(x.shape)}")
    _check_tensor("x", x)
    for size in x.shape[2:]:
        torch._check(size > 0, lambda: f"x: expected at least one position, got shape {tuple(x.shape)}")


def _check_matrices(sigma):
    torch._check(
        sigma.dim() == 3 and sigma.shape[1] == sigma.shape[2],
        lambda: f"sigma: expected a batch of square matrices (B, C, C), got {tuple(sigma.shape)}",
    )
    _check_tensor("sigma", sigma)


def _check_steps(iterations, spectrum_floor):
    _check_number("iterations", iterations, 1, 1000)
    torch._check(
        spectrum_floor == 0 or 1e-12 <= spectrum_floor < 1,
        lambda: f"spectrum_floor: expected 1e-12 or more and less than 1, got {spectrum_floor}",
    )


def _without_cuda(*arguments, **named):
    raise RuntimeError(
        "this isqrt_cov was built without CUDA kernels: install it again where nvcc is found, or with FORCE_CUDA=1"
    )


def _register(name, fake, *derivatives, autocast=True):
    torch.library.register_fake(f"isqrt_cov::{name}", fake)
    if not _has_cuda:
        torch.library.impl(f"isqrt_cov::{name}", "cuda", _without_cuda)
    transforms.register_batching(name, fake)
    return transforms.register_derivatives(name, *derivatives, autocast=autocast)


def _register_gradient(name, fake, function):
    """The operator ``name(upstream, x, *kept, *arguments)``: the vjp of ``function(x, kept, *arguments)`` at x.

    ``function`` returns one of x alone, which fixes what was kept: of that it may ask the shapes.
    """
    op = getattr(_ops, name).default

    def setup_context(ctx, tensors, output):
        ctx.save_for_backward(*tensors[:2])
        ctx.save_for_forward(*tensors)
        ctx.function = function(*tensors[1:], *ctx.arguments)

    def backward(ctx, direction):
        upstream, x = ctx.saved_tensors
        return _second_order(ctx.function, x, upstream, direction)

    def jvp(ctx, saved, upstream_tangent, x_tangent, *_):
        upstream, x, *kept = saved
        # The vjp is the gradient of <upstream, function(x)> with respect to x, and a Hessian is symmetric.
        _, curvature = _second_order(ctx.function, x, upstream, x_tangent)
        return op(upstream_tangent, x, *kept, *ctx.arguments) + curvature

    return _register(name, fake, setup_context, backward, jvp, autocast=False)


def _with_digits_of_derivatives(make):
    """The functions that ``make`` makes, in what their derivatives are computed in."""

    def make_wide(*arguments):
        function = make(*arguments)
        iterations, _, spectrum_floor, _ = arguments[-4:]
        return lambda x: function(x.to(_derivative_dtype(x.dtype, iterations, spectrum_floor))).to(x.dtype)

    return make_wide


# ---- covariance_pool: x [B, C, H, W] or [B, C, M] -> sigma [B, C, C], mean [B, C] ------------------------------------
#
# The mean is less the sample's first position: beside a large one the gradient would see the rounding of it.


def _result_dtype(x, wide):
    return compute_dtype(x.dtype) if wide else x.dtype


def _pool_fake(x, engine=0, wide=False):
    _check_maps(x)
    _check_number("engine", engine, 0, len(ENGINES) - 1)
    batch, channels = x.shape[:2]
    sigma = x.new_empty(batch, channels, channels, dtype=_result_dtype(x, wide))
    return sigma, x.new_empty(batch, channels, dtype=compute_dtype(x.dtype))


def _pool_setup(ctx, tensors, output):
    ctx.save_for_backward(*tensors, output[1])
    ctx.save_for_forward(*tensors)


def _pool_backward(ctx, grad):
    engine, _ = ctx.arguments
    return (covariance_pool_backward(grad, *ctx.saved_tensors, engine),)


def _pool_tangent(x, tangent):
    dtype = compute_dtype(x.dtype)
    return reference.covariance_pool_tangent(tangent.to(dtype), x.to(dtype))


def _pool_jvp(ctx, saved, tangent):
    (x,) = saved
    _, wide = ctx.arguments
    return _pool_tangent(x, tangent).to(_result_dtype(x, wide))


def _pool_backward_fake(grad, x, mean, engine=0):
    return torch.empty_like(x)


covariance_pool = _register("covariance_pool", _pool_fake, _pool_setup, _pool_backward, _pool_jvp)
covariance_pool_backward = _register_gradient(
    "covariance_pool_backward", _pool_backward_fake, lambda x, mean, engine: reference.covariance_pool
)


# ---- matrix_root: sigma [B, C, C] -> its square or inverse square root [B, C, C] -------------------------------------


def _root_fake(sigma, iterations, root, spectrum_floor=0.0, engine=0):
    _check_matrices(sigma)
    _check_steps(iterations, spectrum_floor)
    _check_number("root", root, 0, len(ROOTS) - 1)
    _check_number("engine", engine, 0, len(ENGINES) - 1)
    return torch.empty_like(sigma, memory_format=torch.contiguous_format)


def _root_setup(ctx, tensors, output):
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _root_backward(ctx, grad):
    return (matrix_root_backward(grad, *ctx.saved_tensors, *ctx.arguments),)


def _root_tangent(sigma, tangent, *arguments):
    """Tangent of ``matrix_root`` from its gradient.

    The root is F(S) = t^k p(S / t), t = tr S, k = 1/2 or -1/2, and the derivative of a polynomial at a symmetric matrix
    is self-adjoint. So in a symmetric direction H the tangent is L[H] + tr(H) E and the gradient L[H] + <H, E> I with
    one self-adjoint L. F is homogeneous, hence its tangent in the direction S is k F: that determines E up to a
    multiple of I, which cancels.
    """

    def gradient(direction):
        return _ops.matrix_root_backward(direction, sigma, *arguments)

    degree = (0.5, -0.5)[arguments[1]]
    t = reference._trace(sigma)
    te = degree * _ops.matrix_root(sigma, *arguments) - gradient(sigma)  # t E, no larger than the root
    ratio = tangent / torch.where(t == 0, 1.0, t)
    eye = torch.eye(sigma.shape[1], dtype=sigma.dtype, device=sigma.device)
    return gradient(tangent) + reference._trace(ratio) * te - (ratio * te).sum((1, 2), keepdim=True) * eye


def _root_jvp(ctx, saved, tangent):
    (sigma,) = saved
    iterations, _, spectrum_floor, _ = ctx.arguments
    dtype = _derivative_dtype(sigma.dtype, iterations, spectrum_floor)
    return _root_tangent(sigma.to(dtype), tangent.to(dtype), *ctx.arguments).to(sigma.dtype)


def _root_backward_fake(grad, sigma, iterations, root, spectrum_floor=0.0, engine=0):
    return torch.empty_like(sigma, memory_format=torch.contiguous_format)


def _root_function(sigma, iterations, root, spectrum_floor, engine):
    step = _steps(iterations, spectrum_floor)

    def function(sigma):
        # Roots are homogeneous: of traces near 1 they have derivatives of all orders within the range of the dtype.
        t = reference._trace(sigma.detach())
        t = torch.where((t > 0) & t.isfinite(), t, 1.0)
        if root == ROOTS.index("square"):
            return t.sqrt() * reference.matrix_sqrt(sigma / t, iterations, step)
        return t.rsqrt() * reference.matrix_inv_sqrt(sigma / t, iterations, step)

    return function


matrix_root = _register("matrix_root", _root_fake, _root_setup, _root_backward, _root_jvp)
matrix_root_backward = _register_gradient(
    "matrix_root_backward", _root_backward_fake, _with_digits_of_derivatives(_root_function)
)


# ---- cov_sqrt: x [B, C, H, W] or [B, C, M] -> y, sigma [B, C, C], mean [B, C], scale [B] -----------------------------
#
# sigma is the covariance of scale x, and the mean that of scale x less its first position: the powers of two keep them
# within the range of their dtype wherever y is, and are 1 for samples that do not need it. With gram, where there are
# more than one position and fewer than channels, sigma is the positions' Gram matrix [B, M - 1, M - 1] instead
# (csrc/gram.h), the trace of which they bring near 1, mean is [B, 0], and y the same.


def _is_traced():
    """By torch.jit.trace, for any sizes."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined]


def prefers_gram(shape, device):
    """Whether ``gram`` makes :func:`cov_sqrt` faster for such feature maps.

    Matrices, of (M - 1) x (M - 1), are padded to multiples of 16, and where they are nearly as large as C x C the four
    products beside the iteration outweigh what it saves. torch.compile makes a graph for either answer, by a guard on
    the sizes; a program that is exported has none, and takes C x C where they are open.
    """
    if device.type != "cpu" or len(shape) not in (3, 4) or _is_traced():
        return False
    positions = shape[2] * shape[3] if len(shape) == 4 else shape[2]
    several, fewer = positions > 2, (positions + 14) // 16 * 8 <= (shape[1] + 15) // 16 * 7
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true  # takes time to load

        decide = statically_known_true if torch.compiler.is_exporting() else guard_or_false
        return decide(several) and decide(fewer)
    return bool(several and fewer)


def _has_gram(channels, positions, gram):
    """Whether the positions' matrix is iterated, where ``gram`` asks for it."""
    if not gram:
        return False
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    # Sizes that depend on data may have been known where gram was decided.
    if not (guard_or_true(positions > 1) and guard_or_true(positions < channels)):
        return False
    for holds in (positions > 1, positions < channels):
        torch._check(holds, lambda: f"gram: {positions} positions are not more than one and fewer than {channels}")
    return True


def _cov_sqrt_fake(x, iterations, output, spectrum_floor=0.0, engine=0, wide=False, gram=False):
    _check_maps(x)
    _check_steps(iterations, spectrum_floor)
    _check_number("output", output, 0, len(OUTPUTS) - 1)
    _check_number("engine", engine, 0, len(ENGINES) - 1)
    batch, channels = x.shape[:2]
    positions = math.prod(x.shape[2:])
    side, means = (positions - 1, 0) if _has_gram(channels, positions, gram) else (channels, channels)
    shape = ((batch, channels, channels), (batch, channels * (channels + 1) // 2), (batch, channels))[output]
    mean = x.new_empty(batch, means, dtype=compute_dtype(x.dtype))
    y = x.new_empty(shape, dtype=_result_dtype(x, wide))
    return y, mean.new_empty(batch, side, side), mean, mean.new_empty(batch)


def _is_gram(x, sigma):
    """Whether sigma is the positions' matrix."""
    return sigma.shape[1] < x.shape[1]


def _cov_sqrt_setup(ctx, tensors, output):
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.save_for_forward(*tensors, output[3])
    ctx.gram = _is_gram(tensors[0], output[1])


def _cov_sqrt_backward(ctx, grad):
    return (cov_sqrt_backward(grad, *ctx.saved_tensors, *ctx.arguments[:4]),)


def _gram_tangent(x, tangent, iterations, *rest):
    """Of F R F' / M, R the inverse root of F'F / M (:func:`reference.gram_cov_sqrt`); x and its tangent (B, C, M)."""
    features, moved = reference.gram_features(x), reference.gram_features(tangent)
    positions, inverse = x.shape[2], ROOTS.index("inverse")
    gram, product = features.mT @ features / positions, features.mT @ moved / positions
    root = _ops.matrix_root(gram, iterations, inverse, *rest)
    root_tangent = _root_tangent(gram, product + product.mT, iterations, inverse, *rest)
    product = moved @ root @ features.mT
    return (product + product.mT + features @ root_tangent @ features.mT) / positions


def _cov_sqrt_jvp(ctx, saved, tangent):
    x, scale = saved
    iterations, output, *rest, wide, _ = ctx.arguments
    dtype = _derivative_dtype(x.dtype, iterations, rest[0])
    scaled = _times(2 * scale, _half_from_first(x.to(dtype)))  # where the derivative is the same
    tangent = tangent.flatten(2).to(dtype)
    if ctx.gram:
        root = _gram_tangent(scaled, tangent, iterations, *rest)
    else:
        sigma, _ = _ops.covariance_pool(scaled)  # not the one put out, which is a constant
        root = _root_tangent(sigma, _pool_tangent(scaled, tangent), iterations, ROOTS.index("square"), *rest)
    return reference.convert_output(root, OUTPUTS[output]).to(_result_dtype(x, wide))


def _cov_sqrt_backward_fake(grad, x, sigma, mean, scale, iterations, output, spectrum_floor=0.0, engine=0):
    return torch.empty_like(x)


def _cov_sqrt_function(x, sigma, mean, scale, iterations, output, spectrum_floor, engine):
    step = _steps(iterations, spectrum_floor)
    root = reference.gram_cov_sqrt if _is_gram(x, sigma) else reference.cov_sqrt

    def function(x):
        # cov_sqrt is homogeneous: near 1 its covariance does not leave the range of x's dtype.
        halves = _half_from_first(x)
        largest, smallest = halves.detach().abs().amax((1, 2)), torch.finfo(x.dtype).tiny
        usable = (largest > 0) & largest.isfinite()
        scale = torch.where(usable, 1 / largest.clamp_min(smallest), 1.0).clamp_min(smallest)
        return _times(2 / scale, root(_times(scale, halves), iterations, OUTPUTS[output], step))

    return function


cov_sqrt = _register("cov_sqrt", _cov_sqrt_fake, _cov_sqrt_setup, _cov_sqrt_backward, _cov_sqrt_jvp)
cov_sqrt_backward = _register_gradient(
    "cov_sqrt_backward", _cov_sqrt_backward_fake, _with_digits_of_derivatives(_cov_sqrt_function)
)


# ---- Flops, for torch.utils.flop_counter: of the shapes of tensors, and of other arguments as they are ---------------


def _flops(x, iterations, output, is_gram):
    return (flops.by_positions if is_gram else flops.by_channels)(x, iterations, OUTPUTS[output])


@register_flop_formula(_ops.covariance_pool)
def _pool_flops(x, *rest, out_shape, **named):
    return flops.of_pooling(x)[0]


@register_flop_formula(_ops.covariance_pool_backward)
def _pool_backward_flops(grad, x, *rest, out_shape, **named):
    return flops.of_pooling(x)[1]


@register_flop_formula(_ops.matrix_root)
def _root_flops(sigma, iterations, root, *rest, out_shape, **named):
    return flops.of_root(sigma[0], sigma[1], iterations, root == ROOTS.index("inverse"))[0]


@register_flop_formula(_ops.matrix_root_backward)
def _root_backward_flops(grad, sigma, iterations, root, *rest, out_shape, **named):
    return flops.of_root(sigma[0], sigma[1], iterations, root == ROOTS.index("inverse"))[1]


@register_flop_formula(_ops.cov_sqrt)
def _cov_sqrt_flops(x, iterations, output, spectrum_floor=0.0, engine=0, wide=False, gram=False, *, out_shape):
    return _flops(x, iterations, output, gram)[0]


@register_flop_formula(_ops.cov_sqrt_backward)
def _cov_sqrt_backward_flops(grad, x, sigma, mean, scale, iterations, output, *rest, out_shape, **named):
    return _flops(x, iterations, output, sigma[1] < x[1])[1]


# ---- The operators in plain torch ------------------------------------------------------------------------------------


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The operators in plain torch, for where they are unknown: ONNX, and runtimes without this library.

    A table for :meth:`torch.export.ExportedProgram.run_decompositions`. The program that comes out has the values of
    the functions, within rounding, by their equations and with all temporaries of these. The operators of gradients,
    which a program that computes derivatives consists of, stay.
    """

    def pool(x, engine=0, wide=False):
        maps = x.to(compute_dtype(x.dtype))
        return reference.covariance_pool(maps).to(_result_dtype(x, wide)), 2 * _half_from_first(maps).mean(2)

    def root(sigma, iterations, root, spectrum_floor=0.0, engine=0):
        function = _root_function(sigma, iterations, root, spectrum_floor, engine)
        return function(sigma.to(compute_dtype(sigma.dtype))).to(sigma.dtype)

    def pool_and_root(x, iterations, output, spectrum_floor=0.0, engine=0, wide=False, gram=False):
        maps = x.to(compute_dtype(x.dtype))
        sigma, mean = pool(maps)
        scale = torch.ones_like(mean[:, 0])
        if gram:
            features = reference.gram_features(maps.flatten(2))
            sigma, mean = features.mT @ features / math.prod(x.shape[2:]), mean[:, :0]
        function = _cov_sqrt_function(maps, sigma, mean, None, iterations, output, spectrum_floor, engine)
        return function(maps).to(_result_dtype(x, wide)), sigma, mean, scale

    table: dict[str, Callable[..., Any]] = {"covariance_pool": pool, "matrix_root": root, "cov_sqrt": pool_and_root}
    return {getattr(_ops, name).default: function for name, function in table.items()}
