"""The operators of ``torch.ops.isqrt_cov``: their shapes under tracing and their gradients.

Schemas, argument checks and implementations are in ``csrc/ops.cpp``. A gradient is an operator of its own, and what is
kept for it is x, mu and Sigma. The gradient of a gradient is composed from :mod:`isqrt_cov.reference`.
"""

import functools
from pathlib import Path

import torch

from . import reference

# The enumerations of csrc, in their order.
OUTPUTS = ("matrix", "triu", "mean")
ROOTS = ("square", "inverse")
ENGINES = ("auto", "library", "portable", "avx2", "avx512", "block", "grid")


def code(argument: str, value: str, names: tuple[str, ...]) -> int:
    """Number of ``value`` among ``names``. Raises ValueError naming the argument and what it was."""
    if value not in names:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, names))}, got {value!r}")
    return names.index(value)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What feature maps and matrices of this dtype are computed in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _load() -> None:
    library = Path(__file__).with_name("_C.so")
    if not library.exists():
        raise ImportError(
            f"isqrt_cov is imported from {library.parent}, which holds no compiled library:"
            " leave the source tree, or build it in place with `pip install -e .`"
        )
    torch.ops.load_library(str(library))


_load()
_ops = torch.ops.isqrt_cov


def _second_order(function, inputs, upstream, grad_of_grad):
    """Gradient of ``vjp(function, inputs)(upstream)`` with respect to the upstream gradient and the inputs."""
    dtype = compute_dtype(inputs.dtype)
    with torch.enable_grad():
        x, g = (t.detach().to(dtype).requires_grad_() for t in (inputs, upstream))
        (vjp,) = torch.autograd.grad(function(x), x, g, create_graph=True)
        grads = torch.autograd.grad(vjp, (g, x), grad_of_grad.to(dtype))
    return [grad.to(inputs.dtype) for grad in grads]


def _step(ctx):
    if ctx.spectrum_floor == 0:
        return reference.PAPER_STEP
    return reference.minimax_steps(ctx.iterations, ctx.spectrum_floor)


def _register(name, fake, setup_context, backward):
    torch.library.register_fake(f"isqrt_cov::{name}", fake)
    torch.library.register_autograd(f"isqrt_cov::{name}", backward, setup_context=setup_context)


# ---- covariance_pool: x [B, C, H, W] or [B, C, M] -> sigma [B, C, C], mean [B, C] ------------------------------------


def _pool_fake(x, engine=0):
    batch, channels = x.shape[:2]
    return x.new_empty(batch, channels, channels), x.new_empty(batch, channels, dtype=compute_dtype(x.dtype))


def _pool_setup(ctx, inputs, output):
    x, ctx.engine = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1])


def _pool_backward(ctx, grad, _):
    if grad is None:
        return None, None
    x, mean = ctx.saved_tensors
    return _ops.covariance_pool_backward(grad, x, mean, ctx.engine), None


def _pool_backward_fake(grad, x, mean, engine=0):
    return torch.empty_like(x)


def _pool_backward_setup(ctx, inputs, output):
    grad, x, _, _ = inputs
    ctx.save_for_backward(grad, x)


def _pool_double_backward(ctx, grad_of_grad):
    grad, x = ctx.saved_tensors
    return *_second_order(reference.covariance_pool, x, grad, grad_of_grad), None, None


_register("covariance_pool", _pool_fake, _pool_setup, _pool_backward)
_register("covariance_pool_backward", _pool_backward_fake, _pool_backward_setup, _pool_double_backward)


# ---- matrix_root: sigma [B, C, C] -> its square or inverse square root [B, C, C] -------------------------------------


def _root_fake(sigma, iterations, root, spectrum_floor=0.0, engine=0):
    return torch.empty_like(sigma, memory_format=torch.contiguous_format)


def _root_setup(ctx, inputs, output):
    sigma, *ctx.arguments = inputs
    ctx.save_for_backward(sigma)


def _root_backward(ctx, grad):
    (sigma,) = ctx.saved_tensors
    return _ops.matrix_root_backward(grad, sigma, *ctx.arguments), None, None, None, None


def _root_backward_fake(grad, sigma, iterations, root, spectrum_floor=0.0, engine=0):
    return torch.empty_like(sigma, memory_format=torch.contiguous_format)


def _root_backward_setup(ctx, inputs, output):
    grad, sigma, ctx.iterations, ctx.root, ctx.spectrum_floor, _ = inputs
    ctx.save_for_backward(grad, sigma)


def _root_double_backward(ctx, grad_of_grad):
    grad, sigma = ctx.saved_tensors
    function = (reference.matrix_sqrt, reference.matrix_inv_sqrt)[ctx.root]
    function = functools.partial(function, iterations=ctx.iterations, step=_step(ctx))
    return *_second_order(function, sigma, grad, grad_of_grad), None, None, None, None


_register("matrix_root", _root_fake, _root_setup, _root_backward)
_register("matrix_root_backward", _root_backward_fake, _root_backward_setup, _root_double_backward)


# ---- cov_sqrt: x [B, C, H, W] or [B, C, M] -> y, sigma [B, C, C], mean [B, C] ----------------------------------------


def _cov_sqrt_fake(x, iterations, output, spectrum_floor=0.0, engine=0):
    batch, channels = x.shape[:2]
    shape = ((batch, channels, channels), (batch, channels * (channels + 1) // 2), (batch, channels))[output]
    sigma, mean = _pool_fake(x)
    return x.new_empty(shape), sigma.to(compute_dtype(x.dtype)), mean


def _cov_sqrt_setup(ctx, inputs, output):
    x, *ctx.arguments = inputs
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], output[2])


def _cov_sqrt_backward(ctx, grad, _sigma, _mean):
    if grad is None:
        return None, None, None, None, None
    return _ops.cov_sqrt_backward(grad, *ctx.saved_tensors, *ctx.arguments), None, None, None, None


def _cov_sqrt_backward_fake(grad, x, sigma, mean, iterations, output, spectrum_floor=0.0, engine=0):
    return torch.empty_like(x)


def _cov_sqrt_backward_setup(ctx, inputs, output):
    grad, x, _, _, ctx.iterations, ctx.output, ctx.spectrum_floor, _ = inputs
    ctx.save_for_backward(grad, x)


def _cov_sqrt_double_backward(ctx, grad_of_grad):
    grad, x = ctx.saved_tensors
    output = OUTPUTS[ctx.output]
    function = functools.partial(reference.cov_sqrt, iterations=ctx.iterations, output=output, step=_step(ctx))
    return *_second_order(function, x, grad, grad_of_grad), None, None, None, None, None, None


_register("cov_sqrt", _cov_sqrt_fake, _cov_sqrt_setup, _cov_sqrt_backward)
_register("cov_sqrt_backward", _cov_sqrt_backward_fake, _cov_sqrt_backward_setup, _cov_sqrt_double_backward)
