"""Whatever shape, layout, dtype, option and engine: the reference's result and gradient.

A few hundred cases, the same each time; FUZZ_CASES in the environment asks for more, and for other ones each time
(`make fuzz`). A case that failed once stands in FOUND, and stays there.
"""

import os

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from common import (
    CUDA_ENGINES,
    assert_close,
    covariances,
    engine_code,
    engine_device,
    feature_maps,
    gradient_size,
    gram_matrix,
    missing_cuda,
    refusal,
    skip_unless_fits,
    tolerance,
)
from isqrt_cov import build_info, reference
from isqrt_cov.ops import OUTPUTS, ROOTS

pytestmark = pytest.mark.usefixtures("one_thread")
ops = torch.ops.isqrt_cov
CASES = int(os.environ.get("FUZZ_CASES", "0"))
SETTINGS = {"deadline": None, "database": None, "suppress_health_check": list(hypothesis.HealthCheck)}
CPU_ENGINES = ("library", *build_info()["simd_usable"])
ON_CUDA = (pytest.mark.cuda, pytest.mark.skipif(missing_cuda() is not None, reason=str(missing_cuda())))
ENGINES = (*CPU_ENGINES, *(pytest.param(name, marks=ON_CUDA) for name in CUDA_ENGINES))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def fuzz(cases, **strategies):
    """``cases`` in the normal run, and the same share of FUZZ_CASES; on a GPU as many, of its engines."""
    settings = {"max_examples": CASES * cases // 600, "print_blob": True} if CASES else {"max_examples": cases}
    settings = hypothesis.settings(**SETTINGS, derandomize=not CASES, **settings)
    strategies["number"] = st.sampled_from(range(60))  # of an engine, of which there may be 2 to 5
    on_each = pytest.mark.parametrize(
        "engines", (CPU_ENGINES, pytest.param(CUDA_ENGINES, marks=ON_CUDA)), ids=("cpu", "cuda")
    )
    return lambda test: on_each(settings(hypothesis.given(**strategies)(test)))


def steps(floor, iterations):
    return reference.minimax_steps(iterations, floor) if floor else reference.PAPER_STEP


def rounding(dtype):
    return torch.finfo(dtype).eps / 2 if dtype in (torch.float16, torch.bfloat16) else 0.0


def computed(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def curvature(floor, iterations):
    """At an eigenvalue l of zero, where it is largest: of l g_N, g_n = g_{n-1} (a + b l g^2)."""
    pairs = steps(floor, iterations) if floor else [reference.PAPER_STEP] * iterations
    slope, bend = 1.0, 0.0
    for a, b in pairs:
        bend += b / a * slope**2
        slope *= a
    return abs(2 * slope * bend)


def subnormal(tensor):
    """How far rounding to the spacing of subnormal numbers can take the norm of a tensor of this dtype and size."""
    info = torch.finfo(tensor.dtype)
    return tensor.numel() ** 0.5 * info.smallest_normal * info.eps / 2


@st.composite
def layouts(draw, rank):
    """How feature maps of this rank lie in memory: order of dimensions, margins and steps, repeated dimensions."""
    order = draw(st.permutations(range(rank)))
    margins = draw(st.lists(st.integers(0, 2), min_size=rank, max_size=rank))
    every = draw(st.lists(st.sampled_from((1, 1, 1, 2, 3)), min_size=rank, max_size=rank))
    repeated = draw(st.sampled_from(((), (), (), (0,), (1,), (rank - 1,), (0, rank - 1))))
    return order, margins, every, repeated


def lay_out(x, order, margins, every, repeated):
    """x in memory as ``layouts`` says, its dimensions ``repeated`` filled from their first entry, between NaN."""
    kept = x[tuple(slice(0, 1 if d in repeated else None) for d in range(x.dim()))]
    cuts = [slice(m, m + n * step, step) for m, n, step in zip(margins, kept.shape, every, strict=True)]
    outer = [cut.stop + cut.start for cut in cuts]
    memory = torch.full([outer[d] for d in order], float("nan"), dtype=x.dtype, device=x.device)
    view = memory.permute([order.index(d) for d in range(x.dim())])[tuple(cuts)]
    return view.copy_(kept).expand(x.shape)


def check_feature_maps(shape, layout, dtype, engine, iterations, output, floor, exponent, mean, seed, gram=False):
    device = engine_device(engine)
    batch, channels, *spatial = shape
    positions = torch.Size(spatial).numel()
    if refusal(engine, (batch, channels, positions), dtype, device):
        hypothesis.reject()
    unit = 2.0 ** (exponent * {torch.float16: 0, torch.float64: 8}.get(dtype, 1))
    x = (feature_maps(batch, channels, positions, torch.float64, seed=seed) - 3.0 + mean) * unit
    x = lay_out(x.reshape(shape).to(dtype).to(device), *layout).requires_grad_()
    gram = gram and 1 < positions < channels
    y, sigma, _, scale = ops.cov_sqrt(x, iterations, OUTPUTS.index(output), floor, engine_code(engine), gram=gram)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)
    (slope,) = torch.autograd.grad(y, x, upstream)

    exact = x.detach().double() / unit  # of which the slope is the same
    constant = (exact == exact.flatten(2)[:, :, 0].view(*exact.shape[:2], *(1,) * len(spatial))).flatten(2).all(2)
    exact[constant] = 0.0  # as far as the covariance is concerned; the reference would round its mean
    exact.requires_grad_()
    exact_y = reference.cov_sqrt(exact, iterations, output, steps(floor, iterations))
    (exact_slope,) = torch.autograd.grad(exact_y, exact, upstream.double())
    bound = (8 if floor else 1) * tolerance(computed(dtype), channels, positions, iterations)
    of_sigma = torch.finfo(computed(dtype)).eps * (positions**0.5 + channels**0.5)
    slope_bound = rounding(dtype) + 2 * bound + 2 * curvature(floor, iterations) * of_sigma
    bound += rounding(dtype)
    assert (y.dtype, slope.dtype) == (dtype, dtype)
    scale = (scale.double() * unit)[:, None, None]
    assert_close(sigma.double() / scale / scale, (gram_matrix if gram else reference.covariance_pool)(exact), bound)
    terms = reference.cov_sqrt(exact.detach(), iterations, "matrix", steps(floor, iterations))
    if output == "mean":
        terms /= channels**0.5  # they may cancel in it
    assert_close(y.double() / unit, exact_y, bound, terms.norm().item() + subnormal(y) / unit / bound)
    size = gradient_size(upstream, terms, exact) + subnormal(slope) / slope_bound
    assert_close(slope, exact_slope, slope_bound, size if torch.count_nonzero(exact_slope) else 0.0)


FEATURE_MAPS = {
    "dtype": st.sampled_from(DTYPES),
    "iterations": st.integers(1, 6),
    "output": st.sampled_from(OUTPUTS),
    "floor": st.sampled_from((0.0, 0.0, 1e-3, 1e-2, 0.3)),
    "exponent": st.integers(-20, 20) | st.integers(-118, 118),  # as many times 8 for float64
    "mean": st.sampled_from((0.0, 3.0, -100.0)),
    "seed": st.integers(0, 2**31),
    "gram": st.booleans(),
}


DENSE = ([0, 1, 2, 3], [0] * 4, [1] * 4, ())
# Each was off by more than the bound, once.
FOUND = {
    "a mean of 100 spreads": ((2, 2, 1, 2), torch.float32, 1, 0.0, -100.0),
    "a mean of 100 spreads, one minimax step": ((1, 2, 1, 4), torch.float32, 1, 1e-3, -100.0),
    "curvature of six minimax steps at zero": ((1, 2, 1, 2), torch.float32, 6, 1e-3, 0.0),
}
CONSTANT = {"shape": (1, 10, 1, 3), "layout": ([0, 1, 2, 3], [0] * 4, [1] * 4, (3,)), "seed": 0}
CANCELLING_MEAN = {"shape": (1, 48, 2, 19), "layout": ([0, 1, 2, 3], [0] * 4, [1] * 4, (3,)), "seed": 6536543}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("shape", "dtype", "iterations", "floor", "mean"), FOUND.values(), ids=FOUND)
def test_found(shape, dtype, engine, iterations, floor, mean):
    skip_unless_fits(engine, shape, dtype, engine_device(engine))
    check_feature_maps(shape, DENSE, dtype, engine, iterations, "matrix", floor, 0, mean, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_found_mean_of_channels_that_cancel(engine):
    skip_unless_fits(engine, CANCELLING_MEAN["shape"], torch.float32, engine_device(engine))
    options = {"iterations": 1, "output": "mean", "floor": 0.0, "exponent": 0, "mean": 0.0}
    check_feature_maps(**CANCELLING_MEAN, dtype=torch.float32, engine=engine, **options)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("gram", (False, True), ids=("channels", "positions"))
def test_found_constant_map_in_float64(engine, gram):
    skip_unless_fits(engine, CONSTANT["shape"], torch.float64, engine_device(engine))
    options = {"iterations": 1, "output": "matrix", "floor": 0.0, "exponent": 0, "mean": 0.0}
    check_feature_maps(**CONSTANT, dtype=torch.float64, engine=engine, gram=gram, **options)


@fuzz(
    400,
    shape=st.tuples(st.integers(1, 4), st.integers(1, 48), st.integers(1, 24), st.integers(1, 24)),
    layout=layouts(4),
    **FEATURE_MAPS,
)
def test_images(engines, number, **case):
    check_feature_maps(engine=engines[number % len(engines)], **case)


@fuzz(
    100,
    shape=st.tuples(st.integers(1, 20), st.integers(1, 70), st.integers(1, 600)),
    layout=layouts(3),
    **FEATURE_MAPS,
)
def test_sequences(engines, number, **case):
    check_feature_maps(engine=engines[number % len(engines)], **case)


@fuzz(
    100,
    shape=st.tuples(st.integers(1, 5), st.integers(1, 70)),
    layout=layouts(3),
    dtype=st.sampled_from(DTYPES),
    iterations=st.integers(1, 6),
    root=st.sampled_from(ROOTS),
    floor=st.sampled_from((0.0, 0.0, 1e-3, 1e-2, 0.3)),
    seed=st.integers(0, 2**31),
)
def test_matrices(engines, number, shape, layout, dtype, iterations, root, floor, seed):
    engine = engines[number % len(engines)]
    batch, channels = shape
    order, margins, every, _ = layout
    device = engine_device(engine)
    if refusal(engine, (batch, channels, 1), dtype, device):
        hypothesis.reject()
    sigma = lay_out(covariances(batch, channels, dtype, device, seed), order, margins, every, ()).requires_grad_()
    y = ops.matrix_root(sigma, iterations, ROOTS.index(root), floor, engine_code(engine))
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)
    (slope,) = torch.autograd.grad(y, sigma, upstream)

    exact = sigma.detach().double().requires_grad_()
    function = (reference.matrix_sqrt, reference.matrix_inv_sqrt)[ROOTS.index(root)]
    exact_y = function(exact, iterations, steps(floor, iterations))
    (exact_slope,) = torch.autograd.grad(exact_y, exact, upstream.double())
    bound = (8 if floor else 1) * tolerance(computed(dtype), channels, 1, iterations)
    bound, slope_bound = rounding(dtype) + bound, rounding(dtype) + 2 * bound
    assert_close(y, exact_y, bound, subnormal(y) / bound)
    assert_close(slope, exact_slope, slope_bound, gradient_size(upstream, y, sigma))
