"""PSNR and SSIM on the luma channel, as the super-resolution literature prints them.

Luma is BT.601 studio swing (16..235) computed from the 8-bit image and not rounded again; ``shave`` pixels of border,
the factor by custom, are left out. SSIM with these arguments is MATLAB's ``ssim_index``.
"""

from typing import NamedTuple

import numpy as np
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import structural_similarity

SSIM_WINDOW = 11


class Score(NamedTuple):
    """psnr in dB (infinite for equal images), ssim at most 1."""

    psnr: float
    ssim: float


def luma(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) uint8 -> (H, W) float64."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image: expected (3, H, W) uint8, got {tuple(image.shape)} {image.dtype}")
    return rgb2ycbcr(image.permute(1, 2, 0).cpu().numpy())[..., 0]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of two planes on the scale 0..255."""
    mse = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / mse)) if mse > 0 else float("inf")


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Of two planes on the scale 0..255, at least 11 x 11."""
    return float(
        structural_similarity(
            a, b, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, win_size=SSIM_WINDOW
        )
    )


def shaved(plane: np.ndarray, shave: int, least: int = 1) -> np.ndarray:
    """Without ``shave`` pixels on each side; raises ValueError where less than least x least would remain."""
    height, width = plane.shape
    if min(height, width) - 2 * shave < least:
        raise ValueError(f"{width} x {height} is too small: {least} x {least} must remain inside borders of {shave}")
    return plane[shave : height - shave, shave : width - shave]


def psnr_y(image: torch.Tensor, target: torch.Tensor, shave: int) -> float:
    """PSNR of the luma of two (3, H, W) uint8 images."""
    _check_sizes(image, target)
    return psnr(shaved(luma(image), shave), shaved(luma(target), shave))


def score(image: torch.Tensor, target: torch.Tensor, shave: int) -> Score:
    """PSNR and SSIM of the luma of two (3, H, W) uint8 images."""
    _check_sizes(image, target)
    return score_planes(luma(image), luma(target), shave)


def score_planes(plane: np.ndarray, target: np.ndarray, shave: int) -> Score:
    """PSNR and SSIM of two luma planes."""
    a, b = shaved(plane, shave, SSIM_WINDOW), shaved(target, shave, SSIM_WINDOW)
    return Score(psnr(a, b), ssim(a, b))


def mean(scores: list[Score]) -> Score:
    """Of a data set: the mean of its images."""
    return Score(*(float(np.mean(column)) for column in zip(*scores, strict=True)))


def _check_sizes(image: torch.Tensor, target: torch.Tensor) -> None:
    if image.shape != target.shape:
        sizes = [f"{t.shape[-1]} x {t.shape[-2]}" for t in (image, target)]
        raise ValueError(f"the image is {sizes[0]}, the target {sizes[1]}")
