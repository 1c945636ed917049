"""PSNR and SSIM are the published ones."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("skimage", reason="san_model needs the extra [san]")
pytest.importorskip("png", reason="san_model needs the extra [san]")
import numpy as np
from scipy.ndimage import correlate1d

from san_model import metrics
from san_model.images import bicubic, crop_to_multiple, read_uint8

DATA = Path(os.environ.get("ISQRT_COV_DATA", Path(__file__).parents[2] / "shared" / "data"))


def noisy(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(30, 220, (3, *size), generator=generator)
    return image.to(torch.uint8), (image + torch.randint(-9, 10, image.shape, generator=generator)).to(torch.uint8)


def ssim_index(a, b):
    """Wang's ssim_index.m: Gaussian window 11 x 11, sigma 1.5, valid part only."""
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def blurred(x):
        return correlate1d(correlate1d(x, window, 0), window, 1)[5:-5, 5:-5]

    ma, mb = blurred(a), blurred(b)
    va, vb, cov = blurred(a * a) - ma * ma, blurred(b * b) - mb * mb, blurred(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return np.mean((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))


def test_luma_is_matlab_rgb2ycbcr():
    image, _ = noisy((7, 9))
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64)
    expected = 16 + (weights[:, None, None] * image / 255).sum(0)
    np.testing.assert_allclose(metrics.luma(image), expected, rtol=1e-12)


def test_score_by_hand():
    a, b = noisy((40, 33))
    inside = slice(3, -3)
    x, y = (metrics.luma(image)[inside, inside] for image in (a, b))
    psnr, ssim = metrics.score(a, b, 3)
    assert psnr == pytest.approx(10 * math.log10(255**2 / ((x - y) ** 2).mean()), rel=1e-12)
    assert ssim == pytest.approx(ssim_index(x, y), rel=1e-10)
    assert metrics.psnr_y(a, b, 3) == psnr


def test_equal_images():
    a, _ = noisy((20, 20))
    assert metrics.score(a, a, 2) == (math.inf, pytest.approx(1))


def test_wrong_input_is_named():
    a, b = noisy((20, 20))
    with pytest.raises(ValueError, match="image is 20 x 20, the target 19 x 20"):
        metrics.score(a, b[:, :, 1:], 2)
    with pytest.raises(ValueError, match="20 x 20 is too small"):
        metrics.score(a, b, 5)
    with pytest.raises(ValueError, match=r"\(3, H, W\) uint8"):
        metrics.luma(a.float())


@pytest.mark.skipif(not (DATA / "expected.json").is_file(), reason="the benchmark images are not here")
def test_published_numbers_of_one_image():
    expected = json.loads((DATA / "expected.json").read_text())
    hr = read_uint8(DATA / "benchmark/Set5/HR/woman.png")
    for scale in (2, 3, 4, 8):
        target = crop_to_multiple(hr, scale)
        lr = read_uint8(DATA / f"benchmark/Set5/LR_bicubic/X{scale}/womanx{scale}.png")
        psnr, ssim = expected[f"bicubic (MATLAB uint8 LR, MATLAB uint8 two-pass up) x{scale} Set5"]["woman"]
        score = metrics.score(bicubic(lr, scale), target, scale)
        assert score == (pytest.approx(psnr, abs=1e-5), pytest.approx(ssim, abs=1e-5))
