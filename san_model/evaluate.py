"""Measuring a network, bicubic interpolation or anybody's output images against a data set."""

import csv
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import SAN
from .checkpoint import replacing
from .data import PairPaths, dataset_name, load_pair
from .images import (
    InputError,
    Picture,
    bicubic,
    by_key,
    check_kept,
    crop_to_multiple,
    list_images,
    match,
    read,
    read_uint8,
    to_uint8,
    write,
)
from .metrics import Score, luma, mean, score, score_planes
from .upscale import check_finite, check_tile, load_model, progress_bar, super_resolve


@dataclass
class EvaluateOptions:
    """Measures PSNR and SSIM on luma, per image and in the mean, as they are published.

    What is measured is a network (--model), bicubic interpolation (--bicubic) or a folder with the output images of any
    method (--sr): exactly one of them. A file belongs to the HR image whose stem its name begins with. Borders of
    ``scale`` pixels are left out.

    Args:
        hr: folder of the HR images
        scale: factor between LR and HR
        model: weights of a network, .safetensors, .pt or .pth
        bicubic: measure MATLAB's bicubic interpolation
        sr: folder of output images to measure
        lr: folder of the LR images; by default they are made from HR as MATLAB makes them
        json: file to write the results to, {title: {image: [psnr, ssim], ..., "mean": [psnr, ssim]}}
        csv: file to write the results to, a line per image
        name: what to call the method in the results
        save: folder to write the output images to
        protocol: rgb enlarges the 8-bit colours and then takes luma; y-plane (for --bicubic) shrinks and enlarges the
            rounded luma alone and rounds once at the end, which is what papers print for bicubic; a grey image is a
            colour image of three equal channels for rgb, and itself the plane for y-plane
        tile: side in input pixels of the tiles the image is cut into, 0 for none (which is what papers measure)
        overlap: input pixels over which neighbouring tiles are blended
        self_ensemble: mean of the network's results for the eight flips and rotations
        device: cpu, cuda, cuda:1, ...; auto is cuda where there is one
    """

    hr: Path
    scale: Literal[2, 3, 4, 8]
    model: Path | None = None
    bicubic: bool = False
    sr: Path | None = None
    lr: Path | None = None
    json: Path | None = None
    csv: Path | None = None
    name: str | None = None
    save: Path | None = None
    protocol: Literal["rgb", "y-plane"] = "rgb"
    tile: int = 0
    overlap: int = 16
    self_ensemble: bool = False
    device: str = "auto"


class Target(NamedTuple):
    """An image of a data set: the HR file, and its LR file where there is one."""

    paths: PairPaths
    scale: int

    def images(self) -> tuple[Tensor, Tensor]:
        """LR and HR, see :func:`san_model.data.load_pair`."""
        return _load_pair(self.paths, self.scale)


_load_pair = lru_cache(maxsize=4)(load_pair)  # several methods ask for the same images in a row


# What a method makes of a target: (3, scale h, scale w) uint8.
Method = Callable[[Target], Tensor]


def targets(hr: Path, scale: int, lr: Path | None = None) -> list[Target]:
    """The images of a folder, which are told apart by their stems."""
    paths = list_images(hr, "--hr")
    by_key(paths, lambda path: path.stem, lambda a, b: f"--hr {hr}: {a.name} and {b.name} are both called {a.stem!r}")
    lr_files = match(paths, lr, "--lr", scale) if lr else {}
    return [Target(PairPaths(path, lr_files.get(path)), scale) for path in paths]


def bicubic_method(target: Target) -> Tensor:
    """MATLAB's bicubic interpolation."""
    return bicubic(target.images()[0], target.scale)


def folder_method(folder: Path, dataset: list[Target], argument: str = "--sr") -> Method:
    """Output images of any method, as files."""
    files = match([target.paths.hr for target in dataset], folder, argument, dataset[0].scale)

    def method(target: Target) -> Tensor:
        hr, image = target.images()[1], read_uint8(files[target.paths.hr])
        # Some programs enlarge to the whole HR image where its sides are not divisible by the factor.
        cropped = crop_to_multiple(image, target.scale)
        if cropped.shape != hr.shape:
            raise InputError(
                f"{files[target.paths.hr]}: {image.shape[2]} x {image.shape[1]}, but {hr.shape[2]} x {hr.shape[1]}"
                f" belongs to {target.paths.hr} at scale {target.scale}"
            )
        return cropped

    return method


def model_method(model: SAN, tile: int = 0, overlap: int = 16, self_ensemble: bool = False) -> Method:
    """A network."""

    def method(target: Target) -> Tensor:
        image = super_resolve(model, target.images()[0].float(), tile, overlap, self_ensemble)
        return to_uint8(check_finite(image, target.paths.hr))

    return method


def measure(method: Method, target: Target, save: Path | None = None) -> Score:
    """PSNR and SSIM of what a method makes of one target; the image is written to the folder ``save``."""
    image = method(target)
    if save is not None:
        write(_saved(save, target), Picture(image.float()))
    return named(target, lambda: score(image, target.images()[1], target.scale))


def _saved(folder: Path, target: Target) -> Path:
    return folder / f"{target.paths.hr.stem}_x{target.scale}.png"


def bicubic_luma(target: Target) -> Score:
    """Of bicubic interpolation of the rounded luma plane alone, rounded once at the end (grey images are the plane)."""
    picture = read(target.paths.hr)
    plane = picture.colour[:1] if picture.grey else torch.from_numpy(luma(to_uint8(picture.colour)))[None]
    plane = crop_to_multiple(to_uint8(plane), target.scale)
    small = bicubic(plane.double(), target.scale, down=True, peak=None)
    enlarged = to_uint8(bicubic(small, target.scale, peak=None))
    return named(target, lambda: score_planes(enlarged[0].numpy(), plane[0].numpy(), target.scale))


def named(target: Target, compute: Callable[[], Score]) -> Score:
    """The score; where the image cannot be scored, an error with its name."""
    try:
        return compute()
    except ValueError as error:
        raise InputError(f"{target.paths.hr}: {error}") from error


def evaluate(options: EvaluateOptions) -> dict[str, Score]:
    """Runs the command; returns the score per image, and last the one called ``mean``."""
    check_tile(options.tile, options.overlap)
    given = [flag for flag in ("model", "bicubic", "sr") if getattr(options, flag)]
    if len(given) != 1:
        raise InputError(
            f"--model, --bicubic, --sr: exactly one is needed, got {' and '.join('--' + g for g in given) or 'none'}"
        )
    if options.protocol == "y-plane" and (not options.bicubic or options.lr or options.save):
        raise InputError("--protocol y-plane: only with --bicubic, and without --lr and --save")
    dataset = targets(options.hr, options.scale, options.lr)
    if any(target.paths.hr.stem == "mean" for target in dataset):
        raise InputError(f"--hr {options.hr}: an image called 'mean' would be taken for the mean of all")
    if options.save:
        read_from = {"--hr": options.hr, "--lr": options.lr, "--sr": options.sr}
        inputs = [file for argument, folder in read_from.items() if folder for file in list_images(folder, argument)]
        check_kept("--save", [_saved(options.save, target) for target in dataset], inputs)
    if options.model:
        model = load_model(options.model, options.device, options.scale)
        method = model_method(model, options.tile, options.overlap, options.self_ensemble)
    else:
        method = folder_method(options.sr, dataset) if options.sr else bicubic_method
    name = options.name or (
        options.model.stem if options.model else options.sr.resolve().name if options.sr else "bicubic"
    )
    one_saved = options.save and _saved(options.save, dataset[0])
    check_writable({"--json": options.json, "--csv": options.csv, "--save": one_saved})
    scores = {}
    with progress_bar() as progress:
        for target in progress.track(dataset, description=name):
            stem = target.paths.hr.stem
            luma_only = options.protocol == "y-plane"
            scores[stem] = bicubic_luma(target) if luma_only else measure(method, target, options.save)
    scores["mean"] = mean(list(scores.values()))
    title = f"{name} x{options.scale} {dataset_name(options.hr)}"
    if options.json:
        write_text(options.json, json.dumps({title: jsonable(scores)}, indent=1) + "\n")
    if options.csv:
        rows = [[name, dataset_name(options.hr), options.scale, image, *value] for image, value in scores.items()]
        write_csv(options.csv, ["method", "dataset", "scale", "image", "psnr", "ssim"], rows)
    # Last, for whoever reads this may have gone.
    print_scores(f"{title} ({options.protocol})" if options.bicubic else title, scores)
    return scores


def jsonable(scores: dict[str, Score]) -> dict[str, list[float | None]]:
    """JSON knows no infinity: the PSNR of equal images becomes null."""
    return {key: [round(v, 6) if math.isfinite(v) else None for v in value] for key, value in scores.items()}


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([header, *([f"{c:.6f}" if isinstance(c, float) else c for c in r] for r in rows)])
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    with writing(path) as file:
        file.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")  # names of files as they are


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file to write in place of ``path``, which stays as it is until that is whole; ``/dev/stdout`` itself."""
    if _is_stream(path):
        yield path
    else:
        with replacing(Path(os.path.realpath(path))) as unfinished:  # a link stays one
            yield unfinished


def _is_stream(path: Path) -> bool:
    return path.is_fifo() or path.is_char_device()


def check_writable(outputs: dict[str, Path | None]) -> None:
    """Raises InputError where :func:`writing` an argument's file would fail: now, not after hours of work."""
    for argument, path in outputs.items():
        if path is None or _is_stream(path):
            continue
        if path.is_dir():
            raise InputError(f"{argument} {path}: a folder, expected a file")
        try:
            folder = Path(os.path.realpath(path)).parent
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise InputError(f"{argument} {path}: cannot be written ({error})") from error


def print_scores(title: str, scores: dict[str, Score]) -> None:
    table = Table("image", title=title)
    for heading in ("PSNR-Y [dB]", "SSIM-Y"):
        table.add_column(heading, justify="right")
    for image, value in scores.items():
        if image == "mean":
            table.add_section()
        table.add_row(image, f"{value.psnr:.3f}", f"{value.ssim:.4f}")
    show(table)


def show(table: Table) -> None:
    """Prints it, within the terminal or, where the output is a file or another program, as wide as it is."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names in letters that its encoding lacks
    output = Console(markup=False)
    if not output.is_terminal and "COLUMNS" not in os.environ:
        output.width = 10_000
    output.print(table)
