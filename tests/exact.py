"""Exact forms side by side in float64: arguments, gradients and how near two results have to be."""

import torch


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sym(matrix):
    return (matrix + matrix.mT) / 2


def trace(matrix):
    return matrix.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]


def with_spectrum(*spectra, seed=0):
    """Symmetric (B, C, C) with the given eigenvalues in random directions."""
    values = torch.tensor(spectra, dtype=torch.float64)
    directions, _ = torch.linalg.qr(randn(values.shape[0], values.shape[1], values.shape[1], seed=seed))
    return sym((directions * values[:, None, :]) @ directions.mT)


def assert_near(actual, expected, rtol=1e-12):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error = (actual - expected).abs().max().item()
    assert error <= rtol * expected.abs().max().item(), f"error {error:.3g}"  # false for NaN


def gradient(function, argument, upstream):
    argument = argument.detach().clone().requires_grad_()
    return torch.autograd.grad(function(argument), argument, upstream)[0]
