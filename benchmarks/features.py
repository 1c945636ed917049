"""Input for the benchmarks: feature maps of photographs, and maps with a spectrum that is known.

    photo   photographs of scikit-image through conv3x3 - ReLU - conv3x3 with fixed random weights
    randn   independent normal numbers: a flat spectrum
    rank    covariance of rank (C, or M - 1 where that is less) / 4: most eigenvalues are 0
    decay   eigenvalues that fall as 1 / k^2, in random directions

Each is a function of (shape, seed) alone. Nothing is downloaded: only image files that lie inside the installed
scikit-image are read.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

Shape = tuple[int, int, int, int]

# Photographs that scikit-image carries in its wheel. Its functions fetch whatever is not there, so files are read.
PHOTOGRAPHS = (
    "astronaut.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "motorcycle_left.png",
    "rocket.jpg",
)
HIDDEN = 64  # channels between the convolutions: the second has 576 inputs, enough for independent outputs to C = 512
IMAGE_SIDE = 224  # what a small map is taken to come from


class PhotographsMissing(Exception):
    pass


def load_photographs() -> list[Tensor]:
    """Grey or colour photographs as (3, H, W) float32 in [0, 1]."""
    try:
        import skimage.data
        import skimage.io
    except ImportError as error:
        raise PhotographsMissing(
            "photographs need scikit-image: pip install 'isqrt_cov[san]', or choose --input randn rank decay"
        ) from error
    paths = [Path(skimage.data.__file__).parent / name for name in PHOTOGRAPHS]
    images = [torch.from_numpy(skimage.io.imread(path)) for path in paths if path.exists()]
    if not images:
        raise PhotographsMissing(f"this scikit-image {skimage.__version__} carries none of {', '.join(PHOTOGRAPHS)}")
    colour = [image[..., :3] if image.dim() == 3 else image[..., None].expand(-1, -1, 3) for image in images]
    return [image.permute(2, 0, 1).float() / 255 for image in colour]


def _integer(high: int, generator: torch.Generator) -> int:
    return int(torch.randint(high, (), generator=generator))


def _crop(image: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """A random crop, randomly mirrored; a photograph that is too small is first reflected beyond its border."""
    for dim, side in ((1, height), (2, width)):
        while image.shape[dim] < side:
            image = torch.cat([image, image.flip(dim)], dim)
    top, left = (_integer(image.shape[dim] - side + 1, generator) for dim, side in ((1, height), (2, width)))
    crop = image[:, top : top + height, left : left + width]
    return crop.flip(2) if _integer(2, generator) else crop


def photo(shape: Shape, generator: torch.Generator) -> Tensor:
    """Maps as a super-resolution network sees them, one pixel a position; maps of 28 and less as a classifier does.

    The latter are pooled between the convolutions, so that a position stands for a part of a 224 x 224 image.
    """
    batch, channels, height, width = shape
    photographs = load_photographs()
    first = torch.randn(HIDDEN, 3, 3, 3, generator=generator) / 27**0.5
    second = torch.randn(channels, HIDDEN, 3, 3, generator=generator) / (9 * HIDDEN) ** 0.5
    stride = IMAGE_SIDE // max(height, width) if max(height, width) <= 28 else 1
    maps = []
    for _ in range(batch):  # one by one: the hidden maps of a whole batch can be gigabytes
        image = photographs[_integer(len(photographs), generator)]
        crop = _crop(image, height * stride, width * stride, generator)
        hidden = functional.conv2d(crop[None], first, padding=1).relu()
        maps.append(functional.conv2d(functional.avg_pool2d(hidden, stride), second, padding=1))
    return torch.cat(maps).double()


def randn(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def rank_of(shape: Shape) -> int:
    """Rank of the covariance of the "rank" maps of this shape."""
    return max(1, min(shape[1], shape[2] * shape[3] - 1) // 4)


def rank(shape: Shape, generator: torch.Generator) -> Tensor:
    batch, channels, height, width = shape
    directions = randn((batch, channels, rank_of(shape)), generator)
    return (directions @ randn((batch, rank_of(shape), height * width), generator)).reshape(shape)


def decay(shape: Shape, generator: torch.Generator) -> Tensor:
    """White maps, coloured: a covariance Q diag(k^-2) Q', up to the sampling noise of M positions."""
    batch, channels, height, width = shape
    directions, _ = torch.linalg.qr(randn((batch, channels, channels), generator))
    scale = 1 / torch.arange(1, channels + 1, dtype=torch.float64)
    white = randn((batch, channels, height * width), generator)
    return (directions @ (scale[:, None] * white)).reshape(shape)


INPUTS: dict[str, Callable[[Shape, torch.Generator], Tensor]] = {
    "photo": photo,
    "randn": randn,
    "rank": rank,
    "decay": decay,
}
TITLES = {"photo": "photographs", "randn": "flat", "rank": "low rank", "decay": "decaying"}  # on pages, in figures


@torch.no_grad()
def feature_maps(kind: str, shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Tensor:
    """Feature maps (B, C, H, W) of one of ``INPUTS``; raises PhotographsMissing where it needs some and has none."""
    return INPUTS[kind](shape, torch.Generator().manual_seed(seed)).to(device, dtype)
