"""What a user's type checker sees of the installed packages; checked by `make types`, never run."""

from typing import Any, assert_type

import torch
from torch import Tensor

from isqrt_cov import (
    CovSqrtNorm,
    build_info,
    cov_sqrt,
    covariance_pool,
    matrix_inv_sqrt,
    matrix_sqrt,
    plan,
    triu_vector,
)
from isqrt_cov.mpncov import MPNCOV, CovpoolLayer, SqrtmLayer, TriuvecLayer
from san_model import SAN

x = torch.randn(2, 8, 6, 6)

assert_type(cov_sqrt(x), Tensor)
assert_type(cov_sqrt(x, 3, "triu", coefficients="minimax", spectrum_floor=1e-2), Tensor)
assert_type(covariance_pool(x), Tensor)
assert_type(matrix_sqrt(covariance_pool(x), iterations=7), Tensor)
assert_type(matrix_inv_sqrt(covariance_pool(x)), Tensor)
assert_type(triu_vector(covariance_pool(x)), Tensor)
assert_type(plan((2, 8, 6, 6), torch.float64, "cpu"), dict[str, Any])
assert_type(build_info(), dict[str, Any])

layer = CovSqrtNorm(iterations=3, output="mean")
assert_type(layer, CovSqrtNorm)
assert_type(layer.iterations, int)
assert_type(layer.output, str)

assert_type(CovpoolLayer(x), Tensor)
assert_type(SqrtmLayer(CovpoolLayer(x), 5), Tensor)
assert_type(TriuvecLayer(CovpoolLayer(x)), Tensor)
assert_type(MPNCOV(input_dim=8, dimension_reduction=4).output_dim, int)

assert_type(SAN.from_checkpoint("weights.safetensors", variant="soca"), SAN)

cov_sqrt(x, "5")  # type: ignore[arg-type]
CovSqrtNorm(iterations=None)  # type: ignore[arg-type]
MPNCOV(dimension_reduction="256")  # type: ignore[arg-type]
