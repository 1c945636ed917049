"""The time that a covariance square root needs at torch's own rates on this machine: work needed over rates measured.

    floor = max(flops / GEMM rate, bytes / copy rate)

It is the larger of the two, as if arithmetic and memory traffic overlapped perfectly, and it charges nothing for
launches, reductions and synchronisation. Both rates are the best that torch itself reaches here, in each round of the
methods anew: of matrix products of several sizes in the dtype that is computed in (under torch's precision setting), on
a GPU also of float16 ones, three of which make one of float32 on tensor cores, as in the kernels; and of a copy as
large as x, which stays in the cache where x does, and a large one. Products of small matrices that stay in the cache
can be faster than those, and then time over floor is below 1. It is the median of the ratios of each round, as all
ratios are: a processor whose clock changes, or that others use, too, changes both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Work:
    """What one call on a batch must do at least."""

    flops: int
    bytes: int


def half_products(iterations: int, output: str) -> tuple[int, int]:
    """Symmetric C x C products of C^3 flops each (one triangle of 2 C^3) that N steps need: (forward, backward).

    All iterates are polynomials in A, hence symmetric, so that one triangle of a product suffices.

    Forward, a step is T = Z Y; Y <- 1.5 Y - 0.5 Y T; Z <- 1.5 Z - 0.5 T Z: 3 products. Two steps multiply Y and Z by a
    polynomial of degree four in T, which takes two squares, S = T T - 4.5 T and S S: T, S, S S, Y and Z, 5 products.
    The first ones need none for T = A nor for Z, which is a sum, and the last ones none for Z_N. With a single step
    first where N is odd that is 1, 3, 5, 7, 10 for N = 1, 2, 3, 4, 5.

    Backward, with x, mu and one C x C matrix kept, by the tangent of the forward in the direction of the symmetrised
    upstream gradient: each product A B becomes A B and A dB + dA B, the symmetric sum of two products, of which one
    triangle of each is needed: 3 half products for each one of the forward. (Recurrences that go backward need the
    iterates, and cost more where these are recomputed.)

    Output "mean" needs Y_N v alone: the products of the last forward step become matrix-vector ones, also that for Y_N
    in the backward, and those of the first tangent with an upstream gradient of rank 2, a step of its own, cost C^2.
    The rest is counted as it is for a full gradient.

    Where there are fewer positions than channels, the iteration may take their Gram matrix (csrc/gram.h), which has
    M - 1 rows, and as many products for Z_N: one less where all steps are the first ones and the last ones, for then
    Z_N is a sum.
    """
    if output != "mean":
        forward = _products(_steps_at_once(iterations), ends=True)
        return forward, 3 * forward
    backward = 3 * _products([1, *_steps_at_once(iterations - 1)], ends=True)
    return _products(_steps_at_once(iterations - 1), ends=False), backward - 3


def _steps_at_once(iterations: int) -> list[int]:
    return [1] * (iterations % 2) + [2] * (iterations // 2)


def _products(steps_at_once: list[int], ends: bool) -> int:
    """Products of the forward; where it ends with them, Z_N is not needed."""
    needed = 0
    for index, steps in enumerate(steps_at_once):
        is_first, is_last = index == 0, ends and index == len(steps_at_once) - 1
        needed += {1: 3, 2: 5}[steps] - is_first - (is_first or is_last)
    return needed


def work(shape: tuple[int, int, int, int], iterations: int, output: str, itemsize: int) -> tuple[Work, Work]:
    """Work needed for (forward, forward + backward) for feature maps (B, C, H, W) of ``itemsize`` bytes a number.

    Per sample, M = H W; a multiplication and an addition are 2 flops:
      forward flops   pooling, one triangle of X X': 2 C C M / 2; the half products, C^3 each;
                      three matrix-vector products, 2 C^2 each, for "mean"
      backward flops  the half products; dX = (dSigma + dSigma') (X - mu) / M: 2 C C M
      forward bytes   read x, write the output
      backward bytes  read x, write dX, read the upstream gradient; and the matrix that is kept for it, written by the
                      forward and read by the backward, which only a training step pays
    From the side of the positions, if that is less in all, the features F have n = M - 1 numbers a channel, the half
    products n^3 flops, and the others are
      forward flops   one triangle of F' F: C n n; P = R F' and one triangle of F P: 2 C n n + C C n;
                      for "mean" vectors instead, 1' F, R times that, and F times that: 4 C n + 2 n n, and three
                      matrix-vector products for the last step
      backward flops  V = G F and one triangle of F' V: 2 C C n + C n n; V R and F dK: 4 C n n;
                      for "mean" V has rank 2: F dK alone, 2 C n n, and vectors, some 8 C n
    """
    by_channels, by_positions = _flops(shape, iterations, output), _gram_flops(shape, iterations, output)
    flops = min(by_channels, by_positions, key=sum)
    batch, channels, height, width = shape
    m = height * width
    side = m - 1 if flops is by_positions else channels
    numbers = {"matrix": channels**2, "triu": channels * (channels + 1) // 2, "mean": channels}[output]
    forward_numbers = channels * m + numbers
    step_numbers = forward_numbers + 2 * channels * m + numbers + 2 * side**2
    return (
        Work(batch * flops[0], batch * forward_numbers * itemsize),
        Work(batch * sum(flops), batch * step_numbers * itemsize),
    )


def _flops(shape: tuple[int, int, int, int], iterations: int, output: str) -> tuple[int, int]:
    """Of (forward, backward) of a sample."""
    _, channels, height, width = shape
    m = height * width
    forward, backward = half_products(iterations, output)
    vectors = 3 * 2 * channels**2 if output == "mean" else 0
    return channels**2 * m + forward * channels**3 + vectors, backward * channels**3 + 2 * channels**2 * m


def _gram_flops(shape: tuple[int, int, int, int], iterations: int, output: str) -> tuple[int, int]:
    """The same from the side of the positions."""
    _, channels, height, width = shape
    n = height * width - 1
    forward, backward = half_products(iterations, output)
    if output == "mean":
        return (
            channels * n**2 + forward * n**3 + 4 * channels * n + 2 * n**2 + 3 * 2 * n**2,
            backward * n**3 + 2 * channels * n**2 + 8 * channels * n,
        )
    is_sum = iterations <= 2
    return (
        3 * channels * n**2 + channels**2 * n + (forward - is_sum) * n**3,
        (backward - 3 * is_sum) * n**3 + 2 * channels**2 * n + 5 * channels * n**2,
    )


def floor_ms(needed: Work, gemm_flops_per_s: float, copy_bytes_per_s: float) -> float:
    return 1e3 * max(needed.flops / gemm_flops_per_s, needed.bytes / copy_bytes_per_s)


SPLIT_PRODUCTS = 3  # of tensor cores on pairs of float16, for one at float32's accuracy: csrc/cuda/tensor.cuh


class Gemm:
    """A product of two matrices with ``size`` rows and columns, or one of ``products`` for a more exact one."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, products: int = 1):
        generator = torch.Generator(device)  # torch's own is of no use after a capture that failed
        a, b = (torch.randn(size, size, dtype=dtype, device=device, generator=generator) for _ in range(2))
        out = torch.empty_like(a)
        self.name = f"{size} x {size}" + (f", one of {products} in {dtype}" if products > 1 else "")
        self.call = lambda: torch.mm(a, b, out=out)
        self.amount = 2 * size**3 // products  # flops


class Copy:
    """A copy between two buffers of ``size`` bytes; every byte is read once and written once."""

    def __init__(self, size: int, device: torch.device):
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        self.name = f"{size} bytes"
        self.call = lambda: target.copy_(source)
        self.amount = 2 * size  # bytes


def probes(x: torch.Tensor, quick: bool = False) -> dict[str, list[Gemm] | list[Copy]]:
    """What is timed in the rounds of methods for feature maps x, to know the rates of the machine."""
    sizes = (2048, 4096, 8192) if x.is_cuda else (512, 1024) if quick else (512, 1024, 2048)
    large = (1024 if x.is_cuda else 64 if quick else 256) * 2**20
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    gemms = [Gemm(size, dtype, x.device) for size in sizes]
    if x.is_cuda and dtype == torch.float32:
        gemms += [Gemm(size, torch.float16, x.device, SPLIT_PRODUCTS) for size in sizes]
    return {
        "gemm": gemms,
        "copy": [Copy(size, x.device) for size in (max(x.nbytes, 2**16), large)],
    }


def best_rates(probes: Sequence[Gemm | Copy], samples_ms: Mapping[str, Sequence[float]]) -> list[float]:
    """The best of each round, a second."""
    per_second = ([1e3 * probe.amount / ms for ms in samples_ms[probe.name]] for probe in probes)
    return [max(of_round) for of_round in zip(*per_second, strict=True)]
