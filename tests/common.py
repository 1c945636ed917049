"""What the tests share: what they compare with, and how near is near enough."""

import math
import platform

import pytest
import torch

from isqrt_cov import build_info, plan
from isqrt_cov.ops import ENGINES

CUDA_ENGINES = ("block", "grid", "warpgroup")

needs_emulation = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulation switches stacks of x86-64 only"
)


def missing_cuda() -> str | None:
    """Why the CUDA kernels cannot be tested here, or None."""
    if not build_info()["cuda_architectures"]:
        return "this build of isqrt_cov has no CUDA kernels"
    return None if torch.cuda.is_available() else "no CUDA device"


def refusal(engine, shape, dtype, device) -> str | None:
    """The block engine ends where the device's shared memory does; plan() is tested to fall back from there. Not every
    device has warpgroups."""
    if engine in ("block", "warpgroup"):
        try:
            plan(shape, dtype, device, engine)
        except RuntimeError as error:
            return str(error)
    return None


def skip_unless_fits(engine, shape, dtype, device):
    if reason := refusal(engine, shape, dtype, device):
        pytest.skip(reason)


def engine_code(name):
    return ENGINES.index(name)


def engine_device(name):
    return "cuda" if name in CUDA_ENGINES else "cpu"


def tolerance(dtype, channels, positions=1, iterations=5):
    """Bound on the relative Frobenius error of a result in ``dtype``.

    Rounding errors are independent, so a sum of n terms is off by about sqrt(n) u, u being the unit roundoff. The
    covariance sums M terms, each of the N steps two sums of C terms in a row; 4 leaves room for the growth along the
    iteration (its derivative is below 1.5^2 on the spectrum that carries the norm) and for the tails of the shape.
    """
    unit = torch.finfo(dtype).eps / 2
    return 4 * unit * (math.sqrt(positions) + 2 * iterations * math.sqrt(channels))


def assert_close(actual, expected, bound, size=0.0):
    """Relative Frobenius distance per batch at most ``bound``; what is expected to be zero has to be zero.

    ``size``: what the terms of the result amount to where they may cancel, beside the result itself.
    """
    assert actual.shape == expected.shape
    expected = expected.to(torch.float64)
    distance = (actual.to(torch.float64) - expected).norm().item()
    size += expected.norm().item()
    assert distance <= bound * size, f"error {distance:.2e} of {size:.2e}, bound {bound:.2e}"


def gradient_size(upstream, y, argument):
    """Size of the gradient's terms: y is homogeneous in its argument, so its slope is about |y| / |argument|."""
    argument = argument.detach().double().flatten(2)
    if argument.shape[1] != argument.shape[2] or not torch.equal(argument, argument.mT):  # feature maps, of any mean
        argument = argument - argument.mean(2, keepdim=True)
    size = upstream.double().norm() * y.detach().double().norm() / argument.norm()
    return size.item() if size.isfinite() else 0.0


def assert_mean(actual, x, bound):
    """It is that of x (B, C, M) less the first position, the terms of which may cancel."""
    distances = x - x[:, :, :1]
    assert_close(actual, distances.mean(-1), bound, distances.norm().item() / x.shape[2] ** 0.5)


def feature_maps(batch, channels, positions, dtype, device="cpu", seed=0):
    """Correlated channels with a mean well above their spread, as feature maps after a ReLU have."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64) / math.sqrt(channels)
    x = torch.randn(batch, channels, positions, generator=generator, dtype=torch.float64)
    return (mixing @ x + 3.0).to(dtype).to(device)


def covariances(batch, channels, dtype, device="cpu", seed=0):
    """Symmetric positive definite matrices with eigenvalues over two decades."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(batch, channels, channels, generator=generator, dtype=torch.float64))
    spectrum = torch.logspace(0, -2, channels, dtype=torch.float64)
    return ((q * spectrum) @ q.mT).to(dtype).to(device)


def gram_matrix(x):
    """What is iterated for fewer positions than channels, csrc/gram.h: (B, M - 1, M - 1)."""
    centered = x.flatten(2) - x.flatten(2).mean(2, keepdim=True)
    positions = centered.shape[2]
    features = centered[:, :, 1:] + centered[:, :, :1] / (math.sqrt(positions) - 1)
    return features.mT @ features / positions


def layouts(x):
    """The same feature maps (B, C, H, W) in every layout that has a path of its own, under a name."""
    padded = torch.zeros(x.shape[0], x.shape[1] + 2, x.shape[2] + 4, x.shape[3] + 6, dtype=x.dtype, device=x.device)
    cropped = padded[:, 1:-1, 2:-2, 3:-3].copy_(x)
    every_other = x.repeat_interleave(2, dim=3)[..., ::2]
    return {
        "NCHW": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "cropped": cropped,
        "cropped channels_last": padded.contiguous(memory_format=torch.channels_last)[:, 1:-1, 2:-2, 3:-3].copy_(x),
        "transposed": x.mT.contiguous().mT,
        "every other column": every_other,
        "batch last": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "one column": x.flatten(2)[..., None],
        "expanded": x[:1].expand(x.shape[0], -1, -1, -1),
        # Of a signal: neighbours in channels and in positions both follow each other in memory.
        "sliding windows": x.contiguous().as_strided(x.shape, (x[0].numel(), 1, x.shape[3], 1)),
    }
