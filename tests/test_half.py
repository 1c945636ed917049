"""The operators on feature maps of 16 bits: read as they are, computed in float32, rounded once."""

import pytest
import torch

from common import assert_close, engine_code, engine_device, feature_maps, gradient_size, layouts, tolerance
from isqrt_cov import reference
from isqrt_cov.ops import OUTPUTS

ops = torch.ops.isqrt_cov


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("channels", (3, 40, 64))
def test_half_is_computed_in_float(engine, channels, dtype, output):
    device = engine_device(engine)
    source = feature_maps(2, channels, 60, torch.float32, device).view(2, channels, 6, 10)
    # One rounding to dtype, at most half its spacing for each element, besides the errors of float32.
    bound = torch.finfo(dtype).eps / 2 + 2 * tolerance(torch.float32, channels, 60)
    for x in layouts(source.to(dtype)).values():
        x = x.detach().requires_grad_()
        y, sigma, mean, _ = ops.cov_sqrt(x, 5, OUTPUTS.index(output), engine=engine_code(engine))
        upstream = torch.randn_like(y)
        (grad,) = torch.autograd.grad(y, x, upstream)
        exact = x.detach().double()
        assert (y.dtype, sigma.dtype, mean.dtype, grad.dtype) == (dtype, torch.float32, torch.float32, dtype)
        assert_close(y, reference.cov_sqrt(exact, 5, output), bound)
        exact_grad = reference.cov_sqrt_backward(upstream.double(), exact, 5, output)
        assert_close(grad, exact_grad, bound, gradient_size(upstream, y, x))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_every_half_is_read_as_it_is(engine, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(engine_device(engine))
    every = every.view(1024, 64, 1)
    x = torch.cat((torch.zeros_like(every), every), 2)
    for after_zeros in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        twice = 2 * ops.covariance_pool(after_zeros, engine_code(engine))[1]
        expected = after_zeros[:, :, 1].float()
        assert torch.equal(twice.nan_to_num(0.5), expected.nan_to_num(0.5)) and twice.isnan().equal(expected.isnan())


def test_small_halves_where_denormal_numbers_are_zeros(engine):
    """They are normal numbers of float32, in which they are computed."""
    x = (2e-7 * torch.randn(2, 19, 103, device=engine_device(engine))).half()
    expected = reference.covariance_pool(x.double())
    assert torch.set_flush_denormal(True)
    try:
        sigma, _ = ops.covariance_pool(x, engine_code(engine), True)
    finally:
        torch.set_flush_denormal(False)
    assert_close(sigma, expected, tolerance(torch.float32, 19, 103))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_is_rounded_to_nearest(engine, dtype):
    # With a covariance's gradient that is zero but for g at (0, 0), and a first position and a mean of zero, dx[0] is
    # 2 g x[0] / M: any product of two halves.
    device = engine_device(engine)
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 17, (5000,), generator=generator).float()
    values = (torch.randn(5000, generator=generator) * torch.exp2(exponents)).to(dtype)
    values = values[values.isfinite()]
    factors = torch.randn(64, generator=generator).to(dtype)
    factors[0] = 0
    for channels in (1, 64):
        grad = torch.zeros(len(values), channels, channels, dtype=dtype, device=device)
        grad[:, 0, 0] = values.to(device)
        x = torch.zeros(len(values), channels, 64, dtype=dtype, device=device)
        x[:, 0] = factors.to(device)
        mean = torch.zeros(len(values), channels, device=device)
        dx = ops.covariance_pool_backward(grad, x, mean, engine_code(engine))[:, 0]
        expected = (values.float()[:, None] * (2 / 64) * factors.float()).to(dtype)
        assert torch.equal(dx.cpu(), expected)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_functions_and_second_order(device, dtype):
    x = feature_maps(2, 6, 30, dtype, device).requires_grad_()
    sigma, _ = ops.covariance_pool(x)
    root = ops.matrix_root(sigma, 3, 0)
    (grad,) = torch.autograd.grad(root, x, torch.ones_like(root), create_graph=True)
    (second,) = torch.autograd.grad(grad.float().square().sum(), x)
    assert {t.dtype for t in (sigma, root, grad, second)} == {dtype}
    bound = 2 * torch.finfo(dtype).eps  # two roundings in a row, of sigma and of the root
    assert_close(root, reference.cov_sqrt(x.detach().double(), 3), bound)
    assert second.isfinite().all() and torch.count_nonzero(second)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_wide_results_are_those_of_a_copy_in_float(engine, dtype):
    number = engine_code(engine)
    x = feature_maps(2, 40, 60, dtype, engine_device(engine)).requires_grad_()
    copy = x.detach().float().requires_grad_()
    for function in (
        lambda x, wide: ops.covariance_pool(x, number, wide)[0],
        *(lambda x, wide, o=o: ops.cov_sqrt(x, 5, o, engine=number, wide=wide)[0] for o in range(3)),
    ):
        y, expected = function(x, True), function(copy, False)
        upstream = torch.randn_like(expected)
        (grad,), (expected_grad,) = torch.autograd.grad(y, x, upstream), torch.autograd.grad(expected, copy, upstream)
        assert (y.dtype, grad.dtype) == (torch.float32, dtype)
        assert torch.equal(y, expected) and torch.equal(grad, expected_grad.to(dtype))
        assert torch.equal(function(copy, True), expected) and torch.equal(function(x, False), y.to(dtype))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_second_order_of_wide_results(device, dtype):
    x = feature_maps(2, 6, 30, dtype, device).requires_grad_()
    copy = x.detach().float().requires_grad_()
    for function in (
        lambda x, wide: ops.covariance_pool(x, 0, wide)[0],
        lambda x, wide: ops.cov_sqrt(x, 3, 1, 0.0, 0, wide)[0],
    ):
        seconds = []
        for leaf in (x, copy):
            y = function(leaf, True)
            upstream = torch.ones_like(y).requires_grad_()
            (grad,) = torch.autograd.grad(y, leaf, upstream, create_graph=True)
            seconds.append(torch.autograd.grad(grad.float().square().sum(), (upstream, leaf)))
        for actual, expected, wanted in zip(*seconds, (torch.float32, dtype), strict=True):
            assert actual.dtype == wanted
            assert_close(actual, expected, torch.finfo(dtype).eps)
