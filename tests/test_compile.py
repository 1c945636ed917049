"""torch.compile, torch.export and AOTInductor; CUDA graphs and streams."""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad

from common import (
    CUDA_ENGINES,
    assert_close,
    engine_code,
    feature_maps,
    missing_cuda,
    skip_unless_fits,
    tolerance,
)
from isqrt_cov import (
    CovSqrtNorm,
    cov_sqrt,
    covariance_pool,
    decompositions,
    matrix_inv_sqrt,
    matrix_sqrt,
    triu_vector,
)
from isqrt_cov.mpncov import MPNCOV, SqrtmLayer

FUNCTIONS = {
    "covariance_pool": covariance_pool,
    "roots": lambda x: matrix_sqrt(covariance_pool(x), 3) @ matrix_inv_sqrt(covariance_pool(x), 3),
    "cov_sqrt": lambda x: cov_sqrt(x * 2, 4, "triu"),
    "cov_sqrt minimax": lambda x: cov_sqrt(x, 3, "mean", "minimax", 1e-2),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def value_and_gradient(function, x, dynamic=()):
    leaf = x.clone().requires_grad_()
    torch._dynamo.mark_dynamic(leaf, dynamic)  # compiling for one size of these is an error
    y = function(leaf)
    y.square().sum().backward()
    return y.detach(), leaf.grad


def assert_same(actual, expected):
    # Inductor contracts the elementwise operations around ours in its own way.
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other, 8 * torch.finfo(one.dtype).eps)


def tangent(function, x, direction):
    """Of a sum, the other part of which has a tangent whatever becomes of the function's."""
    return torch.func.jvp(lambda x: x.sum() + function(x).sin().sum(), (x,), (direction,))[1]


def dual(function, x, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode(device, name, backend):
    # Graphs enter forward_ad's level without its knowledge: nothing of a tangent must be lost for that.
    x, direction = torch.randn(2, 2, 5, 7, device=device, dtype=torch.float64)
    for transform in (tangent, dual):
        compiled = torch.compile(partial(transform, FUNCTIONS[name]), backend=backend, fullgraph=transform is tangent)
        assert_close(compiled(x, direction), transform(FUNCTIONS[name], x, direction), 1e-14)


def test_symbolic_trace_has_a_node_for_each_function():
    def call(x):
        return triu_vector(matrix_sqrt(covariance_pool(x), 3)), cov_sqrt(x, output="mean"), matrix_inv_sqrt(x @ x.mT)

    traced, x = torch.fx.symbolic_trace(call), torch.randn(2, 3, 9)
    for found, expected in zip(traced(x), call(x), strict=True):
        assert torch.equal(found, expected)
    names = {node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"}
    assert names >= {"triu_vector", "matrix_sqrt", "covariance_pool", "cov_sqrt", "matrix_inv_sqrt"}


def test_triangle_of_any_size():
    class Triangle(torch.nn.Module):
        def forward(self, y):
            return triu_vector(y)

    any_size = torch.export.Dim.DYNAMIC
    program = torch.export.export(Triangle(), (torch.randn(2, 5, 5),), dynamic_shapes=({1: any_size, 2: any_size},))
    for channels in (2, 7):
        y = torch.randn(2, channels, channels)
        assert torch.equal(program.module()(y), triu_vector(y))


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_crop_of_a_size_that_data_tell():
    def crop(x, size):
        return cov_sqrt(x[:, :, : size.item()])

    compiled, x = torch.compile(crop, fullgraph=True, backend="aot_eager"), torch.randn(2, 64, 90)
    for size in (16, 70):
        assert_close(compiled(x, torch.tensor(size)), crop(x, torch.tensor(size)), 1e-5)


def test_symbolic_trace_has_a_node_for_the_layer():
    for layer, name in (
        (CovSqrtNorm(), "cov_sqrt"),
        (MPNCOV(5, input_dim=8), "cov_sqrt"),
        (MPNCOV(5, False), "triu_vector"),
    ):
        traced = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), layer))
        assert name in [getattr(node.target, "__name__", "") for node in traced.graph.nodes]
        x = torch.randn(2, 3, 9, 8)
        assert torch.equal(traced(x), layer(traced.get_submodule("0")(x)))


@pytest.mark.parametrize("strict", (False, True))
def test_exported_tangents(device, strict):
    if torch.__version__ < (2, 13):
        pytest.skip("torch 2.12 does not export forward-mode derivatives of its own functions either")

    class Tangent(torch.nn.Module):
        def forward(self, x, direction):
            return tangent(cov_sqrt, x, direction)

    x, direction = torch.randn(2, 2, 5, 7, device=device, dtype=torch.float64)
    program = torch.export.export(Tangent(), (x, direction), strict=strict)
    for exported in (program, program.run_decompositions()):
        assert_close(exported.module()(x, direction), tangent(cov_sqrt, x, direction), 1e-14)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_for_all_shapes(device, name, dtype):
    # aot_eager traces forward and backward as inductor does, without the time to generate code.
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend=backend)
    for shape in ((2, 5, 6, 7), (3, 5, 4, 9), (4, 5, 8, 3)):
        x = torch.randn(shape, device=device).to(dtype)
        assert_same(value_and_gradient(compiled, x, (0, 2, 3)), value_and_gradient(FUNCTIONS[name], x))
    assert len(graphs) == 1
    assert "isqrt_cov" in graphs[0].code


def test_inductor(device):
    layer = CovSqrtNorm(3, "triu")
    compiled = torch.compile(lambda x: layer(x.relu()) + 1, fullgraph=True, dynamic=True)
    for shape in ((2, 5, 6, 7), (3, 6, 4, 9)):
        x = torch.randn(shape, device=device)
        for layout in (x, x.contiguous(memory_format=torch.channels_last)):
            actual = value_and_gradient(compiled, layout)
            assert_same(actual, value_and_gradient(lambda x: layer(x.relu()) + 1, layout))


def test_compile_under_autocast(device):
    compiled = torch.compile(lambda x: cov_sqrt(x * 2), fullgraph=True, backend="aot_eager")
    x = feature_maps(2, 4, 20, torch.bfloat16, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, slope = value_and_gradient(compiled, x)
        assert_same((y, slope), value_and_gradient(lambda x: cov_sqrt(x * 2), x))
    assert (y.dtype, slope.dtype) == (torch.float32, torch.bfloat16)


def test_compiled_autograd(device):
    x = torch.randn(2, 3, 5, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(cov_sqrt(x).square().sum(), x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        cov_sqrt(x).square().sum().backward()
    assert torch.equal(x.grad, expected)


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Conv2d(3, 6, 3)
        self.pool = CovSqrtNorm(3, "triu")
        self.head = torch.nn.Linear(21, 2)

    def forward(self, x):
        return self.head(self.pool(self.features(x)))


def exported(device):
    """A program for any batch, height and width, and its model."""
    model = Classifier().to(device).eval()
    free = {dimension: torch.export.Dim.DYNAMIC for dimension in (0, 2, 3)}
    return torch.export.export(model, (torch.randn(2, 3, 9, 11, device=device),), dynamic_shapes=(free,)), model


def images(device):
    return [torch.randn(shape, device=device) for shape in ((2, 3, 9, 11), (5, 3, 12, 8))]


def test_export_and_back(device, tmp_path):
    program, model = exported(device)
    assert sum(node.target == torch.ops.isqrt_cov.cov_sqrt.default for node in program.graph.nodes) == 1
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for x in images(device):
        assert torch.equal(loaded(x), model(x))
    (slope,) = torch.autograd.grad(loaded(x).square().sum(), loaded.features.weight)
    (expected,) = torch.autograd.grad(model(x).square().sum(), model.features.weight)
    assert torch.equal(slope, expected)


def test_export_under_autocast(device):
    x = feature_maps(2, 4, 20, torch.bfloat16, device).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        program = torch.export.export(CovSqrtNorm(3, "triu"), (x,))
    y = program.module()(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(cov_sqrt(x.float(), 3, "triu").sum(), x)
    assert (y.dtype, slope.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(y, cov_sqrt(x.float(), 3, "triu")) and torch.equal(slope, expected)


@pytest.mark.parametrize("is_open", (True, False), ids=("open", "fixed"))
@pytest.mark.parametrize(
    ("function", "shape"),
    (
        (lambda x: cov_sqrt(1e30 * x, 3, "triu", "minimax", 1e-2), (2, 6, 4, 5)),
        (lambda x: cov_sqrt(x, output="mean"), (2, 40, 3, 4)),  # of the positions' matrices
        (lambda x: matrix_sqrt(covariance_pool(x), 3), (2, 6, 20)),
        (lambda x: matrix_inv_sqrt(covariance_pool(x.bfloat16())), (2, 6, 20)),
        (lambda x: cov_sqrt(x - x), (2, 6, 4, 5)),
    ),
    ids=("triu", "gram", "root", "inverse", "constant"),
)
def test_decompositions(function, shape, is_open, device):
    class Network(torch.nn.Module):
        forward = staticmethod(function)

    sizes = {0: torch.export.Dim.DYNAMIC} if is_open else None
    program = torch.export.export(Network(), (torch.randn(shape, device=device),), dynamic_shapes=(sizes,))
    plain = program.run_decompositions(decompositions())
    assert not any("isqrt_cov" in str(node.target) for node in plain.graph.nodes)
    x = torch.randn(5 if is_open else 2, *shape[1:], device=device)
    expected = function(x)
    actual = plain.module()(x)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert_close(actual, expected, 1e-5 if x.dtype == expected.dtype else 2 * torch.finfo(expected.dtype).eps)


def test_compiled_drop_in_takes_any_steps(device):
    compiled = torch.compile(SqrtmLayer, fullgraph=True, backend="aot_eager", dynamic=True)
    sigma = covariance_pool(torch.randn(2, 4, 9, device=device))
    for steps in (3, 5):
        assert torch.equal(compiled(sigma, steps), SqrtmLayer(sigma, steps))


def test_aot_inductor(device, tmp_path):
    if device == "cuda" and torch.__version__ < (2, 13):
        # In torch/export/pt2_archive/_package.py, _load_aoti; whose fault it is has not been established.
        pytest.skip("torch 2.11's AOTInductor loader crashes on CUDA before it calls the model")
    program, model = exported(device)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for x in images(device):
        with torch.no_grad():
            assert_close(loaded(x), model(x), 1e-5)


@pytest.fixture
def cuda():
    if reason := missing_cuda():
        pytest.skip(reason)


# One shape for each engine that is chosen on a CUDA device: the block, and the grid from 256 channels on.
CUDA_SHAPES = ((4, 32, 20, 20), (2, 512, 7, 7))
CAPTURED = [*(("auto", shape) for shape in CUDA_SHAPES), *((e, CUDA_SHAPES[0]) for e in ("library", *CUDA_ENGINES))]


@pytest.mark.cuda
@pytest.mark.parametrize(("engine", "shape"), CAPTURED)
def test_cuda_graph(cuda, engine, shape):
    skip_unless_fits(engine, shape, torch.float32, "cuda")

    def cov_sqrt(x):
        return torch.ops.isqrt_cov.cov_sqrt(x, 5, 0, engine=engine_code(engine))[0]

    # The same kernels, hence the same bits; the library's are those that its GEMM chooses.
    bound = tolerance(torch.float32, shape[1], shape[2] * shape[3]) if engine == "library" else 0.0
    static = torch.randn(shape, device="cuda", requires_grad=True)
    upstream = torch.randn(shape[0], shape[1], shape[1], device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up
        for _ in range(3):
            torch.autograd.grad(cov_sqrt(static), static, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cov_sqrt(static)
        (slope,) = torch.autograd.grad(y, static, upstream)
    for _ in range(2):
        x = torch.randn(shape, device="cuda", requires_grad=True)
        with torch.no_grad():
            static.copy_(x)
        graph.replay()
        expected = cov_sqrt(x)
        assert_close(y, expected, bound)
        assert_close(slope, torch.autograd.grad(expected, x, upstream)[0], 2 * bound)


@pytest.mark.cuda
def test_reduce_overhead(cuda):
    compiled = torch.compile(lambda x: cov_sqrt(x * 2, 3), mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(4, 32, 20, 20, device="cuda")
        assert_same(value_and_gradient(compiled, x), value_and_gradient(lambda x: cov_sqrt(x * 2, 3), x))


@pytest.mark.cuda
@pytest.mark.parametrize("shape", CUDA_SHAPES)
def test_two_streams(cuda, shape):
    # What a stream waits for before its input is there, our kernels have to wait for, too; the other stream does not.
    inputs = [torch.randn(shape, device="cuda") for _ in range(2)]
    expected = [value_and_gradient(cov_sqrt, x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(5):
        results = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                late = torch.full_like(x, float("nan"))
                torch.cuda._sleep(20_000_000)
                late.copy_(x)
                results.append(value_and_gradient(cov_sqrt, late))
        torch.cuda.synchronize()
        for actual, wanted in zip(results, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))
