"""The public functions and the layer."""

import copy
import math
import pickle
from fractions import Fraction

import numpy
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import isqrt_cov
from common import assert_close, covariances, engine_code, feature_maps, missing_cuda, tolerance
from isqrt_cov import (
    CovSqrtNorm,
    cov_sqrt,
    covariance_pool,
    flops,
    matrix_inv_sqrt,
    matrix_sqrt,
    plan,
    reference,
    triu_vector,
)
from isqrt_cov.mpncov import MPNCOV
from isqrt_cov.ops import OUTPUTS


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_functions_match_reference(device, dtype):
    x = feature_maps(3, 24, 60, dtype, device).view(3, 24, 6, 10)
    sigma = covariances(3, 24, dtype, device)
    bound = tolerance(dtype, 24, 60)
    assert_close(covariance_pool(x), reference.covariance_pool(x.double()), bound)
    assert_close(matrix_sqrt(sigma), reference.matrix_sqrt(sigma.double()), bound)
    assert_close(matrix_inv_sqrt(sigma, iterations=3), reference.matrix_inv_sqrt(sigma.double(), 3), bound)
    for output in OUTPUTS:
        assert_close(cov_sqrt(x, output=output), reference.cov_sqrt(x.double(), output=output), bound)
        assert torch.equal(CovSqrtNorm(output=output)(x), cov_sqrt(x, output=output))


def test_cov_sqrt_is_the_composition(device):
    x = feature_maps(2, 30, 200, torch.float64, device)
    sigma = covariance_pool(x)
    y = cov_sqrt(x, iterations=4)
    assert torch.equal(y, matrix_sqrt(sigma, iterations=4))
    assert torch.equal(cov_sqrt(x, iterations=4, output="triu"), triu_vector(y))
    assert_close(cov_sqrt(x, iterations=4, output="mean"), y.mean(dim=1), tolerance(torch.float64, 30))


def test_roots_are_roots(device):
    # With many steps on a well-conditioned matrix the truncated function is the root to rounding.
    sigma = covariances(2, 16, torch.float64, device)
    root, inverse = matrix_sqrt(sigma, 20), matrix_inv_sqrt(sigma, 20)
    eye = torch.eye(16, dtype=torch.float64, device=device).expand(2, -1, -1)
    assert_close(root @ root, sigma, 1e-12)
    assert_close(root @ inverse, eye, 1e-12)


# Four spectra, channels x positions: of C x M noise, and of noise whose channels decay over two decades.
SPECTRA = {"flat 64x2304": (64, 2304, 0), "decaying 64x2304": (64, 2304, -2), "flat 256x196": (256, 196, 0)}
SPECTRA |= {"decaying 256x784": (256, 784, -2)}


@pytest.mark.parametrize(("channels", "positions", "decade"), SPECTRA.values(), ids=SPECTRA)
def test_minimax_is_nearer_to_the_exact_root(channels, positions, decade):
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, decade, channels, dtype=torch.float64)[:, None]
    x = scales * torch.randn(2, channels, positions, generator=generator, dtype=torch.float64)
    exact = reference.exact_sqrt(reference.covariance_pool(x))

    def distance(iterations, **coefficients):
        return ((cov_sqrt(x, iterations, **coefficients) - exact).norm() / exact.norm()).item()

    printed = distance(5)
    assert distance(3, coefficients="minimax", spectrum_floor=1e-2) <= printed
    assert distance(5, coefficients="minimax", spectrum_floor=1e-3) <= printed / 6.5
    # Far below the floor (here eigenvalues of zero, too) nothing grows.
    assert cov_sqrt(x, 20, coefficients="minimax", spectrum_floor=0.5).norm() < 1.1 * exact.norm()


def test_triu_vector_is_row_major(device):
    y = torch.arange(9.0, device=device).view(1, 3, 3)
    assert triu_vector(y).tolist() == [[0, 1, 2, 4, 5, 8]]
    y = torch.randn(2, 4, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(triu_vector, (y,))


@pytest.mark.parametrize("output", OUTPUTS)
def test_layer_in_training(device, output):
    torch.manual_seed(0)
    layer = CovSqrtNorm(iterations=3, output=output)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), layer, torch.nn.Flatten()).to(device)
    network(torch.randn(2, 3, 10, 10, device=device)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert not layer.state_dict()
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (clone.iterations, clone.output, clone.coefficients) == (3, output, "newton_schulz")
    assert repr(layer) == f"CovSqrtNorm(iterations=3, output={output!r}, coefficients='newton_schulz')"


def test_nodes_of_the_graph_are_named():
    x = torch.randn(1, 3, 5, requires_grad=True)
    assert [type(f(x).grad_fn).__name__ for f in (cov_sqrt, covariance_pool)] == [
        "CovSqrtBackward",
        "CovariancePoolBackward",
    ]
    assert "CovSqrtBackward object" in repr(cov_sqrt(x).grad_fn)
    with torch.autograd.detect_anomaly(check_nan=True), pytest.raises(RuntimeError, match="'CovSqrtBackward' returned"):
        (cov_sqrt(x) * math.inf).sum().backward()


@pytest.mark.parametrize("floor", (numpy.float64(0.25), torch.tensor(0.25), Fraction(1, 4)), ids=type)
def test_other_numbers_as_floor(floor):
    x = torch.randn(1, 3, 5)
    layer = CovSqrtNorm(3, coefficients="minimax", spectrum_floor=floor)
    assert type(layer.spectrum_floor) is float and torch.equal(layer(x), cov_sqrt(x, 3, "matrix", "minimax", floor))
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("five", (numpy.int64(5), torch.tensor(5)), ids=("numpy", "tensor"))
def test_other_whole_numbers_of_steps(five):
    torch._dynamo.reset()
    x = feature_maps(2, 3, 8, torch.float64).requires_grad_()
    layer = CovSqrtNorm(five)
    assert type(layer.iterations) is int and MPNCOV(five, input_dim=3).iterNum == 5
    expected = cov_sqrt(x, 5)
    for function in (layer, lambda x: cov_sqrt(x, five), torch.compile(layer, fullgraph=True, backend="aot_eager")):
        assert torch.equal(function(x), expected)
    for root in (matrix_sqrt, matrix_inv_sqrt):
        assert torch.equal(root(expected, five), root(expected, 5))

    def curvature(iterations):
        (slope,) = torch.autograd.grad(cov_sqrt(x, iterations).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    assert torch.equal(curvature(five), curvature(5))


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile_fullgraph(device, dynamic):
    torch._dynamo.reset()

    def function(x):
        return cov_sqrt(x * 2, 4, "triu").sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 5, 6, 7), (3, 6, 4, 9)):
        x = torch.randn(shape, device=device, requires_grad=True)
        y = compiled(x)
        y.backward()
        z = x.detach().clone().requires_grad_()
        expected = function(z)
        expected.backward()
        assert_close(y, expected, 1e-6)
        assert_close(x.grad, z.grad, 1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cov_sqrt(torch.zeros(2, 3)), RuntimeError, r"x: expected shape .* got \(2, 3\)"),
        (lambda: cov_sqrt(torch.zeros(2, 3, 4, 4, 4)), RuntimeError, r"x: expected shape .* got \(2, 3, 4, 4, 4\)"),
        (lambda: cov_sqrt(torch.zeros(2, 3, 4).cfloat()), RuntimeError, "x: expected a float32, .* got ComplexFloat"),
        (lambda: cov_sqrt(torch.zeros(2, 3, 4).int()), RuntimeError, "x: expected a float32, float64, .* got Int"),
        (lambda: cov_sqrt(torch.zeros(2, 0, 4)), RuntimeError, r"x: expected at least one channel, .* \(2, 0, 4\)"),
        (lambda: cov_sqrt(torch.zeros(2, 3, 0)), RuntimeError, r"x: expected at least one position, .* \(2, 3, 0\)"),
        (lambda: cov_sqrt(torch.zeros(2, 3, 4, 0)), RuntimeError, r"x: .* one position, .* \(2, 3, 4, 0\)"),
        (lambda: cov_sqrt(torch.zeros(2, 3, 4), iterations=0), RuntimeError, "iterations: expected 1 .* got 0"),
        (lambda: cov_sqrt(torch.zeros(2, 3, 4), iterations=-3), RuntimeError, "iterations: expected 1 .* got -3"),
        (lambda: cov_sqrt(torch.zeros(2, 3, 4), iterations=2.5), ValueError, "iterations: expected a whole .* got 2.5"),
        (lambda: matrix_sqrt(torch.zeros(2, 3, 3), torch.tensor(3.7)), ValueError, r"iterations: .* got tensor\(3.7"),
        (lambda: cov_sqrt(torch.zeros(2, 3, 4), torch.tensor([2, 3])), ValueError, r"iterations: .* got tensor\(\[2"),
        (lambda: cov_sqrt(torch.zeros(2, 3, 4), 2**70), RuntimeError, "iterations"),
        (lambda: cov_sqrt(torch.zeros(2, 3, 4), output=["mean"]), ValueError, r"output: .* got \['mean'\]"),
        (
            lambda: cov_sqrt(torch.zeros(2, 3, 4), spectrum_floor=torch.tensor([1e-3, 1e-2])),
            ValueError,
            "spectrum_floor: expected a number",
        ),
        (lambda: cov_sqrt(torch.zeros(2, 3, 4).to_sparse()), TypeError, "x: expected a dense .* torch.sparse_coo"),
        (
            lambda: covariance_pool(torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(3, 5)])),
            TypeError,
            "x: expected a dense tensor, got one that is nested",
        ),
        (lambda: cov_sqrt(torch.zeros(2, 3, 4), output="vector"), ValueError, "output: .* got 'vector'"),
        (lambda: covariance_pool(torch.zeros(3)), RuntimeError, r"x: expected shape .* got \(3\)"),
        (lambda: matrix_sqrt(torch.zeros(2, 3, 4)), RuntimeError, r"sigma: expected .* square .* got \(2, 3, 4\)"),
        (lambda: matrix_sqrt(torch.zeros(3, 3)), RuntimeError, r"sigma: expected a batch .* got \(3, 3\)"),
        (lambda: matrix_sqrt(torch.zeros(2, 0, 0)), RuntimeError, r"sigma: .* one channel, got shape \(2, 0, 0\)"),
        (lambda: matrix_sqrt(torch.zeros(2, 3, 3).long()), RuntimeError, "sigma: expected a float32, .* got Long"),
        (lambda: matrix_inv_sqrt(torch.zeros(2, 3, 3), 0), RuntimeError, "iterations: expected 1 .* got 0"),
        (lambda: triu_vector(torch.zeros(2, 3, 4)), ValueError, r"y: expected .* got \(2, 3, 4\)"),
        (lambda: cov_sqrt(torch.zeros(2, 3, 4), coefficients="best"), ValueError, "coefficients: .* got 'best'"),
        (
            lambda: cov_sqrt(torch.zeros(2, 3, 4), coefficients="minimax", spectrum_floor=0),
            ValueError,
            "spectrum_floor: .* got 0",
        ),
        (lambda: cov_sqrt(torch.zeros(2, 3, 4), spectrum_floor=-7), ValueError, "spectrum_floor: .* got -7"),
        (
            lambda: matrix_sqrt(torch.zeros(2, 3, 3), coefficients="minimax", spectrum_floor=2),
            ValueError,
            "spectrum_floor: .* got 2",
        ),
        (lambda: CovSqrtNorm(coefficients="best"), ValueError, "coefficients: .* got 'best'"),
        (lambda: CovSqrtNorm(iterations=0), ValueError, "iterations: expected a whole number from 1 to 1000, got 0"),
        (lambda: CovSqrtNorm(iterations=2.5), ValueError, "iterations: expected a whole number .* got 2.5"),
        (lambda: CovSqrtNorm(iterations="5"), ValueError, "iterations: expected a whole number .* got '5'"),
        (lambda: CovSqrtNorm(spectrum_floor=2.0), ValueError, "spectrum_floor: .* got 2.0"),
        (lambda: CovSqrtNorm(spectrum_floor=None), ValueError, "spectrum_floor: .* got None"),
        (lambda: cov_sqrt(torch.zeros(2, 3, 4), spectrum_floor="1e-3"), ValueError, "spectrum_floor: .* got '1e-3'"),
        (lambda: CovSqrtNorm(output="all"), ValueError, "output: .* got 'all'"),
        (lambda: cov_sqrt(torch.zeros(2, 3, 4).numpy()), TypeError, "x: expected a tensor, got ndarray"),
        (lambda: covariance_pool(None), TypeError, "x: expected a tensor, got NoneType"),
        (lambda: matrix_sqrt([[1.0]]), TypeError, "sigma: expected a tensor, got list"),
        (lambda: plan((2, 3)), ValueError, r"shape: expected .* got \(2, 3\)"),
        (lambda: plan((2, 8, -5, -5)), ValueError, r"shape: expected sizes .* got \(2, 8, -5, -5\)"),
        (lambda: plan((2, 2**40, 2**40)), ValueError, "shape: expected sizes that a tensor can have"),
        (lambda: plan((2, 8.0, 5)), ValueError, r"shape: expected \(B, C, H, W\) .* got \(2, 8.0, 5\)"),
        (lambda: plan(None), ValueError, "shape: expected .* got None"),
        (lambda: plan((2, 3, 4), device="tpu9"), ValueError, "device: .* got 'tpu9'"),
        (lambda: plan((2, 3, 4), iterations=2.5), ValueError, "iterations: .* got 2.5"),
        (lambda: plan((2, 3, 4), dtype=torch.int8), ValueError, "dtype: .* got torch.int8"),
        (lambda: plan((2, 3, 4), device="meta"), ValueError, "device: .* got 'meta'"),
        (lambda: plan((2, 3, 4), engine="fast"), ValueError, "engine: .* got 'fast'"),
        (lambda: plan((2, 0, 4)), RuntimeError, "channels: expected 1 or more, got 0"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("output", OUTPUTS)
def test_minimax_steps_of_the_layer_and_of_both_roots(output, device):
    step, bound = reference.minimax_steps(3, 1e-2), tolerance(torch.float64, 12, 60)
    x = feature_maps(2, 12, 60, torch.float64, device)
    y = CovSqrtNorm(3, output, "minimax", 1e-2)(x)
    assert_close(y, reference.cov_sqrt(x, 3, output, step), bound)
    sigma = covariances(2, 12, torch.float64, device)
    for root in ("matrix_sqrt", "matrix_inv_sqrt"):
        actual = getattr(isqrt_cov, root)(sigma, 3, "minimax", 1e-2)
        assert_close(actual, getattr(reference, root)(sigma, 3, step), bound)


def test_plan_on_the_cpu():
    best = isqrt_cov.build_info()["simd_usable"][0]
    one_chunk = plan((64, 64, 30, 30))
    assert (one_chunk["pooling"], one_chunk["forward"], one_chunk["backward"]) == (best,) * 3
    assert one_chunk["pool_chunks"] == 1
    # A small batch is split over its positions, by its shape alone: results are the same bits on every machine.
    chunks = {(1, 64, 256, 256): (64, 64), (4, 512, 64, 64): (2, 16), (1, 64, 45, 45): (1, 7), (40, 64, 64, 64): (1, 1)}
    for shape, expected in chunks.items():
        assert (plan(shape)["pool_chunks"], plan(shape)["pool_backward_chunks"]) == expected
    for large in ((2, 4096, 80, 80), (2, 4096, 50, 50), (2, 2048, 7, 7)):  # what outgrows the cache, too
        assert plan(large)["pooling"] == plan(large)["forward"] == plan(large)["backward"] == best
    assert plan((2, 4096, 50, 50), engine="library")["pooling"] == "library"
    assert plan((2, 64, 14, 14), engine="portable")["forward"] == "portable"


@pytest.mark.cuda
def test_plan_on_cuda():
    if reason := missing_cuda():
        pytest.skip(reason)
    assert plan((16, 64, 48, 48), device="cuda")["forward"] == "block"
    assert plan((16, 64, 48, 48), device="cuda")["backward"] == "block"
    assert plan((16, 1024, 14, 14), device="cuda")["forward"] == "grid"


@pytest.mark.cuda
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(("batch", "channels"), ((3, 64), (12, 64), (40, 64), (5, 80), (5, 128), (12, 100), (40, 128)))
def test_clusters_compute_the_bits_of_blocks(batch, channels, output):
    """Without a name for the engine blocks of a GPU form clusters; where it is named, they do not."""
    if reason := missing_cuda():
        pytest.skip(reason)
    x = feature_maps(batch, channels, 400, torch.float32, "cuda").requires_grad_()
    results = []
    for engine in ("auto", "block"):
        y = torch.ops.isqrt_cov.cov_sqrt(x, 5, OUTPUTS.index(output), engine=engine_code(engine))[0]
        upstream = torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y)
        results.append((y, *torch.autograd.grad(y, x, upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_negative_trace_gives_nan_in_its_sample():
    sigma = covariances(2, 5, torch.float64)
    sigma[1] *= -1
    y = matrix_sqrt(sigma)
    assert y[0].isfinite().all() and y[1].isnan().all()


@pytest.mark.parametrize("exponent", (-110, -60, 60, 110))
@pytest.mark.parametrize(("function", "degree"), ((matrix_sqrt, 1), (matrix_inv_sqrt, -1)), ids=("square", "inverse"))
def test_scaling_by_a_power_of_two_is_exact(device, function, degree, exponent):
    """F(4^k S) = 2^(degree k) F(S), bit for bit, and likewise the derivatives: nothing under- or overflows on the way.

    Not even where the derivatives of the inverse root, 2^(-3 k) times those at S, are beyond float32.
    """
    sigma, upstream, direction = covariances(3, 12, torch.float32, device)[:, None]
    root_scale = 2.0 ** (degree * exponent // 2)
    results = []
    for scale, of_root in ((1.0, 1.0), (2.0**exponent, root_scale)):
        scaled = (sigma * scale).requires_grad_()
        y, tangent = torch.func.jvp(function, (scaled.detach(),), (direction * scale,))
        (gradient,) = torch.autograd.grad(function(scaled), scaled, upstream / of_root)
        results.append((y / of_root, tangent / of_root, gradient * scale))
    for number, (plain, scaled) in enumerate(zip(*results, strict=True)):
        assert torch.equal(plain, scaled), number


@pytest.mark.parametrize("output", ("matrix", "triu", "mean"))
@pytest.mark.parametrize("shape", ((2, 6, 4, 5), (2, 40, 3, 4)), ids=("channels", "positions"))
def test_flops_are_counted(shape, output, device):
    """What the floor of the benchmarks charges, tests/test_floor.py."""
    of = flops.by_positions if device == "cpu" and shape[1] > 12 else flops.by_channels
    x = torch.randn(shape, device=device, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        cov_sqrt(x, 3, output).sum().backward()
    assert counter.get_total_flops() == sum(of(shape, 3, output))


def test_flops_of_operators_by_hand(device):
    x = torch.randn(2, 6, 20, device=device, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        matrix_sqrt(covariance_pool(x), 3).sum().backward()
        matrix_inv_sqrt(covariance_pool(x), 2).sum().backward()
    pooling = 2 * 6 * 6 * 20 * (1 + 2)
    # 5 half products forward and 15 backward; S and S S, for Z is a sum, and three times as many.
    assert counter.get_total_flops() == 2 * pooling + 2 * 6**3 * (5 + 15) + 2 * 6**3 * (2 + 6)
