"""Pairs of low- and high-resolution images, and the endless stream of training patches cut from them.

Patch i of the stream (image, place, flips) is a pure function of the seed and of i. So the order is the same with any
number of workers, each rank of a distributed run takes its share of the very batch that one process would have, and a
run is resumed by going on counting.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .checkpoint import replacing
from .collage import SIDE, collage
from .images import InputError, bicubic, by_key, crop_to_multiple, list_images, match, read_uint8, to_uint8

Root = TypeVar("Root", bound=str | Path)
Item = TypeVar("Item")
Result = TypeVar("Result")


class PairPaths(NamedTuple):
    """An HR file and its LR file; without one, the LR image is made as MATLAB makes it."""

    hr: Path
    lr: Path | None


def find_pairs(root: str | Path, scale: int, argument: str = "--data") -> list[PairPaths]:
    """The images of ``root/HR`` or else of root, with LR files from ``LR_bicubic/X{scale}`` beside HR where it exists.

    Data sets that put their name in front (``DIV2K_train_HR`` beside ``DIV2K_train_LR_bicubic``) are given by their HR
    folder.
    """
    folder = Path(root)
    folder = folder / "HR" if (folder / "HR").is_dir() else folder
    images = list_images(folder, argument)
    lr_folder = folder.resolve().parent / (folder.resolve().name[:-2] + "LR_bicubic") / f"X{scale}"
    if not folder.resolve().name.endswith("HR") or not lr_folder.is_dir():
        return [PairPaths(path, None) for path in images]
    matched = match(images, lr_folder, argument, scale)
    return [PairPaths(path, matched[path]) for path in images]


def dataset_name(root: str | Path) -> str:
    """What a folder of images is called in tables: its own name, or its parent's where that is only ``HR``."""
    folder = Path(root).resolve()
    return folder.parent.name if folder.name == "HR" else folder.name


def by_name(roots: Sequence[Root], argument: str) -> dict[str, Root]:
    """Folders by their names in tables; raises InputError where two have the same."""

    def clash(first: Root, _: Root) -> str:
        return f"{argument} {first}: another folder is called {dataset_name(first)!r}, too"

    return by_key(roots, dataset_name, clash)


def load_pair(paths: PairPaths, scale: int, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """(3, h, w) and (3, scale h, scale w), uint8; rows and columns of HR that no LR pixel stands for are cut off.

    With ``shrink`` below 1 a copy of HR of so many times its sides, whose LR image is always made.
    """
    hr = read_uint8(paths.hr)
    if shrink < 1:
        sides = [max(1, int(side * shrink)) for side in hr.shape[1:]]
        hr = to_uint8(F.interpolate(hr[None].double(), size=sides, mode="bicubic", antialias=True)[0])
    hr = crop_to_multiple(hr, scale)
    size = hr.shape[1] // scale, hr.shape[2] // scale
    if 0 in size:
        raise InputError(f"{paths.hr}: smaller than one LR pixel at scale {scale}")
    if paths.lr is None or shrink < 1:
        return bicubic(hr, scale, down=True), hr
    lr = read_uint8(paths.lr)
    if lr.shape[1:] != size:
        raise InputError(
            f"{paths.lr}: {lr.shape[2]} x {lr.shape[1]}, but {size[1]} x {size[0]} belongs to {paths.hr}"
            f" at scale {scale}"
        )
    return lr, hr


@dataclass
class Pair:
    """An image pair in memory, or mapped from the cache."""

    path: Path
    lr: Tensor  # (3, h, w) uint8
    hr: Tensor  # (3, scale h, scale w) uint8
    shrink: float = 1.0  # of the file's own size


def load_pairs(
    roots: Sequence[str | Path],
    scale: int,
    *,
    argument: str = "--data",
    least: int = 1,
    bad_files: str = "refuse",
    cache: str | Path | None = None,
    shrink: Sequence[float] = (),
    report: Callable[[str], None] = print,
) -> list[Pair]:
    """Decodes every image of the folders once, and makes the LR images that are not there.

    Args:
        roots: the folders, see :func:`find_pairs`.
        least: smallest side of an LR image.
        bad_files: "refuse" raises for a file that is broken or too small, "skip" reports its name and goes on.
        cache: a folder for the decoded images, which are then mapped and shared between processes and runs instead of
            being held in memory.
        shrink: fractions of its size of which each image is loaded as a copy, too.
        report: called with a line about each file skipped.
    """
    if bad_files not in ("refuse", "skip"):
        raise InputError(f"--bad-files: expected refuse or skip, got {bad_files!r}")

    def load(wanted: tuple[PairPaths, float]) -> Pair | InputError:
        paths, size = wanted
        try:
            lr, hr = load_pair(paths, scale, size) if cache is None else _cached_pair(paths, scale, size, Path(cache))
            if min(lr.shape[1:]) < least:
                width, height = hr.shape[2], hr.shape[1]
                name = _name(paths.hr, size)
                raise InputError(f"{name}: {width} x {height} is too small, {least * scale} a side are needed")
            return Pair(paths.hr, lr, hr, size)
        except InputError as error:
            if bad_files == "refuse":
                raise
            return error

    sizes = 1.0, *shrink
    everything = [(paths, size) for root in roots for paths in find_pairs(root, scale, argument) for size in sizes]
    loaded = _side_by_side(load, everything)
    for problem in loaded:
        if isinstance(problem, InputError):
            report(f"skipped {problem}")
    pairs = [pair for pair in loaded if isinstance(pair, Pair)]
    if not pairs:
        raise InputError(f"{argument} {' '.join(map(str, roots))}: no usable image is left")
    return pairs


def collages_of(pairs: Sequence[Pair], scale: int, count: int, seed: int, least: int = 1) -> list[Pair]:
    """So many collages of pieces of the pairs, see :mod:`san_model.collage`; ``least`` as for :func:`load_pairs`."""
    images = [pair.hr for pair in pairs]

    def make(number: int) -> Pair:
        hr = crop_to_multiple(collage(images, seed, number, max(SIDE, least * scale)), scale)
        return Pair(Path(f"collage {number}"), bicubic(hr, scale, down=True), hr)

    return _side_by_side(make, range(count))


def _side_by_side(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        return list(pool.map(function, items))


def _name(path: Path, shrink: float) -> str:
    """Of an image, or of a smaller copy."""
    return f"{path} at {shrink:g} of its size" if shrink < 1 else str(path)


def _cached_pair(paths: PairPaths, scale: int, shrink: float, cache: Path) -> tuple[Tensor, Tensor]:
    sources = [path for path in paths if path is not None]
    try:
        state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    except (OSError, RuntimeError) as error:  # this one of links in a circle
        raise InputError(f"{paths.hr}: cannot be read ({error})") from error
    key = hashlib.sha256(repr((state, scale, shrink)).encode()).hexdigest()[:16]
    files = [cache / f"{paths.hr.stem}-{key}-{part}.npy" for part in ("lr", "hr")]
    with suppress(Exception):  # of many types: the files are not there yet, or damaged
        return _mapped_pair(files, scale)
    for file, image in zip(files, load_pair(paths, scale, shrink), strict=True):
        with replacing(file) as unfinished:
            np.save(unfinished, image.numpy())
    return _mapped_pair(files, scale)


def _mapped_pair(files: Sequence[Path], scale: int) -> tuple[Tensor, Tensor]:
    # "c": torch wants to be allowed to write
    lr, hr = (torch.from_numpy(np.load(file, mmap_mode="c")) for file in files)
    channels, height, width = lr.shape
    if {lr.dtype, hr.dtype} != {torch.uint8} or hr.shape != (channels, scale * height, scale * width):
        raise ValueError(f"{files[0]}, {files[1]}: no pair at scale {scale}")
    return lr, hr


class Place(NamedTuple):
    """Where a patch is cut from the LR image, and how it is turned."""

    image: int
    top: int
    left: int
    transpose: bool
    flip_rows: bool
    flip_columns: bool


class Patches(Dataset[tuple[Tensor, Tensor, int]]):
    """Patch i of the stream: (lr (3, patch, patch), hr (3, scale patch, scale patch), i), both images uint8.

    Each image is drawn once before any is drawn a second time.

    Args:
        pairs: images with LR sides of at least ``patch``.
        patch: side of the LR patch.
        seed: of the stream.
        augment: flips and rotations, the eight symmetries of the square.
    """

    def __init__(self, pairs: list[Pair], scale: int, patch: int, seed: int, augment: bool = True) -> None:
        self.pairs, self.scale, self.patch, self.seed, self.augment = pairs, scale, patch, seed, augment
        self._order = lru_cache(maxsize=2)(self._order_of)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(self._order_of)

    def _order_of(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.pairs))

    def place(self, index: int) -> Place:
        epoch, position = divmod(index, len(self.pairs))
        image = int(self._order(epoch)[position])
        random = np.random.default_rng([self.seed, 1, index])
        top, left = (int(random.integers(side - self.patch + 1)) for side in self.pairs[image].lr.shape[1:])
        turns = random.integers(2, size=3) if self.augment else (0, 0, 0)
        return Place(image, top, left, *(bool(turn) for turn in turns))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        place = self.place(index)
        pair = self.pairs[place.image]
        return self._cut(pair.lr, place, 1), self._cut(pair.hr, place, self.scale), index

    def _cut(self, image: Tensor, place: Place, factor: int) -> Tensor:
        top, left, side = place.top * factor, place.left * factor, self.patch * factor
        cut = image[:, top : top + side, left : left + side]
        flipped = [dim for dim, flip in ((1, place.flip_rows), (2, place.flip_columns)) if flip]
        cut = cut.flip(flipped)  # a copy, also with nothing to flip
        return cut.transpose(1, 2).contiguous() if place.transpose else cut

    def describe(self, index: int) -> str:
        """The file and the crop, for messages."""
        place = self.place(index)
        turned = [word for word in ("transpose", "flip_rows", "flip_columns") if getattr(place, word)]
        where = (
            f"LR rows {place.top}..{place.top + self.patch - 1}, columns {place.left}..{place.left + self.patch - 1}"
        )
        pair = self.pairs[place.image]
        return f"{_name(pair.path, pair.shrink)}: {where}" + (f" ({', '.join(turned)})" if turned else "")


class Batches(Sampler[list[int]]):
    """The indices of batches start, start + 1, ..., stop - 1: of each, the share of one rank."""

    def __init__(self, start: int, stop: int, batch: int, rank: int = 0, world: int = 1) -> None:
        if batch % world:
            raise InputError(f"--batch {batch}: not divisible by the {world} processes that share it")
        self.start, self.stop, self.batch, self.rank, self.share = start, stop, batch, rank, batch // world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.start, self.stop):
            first = number * self.batch + self.rank * self.share
            yield list(range(first, first + self.share))
