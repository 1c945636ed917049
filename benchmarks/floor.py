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

from methods import load_plain

flops = load_plain("flops")


@dataclass(frozen=True)
class Work:
    """What one call on a batch must do at least."""

    flops: int
    bytes: int


def work(shape: tuple[int, int, int, int], iterations: int, output: str, itemsize: int) -> tuple[Work, Work]:
    """Work needed for (forward, forward + backward) for feature maps (B, C, H, W) of ``itemsize`` bytes a number.

    Flops are those of isqrt_cov/flops.py, by the channels or the positions, whichever are less. Bytes:
      forward   read x, write the output
      backward  read x, write dX, read the upstream gradient; and the matrix that is kept for it, written by the forward
                and read by the backward, which only a training step pays
    """
    by_channels = flops.by_channels(shape, iterations, output)
    by_positions = flops.by_positions(shape, iterations, output)
    needed = min(by_channels, by_positions, key=sum)
    batch, channels, height, width = shape
    m = height * width
    side = m - 1 if needed is by_positions else channels
    numbers = {"matrix": channels**2, "triu": channels * (channels + 1) // 2, "mean": channels}[output]
    forward_numbers = channels * m + numbers
    step_numbers = forward_numbers + 2 * channels * m + numbers + 2 * side**2
    return (
        Work(needed[0], batch * forward_numbers * itemsize),
        Work(sum(needed), batch * step_numbers * itemsize),
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
