"""The layer."""

from torch import Tensor, nn

from .functional import cov_sqrt
from .ops import OUTPUTS, code


class CovSqrtNorm(nn.Module):
    """Square-root normalised covariance pooling as a layer without parameters; see :func:`isqrt_cov.cov_sqrt`.

    Args:
        iterations: number of Newton-Schulz steps, at least 1.
        output: ``"matrix"``, ``"triu"`` or ``"mean"``.

    Shape:
        (B, C, H, W) or (B, C, M) to (B, C, C), (B, C (C + 1) / 2) or (B, C).
    """

    def __init__(self, iterations: int = 5, output: str = "matrix") -> None:
        super().__init__()
        if iterations < 1:
            raise ValueError(f"iterations: expected 1 or more, got {iterations}")
        code("output", output, OUTPUTS)
        self.iterations = iterations
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return cov_sqrt(x, self.iterations, self.output)

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}, output={self.output!r}"
