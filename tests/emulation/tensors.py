"""The emulated kernels and their launchers for tensors, and what their results are compared with."""

import torch

from common import assert_close, assert_mean, gradient_size, tolerance
from isqrt_cov import reference
from isqrt_cov.ops import OUTPUTS, ROOTS


def in_layout(x, layout):
    """x in memory as (B, C, H, W), (B, H, W, C), or as a part of a larger image."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "crop":
        large = torch.full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 2), float("nan"), dtype=x.dtype)
        large[:, :, 2:-1, 1:-1] = x
        return large[:, :, 2:-1, 1:-1]
    return x


def array(t):
    """A numpy array over the same memory; numpy knows no bfloat16."""
    return t.detach().view(torch.int16).numpy() if t.element_size() == 2 else t.detach().numpy()


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def not_a_number(*shape, dtype):
    """For the kernels to write all of it."""
    return torch.full(shape, float("nan"), dtype=dtype)


NO_SCALE = torch.empty(0)


def pool(kernels, x, chunk, scale=NO_SCALE):
    batch, channels = x.shape[:2]
    dtype = torch.promote_types(x.dtype, torch.float32)
    sigma, mean = not_a_number(batch, channels, channels, dtype=dtype), not_a_number(batch, channels, dtype=dtype)
    kernels.pool(name_of(x.dtype), array(x), chunk, array(sigma), array(mean), array(scale))
    return sigma, mean


def pool_backward(kernels, grad_sigma, x, mean, chunk, scale=NO_SCALE):
    grad_x = torch.full_like(x, float("nan"))
    arrays = array(grad_sigma), array(x), array(mean), array(scale)
    kernels.pool_backward(name_of(x.dtype), *arrays, chunk, array(grad_x))
    return grad_x


def engine_code(grid, blocks):
    """Of launchers.h: whether matrices are on the grid, how many blocks share one, or "warpgroups" for either."""
    return {False: -2 if blocks == "warpgroups" else blocks, True: 0, "warpgroups": -1}[grid]


def root(kernels, sigma, iterations, root_name, output, floor=0.0, grid=False, scale=NO_SCALE, dtype=None, blocks=1):
    batch, channels = sigma.shape[:2]
    shape = {"matrix": (channels, channels), "triu": (channels * (channels + 1) // 2,), "mean": (channels,)}[output]
    result = not_a_number(batch, *shape, dtype=dtype or sigma.dtype)
    codes = ROOTS.index(root_name), OUTPUTS.index(output)
    blocks = engine_code(grid, blocks)
    kernels.root(name_of(result.dtype), array(sigma), iterations, *codes, floor, blocks, array(scale), array(result))
    return result


def root_backward(kernels, grad, sigma, iterations, root_name, output, floor=0.0, grid=False, blocks=1, value=None):
    grad_sigma = torch.full_like(sigma, float("nan"))
    value = torch.empty(0, dtype=sigma.dtype) if value is None else value  # where the root itself is written
    codes = ROOTS.index(root_name), OUTPUTS.index(output)
    arrays = array(grad.contiguous()), array(sigma)
    blocks = engine_code(grid, blocks)
    results = array(grad_sigma), array(value)
    kernels.root_backward(name_of(grad.dtype), *arrays, iterations, *codes, floor, blocks, *results)
    return grad_sigma


def fits(kernels, sigma, backward, iterations=5, floor=0.0):
    return kernels.root_shared_bytes(sigma.shape[1], sigma.element_size(), backward, iterations, floor) > 0


def check_pooling(kernels, x, chunk, backward_chunk=None):
    exact_x = x.double()
    dtype = torch.promote_types(x.dtype, torch.float32)
    bound = tolerance(dtype, x.shape[1], x[0, 0].numel())
    sigma, mean = pool(kernels, x, chunk)
    assert sigma.dtype == mean.dtype == dtype
    assert_mean(mean, exact_x.flatten(2), bound)
    assert_close(sigma, reference.covariance_pool(exact_x), bound)
    assert torch.equal(sigma, sigma.mT)
    grad_sigma = torch.randn(sigma.shape, dtype=dtype)
    grad_sigma += grad_sigma.mT.clone()
    grad_x = pool_backward(kernels, grad_sigma, x, mean, backward_chunk or chunk)
    # Rounding to x's own dtype is off by at most half its spacing.
    rounding = torch.finfo(x.dtype).eps / 2 if x.dtype != dtype else 0
    assert_close(grad_x, reference.covariance_pool_backward(grad_sigma.double(), exact_x), bound + rounding)


def check_root(kernels, sigma, iterations, root_name, output, floor=0.0, grid=False, blocks=1):
    step = reference.minimax_steps(iterations, floor) if floor else reference.PAPER_STEP
    exact = {"square": reference.matrix_sqrt, "inverse": reference.matrix_inv_sqrt}[root_name]
    exact_sigma = sigma.double().requires_grad_()
    expected = reference.convert_output(exact(exact_sigma, iterations, step), output)
    bound = tolerance(sigma.dtype, sigma.shape[1], 1, iterations)
    result = root(kernels, sigma, iterations, root_name, output, floor, grid, blocks=blocks)
    assert_close(result, expected.detach(), bound)
    if output == "matrix":
        assert torch.equal(result, result.mT)
    if grid or blocks == "warpgroups" or fits(kernels, sigma, True, iterations, floor):
        upstream = torch.randn(result.shape, dtype=sigma.dtype)
        (grad,) = torch.autograd.grad(expected, exact_sigma, upstream.double())
        result = root_backward(kernels, upstream, sigma, iterations, root_name, output, floor, grid, blocks)
        # Half of its sums have twice the terms, and it is a product of two such results.
        assert_close(result, grad, 2 * bound, gradient_size(upstream, expected, sigma))
        assert torch.equal(result, result.mT)
