"""Square-root normalised covariance pooling (iSQRT-COV / MPN-COV) as fused kernels for PyTorch.

>>> import torch
>>> from isqrt_cov import CovSqrtNorm
>>> CovSqrtNorm(iterations=5, output="triu")(torch.randn(2, 8, 6, 6)).shape
torch.Size([2, 36])
"""

from .functional import build_info, cov_sqrt, covariance_pool, matrix_inv_sqrt, matrix_sqrt, plan, triu_vector
from .modules import CovSqrtNorm
from .ops import decompositions

__all__ = [
    "CovSqrtNorm",
    "build_info",
    "cov_sqrt",
    "covariance_pool",
    "decompositions",
    "matrix_inv_sqrt",
    "matrix_sqrt",
    "plan",
    "triu_vector",
]
