"""The baselines of the reference: eager loops are the same function, EIG is the root with its own gradient.

Tolerances are those of test_reference.py.
"""

import math

import pytest
import torch

from exact import assert_near, gradient, randn, sym, trace, with_spectrum
from isqrt_cov import reference as ref

OUTPUTS = ("matrix", "triu", "mean")


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("iterations", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("function", [ref.mxm_cov_sqrt, ref.baddbmm_cov_sqrt])
def test_eager_baselines_are_the_same_function(function, iterations, output):
    for shape in ((2, 5, 3, 4), (2, 9, 49), (2, 6, 4), (1, 1, 7)):
        x = randn(*shape)
        expected = ref.cov_sqrt(x, iterations, output)
        assert_near(function(x, iterations, output), expected)
        g = randn(*expected.shape, seed=1)
        actual = gradient(lambda v: function(v, iterations, output), x, g)
        assert_near(actual, ref.cov_sqrt_backward(g, x, iterations, output))


def test_eig_squares_to_sigma():
    sigma = ref.covariance_pool(randn(3, 6, 20))
    y = ref.eig_sqrt(sigma)
    assert_near(y @ y, sigma)
    assert_near(y, ref.exact_sqrt(sigma))
    assert_near(ref.eig_sqrt(sigma + torch.triu(sigma, 1) - torch.tril(sigma, -1)), y)  # the symmetric part counts


def test_eig_by_another_decomposition():
    def eigh(a):
        return [t.flip(-1) for t in torch.linalg.eigh(a)]

    sigma, g = ref.covariance_pool(randn(3, 6, 20)), randn(3, 6, 6, seed=1)
    assert_near(ref.eig_sqrt(sigma, eigh=eigh), ref.eig_sqrt(sigma))
    assert_near(gradient(lambda s: ref.eig_sqrt(s, eigh=eigh), sigma, g), gradient(ref.eig_sqrt, sigma, g))


NEAR_DEGENERATE = {
    "simple": [1.0, 0.7, 0.4, 0.2],
    "equal": [1.0, 1.0, 1.0, 1.0],
    "equal pair": [1.0, 0.5, 0.5, 0.1],
    "1e-12 apart": [1.0, 0.5 + 1e-12, 0.5, 0.1],
    "1e-7 apart": [1.0 + 1e-7, 1.0, 0.3 + 1e-7, 0.3],
}


@pytest.mark.parametrize("spectrum", NEAR_DEGENERATE.values(), ids=NEAR_DEGENERATE.keys())
def test_eig_gradient(spectrum):
    sigma, g = with_spectrum(spectrum), randn(1, 4, 4, seed=1)
    assert torch.autograd.gradcheck(ref.eig_sqrt, sigma.clone().requires_grad_())
    grad, root = gradient(ref.eig_sqrt, sigma, g), ref.exact_sqrt(sigma)
    # The derivative D of the root solves the Lyapunov equation R D + D R = sym G.
    assert_near(root @ grad + grad @ root, sym(g))
    # Another way to the same gradient: enough Newton-Schulz steps of a well-conditioned sigma.
    assert_near(grad, ref.matrix_sqrt_backward(g, sigma, 14), rtol=1e-10)


@pytest.mark.parametrize("output", OUTPUTS)
def test_eig_gradcheck_through_x(output):
    x = randn(2, 3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: ref.eig_cov_sqrt(v, output), x)


@pytest.mark.parametrize("spectrum", [[0.6, 0.3, 0.06, 0.04], [0.6, 0.2, 0.1, 0.1], [0.5, 0.5, 0.0, 0.0]])
def test_eig_gradient_with_clamped_eigenvalues(spectrum):
    """Free, clamped and mixed pairs: the gradient is that of sqrt(max(l, floor t)), its dependence on t included."""
    sigma = with_spectrum(spectrum) * 3
    floor = 0.15
    assert torch.autograd.gradcheck(lambda s: ref.eig_sqrt(s, floor), sigma.clone().requires_grad_())
    values = torch.linalg.eigvalsh(ref.eig_sqrt(sigma, floor))[0]
    expected = sorted(math.sqrt(3 * max(value, floor)) for value in spectrum)
    assert values.tolist() == pytest.approx(expected, rel=1e-12)


def test_eig_without_a_clamp_on_a_singular_sigma():
    sigma = torch.diag_embed(torch.tensor([[4.0, 0.0, 0.0]], dtype=torch.float64))  # its zeros stay exact
    grad = gradient(lambda s: ref.eig_sqrt(s, 0.0), sigma, torch.ones_like(sigma))
    expected = torch.tensor([[[0.25, 0.5, 0.5], [0.5, 0.0, 0.0], [0.5, 0.0, 0.0]]], dtype=torch.float64)
    assert_near(grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eig_default_clamp_keeps_a_rank_deficient_sigma_finite(dtype):
    x = randn(2, 16, 5).to(dtype).requires_grad_()  # rank 4 of 16
    y = ref.eig_cov_sqrt(x)
    (grad,) = torch.autograd.grad(y.square().sum() + y.sum(), x)
    eps, t = torch.finfo(dtype).eps, trace(ref.covariance_pool(x.detach()))
    # The twelve null directions: eigenvalue eps, or noise of the order of eps above it. 16 eps bounds eigh's error.
    null = torch.linalg.eigvalsh(y.detach().double())[:, :12] / t[:, 0].double().sqrt()
    assert null.min() > 0.9 * math.sqrt(eps) and null.max() < math.sqrt(16 * eps)
    assert grad.isfinite().all()


@pytest.mark.parametrize("function", [ref.baddbmm_cov_sqrt, ref.mxm_cov_sqrt])
def test_zero_input_of_the_eager_baselines(function):
    x, g = torch.zeros(2, 3, 6), torch.ones(2, 3, 3)
    assert not function(x).any() and not gradient(function, x, g).any()
