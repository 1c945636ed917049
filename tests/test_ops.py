"""Every engine against the reference in float64, and the operators against torch's own checks."""

import pytest
import torch

from common import (
    assert_close,
    assert_mean,
    covariances,
    engine_code,
    engine_device,
    feature_maps,
    gradient_size,
    layouts,
    missing_cuda,
    skip_unless_fits,
    tolerance,
)
from isqrt_cov import reference
from isqrt_cov.ops import OUTPUTS, ROOTS, compute_dtype

ops = torch.ops.isqrt_cov
CHANNELS = (1, 2, 3, 16, 33, 64, 65, 100, 128, 200, 256)
DTYPES = (torch.float32, torch.float64)


def positions_around(channels):
    """Below the number of channels (rank-deficient), just above it, and enough for several tiles of positions."""
    return sorted({max(2, channels // 2), channels + 5, 3 * channels + 301})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_cov_sqrt_matches_reference(engine, channels, dtype):
    device = engine_device(engine)
    for number, positions in enumerate(positions_around(channels)):
        skip_unless_fits(engine, (2, channels, positions), dtype, device)
        output = OUTPUTS[(number + channels) % 3]
        x = feature_maps(2, channels, positions, dtype, device).requires_grad_()
        y, sigma, mean, _ = ops.cov_sqrt(x, 5, OUTPUTS.index(output), engine=engine_code(engine))
        upstream = torch.randn_like(y)
        (grad,) = torch.autograd.grad(y, x, upstream)

        exact_x = x.detach().double().requires_grad_()
        exact_y = reference.cov_sqrt(exact_x, 5, output)
        (exact_grad,) = torch.autograd.grad(exact_y, exact_x, upstream.double())
        bound = tolerance(dtype, channels, positions)
        assert_mean(mean, exact_x.detach(), bound)
        assert_close(sigma, reference.covariance_pool(exact_x), bound)
        assert_close(y, exact_y, bound)
        # The gradient is a product of two such results.
        assert_close(grad, exact_grad, 2 * bound, gradient_size(upstream, y, x))
        assert torch.equal(sigma, sigma.mT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("iterations", (1, 2, 3, 7))
def test_iterations_and_outputs(engine, iterations, output, dtype):
    device = engine_device(engine)
    x = feature_maps(3, 20, 50, dtype, device).requires_grad_()
    y = ops.cov_sqrt(x, iterations, OUTPUTS.index(output), engine=engine_code(engine))[0]
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, upstream)
    exact_x = x.detach().double()
    bound = tolerance(dtype, 20, 50, iterations)
    assert_close(y, reference.cov_sqrt(exact_x, iterations, output), bound)
    exact_grad = reference.cov_sqrt_backward(upstream.double(), exact_x, iterations, output)
    assert_close(grad, exact_grad, 2 * bound, gradient_size(upstream, y, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("iterations", (1, 2, 5))
@pytest.mark.parametrize("channels", (1, 3, 33, 64, 100))
def test_matrix_root_matches_reference(engine, channels, iterations, root, dtype):
    device = engine_device(engine)
    skip_unless_fits(engine, (2, channels, 1), dtype, device)
    sigma = covariances(2, channels, dtype, device).requires_grad_()
    y = ops.matrix_root(sigma, iterations, ROOTS.index(root), engine=engine_code(engine))
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, sigma, upstream)
    exact = sigma.detach().double().requires_grad_()
    function = {"square": reference.matrix_sqrt, "inverse": reference.matrix_inv_sqrt}[root]
    exact_y = function(exact, iterations)
    (exact_grad,) = torch.autograd.grad(exact_y, exact, upstream.double())
    bound = tolerance(dtype, channels, 1, iterations)
    assert_close(y, exact_y, bound)
    assert_close(grad, exact_grad, 2 * bound, gradient_size(upstream, y, sigma))
    assert torch.equal(y, y.mT) and torch.equal(grad, grad.mT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("iterations", "floor"), ((1, 0.1), (3, 1e-2), (5, 1e-3), (7, 1e-4)))
@pytest.mark.parametrize("root", ROOTS)
def test_minimax_steps_match_reference(engine, root, iterations, floor, dtype):
    sigma = covariances(2, 20, dtype, engine_device(engine)).requires_grad_()
    y = ops.matrix_root(sigma, iterations, ROOTS.index(root), floor, engine=engine_code(engine))
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, sigma, upstream)
    exact = sigma.detach().double().requires_grad_()
    function = {"square": reference.matrix_sqrt, "inverse": reference.matrix_inv_sqrt}[root]
    exact_y = function(exact, iterations, reference.minimax_steps(iterations, floor))
    (exact_grad,) = torch.autograd.grad(exact_y, exact, upstream.double())
    # The first coefficients are larger than the paper's, up to 2.6 / 1.5 a step, and with them the errors.
    bound = 8 * tolerance(dtype, 20, 1, iterations)
    assert_close(y, exact_y, bound)
    assert_close(grad, exact_grad, 2 * bound, gradient_size(upstream, y, sigma))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("iterations", "floor"), ((10, 0), (16, 0), (40, 0), (7, 1e-2), (12, 1e-3), (24, 1e-4)))
@pytest.mark.parametrize("root", ROOTS)
def test_errors_do_not_grow_once_converged(engine, root, iterations, floor, dtype):
    sigma = covariances(2, 40, dtype, engine_device(engine)).requires_grad_()
    y = ops.matrix_root(sigma, iterations, ROOTS.index(root), floor, engine=engine_code(engine))
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, sigma, upstream)
    exact = sigma.detach().double().requires_grad_()
    function = {"square": reference.matrix_sqrt, "inverse": reference.matrix_inv_sqrt}[root]
    exact_y = function(exact, iterations, reference.minimax_steps(iterations, floor) if floor else reference.PAPER_STEP)
    (exact_grad,) = torch.autograd.grad(exact_y, exact, upstream.double())
    # As for few steps, times the condition number 10 of the root. Were T = Z Y taken for symmetric throughout, errors
    # would grow by 1.4 in each step: 16 steps as printed and 7 of minimax would be the last ones below.
    bound = 10 * tolerance(dtype, 40)
    assert_close(y, exact_y, bound)
    assert_close(grad, exact_grad, 4 * bound, gradient_size(upstream, y, sigma))


@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs_of_many_steps(engine, output):
    x = feature_maps(2, 40, 300, torch.float32, engine_device(engine)).requires_grad_()
    y = ops.cov_sqrt(x, 14, OUTPUTS.index(output), engine=engine_code(engine))[0]
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, upstream)
    exact_x = x.detach().double()
    bound = 10 * tolerance(torch.float32, 40, 300)
    assert_close(y, reference.cov_sqrt(exact_x, 14, output), bound)
    exact_grad = reference.cov_sqrt_backward(upstream.double(), exact_x, 14, output)
    assert_close(grad, exact_grad, 4 * bound, gradient_size(upstream, y, x))


@pytest.mark.parametrize("positions", (7, 8, 9))
def test_about_as_many_positions_as_channels(engine, positions):
    """With one position more than channels both forms of the iteration have matrices of the same size."""
    x = feature_maps(2, 7, positions, torch.float64, engine_device(engine)).requires_grad_()
    y = ops.cov_sqrt(x, 5, 0, engine=engine_code(engine))[0]
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, upstream)
    bound = tolerance(torch.float64, 7, positions)
    assert_close(y, reference.cov_sqrt(x.detach(), 5), bound)
    exact = reference.cov_sqrt_backward(upstream, x.detach(), 5, "matrix")
    assert_close(grad, exact, 2 * bound, gradient_size(upstream, y, x))


@pytest.mark.parametrize(("iterations", "floor"), ((9, 0.0), (12, 0.0), (20, 0.0), (10, 1e-3)))
@pytest.mark.parametrize("output", OUTPUTS)
def test_many_steps_of_a_singular_covariance(engine, output, iterations, floor):
    """Rounding in the null space grows; by no more than in the plain loop, whose products are in full."""
    device = engine_device(engine)
    x = feature_maps(8, 8, 300, torch.float32, device)  # many samples: that of one has errors of any size
    x = (torch.randn(8, 40, 8, device=device) @ x).requires_grad_()
    step = reference.minimax_steps(iterations, floor) if floor else reference.PAPER_STEP
    y = ops.cov_sqrt(x, iterations, OUTPUTS.index(output), floor, engine_code(engine))[0]
    upstream = torch.randn_like(y)

    def errors(y, grad):
        return [(a.double() - b).norm() / b.norm() for a, b in ((y, exact_y), (grad, exact_grad))]

    def loop(x):
        y = reference.cov_sqrt(x, iterations, output, step)
        return y.detach(), torch.autograd.grad(y, x, upstream.to(x.dtype))[0]

    exact_y, exact_grad = loop(x.detach().double().requires_grad_())
    ours, plain = errors(y.detach(), *torch.autograd.grad(y, x, upstream)), errors(*loop(x))
    for own, other in zip(ours, plain, strict=True):
        assert own < 8 * other + tolerance(torch.float32, 40, 300)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", (16, 160, 176))
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
def test_gradient_of_whole_cache_lines(engine, memory_format, positions, dtype):
    # Rows of positions or channels that begin and end with cache lines, or with halves of them.
    device = engine_device(engine)
    x = feature_maps(2, 64, positions, dtype, device).unflatten(2, (-1, 16)).contiguous(memory_format=memory_format)
    mean = (x.double() - x.double()[..., :1, :1]).mean((2, 3)).to(compute_dtype(dtype))
    gradient = covariances(2, 64, dtype, device)
    grad_x = ops.covariance_pool_backward(gradient, x, mean, engine=engine_code(engine))
    exact = reference.covariance_pool_backward(gradient.double(), x.double())
    assert_close(grad_x, exact, tolerance(dtype, 64, positions))
    assert grad_x.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", (3, 40))
@pytest.mark.parametrize(("height", "width"), ((6, 10), (19, 27)))  # the rows of one tile, and of several
def test_layouts_are_read_in_place(engine, height, width, channels, dtype):
    device = engine_device(engine)
    source = feature_maps(3, channels, height * width, dtype, device).view(3, channels, height, width)
    for name, x in layouts(source).items():
        x = x.detach().requires_grad_()
        y = ops.cov_sqrt(x, 3, 0, engine=engine_code(engine))[0]
        upstream = torch.randn_like(y)
        (grad,) = torch.autograd.grad(y, x, upstream)
        exact = x.detach().double()
        bound = tolerance(dtype, channels, height * width, 3)
        assert_close(y, reference.cov_sqrt(exact, 3), bound)
        exact_grad = reference.cov_sqrt_backward(upstream.double(), exact, 3)
        assert_close(grad, exact_grad, 2 * bound, gradient_size(upstream, y, x))
        if name in ("NCHW", "channels_last"):
            assert grad.stride() == x.stride(), name


def test_batches(engine):
    device = engine_device(engine)
    x = feature_maps(70, 5, 12, torch.float64, device).requires_grad_()
    y = ops.cov_sqrt(x, 5, 0, engine=engine_code(engine))[0]
    y.sum().backward()
    exact = x.detach().clone().requires_grad_()
    reference.cov_sqrt(exact).sum().backward()
    assert_close(y, reference.cov_sqrt(x.detach()), tolerance(torch.float64, 5, 12))
    assert_close(x.grad, exact.grad, 2 * tolerance(torch.float64, 5, 12))


@pytest.mark.parametrize("output", range(3))
def test_empty_batch(engine, output):
    device = engine_device(engine)
    x = torch.zeros(0, 4, 3, 3, device=device, requires_grad=True)
    y, sigma, mean, _ = ops.cov_sqrt(x, 5, output, engine=engine_code(engine))
    assert [t.shape for t in (y, sigma, mean)] == [((0, 4, 4), (0, 10), (0, 4))[output], (0, 4, 4), (0, 4)]
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert ops.matrix_root(sigma, 5, 0, engine=engine_code(engine)).shape == (0, 4, 4)


@pytest.mark.parametrize("value", (0.0, 0.1, -1 / 3, 1e4 + 0.1, 3e30))
@pytest.mark.parametrize("output", range(3))
def test_constant_map_gives_zero(engine, output, value):
    # A rounded mean could differ from the constant by an ulp, which the root would make visible: it has to be exact.
    x = torch.full((2, 6, 3000), value, device=engine_device(engine)).requires_grad_()
    y, sigma, mean, _ = ops.cov_sqrt(x, 5, output, engine=engine_code(engine))
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
    for zero in (sigma, mean, y, grad):
        assert torch.count_nonzero(zero) == 0


@pytest.mark.parametrize("root", range(2))
def test_zero_sigma_gives_zero(engine, root):
    sigma = torch.zeros(1, 7, 7, device=engine_device(engine), requires_grad=True)
    y = ops.matrix_root(sigma, 5, root, engine=engine_code(engine))
    (grad,) = torch.autograd.grad(y, sigma, torch.randn_like(y))
    assert torch.count_nonzero(y) == 0 and torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_nan_and_inf_stay_in_their_sample(engine, bad):
    device = engine_device(engine)
    clean = feature_maps(5, 9, 40, torch.float32, device)
    dirty = clean.clone()
    dirty[2, 4, 7] = bad
    results = []
    for x in (clean, dirty):
        x.requires_grad_()
        y = ops.cov_sqrt(x, 5, 0, engine=engine_code(engine))[0]
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        results.append((y, grad))
    others = [0, 1, 3, 4]
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[others], after[others])
        assert after[2].isnan().any()


@pytest.mark.parametrize("dtype", (*DTYPES, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", ((1, 24, 9000), (5, 64, 700), (3, 100, 3000), (1, 200, 900)), ids=str)
def test_same_bits_each_time_and_for_any_number_of_threads(engine, shape, dtype):
    if engine == "library":
        pytest.skip("the library engine is as deterministic as the GEMM of this torch")
    device = engine_device(engine)
    skip_unless_fits(engine, shape, dtype, device)
    x = feature_maps(*shape, dtype, device).requires_grad_()
    upstream = torch.randn(shape[0], shape[1], shape[1]).to(x)
    threads = torch.get_num_threads()
    first = None
    try:
        for number in (1,) if device == "cuda" else (1, 2, 3, 8):
            torch.set_num_threads(number)
            for _ in range(20 if device == "cuda" else 5):
                y = ops.cov_sqrt(x, 5, 0, engine=engine_code(engine))[0]
                result = (y, *torch.autograd.grad(y, x, upstream))
                first = first or result
                assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ("high", "medium"))
def test_float32_stays_float32_where_less_is_allowed(engine, precision):
    if engine == "library":
        pytest.skip("the library engine multiplies as this torch is told to")
    device = engine_device(engine)
    x = feature_maps(2, 64, 200, torch.float32, device).requires_grad_()
    upstream = torch.randn(2, 64, 64).to(x)

    def result():
        y = ops.cov_sqrt(x, 5, 0, engine=engine_code(engine))[0]
        return y, *torch.autograd.grad(y, x, upstream)

    expected = result()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert all(torch.equal(a, b) for a, b in zip(expected, result(), strict=True))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
def test_pooling_does_not_cancel(engine, memory_format):
    # A mean 1e4 times the spread: E[xx^T] - mu mu^T would lose all 24 bits, and a mean rounded as it is 13 of them.
    device = engine_device(engine)
    x = feature_maps(1, 40, 5000, torch.float64, device).unflatten(2, (50, 100))
    x = ((x - 3.0) * 1e-3 + 10.0).float().contiguous(memory_format=memory_format).requires_grad_()
    sigma, _ = ops.covariance_pool(x, engine_code(engine))
    upstream = covariances(1, 40, torch.float32, device)
    (grad,) = torch.autograd.grad(sigma, x, upstream)
    exact = x.detach().double()
    assert_close(sigma, reference.covariance_pool(exact), tolerance(torch.float32, 40, 5000))
    assert_close(grad, reference.covariance_pool_backward(upstream.double(), exact), tolerance(torch.float32, 40, 5000))


def batch_last(tensor):
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


OPCHECK = {
    "covariance_pool": lambda d: (feature_maps(2, 5, 12, torch.float32, d).view(2, 5, 3, 4).requires_grad_(),),
    "covariance_pool_backward": lambda d: (
        torch.randn(2, 5, 5, device=d),
        feature_maps(2, 5, 12, torch.float32, d),
        torch.randn(2, 5, device=d),
    ),
    "covariance_pool_backward batch last": lambda d: (
        batch_last(torch.randn(2, 5, 5, device=d)),
        batch_last(feature_maps(2, 5, 12, torch.float32, d)),
        batch_last(torch.randn(2, 5, device=d)),
    ),
    "matrix_root": lambda d: (covariances(2, 5, torch.float32, d).requires_grad_(), 3, 1),
    "matrix_root batch last": lambda d: (batch_last(covariances(2, 5, torch.float32, d)).requires_grad_(), 3, 1),
    "matrix_root_backward": lambda d: (torch.randn(2, 5, 5, device=d), covariances(2, 5, torch.float32, d), 3, 0),
    "matrix_root_backward batch last": lambda d: (
        batch_last(torch.randn(2, 5, 5, device=d)),
        batch_last(covariances(2, 5, torch.float32, d)),
        3,
        0,
    ),
    "cov_sqrt": lambda d: (feature_maps(2, 5, 12, torch.float32, d).requires_grad_(), 5, 1),
    "cov_sqrt of half": lambda d: (feature_maps(2, 5, 12, torch.bfloat16, d).requires_grad_(), 5, 1),
    "cov_sqrt wide": lambda d: (feature_maps(2, 5, 12, torch.bfloat16, d).requires_grad_(), 5, 1, 0.0, 0, True),
    "covariance_pool wide": lambda d: (feature_maps(2, 5, 12, torch.float16, d).requires_grad_(), 0, True),
    "cov_sqrt_backward": lambda d: (
        torch.randn(2, 15, device=d),
        feature_maps(2, 5, 12, torch.float32, d),
        covariances(2, 5, torch.float32, d),
        torch.randn(2, 5, device=d),
        torch.ones(2, device=d),
        5,
        1,
    ),
}


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name, device):
    torch.library.opcheck(getattr(ops, name.split()[0]).default, OPCHECK[name](device))


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck_channels_last(name, device):
    arguments = [
        a.detach().contiguous(memory_format=torch.channels_last).requires_grad_(a.requires_grad)
        if isinstance(a, torch.Tensor) and a.dim() == 4
        else a
        for a in OPCHECK[name](device)
    ]
    torch.library.opcheck(getattr(ops, name.split()[0]).default, tuple(arguments))


GRADCHECK = [
    ("covariance_pool", lambda x, e: ops.covariance_pool(x, e)[0], (2, 3, 7)),
    *(
        (f"cov_sqrt {o}", lambda x, e, o=o: ops.cov_sqrt(x, 3, OUTPUTS.index(o), engine=e)[0], (2, 3, 7))
        for o in OUTPUTS
    ),
    ("cov_sqrt rank-deficient", lambda x, e: ops.cov_sqrt(x, 5, 0, engine=e)[0], (1, 5, 3)),
    ("cov_sqrt minimax", lambda x, e: ops.cov_sqrt(x, 3, 1, 1e-2, e)[0], (2, 3, 7)),
]


@pytest.mark.parametrize(("function", "shape"), [case[1:] for case in GRADCHECK], ids=[case[0] for case in GRADCHECK])
def test_gradcheck_through_x(engine, function, shape):
    x = feature_maps(*shape, torch.float64, engine_device(engine)).requires_grad_()
    number = engine_code(engine)
    assert torch.autograd.gradcheck(lambda x: function(x, number), (x,))
    assert torch.autograd.gradgradcheck(lambda x: function(x, number), (x,))


@pytest.mark.parametrize("root", ROOTS)
def test_gradcheck_through_sigma(engine, root):
    sigma = covariances(2, 4, torch.float64, engine_device(engine)).requires_grad_()

    def function(sigma):
        return ops.matrix_root((sigma + sigma.mT) / 2, 3, ROOTS.index(root), engine=engine_code(engine))

    assert torch.autograd.gradcheck(function, (sigma,))
    assert torch.autograd.gradgradcheck(function, (sigma,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.cov_sqrt(torch.zeros(2, 3, 4, 4), 0, 0), "iterations: expected 1 to 1000, got 0"),
        (lambda: ops.cov_sqrt(torch.zeros(2, 3, 4, 4), 1001, 0), "iterations: expected 1 to 1000, got 1001"),
        (lambda: ops.cov_sqrt(torch.zeros(2, 3, 4, 4), 5, 3), "output: expected 0 to 2, got 3"),
        (lambda: ops.cov_sqrt(torch.zeros(2, 3, 4, 4), 5, 0, engine=9), "engine: expected 0 to 7, got 9"),
        (lambda: ops.cov_sqrt(torch.zeros(2, 3, 4, 4), 5, 0, engine=5), "engine: 'block' runs on CUDA devices only"),
        (lambda: ops.cov_sqrt(torch.zeros(2, 3, 4, 4), 5, 0, 1.0), "spectrum_floor: expected 1e-12 .* got 1"),
        (lambda: ops.matrix_root(torch.zeros(2, 3, 3), 5, 0, -0.1), "spectrum_floor: expected 1e-12 .* got -0.1"),
        (lambda: ops.matrix_root(torch.zeros(2, 3, 3), 5, 0, 9e-13), "spectrum_floor: expected 1e-12 .* got 9e-13"),
        (lambda: ops.matrix_root(torch.zeros(2, 3, 3), 5, 0, float("nan")), "spectrum_floor: .* got nan"),
        (lambda: ops.matrix_root(torch.zeros(2, 3, 3), 5, -1), "root: expected 0 to 1, got -1"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_the_most_steps_and_the_lowest_floor():
    root = ops.matrix_root(torch.eye(3, dtype=torch.float64)[None], 1000, 0, 1e-12)
    assert_close(root, torch.eye(3)[None], 1e-9)


# The argument, the sizes of all tensors, and the numbers.
GRADIENTS = {
    "covariance_pool_backward": ("x", {"grad": (2, 4, 4), "x": (2, 4, 5), "mean": (2, 4)}, ()),
    "matrix_root_backward": ("sigma", {"grad": (2, 4, 4), "sigma": (2, 4, 4)}, (5, 0)),
    "cov_sqrt_backward": (
        "x",
        {"grad": (2, 10), "x": (2, 4, 5), "sigma": (2, 4, 4), "mean": (2, 4), "scale": (2,)},
        (5, 1),
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_every_tensor_of_a_gradient_is_checked(name, device):
    argument, sizes, numbers = GRADIENTS[name]
    right = {tensor: torch.ones(shape, device=device) for tensor, shape in sizes.items()}
    getattr(ops, name)(*right.values(), *numbers)
    for tensor in right.keys() - {argument}:
        wrong = {"shape": torch.ones(*sizes[tensor][:-1], sizes[tensor][-1] + 1, device=device)}
        wrong["dtype"] = right[tensor].double()
        for what, other in wrong.items():
            with pytest.raises(RuntimeError, match=f"{tensor}: expected {what} .*, got "):
                getattr(ops, name)(*(right | {tensor: other}).values(), *numbers)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.covariance_pool(torch.zeros(2, 3)), r"x: expected shape .* got \(2, 3\)"),
        (lambda: ops.covariance_pool(torch.zeros(2, 3, 0)), r"x: expected at least one position, .* \(2, 3, 0\)"),
        (lambda: ops.covariance_pool(torch.zeros(2, 3, 4), 9), "engine: expected 0 to 7, got 9"),
        (lambda: ops.matrix_root(torch.zeros(2, 3, 4), 5, 0), r"sigma: expected .* square .* got \(2, 3, 4\)"),
        (lambda: ops.matrix_root(torch.zeros(2, 0, 0), 5, 0), r"sigma: .* one channel, got shape \(2, 0, 0\)"),
        (lambda: ops.matrix_root(torch.zeros(2, 3, 3), 5, -1), "root: expected 0 to 1, got -1"),
        (lambda: ops.matrix_root(torch.zeros(2, 3, 3), 1001, 0), "iterations: expected 1 to 1000, got 1001"),
        (lambda: ops.matrix_root(torch.zeros(2, 3, 3), 5, 0, float("nan")), "spectrum_floor: .* got nan"),
        (lambda: ops.cov_sqrt(torch.zeros(2, 3), 5, 0), r"x: expected shape .* got \(2, 3\)"),
        (lambda: ops.cov_sqrt(torch.zeros(2, 0, 4), 5, 0), r"x: expected at least one channel, .* \(2, 0, 4\)"),
        (lambda: ops.cov_sqrt(torch.zeros(2, 3, 4).int(), 5, 0), "x: expected a float32, .* got torch.int32"),
        (lambda: ops.cov_sqrt(torch.zeros(2, 3, 4), 0, 0), "iterations: expected 1 to 1000, got 0"),
        (lambda: ops.cov_sqrt(torch.zeros(2, 3, 4), 5, 3), "output: expected 0 to 2, got 3"),
    ],
)
def test_wrong_arguments_without_numbers(call, message):
    """While a network is traced, that is: torch.compile and torch.export see no more than shapes."""
    with torch.device("meta"), pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.cuda
def test_mixed_devices():
    if reason := missing_cuda():
        pytest.skip(reason)
    with pytest.raises(RuntimeError, match="grad: expected device 0, got cpu"):
        ops.covariance_pool_backward(
            torch.zeros(2, 4, 4), torch.zeros(2, 4, 5, device="cuda"), torch.zeros(2, 4, device="cuda")
        )
