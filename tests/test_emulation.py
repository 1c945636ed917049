"""The CUDA kernels and their launchers, unchanged, run on the CPU: their results, and that every line runs."""

import importlib.util
from functools import partial

import pytest
import torch

from common import assert_close, assert_mean, covariances, feature_maps, needs_emulation, tolerance
from emulation import coverage
from emulation.build import build
from emulation.tensors import check_pooling, check_root, fits, in_layout, pool, pool_backward, root, root_backward
from isqrt_cov import reference
from isqrt_cov.ops import ENGINES, OUTPUTS, ROOTS

pytestmark = [needs_emulation, pytest.mark.usefixtures("one_thread")]

CHANNELS = (1, 2, 3, 16, 17, 33, 64, 65, 100, 128)
DTYPES = (torch.float32, torch.float64)
# One position; one more than a panel has; a tile of a gradient and a tail; odd sides and several tiles.
IMAGES = ((1, 1), (1, 33), (5, 15), (13, 11))
ORDERS = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))
HOPPER_SHARED_BYTES = 227 * 1024


@pytest.fixture(scope="module")
def loaded_kernels(request):
    measured = coverage.whole_module_runs(request)  # it makes the kernels slower
    path = build("isqrt_emulation", "coverage" if measured else "plain")
    if measured:
        coverage.forget()
    spec = importlib.util.spec_from_file_location("isqrt_emulation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kernels(loaded_kernels):
    loaded_kernels.set_order("forward", 0)
    loaded_kernels.set_device(HOPPER_SHARED_BYTES, 9)
    return loaded_kernels


# ---- Results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_pooling_matches_reference(kernels, channels, dtype):
    for number, (height, width) in enumerate(IMAGES):  # with means of 3 and of 1003 spreads
        x = (feature_maps(2, channels, height * width, dtype) + number % 2 * 1000).unflatten(2, (height, width))
        layout = ("contiguous", "channels_last", "crop")[(number + channels) % 3]
        for chunk in {height * width, 40}:
            check_pooling(kernels, in_layout(x, layout), chunk)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "crop"))
@pytest.mark.parametrize("batch", (1, 3))
def test_pooling_in_any_layout(kernels, batch, layout, dtype):
    x = in_layout(feature_maps(batch, 70, 77, dtype).unflatten(2, (7, 11)), layout)
    for chunk in (50, 13):  # few chunks, and many
        check_pooling(kernels, x, chunk)
    check_pooling(kernels, x.transpose(2, 3), 50)
    check_pooling(kernels, x.flip(0)[:, ::2], 77)
    if layout == "contiguous":
        check_pooling(kernels, x.flatten(2), 50)
        check_pooling(kernels, x[:, :1].expand(-1, 5, -1, -1), 50)
        check_pooling(kernels, x.flatten(1).unfold(1, 40, 1)[:, :70], 40)  # neighbours in both follow each other
        check_pooling(kernels, x.as_strided((batch, 8, 16), (129, 16, 1)), 16)  # every other sample in packets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_newton_schulz_matches_reference(kernels, channels, dtype):
    sigma = covariances(2, channels, dtype)
    if not fits(kernels, sigma, backward=False):
        pytest.skip("does not fit into a block's shared memory")
    # What few steps leave out is left out whatever the size.
    for number, iterations in enumerate((1, 2, 3, 5) if channels < 100 else (2, 5)):
        check_root(kernels, sigma, iterations, "square", OUTPUTS[(number + channels) % 3])
    check_root(kernels, sigma, 2, "inverse", "matrix")


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(
    ("channels", "blocks"),
    ((1, 2), (33, 4), (64, 4), (70, 2), (96, 8), (97, 8), (112, 4), (113, 2), (128, 2), (128, 8)),
)
def test_a_cluster_computes_the_bits_of_a_block(kernels, channels, blocks, output):
    sigma = covariances(2, channels, torch.float32)
    cases = [(iterations, "square", 0) for iterations in (1, 2, 5)]
    cases += [(n, "inverse" if output != "mean" else "square", 1e-2) for n in (1, 3)]
    for iterations, name, floor in cases if channels < 96 else cases[3:]:
        expected, result = (root(kernels, sigma, iterations, name, output, floor, blocks=n) for n in (1, blocks))
        assert torch.equal(result, expected)
        upstream = torch.randn_like(result)
        run = partial(root_backward, kernels, upstream, sigma, iterations, name, output, floor)
        assert torch.equal(run(blocks=blocks), run())


@pytest.mark.parametrize(
    ("channels", "backward", "kilobytes", "blocks"),
    (
        (80, False, 60, 1),
        (80, True, 99, 1),
        (128, False, 120, 1),
        (33, False, 20, 8),
        (80, False, 60, 2),
        (80, True, 99, 4),
    ),
)
@pytest.mark.parametrize("output", OUTPUTS)
def test_roots_without_room_for_spare_matrices(kernels, output, channels, backward, kilobytes, blocks):
    """One block goes through the steps then, and does not run them as a list; in a cluster results wait."""
    sigma = covariances(1, channels, torch.float32)
    upstream = torch.randn_like(root(kernels, sigma, 4, "square", output))
    results = []
    for shared_bytes in (HOPPER_SHARED_BYTES, kilobytes * 1024):
        kernels.set_device(shared_bytes, 9)
        if backward:
            results.append(root_backward(kernels, upstream, sigma, 4, "square", output, blocks=blocks))
        else:
            results.append(root(kernels, sigma, 4, "square", output, blocks=blocks))
    assert_close(results[1], results[0].double(), tolerance(torch.float32, channels))
    assert blocks == 1 or torch.equal(*results)


FLOAT_ENGINES = {
    "block": {"blocks": 1},
    "cluster": {"blocks": 2},
    "grid": {"grid": True},
    "warpgroup on the grid": {"grid": "warpgroups"},
    "warpgroup": {"blocks": "warpgroups"},
}


@pytest.mark.parametrize("engine", FLOAT_ENGINES.values(), ids=FLOAT_ENGINES)
def test_numbers_of_any_size_in_float32(kernels, engine):
    """They are kept as pairs of float16, whose range is that of a tile's scale."""
    channels = 40
    sizes = torch.logspace(0, -9, channels, dtype=torch.float64)  # of variances, within and between tiles
    sigma = (sizes.outer(sizes).sqrt() * covariances(1, channels, torch.float64)).float()
    result = root(kernels, sigma, 5, "square", "matrix", **engine).double()
    expected = reference.matrix_sqrt(sigma.double(), 5)
    assert_close(result, expected, tolerance(torch.float32, channels, 1, 5))
    assert_close(result.diagonal(0, 1, 2) / expected.diagonal(0, 1, 2), torch.ones(1, channels), 1e-5)
    upstream = torch.randn_like(sigma)
    gradient = root_backward(kernels, upstream, sigma, 5, "square", "matrix", **engine)
    for size in (2.0**-90, 2.0**90):
        scaled = root_backward(kernels, size * upstream, sigma, 5, "square", "matrix", **engine)
        assert torch.equal(scaled, size * gradient)


# One tile, a tail, two tiles of which one ends in the middle of a panel; and more.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", (1, 33, 70, 96, 130))
def test_newton_schulz_on_the_grid(kernels, channels, dtype):
    sigma = covariances(2 if channels < 80 else 1, channels, dtype)
    # What few steps leave out is left out by the host, whatever the size.
    for number, iterations in enumerate((1, 2, 3) if channels < 80 else (3,)):
        check_root(kernels, sigma, iterations, "square", OUTPUTS[(number + channels) % 3], grid=True)
    check_root(kernels, sigma, 2, "inverse", OUTPUTS[channels % 3], grid=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("root_name", ROOTS)
def test_the_root_beside_its_gradient_on_the_grid(kernels, root_name, dtype):
    sigma = covariances(2, 40, dtype)
    upstream, exactly = torch.randn_like(sigma), (reference.matrix_sqrt, reference.matrix_inv_sqrt)
    for iterations in (1, 4, 5, 10):  # in full at last
        arguments = (kernels, upstream, sigma, iterations, root_name, "matrix")
        value = torch.full_like(sigma, float("nan"))
        gradient = root_backward(*arguments, grid=True, value=value)
        expected = exactly[ROOTS.index(root_name)](sigma.double(), iterations)
        assert_close(value, expected, tolerance(dtype, 40, 1, iterations))
        assert torch.equal(gradient, root_backward(*arguments, grid=True))


# One panel, a tail; two panels; a second block that is one panel, and a tail; a third one.
@pytest.mark.parametrize("channels", (20, 70, 130, 260))
def test_warpgroups_compute_the_bits_of_the_grid(kernels, channels):
    sigma = covariances(2 if channels < 80 else 1, channels, torch.float32)
    iterations = 3 if channels < 200 else 2
    results = []
    for engine in (True, "warpgroups"):
        y = root(kernels, sigma, iterations, "square", "matrix", grid=engine)
        results.append((y, root_backward(kernels, y.mT.exp(), sigma, iterations, "square", "matrix", grid=engine)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# One tile of four; a tail in the second; three; all.
@pytest.mark.parametrize("channels", (1, 20, 33, 64))
@pytest.mark.parametrize("iterations", (1, 2, 5))
def test_a_block_of_warpgroups(kernels, channels, iterations):
    sigma = covariances(2, channels, torch.float32)
    for output in OUTPUTS:
        check_root(kernels, sigma, iterations, "square", output, blocks="warpgroups")
    for floor in (0.0, 1e-2):
        check_root(kernels, sigma, iterations, "inverse", "triu", floor=floor, blocks="warpgroups")


# For this floor T and its transpose are computed in full, each from half of its tiles and its mirror image's.
@pytest.mark.parametrize("channels", (20, 65, 112))
def test_warpgroups_in_full(kernels, channels):
    sigma = covariances(1, channels, torch.float32)
    for name in ROOTS[: 2 if channels < 100 else 1]:
        check_root(kernels, sigma, 5, name, "matrix", floor=1e-4, grid="warpgroups")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("root_name", "output"), [("square", output) for output in OUTPUTS] + [("inverse", "matrix"), ("inverse", "triu")]
)
@pytest.mark.parametrize("batch", (1, 3))
def test_newton_schulz_outputs_and_roots(kernels, batch, root_name, output, dtype):
    for iterations in (1, 2, 3, 5):
        check_root(kernels, covariances(batch, 20, dtype), iterations, root_name, output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("root_name", ROOTS)
def test_newton_schulz_with_tuned_steps(kernels, root_name, dtype):
    for iterations in (1, 3, 5):
        check_root(kernels, covariances(2, 20, dtype), iterations, root_name, "matrix", floor=1e-2)


# For this floor the fourth step computes T = Z Y in full, and so does the fifth.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", (False, True), ids=("block", "grid"))
@pytest.mark.parametrize(("channels", "output"), ((20, "mean"), (40, "triu"), (65, "matrix"), (112, "matrix")))
def test_newton_schulz_in_full(kernels, channels, output, grid, dtype):
    sigma = covariances(1, channels, dtype)
    if not grid and not fits(kernels, sigma, False, 5, 1e-4):
        pytest.skip("does not fit into a block's shared memory")
    check_root(kernels, sigma, 5, "square", output, floor=1e-4, grid=grid)
    if channels == 20:
        check_root(kernels, sigma, 5, "inverse", "matrix", floor=1e-4, grid=grid)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "crop"))
def test_pooling_of_half_feature_maps(kernels, layout, dtype):
    for channels, height, width in ((3, 7, 11), (70, 7, 11), (72, 1, 80)):  # the last in packets of 16 bytes
        x = in_layout(feature_maps(2, channels, height * width, dtype).unflatten(2, (height, width)), layout)
        check_pooling(kernels, x, 40)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_pooling_reads_and_writes_every_half(kernels, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1024, 64, 1)
    twice = 2 * pool(kernels, torch.cat((torch.zeros_like(every), every), 2), 2)[1]
    expected = every[:, :, 0].float()
    assert torch.equal(twice.nan_to_num(0.5), expected.nan_to_num(0.5)) and twice.isnan().equal(expected.isnan())
    # With g at (0, 0) alone, dx[0] = 2 g (x[0] - 0 - mean) / M: between two halves each, or beyond the largest.
    grad_sigma = torch.zeros(512, 1, 1)
    # Of 11 bits, as the halves are: then the products are exact.
    factors = torch.randint(-1024, 1024, (512,)).float()
    grad_sigma[:, 0, 0] = factors * torch.exp2(torch.randint(-50, 10, (512,)).float())
    x = torch.randn(512, 1, 64).to(dtype)
    x[:, :, 0] = 0
    grad_x = pool_backward(kernels, grad_sigma, x, torch.zeros(512, 1), 64)
    assert torch.equal(grad_x, (2 / 64 * grad_sigma * x.float()).to(dtype))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("channels", "engine"),
    ((20, {"blocks": 1}), (20, {"grid": True}), (100, {"blocks": 4})),
    ids=("block", "grid", "cluster"),
)
@pytest.mark.parametrize("output", OUTPUTS)
def test_newton_schulz_of_half_results(kernels, output, channels, engine, dtype):
    sigma, scale = covariances(2, channels, torch.float32), torch.tensor((1.0, 0.25))
    run = partial(root, kernels, sigma, 2, "square", output, scale=scale, **engine)
    half = run(dtype=dtype)
    assert torch.equal(half, run().to(dtype))
    upstream = torch.randn(half.shape).to(dtype)
    grads = [root_backward(kernels, g, sigma, 2, "square", output, **engine) for g in (upstream, upstream.float())]
    assert torch.equal(*grads)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize(
    ("dtype", "factors"),
    (
        (torch.float32, (1e-37, 1, 1e18)),
        (torch.bfloat16, (1e-30, 1, 1e18)),
        (torch.float16, (1e-3, 1, 1e3)),
        (torch.float64, (1e-180, 1, 1e200)),
    ),
)
def test_pooling_beyond_the_range_of_squares(kernels, dtype, factors, layout):
    factors = torch.tensor(factors, dtype=torch.float64)
    normal = feature_maps(3, 40, 77, torch.float64)
    x = in_layout((normal * factors[:, None, None]).to(dtype).unflatten(2, (7, 11)), layout)
    compute = torch.promote_types(dtype, torch.float32)
    scale = torch.full((3,), float("nan"), dtype=compute)
    sigma, mean = pool(kernels, x, 40, scale)
    assert torch.equal(scale.frexp()[0], torch.full((3,), 0.5, dtype=compute)) and scale[1] == 1
    assert (scale == 1).all() == (dtype == torch.float16)  # whose squares float32 holds
    bound = tolerance(compute, 40, 77)
    if dtype != torch.float64:
        normal = x.flatten(2).double() / factors[:, None, None]
    scaled = normal * (scale.double() * factors)[:, None, None]
    for b in range(3):
        assert_mean(mean[b : b + 1], scaled[b : b + 1], bound)
        assert_close(sigma[b], reference.covariance_pool(scaled)[b], bound)
    # The covariance of x itself is within the range of float32 for numbers up to 1e18.
    if dtype == torch.float32:
        assert_close(pool(kernels, x, 40)[0][1:], reference.covariance_pool(x.double())[1:], bound)
    # Of <G, Sigma of scale x> / scale, as the root's gradient is handed over.
    grad_sigma = torch.randn(sigma.shape, dtype=compute)
    grad_sigma += grad_sigma.mT.clone()
    grad_x = pool_backward(kernels, grad_sigma, x, mean, 40, scale)
    exact = reference.covariance_pool_backward(grad_sigma.double(), scaled).unflatten(2, (7, 11))
    rounding = torch.finfo(dtype).eps / 2 if dtype != compute else 0
    roots = [root(kernels, sigma, 5, "square", "matrix", grid=grid, scale=scale) for grid in (False, True)]
    for b in range(3):
        assert_close(grad_x[b], exact[b], 2 * bound + rounding)
        for y in roots:
            assert_close(y[b].double() * scale[b].double(), reference.cov_sqrt(scaled)[b], 4 * bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", ((0, 1, 1e6, 1e-6, 1e3), (1e6, 1e-3, 1, 0), (1e-6, 1, 1e6)))
def test_pooling_of_numbers_of_any_size(kernels, sizes, dtype):
    """In float32 they become pairs of float16 times a power of two for each channel, another one for each panel."""
    channels, positions = 70, 128 * len(sizes)
    of_channels = torch.logspace(0, -9, channels, dtype=torch.float64)[:, None]
    of_positions = torch.tensor(sizes, dtype=torch.float64).repeat_interleave(128)
    x = (of_channels * (of_positions * (feature_maps(1, channels, positions, torch.float64) - 3) + 5)).to(dtype)
    sigma, mean = pool(kernels, x, positions)
    exact = reference.covariance_pool(x.double())
    deviations = exact.diagonal(0, 1, 2).sqrt()
    each = deviations[:, :, None] * deviations[:, None]
    assert ((sigma - exact).abs() <= tolerance(dtype, 1, positions) * each).all()
    grad_sigma = torch.randn(channels, channels, dtype=torch.float64) / (of_channels * of_channels.mT)
    grad_sigma = (grad_sigma + grad_sigma.mT)[None].to(dtype)
    grad_x = pool_backward(kernels, grad_sigma, x, mean, positions)
    exact = reference.covariance_pool_backward(grad_sigma.double(), x.double())
    each = grad_sigma.double().abs() @ (x.double() - x.double().mean(2, keepdim=True)).abs() * 2 / positions
    assert ((grad_x - exact).abs() <= tolerance(dtype, channels) * each).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_beside_a_constant_channel_far_above(kernels, dtype):
    """It adds zeros to the gradient of the others, however large its column of dL/dSigma were in their units."""
    x = 1e-12 * feature_maps(1, 6, 50, torch.float64).to(dtype)
    x[:, 2] = 1e10
    sigma, mean = pool(kernels, x, 50)
    assert (sigma[:, 2] == 0).all()
    grad_sigma = torch.randn(1, 6, 6, dtype=dtype)
    grad_sigma = grad_sigma + grad_sigma.mT
    exact = reference.covariance_pool_backward(grad_sigma.double(), x.double())
    assert_close(pool_backward(kernels, grad_sigma, x, mean, 50), exact, tolerance(dtype, 6, 50))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(kernels, dtype):
    x, sigma = torch.empty(0, 3, 4, 5, dtype=dtype), torch.empty(0, 3, 3, dtype=dtype)
    assert [tuple(t.shape) for t in pool(kernels, x, 20)] == [(0, 3, 3), (0, 3)]
    assert pool_backward(kernels, sigma, x, sigma[:, 0], 20).shape == x.shape
    for output, shape in zip(OUTPUTS, ((0, 3, 3), (0, 6), (0, 3)), strict=True):
        result = root(kernels, sigma, 5, "square", output)
        assert result.shape == shape
        assert root_backward(kernels, result, sigma, 5, "square", output).shape == (0, 3, 3)


def test_zero_and_not_a_number_stay_in_their_sample(kernels):
    x = feature_maps(3, 20, 50, torch.float32)
    x[0] = 1e3 * torch.rand(20, 1)
    x[1, 4, 7] = float("nan")
    scale = torch.full((3,), float("nan"))
    sigma, mean = pool(kernels, x, 30, scale)
    assert (scale == 1).all()
    upstream = torch.randn(sigma.shape)
    y = root(kernels, sigma, 5, "square", "matrix")
    grad_sigma = root_backward(kernels, upstream, sigma, 5, "square", "matrix")
    grad_x = pool_backward(kernels, grad_sigma, x, mean, 30)
    for result in (sigma, y, grad_sigma, grad_x):
        assert result[0].count_nonzero() == 0
        assert result[1].isnan().any()
        assert result[2].isfinite().all()


# ---- Launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_any_order_of_threads(kernels, dtype):
    x = in_layout(feature_maps(2, 70, 99, dtype).unflatten(2, (9, 11)), "crop")
    small = covariances(2, 35, dtype)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(2, 70, 70, dtype=dtype, generator=generator)
    runs = []
    for order, seed in ORDERS:
        kernels.set_order(order, seed)
        sigma, mean = pool(kernels, x, 40)
        runs.append([sigma, mean, pool_backward(kernels, upstream, x, mean, 40)])
        for output in OUTPUTS:
            y = root(kernels, small, 3, "square", output)
            runs[-1] += [y, root_backward(kernels, y, small, 3, "square", output)]
        if dtype == torch.float32:
            for engine in ({"blocks": 4}, {"grid": True}, {"grid": "warpgroups"}):
                y = root(kernels, small, 3, "square", "matrix", **engine)
                runs[-1] += [y, root_backward(kernels, y, small, 3, "square", "matrix", **engine)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


# Batch, channels, positions; the last column says what they make plan() choose.
PLANS = (
    (1, 3, 5, "one chunk"),
    (1, 3, 1400, "chunks of 128 positions at least, the last one shorter; more than few"),
    (2, 100, 900, "chunks of 2 C positions at least"),
    (1030, 2, 70, "more samples than pieces of work: one chunk each"),
    (1, 128, 64, "the largest matrices of a block; in float64 their gradient is the grid's"),
    (1, 129, 33, "roots that are the grid's"),
)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float16), ids=str)
@pytest.mark.parametrize(("batch", "channels", "positions"), [p[:3] for p in PLANS], ids=[p[3] for p in PLANS])
def test_what_plan_chooses(kernels, batch, channels, positions, dtype):
    compute = torch.promote_types(dtype, torch.float32)
    size = compute.itemsize
    forward, backward, pool_chunk, pool_backward_chunk, *_ = kernels.plan(batch, channels, positions, size)
    check_pooling(kernels, feature_maps(batch, channels, positions, dtype), pool_chunk, pool_backward_chunk)
    assert (forward == "block") == (channels <= 128)
    assert (backward == "block") == (channels <= (128 if size == 4 else 80))
    if dtype == compute:
        sigma = covariances(min(batch, 2), channels, dtype)
        check_root(kernels, sigma, 2, "square", "matrix", grid=forward == "grid")


@pytest.mark.parametrize("shared_bytes", (99 * 1024, 163 * 1024, HOPPER_SHARED_BYTES))
def test_plan_keeps_to_the_shared_memory_of_the_device(kernels, shared_bytes):
    kernels.set_device(shared_bytes, 9)
    for dtype in DTYPES:
        largest = 0  # of the gradients that plan() gives to a block
        for channels in range(1, 140):
            for engine, backward in zip(kernels.plan(1, channels, 10, dtype.itemsize)[:2], (False, True), strict=True):
                needed = kernels.root_shared_bytes(channels, dtype.itemsize, backward)
                assert (engine == "block") == (0 < needed <= shared_bytes)
                largest = channels if backward and engine == "block" else largest
        check_root(kernels, covariances(1, largest, dtype), 1, "square", "mean")


def test_plan_shares_samples_between_idle_multiprocessors(kernels):
    def blocks(*problem):
        return kernels.plan(*problem)[4:]

    assert blocks(8, 64, 2304, 4) == blocks(30, 64, 2304, 4) == (4, 4)
    assert blocks(31, 64, 2304, 4) == blocks(66, 64, 2304, 4) == (2, 2) and blocks(67, 64, 2304, 4) == (1, 1)
    assert blocks(8, 80, 2304, 4) == (4, 8) and blocks(9, 80, 2304, 4) == (4, 4)
    assert blocks(16, 48, 2304, 4) == (1, 4) and blocks(16, 16, 2304, 4) == (1, 1)  # too few tiles
    assert blocks(8, 128, 2304, 4) == (4, 8) and blocks(16, 128, 2304, 4) == (4, 4)
    assert blocks(64, 128, 2304, 4) == (2, 2) and blocks(67, 128, 2304, 4) == (1, 1)
    assert blocks(16, 64, 2304, 8) == (1, 1)  # float64
    assert blocks(16, 64, 2304, 4, 12) == (1, 1)  # steps in full
    assert blocks(99, 129, 2304, 4) == blocks(99, 129, 2304, 8) == (1, 1)  # the grid's
    kernels.set_device(99 * 1024, 9)
    assert blocks(16, 80, 2304, 4) == (4, 4) and blocks(16, 81, 2304, 4) == (4, 1)  # which is the grid's
    kernels.set_device(163 * 1024, 8)  # no clusters
    assert blocks(16, 64, 2304, 4) == (1, 1)


def test_plan_takes_warpgroups_where_there_are(kernels):
    """On Hopper alone; the grid computes in float64."""
    warpgroup = ENGINES.index("warpgroup")
    assert kernels.plan(2, 256, 196, 4, engine=warpgroup)[:2] == ("warpgroup", "warpgroup")
    assert kernels.plan(2, 256, 196, 8, engine=warpgroup)[:2] == ("grid", "grid")
    for capability in (8, 10):
        kernels.set_device(HOPPER_SHARED_BYTES, capability)
        with pytest.raises(RuntimeError, match="engine: 'warpgroup' runs on devices of compute capability 9.0"):
            kernels.plan(2, 256, 196, 4, engine=warpgroup)


def test_failing_launches_name_the_kernel(kernels):
    with pytest.raises(RuntimeError, match="root: a cluster has no such steps, or not so many channels"):
        root(kernels, torch.eye(129)[None], 5, "square", "matrix", blocks=2)
    with pytest.raises(RuntimeError, match="root: 3 blocks of a cluster are not 1, 2, 4 or 8"):
        root(kernels, torch.eye(64)[None], 5, "square", "matrix", blocks=3)
    with pytest.raises(RuntimeError, match="root: a block of warpgroups has no such steps, or not so many channels"):
        root(kernels, torch.eye(65)[None], 5, "square", "matrix", blocks="warpgroups")
    with pytest.raises(RuntimeError, match="root: 129 channels"):
        root(kernels, torch.eye(129)[None], 5, "square", "matrix")
    kernels.set_device(99 * 1024, 8)
    with pytest.raises(RuntimeError, match="root: invalid argument"):
        root(kernels, covariances(1, 128, torch.float32), 5, "square", "matrix")


def test_every_line_of_the_kernels_runs(request, kernels):
    """Of all files that the kernels are compiled from; and every instance of every template."""
    if not coverage.whole_module_runs(request):
        pytest.skip("only some of the tests above were asked for")
    kernels.write_coverage()
    assert coverage.missed() == []
