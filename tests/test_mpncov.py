"""The drop-in has the originals' names, shapes, defaults and state_dict."""

import inspect

import pytest
import torch

from isqrt_cov import cov_sqrt, reference, triu_vector
from isqrt_cov.mpncov import MPNCOV, CovpoolLayer, SqrtmLayer, TriuvecLayer


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


def test_wrong_arguments():
    with pytest.raises(ValueError, match="iterNum: expected 1 or more, got 0"):
        MPNCOV(iterNum=0)
