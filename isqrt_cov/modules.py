"""The layer."""

from torch import Tensor, nn

from .functional import check_coefficients, check_iterations, cov_sqrt
from .ops import OUTPUTS, code


class CovSqrtNorm(nn.Module):
    """Square-root normalised covariance pooling as a layer without parameters; see :func:`isqrt_cov.cov_sqrt`.

    Args:
        iterations: number of Newton-Schulz steps, from 1 to 1000.
        output: ``"matrix"``, ``"triu"`` or ``"mean"``.
        coefficients: ``"newton_schulz"``, the paper's, or ``"minimax"``, nearer to the exact root at the same cost.
        spectrum_floor: the smallest eigenvalue, relative to the trace, that the minimax coefficients are made for.

    Raises:
        ValueError: one of these is none of the values named.

    Shape:
        (B, C, H, W) or (B, C, M) to (B, C, C), (B, C (C + 1) / 2) or (B, C).
    """

    def __init__(
        self,
        iterations: int = 5,
        output: str = "matrix",
        coefficients: str = "newton_schulz",
        spectrum_floor: float = 1e-3,
    ) -> None:
        super().__init__()
        code("output", output, OUTPUTS)
        check_coefficients(coefficients, spectrum_floor)
        self.iterations = check_iterations("iterations", iterations)
        self.output = output
        self.coefficients = coefficients
        self.spectrum_floor = float(spectrum_floor)

    def forward(self, x: Tensor) -> Tensor:
        """:func:`isqrt_cov.cov_sqrt` of feature maps x."""
        return cov_sqrt(x, self.iterations, self.output, self.coefficients, self.spectrum_floor)

    def extra_repr(self) -> str:
        tuned = "" if self.coefficients == "newton_schulz" else f", spectrum_floor={self.spectrum_floor}"
        return f"iterations={self.iterations}, output={self.output!r}, coefficients={self.coefficients!r}{tuned}"
