"""Input that breaks things elsewhere: degenerate, enormous, infinitesimal, not finite, and a great deal of it."""

import os

import pytest
import torch

from common import assert_close, covariances, feature_maps, gradient_size, tolerance
from isqrt_cov import cov_sqrt, covariance_pool, matrix_inv_sqrt, matrix_sqrt, reference
from isqrt_cov.ops import OUTPUTS

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
every_output = pytest.mark.parametrize("output", OUTPUTS)
large = pytest.mark.skipif("TEST_LARGE" not in os.environ, reason="takes 10 GB and minutes: set TEST_LARGE=1")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def value_and_gradient(function, x, upstream=None):
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    upstream = torch.randn_like(y) if upstream is None else upstream
    return y.detach(), torch.autograd.grad(y, leaf, upstream)[0], upstream


def assert_as_reference(x, output, iterations=5):
    """``cov_sqrt`` and its gradient against the reference in float64."""
    y, slope, upstream = value_and_gradient(lambda x: cov_sqrt(x, iterations, output), x)
    wide = x.double()
    exact_y, exact_slope, _ = value_and_gradient(
        lambda x: reference.cov_sqrt(x, iterations, output), wide, upstream.double()
    )
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    rounding = 0 if x.dtype == computed else torch.finfo(x.dtype).eps / 2
    bound = tolerance(computed, x.shape[1], x[0, 0].numel(), iterations)
    assert_close(y, exact_y, rounding + bound)
    size = gradient_size(upstream, y, x) if torch.count_nonzero(exact_slope) else 0.0
    assert_close(slope, exact_slope, rounding + 2 * bound, size)
    return y, slope


@every_dtype
@every_output
def test_constant_map(device, output, dtype):
    x = torch.full((2, 6, 7, 7), -1.7, dtype=dtype, device=device)
    x[1] *= torch.arange(6, device=device)[:, None, None]
    y, slope, _ = value_and_gradient(lambda x: cov_sqrt(x, output=output), x)
    assert torch.count_nonzero(y) == 0 and torch.count_nonzero(slope) == 0


@pytest.mark.parametrize("gram", (False, True), ids=("channels", "positions"))
@every_output
def test_constant_map_after_many_steps(device, output, gram):
    x = torch.full((2, 20 if gram else 4, 3, 4), -1.7, device=device)
    y, slope, _ = value_and_gradient(lambda x: cov_sqrt(x, 200, output), x)
    assert torch.count_nonzero(y) == 0 and torch.count_nonzero(slope) == 0


@every_dtype
@every_output
def test_one_position(device, output, dtype):
    for shape in ((3, 5, 1), (3, 5, 1, 1)):
        x = torch.randn(shape, device=device).to(dtype)
        y, slope, _ = value_and_gradient(lambda x: cov_sqrt(x, output=output), x)
        assert torch.count_nonzero(y) == 0 and torch.count_nonzero(slope) == 0


@every_dtype
@every_output
def test_one_channel(device, output, dtype):
    # The root of a variance; after one step and any other number of them it is exact, since A = 1.
    x = feature_maps(3, 1, 40, dtype, device)
    y, _ = assert_as_reference(x, output)
    assert_close(y.flatten(), x.double().flatten(1).var(1, correction=0).sqrt(), 2 * torch.finfo(dtype).eps)


@every_dtype
@every_output
def test_rank_one(device, output, dtype):
    direction = torch.randn(2, 20, 1, dtype=torch.float64, device=device)
    assert_as_reference((direction * torch.randn(2, 1, 50, dtype=torch.float64, device=device)).to(dtype), output)
    assert_as_reference(torch.randn(2, 20, 2, device=device).to(dtype), output)  # two positions


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@every_output
def test_condition_of_1e12(device, output, dtype):
    scales = torch.logspace(0, -6, 24, dtype=torch.float64, device=device)[:, None]
    x = scales * torch.randn(2, 24, 300, dtype=torch.float64, device=device)
    assert_as_reference(x.to(dtype), output)
    sigma = covariances(2, 24, torch.float64, device)
    values, vectors = torch.linalg.eigh(sigma)
    sigma = ((vectors * torch.logspace(-12, 0, 24, dtype=torch.float64, device=device)) @ vectors.mT).to(dtype)
    for function, exact in ((matrix_sqrt, reference.matrix_sqrt), (matrix_inv_sqrt, reference.matrix_inv_sqrt)):
        y, slope, upstream = value_and_gradient(function, sigma)
        exact_y, exact_slope, _ = value_and_gradient(exact, sigma.double(), upstream.double())
        assert_close(y, exact_y, tolerance(dtype, 24))
        assert_close(slope, exact_slope, 2 * tolerance(dtype, 24), gradient_size(upstream, y, sigma))


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, f) for f in (1e-37, 1e-30, 1e-20, 1e-10, 1e12, 1e18, 1e30, 3e37)]
    + [(torch.bfloat16, f) for f in (1e-30, 1e30)]
    + [(torch.float64, f) for f in (1e-300, 1e-160, 1e-120, 1e150, 1e300)],
)
@every_output
def test_squares_beyond_the_range(device, output, dtype, factor):
    """The covariance leaves the dtype's range; its root, of x's own size, does not, nor does the gradient."""
    normal = feature_maps(3, 20, 150, torch.float64, device)
    x = (factor * normal).to(dtype)
    y, slope, upstream = value_and_gradient(lambda x: cov_sqrt(x, output=output), x)
    wide = x.double() / factor
    exact_y, exact_slope, _ = value_and_gradient(lambda x: reference.cov_sqrt(x, 5, output), wide, upstream.double())
    computed = torch.promote_types(dtype, torch.float32)
    rounding = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0
    bound = tolerance(computed, 20, 150)
    assert_close(y.double() / factor, exact_y, rounding + bound)
    assert_close(slope, exact_slope, rounding + 2 * bound, gradient_size(upstream, exact_y, wide))
    # One sample of that size leaves the others as they are, to the bit.
    mixed = torch.cat([x[:1], normal[1:].to(dtype)])
    y, slope, upstream = value_and_gradient(lambda x: cov_sqrt(x, output=output), mixed)
    alone = value_and_gradient(lambda x: cov_sqrt(x, output=output), mixed[1:], upstream[1:])
    assert torch.equal(y[1:], alone[0]) and torch.equal(slope[1:], alone[1])


@pytest.mark.parametrize("factor", (1e-38, 2e37))
@every_output
def test_the_ends_of_the_range(device, output, factor):
    """The gradient is an ordinary number where x is a denormal one, and where the norm of the root is not finite."""
    normal = feature_maps(2, 300, 100, torch.float64, device)
    x = (factor * normal).float()
    y, slope, upstream = value_and_gradient(lambda x: cov_sqrt(x, output=output), x)
    wide = x.double() / factor
    exact_y, exact_slope, _ = value_and_gradient(lambda x: reference.cov_sqrt(x, 5, output), wide, upstream.double())
    bound = tolerance(torch.float32, 300, 100)
    spacing = y.numel() ** 0.5 * 2.0**-149 / factor  # of denormal numbers
    assert_close(y.double() / factor, exact_y, bound, spacing / bound)
    assert_close(slope, exact_slope, 2 * bound, gradient_size(upstream, exact_y, wide))


@every_output
def test_a_constant_channel_far_above_the_others(device, output):
    x = 1e-30 * feature_maps(2, 6, 50, torch.float64, device).float()
    x[:, 2] = 1e10
    y, slope, upstream = value_and_gradient(lambda x: cov_sqrt(x, output=output), x)
    wide = 1e30 * x.double()
    wide[:, 2] = 0
    exact_y, exact_slope, _ = value_and_gradient(lambda x: reference.cov_sqrt(x, 5, output), wide, upstream.double())
    bound = tolerance(torch.float32, 6, 50)
    assert_close(1e30 * y.double(), exact_y, bound)
    assert_close(slope, exact_slope, 2 * bound, gradient_size(upstream, exact_y, wide))


@pytest.mark.parametrize("factor", (1e-38, 1e-30, 1e18, 1e37))
@every_output
def test_squares_beyond_the_range_under_autocast(device, output, factor):
    x = (factor * feature_maps(3, 20, 150, torch.float64, device)).bfloat16()

    def under_autocast(x):
        with torch.autocast(device, dtype=torch.bfloat16):
            return cov_sqrt(x, output=output)

    y, slope, upstream = value_and_gradient(under_autocast, x)
    copied_y, copied_slope, _ = value_and_gradient(lambda x: cov_sqrt(x, output=output), x.float(), upstream)
    assert (y.dtype, slope.dtype) == (torch.float32, torch.bfloat16)
    bound = tolerance(torch.float32, 20, 150)
    assert_close(y / factor, copied_y.double() / factor, bound)
    assert_close(slope, copied_slope, torch.finfo(torch.bfloat16).eps / 2 + bound)


def test_tangents_and_second_derivatives_beyond_the_range(device):
    normal = feature_maps(2, 6, 40, torch.float64, device)
    direction, upstream = torch.randn_like(normal), torch.randn(2, 6, 6, dtype=torch.float64, device=device)

    def tangent_and_curvature(x, function, scale):
        tangent = torch.func.jvp(function, (x,), (direction.to(x.dtype),))[1]
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf), leaf, upstream.to(x.dtype), create_graph=True)
        (curvature,) = torch.autograd.grad(grad, leaf, direction.to(x.dtype) * scale)
        return tangent, curvature

    exact = tangent_and_curvature(normal, reference.cov_sqrt, 1)
    for factor in (1e-20, 1e20):
        found = tangent_and_curvature((factor * normal).float(), cov_sqrt, factor)
        for value, expected in zip(found, exact, strict=True):
            assert_close(value, expected, 20 * tolerance(torch.float32, 6, 40))


def test_second_derivatives_of_a_channel_far_above_the_others(device):
    """A constant one, of which nothing depends; what is 1e30 times as large as the others is not in range with them."""
    x = 1e-30 * feature_maps(2, 6, 40, torch.float32, device)
    direction, upstream = torch.randn_like(x), torch.randn(2, 6, 6, device=device)
    x[:, 2] = 1e10
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cov_sqrt(leaf), leaf, upstream, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, leaf, 1e-30 * direction)
    tangent = torch.func.jvp(cov_sqrt, (x,), (direction,))[1]
    x[:, 2] = 0
    exact = (1e30 * x.double()).requires_grad_()
    (slope,) = torch.autograd.grad(reference.cov_sqrt(exact), exact, upstream.double(), create_graph=True)
    (expected,) = torch.autograd.grad(slope, exact, direction.double())
    assert_close(curvature, expected, 20 * tolerance(torch.float32, 6, 40))
    expected = torch.func.jvp(reference.cov_sqrt, (exact.detach(),), (direction.double(),))[1]
    assert_close(tangent, expected, 20 * tolerance(torch.float32, 6, 40))


@pytest.mark.parametrize("scale", (1e-22, 1e-16, 1e18, 1e22))
@pytest.mark.parametrize("function", (matrix_sqrt, matrix_inv_sqrt))
def test_second_derivatives_of_roots_beyond_the_range(device, function, scale):
    sigma = covariances(2, 5, torch.float64, device)
    direction, upstream = torch.randn_like(sigma), torch.randn_like(sigma)

    def curvature(function, dtype, scale):
        leaf = (scale * sigma).to(dtype).requires_grad_()
        (slope,) = torch.autograd.grad(function(leaf), leaf, upstream.to(dtype), create_graph=True)
        return torch.autograd.grad(slope, leaf, scale * direction.to(dtype))[0]

    expected = curvature(getattr(reference, function.__name__), torch.float64, scale)
    assert_close(curvature(function, torch.float32, scale), expected, 20 * tolerance(torch.float32, 5, 40))


@pytest.mark.parametrize("size", (1e-15, 1e15))
def test_whitening_of_any_size(device, size):
    """The gradient of an inverse root with respect to x, where that with respect to Sigma is beyond float32."""
    x = feature_maps(2, 6, 40, torch.float64, device)

    def whitened(x, pool, root):
        return (root(pool(x)) @ x).pow(4)

    _, slope, upstream = value_and_gradient(lambda x: whitened(x, covariance_pool, matrix_inv_sqrt), (size * x).float())
    exactly = reference.covariance_pool, reference.matrix_inv_sqrt
    _, expected, _ = value_and_gradient(lambda x: whitened(x, *exactly), size * x, upstream.double())
    assert_close(slope * size, expected * size, 20 * tolerance(torch.float32, 6, 40))


def test_covariance_within_the_range_of_sums_beyond_it(device):
    x = feature_maps(2, 20, 4000, torch.float64, device)
    assert_close(
        covariance_pool((1e18 * x).float()).double() / 1e36,
        reference.covariance_pool(x),
        tolerance(torch.float32, 20, 4000),
    )
    assert covariance_pool((1e-30 * x).float()).count_nonzero() == 0  # as it rounds


@every_output
def test_denormals(device, output):
    x = (feature_maps(2, 5, 30, torch.float64, device) * 2.0**-137).float()
    y, slope, upstream = value_and_gradient(lambda x: cov_sqrt(x, output=output), x)
    wide = x.double() * 2.0**137
    exact_y, exact_slope, _ = value_and_gradient(lambda x: reference.cov_sqrt(x, 5, output), wide, upstream.double())
    # The root's numbers are denormal themselves, and so are halves of differences of x: 2^-149 is their spacing.
    assert_close(y.double() * 2.0**137, exact_y, 2.0**-11)
    assert_close(slope, exact_slope, 2.0**-11, gradient_size(upstream, exact_y, wide))


def test_covariance_of_denormals(device):
    sigma = (covariances(2, 5, torch.float64, device) * 2.0**-138).float()
    y, slope, upstream = value_and_gradient(matrix_sqrt, sigma)
    bound = tolerance(torch.float32, 5)
    assert_close(y, reference.matrix_sqrt(sigma.double()), bound)
    exact_slope = reference.matrix_sqrt_backward(upstream.double(), sigma.double())
    assert_close(slope, exact_slope, 2 * bound, gradient_size(upstream, y, sigma))


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@every_dtype
@every_output
def test_not_finite_in_one_sample_stays_there(device, output, dtype, bad):
    clean = feature_maps(5, 9, 40, dtype, device)
    dirty = clean.clone()
    dirty[2, 4, 7] = bad
    y, slope, upstream = value_and_gradient(lambda x: cov_sqrt(x, output=output), clean)
    y_dirty, slope_dirty, _ = value_and_gradient(lambda x: cov_sqrt(x, output=output), dirty, upstream)
    others = [0, 1, 3, 4]
    assert torch.equal(y_dirty[others], y[others]) and torch.equal(slope_dirty[others], slope[others])
    assert y_dirty[2].isnan().any() and slope_dirty[2].isnan().any()
    # So does an upstream gradient that is not finite.
    upstream = upstream.clone()
    upstream[2, 0] = bad
    _, slope_dirty, _ = value_and_gradient(lambda x: cov_sqrt(x, output=output), clean, upstream)
    assert torch.equal(slope_dirty[others], slope[others]) and not slope_dirty[2].isfinite().all()


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_what_is_not_finite_is_not_scaled(device, bad):
    """A second pass would take its time, and find no scale that helps."""
    x = feature_maps(3, 12, 10, torch.float32, device)
    x[1, 4, 7] = bad  # numbers follow it
    for gram in (False,) if x.is_cuda else (False, True):  # the library scales all samples
        scale = torch.ops.isqrt_cov.cov_sqrt(x, 5, 0, gram=gram)[3]
        assert scale[1] == 1 and (gram or (scale == 1).all())


@pytest.mark.parametrize("function", (matrix_sqrt, matrix_inv_sqrt))
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_not_finite_sigma_stays_in_its_sample(device, function, bad):
    clean = covariances(4, 6, torch.float32, device)
    dirty = clean.clone()
    dirty[1, 2, 3] = bad
    y, slope, upstream = value_and_gradient(function, clean)
    y_dirty, slope_dirty, _ = value_and_gradient(function, dirty, upstream)
    others = [0, 2, 3]
    assert torch.equal(y_dirty[others], y[others]) and torch.equal(slope_dirty[others], slope[others])
    assert y_dirty[1].isnan().any()


@every_dtype
def test_negative_trace(device, dtype):
    # Documented: NaN in that sample, in both directions, and nowhere else.
    sigma = covariances(3, 5, dtype, device)
    sigma[1] *= -1
    for function in (matrix_sqrt, matrix_inv_sqrt):
        y, slope, _ = value_and_gradient(function, sigma)
        for t in (y, slope):
            assert t[[0, 2]].isfinite().all() and t[1].isnan().all()


def test_indefinite_sigma_with_a_positive_trace(device):
    # No root, but the same polynomial: its eigenvalues lie within -1 and 2, where the iteration is defined.
    sigma = covariances(2, 4, torch.float64, device) - 0.1 * torch.eye(4, dtype=torch.float64, device=device)
    y, slope, upstream = value_and_gradient(matrix_sqrt, sigma)
    exact_y, exact_slope, _ = value_and_gradient(reference.matrix_sqrt, sigma, upstream)
    assert_close(y, exact_y, 1e-12)
    assert_close(slope, exact_slope, 1e-12)


@pytest.mark.parametrize(
    ("shape", "strides"),
    (((2, 4, 25), (2**31, 25, 1)), ((1, 3, 25), (75, 2**30, 1)), ((1, 4, 3), (12, 3, 2**30))),
    ids=("batch", "channel", "position"),
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_offsets_beyond_2_to_31(device, dtype, shape, strides):
    # On a CPU the memory between the few elements that are used is never touched, and so never taken.
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    assert extent > 2**31
    x = torch.empty(extent, dtype=dtype, device=device).as_strided(shape, strides)
    x.copy_(feature_maps(*shape, dtype, device))
    y, slope, upstream = value_and_gradient(cov_sqrt, x)
    expected_y, expected_slope, _ = value_and_gradient(cov_sqrt, x.contiguous(), upstream)
    assert_close(y, expected_y, torch.finfo(dtype).eps)
    assert_close(slope, expected_slope, 2 * torch.finfo(dtype).eps)


@large
def test_more_than_2_to_31_positions_in_little_memory(device):
    rows = feature_maps(1, 1, 2**15, torch.float32, device)
    x = rows[..., None].expand(-1, -1, -1, 2**16 + 1)
    assert x[0, 0].numel() > 2**31
    assert_close(covariance_pool(x), reference.covariance_pool(rows.double()), tolerance(torch.float32, 1, 2**31))


@large
def test_more_than_2_to_31_elements_in_memory(device):
    channels, positions = 64, 2**25 + 8
    x = torch.empty(1, channels, positions, dtype=torch.bfloat16, device=device)
    mixing = torch.randn(channels, channels, device=device) / channels**0.5
    pieces = range(0, positions, 2**20)
    for start in pieces:
        piece = x[:, :, start : start + 2**20]
        piece.copy_(mixing @ torch.randn(channels, piece.shape[2], device=device) + 3.0)
    assert x.numel() > 2**31
    y, slope, upstream = value_and_gradient(cov_sqrt, x)

    mean = sum(x[:, :, start : start + 2**20].double().sum(2) for start in pieces)[..., None] / positions
    sigma = torch.zeros(1, channels, channels, dtype=torch.float64, device=device)
    for start in pieces:
        centred = x[:, :, start : start + 2**20].double() - mean
        sigma += centred @ centred.mT / positions
    assert_close(y, reference.matrix_sqrt(sigma), torch.finfo(torch.bfloat16).eps)
    grad_sigma = 2 * reference.matrix_sqrt_backward(upstream.double(), sigma)
    for start in (0, pieces[len(pieces) // 2], positions - 1000):
        expected = grad_sigma @ (x[:, :, start : start + 1000].double() - mean) / positions
        assert_close(slope[:, :, start : start + 1000], expected, torch.finfo(torch.bfloat16).eps)


def test_thousands_of_channels(device):
    x = torch.randn(1500, 8, device=device) @ feature_maps(1, 8, 30, torch.float32, device)
    y, slope, upstream = value_and_gradient(lambda x: cov_sqrt(x, 2, "mean"), x)
    exact_y, exact_slope, _ = value_and_gradient(
        lambda x: reference.cov_sqrt(x, 2, "mean"), x.double(), upstream.double()
    )
    bound = tolerance(torch.float32, 1500, 30, 2)
    assert_close(y, exact_y, bound)
    assert_close(slope, exact_slope, 2 * bound, gradient_size(upstream, y, x))


@every_output
def test_a_hundred_thousand_samples(device, output):
    x = torch.randn(100_000, 3, 2, 2, device=device)
    y, slope, upstream = value_and_gradient(lambda x: cov_sqrt(x, output=output), x)
    last = value_and_gradient(lambda x: cov_sqrt(x, output=output), x[-7:], upstream[-7:])
    assert torch.equal(y[-7:], last[0]) and torch.equal(slope[-7:], last[1])
    assert_close(y, reference.cov_sqrt(x.double(), output=output), tolerance(torch.float32, 3, 4))
