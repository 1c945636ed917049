"""Drop-in for the functions and the layer of fast-MPN-COV and of SAN's ``MPNCOV`` package: same names, argument order,
defaults, shapes and ``state_dict``, so that an old project changes one import.

What differs is in the numbers: no NaN on a constant map; ``SqrtmLayer`` takes the symmetric part of its argument, and
its gradient is the symmetric one, where fast-MPN-COV's is transposed; second derivatives are right; float64 is float64;
and there is no M x M matrix.
"""

import torch
from torch import Tensor, nn

from .functional import check_count, check_iterations, cov_sqrt, covariance_pool, matrix_sqrt, triu_vector

__all__ = ["MPNCOV", "CovpoolLayer", "SqrtmLayer", "TriuvecLayer"]


def _check_maps(name: str, maps: Tensor) -> None:
    """Of one image alone, (C, H, W), C would be taken for the batch."""
    if isinstance(maps, Tensor) and maps.dim() != 4:
        raise ValueError(f"{name}: expected (B, C, H, W), got shape {tuple(maps.shape)}")


def CovpoolLayer(var: Tensor) -> Tensor:
    """(B, C, H, W) to its covariance, (B, C, C); see :func:`isqrt_cov.covariance_pool`. ValueError for another rank."""
    _check_maps("var", var)
    return covariance_pool(var)


def SqrtmLayer(var: Tensor, iterN: int) -> Tensor:
    """(B, C, C) to its square root after ``iterN`` Newton-Schulz steps; see :func:`isqrt_cov.matrix_sqrt`."""
    return matrix_sqrt(var, iterN if isinstance(iterN, torch.SymInt) else check_iterations("iterN", iterN))


def TriuvecLayer(var: Tensor) -> Tensor:
    """(B, C, C) to its upper triangle row by row, (B, C (C + 1) / 2, 1)."""
    return triu_vector(var).unsqueeze(-1)


class MPNCOV(nn.Module):
    """Matrix power normalised covariance pooling of fast-MPN-COV.

    Args:
        iterNum: number of Newton-Schulz steps.
        is_sqrt: take the square root of the covariance.
        is_vec: return the upper triangle as a vector instead of the matrix.
        input_dim: channels of the input.
        dimension_reduction: if given, a 1 x 1 convolution with batch normalisation and ReLU comes first and leaves that
            many channels.

    Raises:
        ValueError: one of these is out of range.

    Attributes:
        output_dim: numbers per sample that come out.

    Shape:
        (B, input_dim, H, W) to (B, d (d + 1) / 2, 1), or to (B, d, d) without ``is_vec``; d = dimension_reduction or
        input_dim.
    """

    def __init__(
        self,
        iterNum: int = 3,
        is_sqrt: bool = True,
        is_vec: bool = True,
        input_dim: int = 2048,
        dimension_reduction: int | None = None,
    ) -> None:
        super().__init__()
        input_dim = check_count("input_dim", input_dim)
        self.iterNum = check_iterations("iterNum", iterNum) if is_sqrt else iterNum
        self.is_sqrt = is_sqrt
        self.is_vec = is_vec
        reduces = dimension_reduction is not None
        self.dr = check_count("dimension_reduction", dimension_reduction) if reduces else None
        if self.dr is not None:
            convolution = nn.Conv2d(input_dim, self.dr, kernel_size=1, stride=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            self.conv_dr_block = nn.Sequential(convolution, nn.BatchNorm2d(self.dr), nn.ReLU(inplace=True))
        channels = input_dim if self.dr is None else self.dr
        self.output_dim = channels * (channels + 1) // 2 if is_vec else channels * channels

    def forward(self, x: Tensor) -> Tensor:
        _check_maps("x", x)
        if self.dr is not None:
            x = self.conv_dr_block(x)
        if self.is_sqrt:
            y = cov_sqrt(x, self.iterNum, "triu" if self.is_vec else "matrix")
            return y.unsqueeze(-1) if self.is_vec else y
        sigma = covariance_pool(x)
        return TriuvecLayer(sigma) if self.is_vec else sigma
