"""The functions under torch.func, forward-mode AD and autocast, against the reference under the same transform."""

import functools
import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from common import assert_close, covariances, feature_maps, tolerance
from isqrt_cov import CovSqrtNorm, cov_sqrt, covariance_pool, matrix_inv_sqrt, matrix_sqrt, reference
from isqrt_cov.ops import OUTPUTS, _derivative_dtype

MINIMAX = reference.minimax_steps(3, 1e-2)
MAPS = (3, 5)  # channels and positions
# Name: the function, the reference's, and the size of the maps; the argument of the others is a covariance.
FUNCTIONS = {
    "covariance_pool": (covariance_pool, reference.covariance_pool, MAPS),
    "matrix_sqrt": (matrix_sqrt, reference.matrix_sqrt, None),
    "matrix_inv_sqrt": (matrix_inv_sqrt, reference.matrix_inv_sqrt, None),
    "matrix_sqrt minimax": (
        lambda s: matrix_sqrt(s, 3, "minimax", 1e-2),
        lambda s: reference.matrix_sqrt(s, 3, MINIMAX),
        None,
    ),
    **{
        f"cov_sqrt {output}": (
            functools.partial(cov_sqrt, iterations=3, output=output),
            functools.partial(reference.cov_sqrt, iterations=3, output=output),
            MAPS,
        )
        for output in OUTPUTS
    },
    # Of fewer positions than channels, by their Gram matrix.
    "cov_sqrt gram": (
        lambda x: torch.ops.isqrt_cov.cov_sqrt(x, 3, 0, gram=True)[0],
        functools.partial(reference.cov_sqrt, iterations=3),
        (4, 3),
    ),
}
BOUND = 1e-9  # of derivatives in float64; what is wrong is off by a tenth or more


@pytest.fixture(params=FUNCTIONS)
def case(request, device):
    """The function, the reference's, and an argument of a batch of two."""
    function, expected, maps = FUNCTIONS[request.param]
    if maps is None:
        skewed = covariances(2, 3, torch.float64, device)
        skewed[0, 0, 1] += 0.01  # only the symmetric part counts, in every derivative
        return function, expected, skewed
    return function, expected, feature_maps(2, *maps, torch.float64, device)


def loss(function):
    """A scalar function that is not linear in what ``function`` returns."""
    return lambda x: function(x).square().sum()


def test_gradients(case):
    function, expected, x = case
    upstream = torch.randn_like(function(x))
    assert_close(vjp(function, x)[1](upstream)[0], vjp(expected, x)[1](upstream)[0], BOUND)
    assert_close(grad(loss(function))(x), grad(loss(expected))(x), BOUND)
    assert_close(jacrev(function)(x), jacrev(expected)(x), BOUND)


def test_tangents(case):
    function, expected, x = case
    tangent = torch.randn_like(x)
    y, y_tangent = jvp(function, (x,), (tangent,))
    assert_close(y, expected(x), BOUND)
    assert_close(y_tangent, jvp(expected, (x,), (tangent,))[1], BOUND)
    assert_close(jacfwd(function)(x), jacfwd(expected)(x), BOUND)
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(x, tangent))
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, y_tangent)
    with forward_ad.dual_level(), torch.no_grad():
        dual = function(forward_ad.make_dual(x, tangent))
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, y_tangent)


def test_forward_mode_by_finite_differences(case):
    function, _, x = case
    symmetric = x.dim() == 3 and x.shape[1] == x.shape[2]
    x = (x + x.mT).requires_grad_() if symmetric else x.requires_grad_()
    assert torch.autograd.gradcheck(function, (x,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (x,), check_fwd_over_rev=True, check_batched_grad=True)


def test_gradients_batched_by_autograd_are_differentiated(case):
    # Of torch.autograd.functional, whose batch is not torch.func's.
    function, expected, x = case
    x.requires_grad_()
    slopes = []
    for f in (function, expected):
        matrix = torch.autograd.functional.hessian(loss(f), x, create_graph=True, vectorize=True)
        jacobian = torch.autograd.functional.jacobian(f, x, create_graph=True, vectorize=True)
        slopes.append([torch.autograd.grad(result.square().sum(), x)[0] for result in (matrix, jacobian)])
    for slope, wanted in zip(*slopes, strict=True):
        assert_close(slope, wanted, BOUND)


@pytest.mark.parametrize("outer", (jacfwd, jacrev))
@pytest.mark.parametrize("inner", (jacfwd, jacrev))
def test_hessians(case, outer, inner):
    function, expected, x = case
    assert_close(outer(inner(function))(x), outer(inner(expected))(x), BOUND)


@pytest.mark.parametrize(
    "modes", list(itertools.product((jacfwd, jacrev), repeat=3)), ids=lambda m: "-".join(f.__name__ for f in m)
)
@pytest.mark.parametrize("name", ("cov_sqrt mean", "matrix_inv_sqrt"))
def test_third_order(device, name, modes):
    function, expected, maps = FUNCTIONS[name]
    x = covariances(1, 3, torch.float64, device) if maps is None else feature_maps(1, 2, 4, torch.float64, device)

    def third(function):
        return functools.reduce(lambda f, mode: mode(f), modes, loss(function))(x)

    assert_close(third(function), third(expected), BOUND)


@pytest.mark.parametrize("floor", (0.0, 1e-1, 1e-3, 1e-12))
def test_which_derivatives_are_computed_in_float64(floor):
    """The gradient by the kernels, the others in Python."""
    sigma = covariances(2, 12, torch.float32)
    upstream = torch.randn_like(sigma)
    for iterations in range(1, 13):
        narrow, wide = (
            torch.ops.isqrt_cov.matrix_root_backward(upstream.to(dtype), sigma.to(dtype), iterations, 0, floor)
            for dtype in (torch.float32, torch.float64)
        )
        is_wide = _derivative_dtype(torch.float32, iterations, floor) == torch.float64
        assert torch.equal(narrow, wide.float()) == is_wide, iterations


@pytest.mark.parametrize(("iterations", "floor"), ((12, 0.0), (20, 0.0), (12, 1e-3)))
@pytest.mark.parametrize("shape", ((2, 40, 90), (2, 90, 60)), ids=("channels", "positions"))
def test_derivatives_of_many_steps_keep_their_digits(device, shape, iterations, floor):
    """In float32 they would have few left where the covariance is singular."""
    x = (torch.randn(*shape[:2], 8, device=device) @ feature_maps(2, 8, shape[2], torch.float32, device)).detach()
    direction, upstream = torch.randn_like(x), torch.randn(2, shape[1] * (shape[1] + 1) // 2, device=device)
    coefficients = ("minimax", floor) if floor else ("newton_schulz",)
    step = reference.minimax_steps(iterations, floor) if floor else reference.PAPER_STEP

    def tangent_and_curvature(function, dtype):
        leaf = x.to(dtype).requires_grad_()
        tangent = jvp(function, (leaf.detach(),), (direction.to(dtype),))[1]
        (slope,) = torch.autograd.grad(function(leaf), leaf, upstream.to(dtype), create_graph=True)
        return tangent, torch.autograd.grad(slope, leaf, direction.to(dtype))[0]

    found = tangent_and_curvature(lambda x: cov_sqrt(x, iterations, "triu", *coefficients), torch.float32)
    expected = tangent_and_curvature(lambda x: reference.cov_sqrt(x, iterations, "triu", step), torch.float64)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-6)


def test_every_order_of_plain_autograd(case):
    function, expected, x = case

    def fourth(function):
        leaf = x.clone().requires_grad_()
        y = loss(function)(leaf)
        for _ in range(4):
            (slope,) = torch.autograd.grad(y, leaf, create_graph=True)
            y = slope.square().sum()
        return slope

    assert_close(fourth(function), fourth(expected), BOUND)


def test_upstream_gradient_that_depends_on_x(case):
    # The gradient's own gradient has to tell the two ways from x apart.
    function, expected, x = case

    def twice(function):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        (slope,) = torch.autograd.grad(y, leaf, y * leaf.sum(), create_graph=True)
        return torch.autograd.grad(slope.square().sum(), leaf)[0]

    assert_close(twice(function), twice(expected), BOUND)


def test_forward_and_reverse_mode_in_one_level(case):
    function, expected, x = case
    tangent = torch.randn_like(x)

    def reverse_over_forward(function):
        with forward_ad.dual_level():
            leaf = x.clone().requires_grad_()
            slope = forward_ad.unpack_dual(function(forward_ad.make_dual(leaf, tangent))).tangent
            return torch.autograd.grad(slope.square().sum(), leaf)[0]

    def forward_over_reverse(function):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(), tangent)
            (slope,) = torch.autograd.grad(loss(function)(dual), dual, create_graph=True)
            return forward_ad.unpack_dual(slope).tangent

    assert_close(reverse_over_forward(function), reverse_over_forward(expected), BOUND)
    assert_close(forward_over_reverse(function), forward_over_reverse(expected), BOUND)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_at_zero_are_zero(device, name):
    function, _, maps = FUNCTIONS[name]
    x = torch.zeros(2, 3, 3, device=device) if maps is None else torch.full((2, 3, 5), 7.0, device=device)
    tangent = torch.randn_like(x)
    _, y_tangent = jvp(function, (x,), (tangent,))
    assert torch.count_nonzero(y_tangent) == 0
    assert torch.count_nonzero(grad(loss(function))(x)) == 0


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_tangents_in_half(device, name, dtype):
    function, expected, maps = FUNCTIONS[name]
    x = covariances(2, 12, dtype, device) if maps is None else feature_maps(2, 12, 40, dtype, device)
    tangent = torch.randn_like(x)
    _, y_tangent = jvp(function, (x,), (tangent,))
    assert y_tangent.dtype == dtype
    exact = jvp(expected, (x.double(),), (tangent.double(),))[1]
    # One rounding to dtype, and the float32 terms of the sum, which are a few times as large as the sum.
    assert_close(y_tangent, exact, torch.finfo(dtype).eps / 2 + 16 * tolerance(torch.float32, 12, 40))


@pytest.mark.parametrize("in_dim", range(-1, 4))
def test_vmap_over_any_dimension(case, in_dim):
    function, _, x = case
    several = torch.stack([x, 2 * x, 3 * x + x.mean()], in_dim % 4)
    each = torch.stack([function(one) for one in several.unbind(in_dim % 4)])
    assert_close(vmap(function, in_dim)(several), each, BOUND)
    assert_close(vmap(function, in_dim, out_dims=1)(several), each.transpose(0, 1), BOUND)


def test_vmap_over_nothing(device):
    x = torch.randn(0, 2, 4, 6, device=device)
    assert vmap(cov_sqrt)(x).shape == (0, 2, 4, 4)
    assert vmap(covariance_pool)(torch.randn(3, 0, 4, 6, device=device)).shape == (3, 0, 4, 4)


def test_vmap_nested_and_around_gradients(case):
    function, _, x = case
    several = torch.stack([torch.stack([x, 2 * x]), torch.stack([3 * x, 4 * x])])
    each = torch.stack([torch.stack([function(one) for one in row]) for row in several])
    assert_close(vmap(vmap(function))(several), each, BOUND)
    slopes = torch.stack([torch.stack([grad(loss(function))(one) for one in row]) for row in several])
    assert_close(vmap(vmap(grad(loss(function))), 1)(several), slopes.transpose(0, 1), BOUND)
    leaf = several.clone().requires_grad_()
    loss(vmap(vmap(function)))(leaf).backward()
    assert_close(leaf.grad, slopes, BOUND)
    # Not batched, batched and both in one call: the upstream gradient and x take turns.
    y, pull = vjp(function, x)
    upstreams = torch.randn(3, *y.shape, dtype=x.dtype, device=x.device)
    assert_close(vmap(lambda u: pull(u)[0])(upstreams), torch.stack([pull(u)[0] for u in upstreams]), BOUND)


@pytest.mark.parametrize(
    ("shape", "sample"), (((6, 4, 9), r"\(4, 9\)"), ((6,), r"\(\)"), ((6, 2, 0, 5), r"\(2, 0, 5\)"))
)
def test_vmap_names_the_shape_of_a_sample(device, shape, sample):
    with pytest.raises(RuntimeError, match=f"x: expected .* got.* {sample}"):
        vmap(cov_sqrt)(torch.randn(shape, device=device))


def test_vmap_is_one_call(device):
    # The fallback of vmap would call the operator once for each slice, with a warning.
    x = torch.randn(5, 2, 3, 7, device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        vmap(cov_sqrt)(x)
    assert sum(event.count for event in profile.key_averages() if event.key == "isqrt_cov::cov_sqrt") <= 2
    assert vmap(cov_sqrt)(torch.randn(5, 0, 3, 7, device=device)).shape == (5, 0, 3, 3)


def test_per_sample_gradients_of_a_network(device):
    network = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, bias=False), CovSqrtNorm(3, "triu"), torch.nn.Linear(10, 1), torch.nn.Flatten(0)
    ).to(device, torch.float64)
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    images = torch.randn(3, 2, 8, 8, dtype=torch.float64, device=device)

    def sample_loss(parameters, image):
        return functional_call(network, parameters, (image[None],)).square().sum()

    gradients = vmap(grad(sample_loss), (None, 0))(parameters, images)
    for number, image in enumerate(images):
        network.zero_grad()
        network(image[None]).square().sum().backward()
        for name, parameter in network.named_parameters():
            assert_close(gradients[name][number], parameter.grad, BOUND)


def test_hessian_vector_product_in_a_network(device):
    weight = torch.randn(3, 4, dtype=torch.float64, device=device)
    x = feature_maps(2, 4, 9, torch.float64, device)

    def energy(function):
        return lambda w: function(w @ x).square().sum()

    assert_close(hessian(energy(cov_sqrt))(weight), hessian(energy(reference.cov_sqrt))(weight), BOUND)


def test_what_has_no_gradient_says_so(device):
    # sigma, mean and scale are put out by the operator for its own gradient only.
    x = torch.randn(2, 3, 5, device=device, requires_grad=True)
    y, sigma, mean, scale = torch.ops.isqrt_cov.cov_sqrt(x, 5, 0)
    assert y.requires_grad and not any(t.requires_grad for t in (sigma, mean, scale))
    with pytest.raises(RuntimeError, match="does not require grad"):
        sigma.sum().backward()


def test_tracers_and_modes_see_the_operators(device):
    # Plain tensors take a short way to autograd; whatever else there is between a call and the kernels is not left out.
    x = torch.randn(2, 3, 5, device=device, requires_grad=True)

    def slope(x):
        return torch.autograd.grad(cov_sqrt(x).square().sum(), x)[0]

    assert "isqrt_cov::cov_sqrt(" in str(torch.jit.trace(cov_sqrt, x).graph)
    for pre_dispatch in (False, True):
        graph = make_fx(slope, pre_dispatch=pre_dispatch)(x).graph
        targets = [node.target for node in graph.nodes]
        assert targets.count(torch.ops.isqrt_cov.cov_sqrt.default) == 1
        assert targets.count(torch.ops.isqrt_cov.cov_sqrt_backward.default) == 1

    class Double(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return (2 * result[0], *result[1:]) if function is torch.ops.isqrt_cov.cov_sqrt.default else result

    y = cov_sqrt(x)
    with Double():
        doubled = cov_sqrt(x)
    assert_close(doubled, 2 * y, 1e-6)
    assert_close(*(torch.autograd.grad(of.sum(), x)[0] for of in (doubled, 2 * y)), 1e-6)
    with torch._C._AutoDispatchBelowAutograd():
        assert not cov_sqrt(x).requires_grad
    with torch.inference_mode():
        assert cov_sqrt(x).is_inference()


HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("autocast_dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "cov_sqrt gram"])  # of operators see below
def test_autocast_computes_in_float32(device, name, autocast_dtype, dtype):
    function, _, maps = FUNCTIONS[name]
    x = covariances(2, 12, dtype, device) if maps is None else feature_maps(2, 12, 40, dtype, device)
    x.requires_grad_()
    with torch.autocast(device, dtype=autocast_dtype):
        y = function(x)
    wide = x.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    expected = function(wide)
    assert y.dtype == expected.dtype and torch.equal(y, expected)
    upstream = torch.randn_like(y)
    (slope,) = torch.autograd.grad(y, x, upstream)
    (expected_slope,) = torch.autograd.grad(expected, wide, upstream)
    assert slope.dtype == dtype and torch.equal(slope, expected_slope.to(dtype))
    with torch.autocast(device, dtype=autocast_dtype, enabled=False):
        assert function(x).dtype == dtype
    # torch.func takes its derivatives before autocast does anything.
    tangent = torch.ones_like(x)
    with torch.autocast(device, dtype=autocast_dtype):
        assert torch.equal(vmap(function)(x.detach()[None])[0], expected)
        assert torch.equal(grad(lambda x: (function(x) * upstream).sum())(x.detach()), slope)
        y_tangent = jvp(function, (x.detach(),), (tangent,))[1]
    expected_tangent = jvp(function, (wide.detach(),), (tangent.to(wide.dtype),))[1]
    assert y_tangent.dtype == expected.dtype and torch.equal(y_tangent, expected_tangent)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_operators_under_autocast(device, dtype):
    ops = torch.ops.isqrt_cov
    x, sigma = feature_maps(2, 12, 40, dtype, device), covariances(2, 12, dtype, device)
    for operator, argument, options in (
        (ops.covariance_pool, x, ()),
        (ops.covariance_pool, x, (0, False)),
        (ops.cov_sqrt, x, (3, 1)),
        (ops.cov_sqrt, x, (3, 1, 1e-2, 0)),
        (ops.matrix_root, sigma, (3, 0)),
    ):
        with torch.autocast(device, dtype=dtype):
            actual = operator(argument, *options)
        expected = operator(argument.float(), *options)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == torch.float32 and torch.equal(a, e)


def test_autocast_in_a_network(device):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), CovSqrtNorm(3, "triu"), torch.nn.Linear(36, 2)).to(device)
    dtypes = []
    network[1].register_forward_hook(lambda module, inputs, output: dtypes.extend((inputs[0].dtype, output.dtype)))
    with torch.autocast(device, dtype=torch.bfloat16):
        y = network(torch.randn(4, 3, 10, 10, device=device))
    y.float().square().sum().backward()
    assert dtypes == [torch.bfloat16, torch.float32] and y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters())


def test_meta_tensors_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert cov_sqrt(torch.zeros(2, 3, 5, 5, device="meta")).shape == (2, 3, 3)


def test_second_order_under_autocast(case):
    # Nor are the matrix products cast of which second derivatives are composed.
    function, _, x = case
    x = x.float()

    def curvature(enabled):
        leaf = x.clone().requires_grad_()
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=enabled):
            (slope,) = torch.autograd.grad(function(leaf).pow(3).sum(), leaf, create_graph=True)
            return torch.autograd.grad(slope.square().sum(), leaf)[0]

    assert torch.equal(curvature(True), curvature(False))


def test_forward_over_reverse_under_autocast_is_refused(device):
    # Rather than composed of matrix products in bfloat16.
    x = feature_maps(1, 3, 8, torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        with pytest.raises(NotImplementedError, match="cov_sqrt_backward: .* in an autocast region"):
            hessian(loss(cov_sqrt))(x)
        with pytest.raises(NotImplementedError, match="cov_sqrt: .* in an autocast region"):
            jacfwd(lambda x: torch.ops.isqrt_cov.cov_sqrt(x, 5, 0)[0])(x)
