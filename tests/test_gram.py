"""Fewer positions than channels: the same function from M x M matrices, on every engine."""

import pytest
import torch

from common import (
    CUDA_ENGINES,
    assert_close,
    engine_code,
    engine_device,
    feature_maps,
    gradient_size,
    gram_matrix,
    layouts,
    tolerance,
)
from isqrt_cov import CovSqrtNorm, cov_sqrt, plan, reference
from isqrt_cov.ops import OUTPUTS, compute_dtype
from isqrt_cov.reference import minimax_steps

ops = torch.ops.isqrt_cov
SHAPES = ((3, 2), (20, 5), (19, 17), (33, 32), (64, 49), (100, 18), (256, 196), (300, 16))  # C, M

BY_GEMM = ("library", *CUDA_ENGINES)  # products beside those of the iteration are torch's

every_output = pytest.mark.parametrize("output", OUTPUTS)


def value_and_gradient(x, upstream=None, iterations=5, output="matrix", floor=0.0, engine="auto", wide=False):
    """(y, dL/dx, dL/dy) for a gradient as given or at random."""
    x = x.detach().requires_grad_()  # a view: with the strides of x
    y = ops.cov_sqrt(x, iterations, OUTPUTS.index(output), floor, engine_code(engine), wide, True)[0]
    upstream = torch.randn_like(y) if upstream is None else upstream
    return y.detach(), torch.autograd.grad(y, x, upstream)[0], upstream


def exactly(x, upstream, iterations=5, output="matrix", step=reference.PAPER_STEP):
    x = x.detach().double().requires_grad_()
    y = reference.cov_sqrt(x, iterations, output, step)
    return y.detach(), torch.autograd.grad(y, x, upstream.double())[0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@every_output
@pytest.mark.parametrize(("channels", "positions"), SHAPES)
def test_matches_reference(engine, channels, positions, output, dtype):
    x = feature_maps(3, channels, positions, dtype, engine_device(engine))
    x[1] = x[1, :, :1]  # a constant map
    y, slope, upstream = value_and_gradient(x, output=output, engine=engine)
    exact_y, exact_slope = exactly(x, upstream, output=output)
    bound = tolerance(dtype, channels, positions)
    assert_close(y, exact_y, bound)
    assert_close(slope, exact_slope, 2 * bound, gradient_size(upstream, y, x))
    assert torch.count_nonzero(y[1]) == 0 and torch.count_nonzero(slope[1]) == 0
    assert output != "matrix" or torch.equal(y, y.mT)
    _, kept, mean, scale = ops.cov_sqrt(x, 5, 0, engine=engine_code(engine), gram=True)
    assert mean.shape == (len(x), 0)  # it needs none
    others = [0, 2]  # of the constant one any scale will do
    assert_close(kept[others], gram_matrix((scale[:, None, None].double() * x)[others]), bound)
    assert torch.equal(scale.frexp()[0], torch.full_like(scale, 0.5))  # powers of two
    if engine not in BY_GEMM:
        traces = kept.diagonal(dim1=1, dim2=2).sum(1)[others]
        assert torch.equal(kept, kept.mT) and (traces > 0.2).all() and (traces < 5).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16), ids=str)
def test_layouts(engine, dtype):
    x = feature_maps(2, 40, 28, dtype, engine_device(engine)).view(2, 40, 4, 7)
    bound = tolerance(compute_dtype(dtype), 40, 28)
    rounding = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0
    for layout in layouts(x).values():
        for output in OUTPUTS:
            y, slope, upstream = value_and_gradient(layout, output=output, engine=engine)
            exact_y, exact_slope = exactly(layout, upstream, output=output)
            assert (y.dtype, slope.dtype, slope.shape) == (dtype, dtype, layout.shape)
            assert_close(y, exact_y, rounding + bound)
            assert_close(slope, exact_slope, rounding + 2 * bound, gradient_size(upstream, y, layout))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@every_output
def test_wide_keeps_what_half_rounds(engine, output, dtype):
    x = feature_maps(2, 40, 28, dtype, engine_device(engine))
    y, slope, upstream = value_and_gradient(x, output=output, engine=engine, wide=True)
    assert (y.dtype, slope.dtype) == (torch.float32, dtype)
    exact_y, exact_slope = exactly(x, upstream, output=output)
    assert_close(y, exact_y, tolerance(torch.float32, 40, 28))
    rounding = torch.finfo(dtype).eps / 2
    bound = rounding + 2 * tolerance(torch.float32, 40, 28)
    assert_close(slope, exact_slope, bound, gradient_size(upstream, y, x))
    assert torch.equal(y.to(dtype), value_and_gradient(x, output=output, engine=engine)[0])


@pytest.mark.parametrize("iterations", (1, 2, 3, 4, 7))
@pytest.mark.parametrize("floor", (0.0, 1e-2))
def test_iterations_and_coefficients(engine, iterations, floor):
    x = feature_maps(2, 30, 20, torch.float64, engine_device(engine))
    step = minimax_steps(iterations, floor) if floor else reference.PAPER_STEP
    y, slope, upstream = value_and_gradient(x, iterations=iterations, floor=floor, engine=engine)
    exact_y, exact_slope = exactly(x, upstream, iterations, step=step)
    bound = tolerance(torch.float64, 30, 20, iterations)
    assert_close(y, exact_y, bound)
    assert_close(slope, exact_slope, 2 * bound, gradient_size(upstream, y, x))


def test_many_steps_keep_their_digits(engine):
    """Rounding errors grow in the null space of the iterated matrix, which the Gram matrix has not."""
    x = feature_maps(2, 64, 32, torch.float32, engine_device(engine)).requires_grad_()
    for iterations in (15, 30):
        y, slope, upstream = value_and_gradient(x, iterations=iterations, engine=engine)
        exact_y, exact_slope = exactly(x, upstream, iterations)
        assert_close(y, exact_y, tolerance(torch.float32, 64, 32, 5))
        assert_close(slope, exact_slope, 2 * tolerance(torch.float32, 64, 32, 5), gradient_size(upstream, y, x))


@pytest.mark.parametrize("iterations", (5, 30))
@every_output
def test_tangents_and_second_derivatives_keep_their_digits(engine, output, iterations):
    """That is, they are of the Gram matrix, too."""
    x = feature_maps(2, 64, 32, torch.float32, engine_device(engine))
    direction, upstream = torch.randn_like(x), torch.randn_like(cov_sqrt(x, 1, output))

    def ours(x):
        return ops.cov_sqrt(x, iterations, OUTPUTS.index(output), 0.0, engine_code(engine), gram=True)[0]

    def tangent_and_curvature(function, dtype):
        leaf, along = x.detach().to(dtype).requires_grad_(), direction.to(dtype)
        (slope,) = torch.autograd.grad(function(leaf), leaf, upstream.to(dtype), create_graph=True)
        tangent = torch.func.jvp(function, (leaf.detach(),), (along,))[1]
        return tangent, torch.autograd.grad(slope, leaf, along)[0]

    expected = tangent_and_curvature(lambda x: reference.cov_sqrt(x, iterations, output), torch.float64)
    for found, exact in zip(tangent_and_curvature(ours, torch.float32), expected, strict=True):
        assert_close(found, exact, 8 * tolerance(torch.float32, 64, 32, 5))


@pytest.mark.parametrize(("size", "upstream_size"), ((1e11, 1e16), (1e6, 1e30), (1e-12, 1e-20), (1e-6, 1e-30)))
@every_output
def test_upstream_gradients_of_any_size(engine, output, size, upstream_size):
    x = size * feature_maps(2, 64, 32, torch.float32, engine_device(engine))
    upstream = upstream_size * torch.randn_like(value_and_gradient(x, output=output, engine=engine)[0])
    y, slope, _ = value_and_gradient(x, upstream, output=output, engine=engine)
    _, exact_slope = exactly(x, upstream, output=output)
    assert_close(slope, exact_slope, 2 * tolerance(torch.float32, 64, 32), gradient_size(upstream, y, x))


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, f) for f in (1e-37, 1e-30, 1e-12, 1e12, 1e30, 3e37)]
    + [(torch.float64, f) for f in (1e-300, 1e-150, 1e150, 1e300)],
)
@every_output
def test_squares_beyond_the_range(engine, output, dtype, factor):
    normal = feature_maps(3, 40, 25, torch.float64, engine_device(engine))
    x = (factor * normal).to(dtype)
    y, slope, upstream = value_and_gradient(x, output=output, engine=engine)
    wide = x.double() / factor
    exact_y, exact_slope = exactly(wide, upstream, output=output)
    bound = tolerance(dtype, 40, 25)
    assert_close(y.double() / factor, exact_y, bound)
    assert_close(slope, exact_slope, 2 * bound, gradient_size(upstream, exact_y, wide))
    mixed = torch.cat([x[:1], normal[1:].to(dtype)])  # the others are what they are alone, to the bit
    y, slope, _ = value_and_gradient(mixed, upstream, output=output, engine=engine)
    alone = value_and_gradient(mixed[1:], upstream[1:], output=output, engine=engine)
    if engine not in BY_GEMM:
        assert torch.equal(y[1:], alone[0]) and torch.equal(slope[1:], alone[1])


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_nan_and_inf_stay_in_their_sample(engine, bad):
    clean = feature_maps(4, 40, 9, torch.float32, engine_device(engine))
    dirty = clean.clone()
    dirty[2, 4, 7] = bad
    upstream = torch.randn(4, 40, 40).to(clean)
    results = [value_and_gradient(x, upstream, engine=engine)[:2] for x in (clean, dirty)]
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
        assert after[2].isnan().any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", ((5, 100, 60), (1, 160, 145), (1, 200, 64)), ids=str)
def test_same_bits_for_any_number_of_threads(engine, shape, dtype):
    if engine in BY_GEMM:
        pytest.skip("as deterministic as the GEMM of this torch")
    x, upstream = feature_maps(*shape, dtype), torch.randn(shape[0], shape[1], shape[1]).to(dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 8):
            torch.set_num_threads(number)
            results += [value_and_gradient(x, upstream, engine=engine)[:2] for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    for y, slope in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(slope, results[0][1])


@every_output
def test_empty_batch(engine, output):
    y, slope, _ = value_and_gradient(torch.zeros(0, 8, 3, device=engine_device(engine)), output=output, engine=engine)
    assert (y.shape[0], slope.shape) == (0, (0, 8, 3))
    x = torch.zeros(0, 8, 3, device=engine_device(engine))
    assert ops.cov_sqrt(x, 5, 0, engine=engine_code(engine), gram=True)[1].shape == (0, 2, 2)


@every_output
def test_gradcheck(engine, output):
    x = feature_maps(2, 7, 4, torch.float64, engine_device(engine)).requires_grad_()

    def function(x):
        return ops.cov_sqrt(x, 3, OUTPUTS.index(output), engine=engine_code(engine), gram=True)[0]

    assert torch.autograd.gradcheck(function, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_opcheck(dtype, device):
    x = feature_maps(2, 12, 6, dtype, device).view(2, 12, 2, 3).requires_grad_()
    torch.library.opcheck(ops.cov_sqrt.default, (x, 5, 1, 0.0, 0, False, True))
    _, kept, mean, scale = ops.cov_sqrt(x.detach(), 5, 1, gram=True)
    torch.library.opcheck(ops.cov_sqrt_backward.default, (torch.randn(2, 78).to(x), x, kept, mean, scale, 5, 1))


def test_autocast_reads_half_in_place():
    x = feature_maps(2, 64, 16, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, through = cov_sqrt(x), ops.cov_sqrt(x, 5, 0, gram=True)
    assert y.dtype == torch.float32
    assert torch.equal(y, ops.cov_sqrt(x, 5, 0, wide=True, gram=True)[0])
    assert torch.equal(y, through[0]) and through[1].shape == (2, 15, 15)


def test_other_sizes_take_matrices_of_the_channels():
    for shape in ((2, 4, 2, 2), (2, 4, 1)):
        x = torch.randn(shape)
        for device in ("cpu", "meta"):
            results = [ops.cov_sqrt(x.to(device), 5, 0, gram=gram) for gram in (False, True)]
            for one, other in zip(*results, strict=True):
                assert one.shape == other.shape and (device == "meta" or torch.equal(one, other))


def test_bad_arguments():
    x = torch.randn(2, 8, 3)
    y, _, mean, scale = ops.cov_sqrt(x, 5, 0)
    with pytest.raises(RuntimeError, match=r"sigma: expected shape \(2, 8, 8\), got \(2, 4, 4\)"):
        ops.cov_sqrt_backward(y, x, torch.randn(2, 4, 4), mean, scale, 5, 0)


@pytest.mark.parametrize(
    ("shape", "chosen"),
    [
        ((8, 256, 14, 14), True),
        ((8, 2048, 7, 7), True),
        ((8, 512, 196), True),
        ((8, 64, 7, 7), True),  # 48 x 48
        ((8, 64, 50), False),  # 64 x 64 when padded
        ((8, 224, 14, 14), False),
        ((8, 230, 14, 14), True),  # 208 x 208 and 240 x 240 when padded
        ((8, 64, 48, 48), False),
        ((8, 64, 1, 1), False),
    ],
)
def test_chosen_where_it_is_faster(shape, chosen):
    assert plan(shape)["gram"] is chosen
    x = torch.randn(1, *shape[1:])
    forms = [ops.cov_sqrt(x, 5, 0, gram=gram)[0] for gram in ((False, True) if chosen else (False,))]
    assert torch.equal(cov_sqrt(x), forms[-1])
    assert_close(forms[-1], forms[0], 2 * tolerance(torch.float32, *x.flatten(2).shape[1:]))


@pytest.mark.parametrize("strict", (False, True))
def test_export_keeps_sizes_dynamic(strict):
    """Where height and width are open, so is which of both is faster: no guard tells."""
    sizes = {name: torch.export.Dim(name) for name in ("batch", "height", "width")}
    dynamic = {"x": dict(zip((0, 2, 3), sizes.values(), strict=True))}
    layer = CovSqrtNorm(output="mean")
    exported = torch.export.export(layer, (torch.randn(2, 64, 4, 5),), dynamic_shapes=dynamic, strict=strict).module()
    for shape in ((1, 64, 3, 4), (3, 64, 20, 30)):
        x = torch.randn(shape)
        assert_close(exported(x), layer(x), 2 * tolerance(torch.float32, 64, 600))
    fixed = torch.export.export(layer, (torch.randn(2, 64, 4, 5),), strict=strict)
    x = torch.randn(2, 64, 4, 5)
    assert torch.equal(fixed.module()(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*jit.trace")
def test_trace_is_of_no_size():
    traced = torch.jit.trace(cov_sqrt, feature_maps(2, 64, 16, torch.float32))
    x = feature_maps(3, 64, 200, torch.float32)
    assert_close(traced(x), reference.cov_sqrt(x.double()), 1e-5)


def test_compile_follows_the_sizes():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(cov_sqrt, fullgraph=True, backend=backend)
    # Open sizes from the second compilation on; one more for the other matrices.
    for number, shape in ((1, (2, 64, 4, 4)), (2, (2, 64, 5, 6)), (2, (2, 64, 6, 7)), (3, (3, 64, 30, 20))):
        x = torch.randn(shape, requires_grad=True)
        y, expected = compiled(x), cov_sqrt(x)
        upstream = torch.randn_like(y)
        (slope,), (expected_slope,) = (torch.autograd.grad(value, x, upstream) for value in (y, expected))
        assert len(graphs) == number
        bound = 2 * tolerance(torch.float32, 64, x[0, 0].numel())
        assert_close(y, expected.double(), bound)
        assert_close(slope, expected_slope.double(), 2 * bound, gradient_size(upstream, y, x))
