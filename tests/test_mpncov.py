"""The drop-in has the originals' names, shapes, defaults and state_dict."""

import inspect

import pytest
import torch

from isqrt_cov import cov_sqrt, mpncov, reference, triu_vector
from isqrt_cov.mpncov import MPNCOV, CovpoolLayer, SqrtmLayer, TriuvecLayer


def published_root(sigma, iterations):
    """Eqs. 1-3 of every entry of sigma, as the originals take it: nothing is made symmetric."""
    trace = sigma.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    return trace.sqrt() * reference.newton_schulz(sigma / trace, iterations)[0]


def test_functions():
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    sigma = CovpoolLayer(x)
    root = SqrtmLayer(sigma, 5)
    vector = TriuvecLayer(root)
    assert torch.allclose(sigma, reference.mxm_covariance_pool(x))
    assert torch.allclose(root, reference.matrix_sqrt(sigma))
    assert vector.shape == (2, 21, 1) and torch.equal(vector[..., 0], triu_vector(root))
    assert torch.autograd.gradcheck(lambda x: TriuvecLayer(SqrtmLayer(CovpoolLayer(x), 3)), (x,))


def test_signature_is_the_original_one():
    defaults = {name: p.default for name, p in inspect.signature(MPNCOV).parameters.items()}
    assert defaults == {
        "iterNum": 3,
        "is_sqrt": True,
        "is_vec": True,
        "input_dim": 2048,
        "dimension_reduction": None,
    }
    assert list(inspect.signature(SqrtmLayer).parameters) == ["var", "iterN"]
    assert (
        list(inspect.signature(CovpoolLayer).parameters) == list(inspect.signature(TriuvecLayer).parameters) == ["var"]
    )
    assert set(mpncov.__all__) == {"MPNCOV", "CovpoolLayer", "SqrtmLayer", "TriuvecLayer"}


@pytest.mark.parametrize("iterations", (1, 2, 5))
def test_gradient_of_both_layers_is_the_published_one(iterations):
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 6, 6, dtype=torch.float64)  # not symmetric
    (ours,) = torch.autograd.grad(SqrtmLayer(CovpoolLayer(x), iterations), x, upstream)
    published = published_root(reference.mxm_covariance_pool(x), iterations)
    (expected,) = torch.autograd.grad(published, x, upstream)
    torch.testing.assert_close(ours, expected)


def test_gradient_of_the_root_is_the_symmetric_part():
    sigma = reference.covariance_pool(torch.randn(2, 6, 30, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(2, 6, 6, dtype=torch.float64)
    (ours,) = torch.autograd.grad(SqrtmLayer(sigma, 5), sigma, upstream)
    (entries,) = torch.autograd.grad(published_root(sigma, 5), sigma, upstream)
    assert not torch.allclose(entries, entries.mT)
    torch.testing.assert_close(ours, (entries + entries.mT) / 2)


def test_constant_map_has_no_nan():
    x = torch.full((2, 6, 4, 5), 0.7, requires_grad=True)
    vector = TriuvecLayer(SqrtmLayer(CovpoolLayer(x), 5))
    vector.sum().backward()
    assert not vector.any() and not x.grad.any()
    assert not MPNCOV(input_dim=6)(x).any()


def test_second_derivative():
    x = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: SqrtmLayer(CovpoolLayer(x), 3), (x,))


def test_float64_is_float64():
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64) + 1
    torch.testing.assert_close(CovpoolLayer(x), reference.covariance_pool(x), rtol=1e-13, atol=0)


def test_nothing_is_kept_of_the_iteration_nor_any_m_by_m_matrix():
    kept = []
    x = torch.randn(2, 6, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        SqrtmLayer(CovpoolLayer(x), 5)
    beside_x = [tensor for tensor in kept if tensor.data_ptr() != x.data_ptr()]
    assert beside_x and sum(tensor.numel() for tensor in beside_x) <= 2 * (6 * 6 + 6)  # sigma and the mean


def test_module_stands_in_for_the_module_of_san():
    module = mpncov  # from model.MPNCOV.python import MPNCOV
    x = torch.randn(2, 6, 4, 5)
    attention = module.SqrtmLayer(module.CovpoolLayer(x), 5).mean(1)
    torch.testing.assert_close(attention, cov_sqrt(x, 5, "mean"))


@pytest.mark.parametrize("is_vec", (True, False))
@pytest.mark.parametrize("is_sqrt", (True, False))
def test_layer(is_sqrt, is_vec):
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    layer = MPNCOV(is_sqrt=is_sqrt, is_vec=is_vec, input_dim=6)
    matrix = cov_sqrt(x, 3) if is_sqrt else CovpoolLayer(x)
    expected = TriuvecLayer(matrix) if is_vec else matrix
    assert torch.equal(layer(x), expected)
    assert layer.output_dim == expected[0].numel()
    assert not layer.state_dict()


def test_dimension_reduction():
    layer = MPNCOV(input_dim=12, dimension_reduction=4)
    keys = ["0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert list(layer.state_dict()) == ["conv_dr_block." + key for key in keys]
    assert layer.state_dict()["conv_dr_block.0.weight"].shape == (4, 12, 1, 1)
    y = layer(torch.randn(3, 12, 5, 5))
    assert y.shape == (3, 10, 1) and layer.output_dim == 10
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_dimension_reduction_is_convolution_normalisation_and_relu():
    layer = MPNCOV(5, input_dim=12, dimension_reduction=64).double().eval()
    convolution, norm, _ = layer.conv_dr_block
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(3, 12, 9, 9, dtype=torch.float64)
    expected = torch.nn.functional.relu(norm(convolution(x)))
    assert torch.equal(layer(x)[..., 0], cov_sqrt(expected, 5, "triu"))
    weight = MPNCOV(input_dim=512, dimension_reduction=256).conv_dr_block[0].weight  # kaiming, fan_out, ReLU
    assert weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)


def test_wrong_arguments():
    steps = "a whole number from 1 to 1000"
    for name, value, expected in (
        ("iterNum", 0, steps),
        ("iterNum", 1.5, steps),
        ("input_dim", 0, "a whole number, 1 or more"),
        ("input_dim", 64.0, "a whole number, 1 or more"),
        ("dimension_reduction", 0, "a whole number, 1 or more"),
        ("dimension_reduction", 32.0, "a whole number, 1 or more"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected {expected}, got {value}"):
            MPNCOV(**{name: value})
    with pytest.raises(ValueError, match="iterN: expected a whole number from 1 to 1000, got 0"):
        SqrtmLayer(torch.zeros(2, 3, 3), 0)


@pytest.mark.parametrize("layer", (CovpoolLayer, MPNCOV(input_dim=6)), ids=("CovpoolLayer", "MPNCOV"))
def test_an_image_alone_is_refused(layer):
    """The originals raise, too: C would be taken for the batch."""
    with pytest.raises(ValueError, match=r"expected \(B, C, H, W\), got shape \(6, 5, 5\)"):
        layer(torch.randn(6, 5, 5))
