"""Collages of pieces of training images, for networks that few images have to teach what edges look like.

After the dead leaves model (A. B. Lee, D. Mumford, J. Huang: Occlusion Models for Natural Images, IJCV 2001): shapes
that cover each other, with sizes that follow a power law as those of things in photographs do. Each is filled with a
piece of an image or with one of its colours.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

Pixels = np.ndarray  # (height, width, 3) float32, 0..255

SIDE = 1024
_SUBPIXELS = 4  # a side, over which the outline of a shape is averaged


def collage(images: Sequence[Tensor], seed: int, number: int, side: int = SIDE) -> Tensor:
    """A collage of side x side pixels, (3, side, side) uint8: a pure function of its arguments.

    Args:
        images: (3, H, W) uint8 each.
        seed, number: tell it from other collages.
    """
    return _Collage(images, np.random.default_rng([seed, number]), side).tensor()


class _Collage:
    """One that is being made, and its random numbers."""

    def __init__(self, images: Sequence[Tensor], random: np.random.Generator, side: int) -> None:
        self.images, self.random = images, random
        self.canvas = self._fill(side, side) if self._chance(0.5) else self._piece(side, side)
        exponent = random.choice([0.3, 1.0, 1.5])  # of the power law for the number of shapes beyond a radius
        least, most = random.choice([3.0, 6.0, 12.0]) ** -exponent, random.choice([50.0, 100.0]) ** -exponent
        count = round(random.choice([30, 80, 200]) * (side / 256) ** 2)
        radii = (least + random.random(count) * (most - least)) ** (-1 / exponent)
        for radius in sorted(radii, reverse=True) if self._chance(0.7) else radii:  # else small ones are covered, too
            self._add(self._outline() * radius + random.uniform(0, side, 2), radius)

    def tensor(self) -> Tensor:
        image = Image.fromarray((self.canvas + 0.5).astype(np.uint8))
        if self._chance(0.5):  # as lenses do
            image = image.filter(ImageFilter.GaussianBlur(self.random.uniform(0.3, 1.0)))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def _chance(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def _add(self, outline: np.ndarray, radius: float) -> None:
        """Covers what is inside the outline, points (x, y)."""
        low = np.maximum(np.floor(outline.min(0)).astype(int) - 1, 0)
        high = np.minimum(np.ceil(outline.max(0)).astype(int) + 1, len(self.canvas))
        width, height = (int(extent) for extent in high - low)
        if min(width, height) <= 0:
            return
        mask = Image.new("L", (width * _SUBPIXELS, height * _SUBPIXELS))
        points = [(float(x), float(y)) for x, y in (outline - low) * _SUBPIXELS]
        if radius > 6 and self._chance(0.15):
            line = round(_SUBPIXELS * self.random.uniform(1, 5))
            ImageDraw.Draw(mask).line([*points, points[0]], fill=255, width=line)
        else:
            ImageDraw.Draw(mask).polygon(points, fill=255)
        covered = np.asarray(mask.reduce(_SUBPIXELS), np.float32)[..., None] / 255
        filling = self._fill(height, width)
        if self._chance(0.15):
            stripes = self._stripes(height, width)
            filling = stripes * filling + (1 - stripes) * self._fill(height, width)
        part = self.canvas[low[1] : high[1], low[0] : high[0]]
        part += covered * (filling - part)

    def _outline(self) -> np.ndarray:
        """Points (x, y) of a shape of radius 1 or so."""
        random = self.random
        kind = random.choice(["ellipse", "bar", "polygon", "blob"], p=[0.35, 0.25, 0.2, 0.2])
        if kind == "polygon":
            angles = np.sort(random.uniform(0, 2 * np.pi, random.integers(3, 8)))
        else:
            angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        points = np.stack([np.cos(angles), np.sin(angles)], 1)
        if kind == "ellipse":
            points[:, 1] *= random.uniform(0.3, 1)
        elif kind == "bar":
            points = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [1, random.uniform(0.02, 0.25)]
        elif kind == "polygon":
            points *= random.uniform(0.5, 1, (len(angles), 1))
        else:
            waves = [random.normal(0, 0.25 / k) * np.cos(k * angles + random.uniform(0, 2 * np.pi)) for k in (2, 3, 4)]
            points *= np.clip(1 + sum(waves), 0.2, 2)[:, None]
        turn = random.uniform(0, 2 * np.pi)
        return points @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]

    def _piece(self, height: int, width: int) -> Pixels:
        """Of one of the images, mirrored on where it is too small."""
        image = self.images[int(self.random.integers(len(self.images)))]
        size = [min(wanted, side) for wanted, side in zip((height, width), image.shape[1:], strict=True)]
        top, left = (int(self.random.integers(side - n + 1)) for side, n in zip(image.shape[1:], size, strict=True))
        piece = image[:, top : top + size[0], left : left + size[1]].permute(1, 2, 0).numpy().astype(np.float32)
        piece = np.pad(piece, [(0, height - size[0]), (0, width - size[1]), (0, 0)], mode="symmetric")
        return piece[:, ::-1] if self._chance(0.5) else piece

    def _fill(self, height: int, width: int) -> Pixels:
        """A piece, one of its colours, or a gradient of it; half of the time of another brightness and contrast."""
        random = self.random
        fill = self._piece(height, width)
        if self._chance(0.55):
            fill = np.broadcast_to(fill[random.integers(height), random.integers(width)], fill.shape)
            if self._chance(0.4):
                x, y = random.normal(size=2) * random.uniform(5, 40)
                fill = fill + (np.linspace(-x, x, width) + np.linspace(-y, y, height)[:, None])[..., None]
        if self._chance(0.5):
            mean = fill.mean((0, 1))
            level = np.clip(mean * random.uniform(0.4, 1.7) + random.uniform(-30, 30), 0, 255)
            fill = (fill - mean) * random.uniform(0.7, 1.6) + level
        return np.clip(fill, 0, 255).astype(np.float32)

    def _stripes(self, height: int, width: int) -> np.ndarray:
        """(height, width, 1), 0..1."""
        angle, period = self.random.uniform(0, np.pi), self.random.uniform(3, 20)
        along = np.cos(angle) * np.arange(width) + np.sin(angle) * np.arange(height)[:, None]
        return np.clip(0.5 + np.sin(2 * np.pi / period * along) * period / 4, 0, 1).astype(np.float32)[..., None]
