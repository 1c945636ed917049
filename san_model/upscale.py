"""Super-resolution of images of any size by a network, and the command that does it to files."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from . import SAN
from .images import (
    InputError,
    Picture,
    bicubic,
    by_key,
    check_kept,
    check_target,
    lacks_memory,
    list_images,
    read,
    write,
)

DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "san_light_x2.safetensors"
console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


@dataclass
class UpscaleOptions:
    """Enlarges an image file, or every image of a folder, with a network.

    The network sees the whole image at once, for its attention and covariance look at all of it. Greyscale, 16 bits
    (of PNG and grey TIFF, in PNG), transparency (enlarged bicubically), colour profile, resolution, EXIF block (with
    the new size), comment and texts of a PNG are kept, and no other metadata; bits that are lost are named.

    Args:
        input: image file, or folder of images
        output: file or folder to write; by default NAME_x2.png beside the file, FOLDER_x2 beside the folder
        model: weights, .safetensors, .pt or .pth; by default those of this package
        tile: side in input pixels of the tiles that an image is cut into when memory is short, 0 for the whole image;
            attention and covariance then see a tile in place of the image, so the result is not the whole-image one
        overlap: input pixels over which neighbouring tiles are blended
        self_ensemble: mean of the results for the eight flips and rotations, in eight times the time
        bad_files: refuse stops at a file that cannot be read, skip names it and goes on
        device: cpu, cuda, cuda:1, ...; auto is cuda where there is one
    """

    input: Path
    output: Path | None = None
    model: Path | None = None
    tile: int = 0
    overlap: int = 16
    self_ensemble: bool = False
    bad_files: Literal["refuse", "skip"] = "refuse"
    device: str = "auto"


def upscale(options: UpscaleOptions) -> list[Path]:
    """Runs the command; returns the files written."""
    check_tile(options.tile, options.overlap)
    if not options.input.exists():
        raise InputError(f"input {options.input}: no such file or folder")
    model = load_model(options.model, options.device)
    if options.model is None:
        console.print(f"weights: {DEFAULT_WEIGHTS.name} of the package, x{model.config['scale']} (--model for others)")
    if options.tile:
        console.print(
            f"--tile {options.tile}: attention and covariance are those of each tile, not those of the whole image"
        )
    jobs = _jobs(options.input, options.output, model.config["scale"])
    written = []
    with progress_bar() as progress:

        def advance(task: TaskID, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        for source, target in jobs:
            task = progress.add_task(source.name, total=None)
            try:
                picture = _upscale_file(source, target, model, options, partial(advance, task))
            except InputError as error:
                if options.bad_files == "refuse":
                    raise
                progress.remove_task(task)
                console.print(f"skipped {error}")
                continue
            written.append(target)
            console.print(f"{source} -> {target}")
            for lost in picture.lost:
                console.print(f"{target} lacks {lost}")
    return written


def _upscale_file(
    source: Path, target: Path, model: SAN, options: UpscaleOptions, step: Callable[[int, int], None]
) -> Picture:
    """What was written."""
    picture = read(source)
    check_target(target, picture.alpha is not None)
    try:
        enlarged = enlarge(picture, model, options, step)
    except (MemoryError, RuntimeError) as error:
        if lacks_memory(error):
            raise InputError(f"{source}: memory does not suffice for the whole image, try --tile 256") from error
        raise
    check_finite(enlarged.colour, source)
    if picture.bits == 16 and target.suffix.lower() != ".png":
        enlarged.lost.append("all but 8 bits of each number: with 16 only .png is written")
    write(target, enlarged)
    return enlarged


def _jobs(source: Path, output: Path | None, scale: int) -> list[tuple[Path, Path]]:
    """What is read and what is written for it."""
    if source.is_dir():
        folder = output or source.resolve().parent / f"{source.resolve().name}_x{scale}"
        if folder.is_file():
            raise InputError(f"--output {folder}: a file, but the input is a folder")
        files = list_images(source, "input")
        stems = [file.stem for file in files]  # of a.png and a.jpg, neither may overwrite the other's result
        names = [file.stem if stems.count(file.stem) == 1 else file.name.replace(".", "_") for file in files]
        jobs = [(file, folder / f"{name}_x{scale}.png") for file, name in zip(files, names, strict=True)]
    elif output is None or output.is_dir() or not output.suffix:
        jobs = [(source, (output or source.parent) / f"{source.stem}_x{scale}.png")]
    else:
        jobs = [(source, output)]
    by_key(
        jobs, lambda job: job[1], lambda a, b: f"input {source}: {a[0].name} and {b[0].name} would both become {a[1]}"
    )
    for _, target in jobs:
        check_target(target)  # now, not after minutes of work
    check_kept("--output", [target for _, target in jobs], [file for file, _ in jobs])
    return jobs


def enlarge(
    picture: Picture, model: SAN, options: UpscaleOptions, step: Callable[[int, int], None] = lambda done, total: None
) -> Picture:
    """The picture enlarged, with everything that belongs to it."""
    colour = super_resolve(model, picture.colour, options.tile, options.overlap, options.self_ensemble, step)
    alpha = picture.alpha
    if alpha is not None:
        levels = 257 if picture.bits == 16 else 1
        alpha = bicubic((alpha.double() * levels).round(), model.config["scale"], peak=255 * levels).div(levels).float()
    return replace(picture, colour=colour, alpha=alpha)


@torch.inference_mode()
def super_resolve(
    model: SAN,
    colour: Tensor,
    tile: int = 0,
    overlap: int = 16,
    self_ensemble: bool = False,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """(3, H, W) -> (3, scale H, scale W), float32 on the scale 0..255, on the CPU; NaN for what is not finite.

    ``model`` is in eval mode on its device; ``step(done, total)`` is called after each of its groups. The other
    arguments are those of :class:`UpscaleOptions`.
    """
    scale = model.config["scale"]
    views = [(turns, flip) for flip in (False, True) for turns in range(4)] if self_ensemble else [(0, False)]
    runs = len(views) * math.prod(len(_tiles(side, tile, overlap)) for side in colour.shape[1:])
    mean = torch.zeros(3, colour.shape[1] * scale, colour.shape[2] * scale)
    with _counted(model.RG, runs, step):
        for turns, flip in views:
            seen = torch.rot90(colour.flip(2) if flip else colour, turns, (1, 2))
            back = torch.rot90(_tiled(model, seen, tile, overlap), -turns, (1, 2))
            mean += (back.flip(2) if flip else back) / len(views)
    return mean.masked_fill_(~mean.isfinite(), math.nan).clamp(0, 255)  # clipped, an infinity would look like white


def check_finite(enlarged: Tensor, source: Path) -> Tensor:
    """What :func:`super_resolve` gave for an image; raises InputError with its name where that holds NaN."""
    if enlarged.isnan().any():
        raise InputError(f"{source}: the network yields NaN or infinities for it")
    return enlarged


def _tiled(model: SAN, seen: Tensor, tile: int, overlap: int) -> Tensor:
    """One view of the image, (3, H, W) -> (3, scale H, scale W), not clipped."""
    device, scale = next(model.parameters()).device, model.config["scale"]
    white = model.config["rgb_range"] / 255
    height, width = seen.shape[1:]
    out, weight = torch.zeros(3, height * scale, width * scale), torch.zeros(height * scale, width * scale)
    for rows, columns in product(_tiles(height, tile, overlap), _tiles(width, tile, overlap)):
        result = model(seen[None, :, slice(*rows), slice(*columns)].to(device, torch.float32) * white)[0] / white
        ramps = _ramp(*rows, height, overlap), _ramp(*columns, width, overlap)
        ramp = torch.outer(*(r.repeat_interleave(scale) for r in ramps))
        top, bottom, left, right = (edge * scale for edge in (*rows, *columns))
        out[:, top:bottom, left:right] += ramp * result.float().cpu()
        weight[top:bottom, left:right] += ramp
    return out / weight


@contextmanager
def _counted(groups: nn.ModuleList, runs: int, step: Callable[[int, int], None]) -> Iterator[None]:
    """Calls ``step(done, total)`` after each group, in all ``runs``: of a large image a single one takes minutes."""
    total, done = runs * len(groups), count(1)
    hooks = [group.register_forward_hook(lambda *_: step(next(done), total)) for group in groups]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_tile(tile: int, overlap: int) -> None:
    """Raises InputError for arguments of :func:`super_resolve` that make no sense."""
    if tile < 0:
        raise InputError(f"--tile {tile}: expected 0 for the whole image or a number of pixels")
    if tile and not 0 <= overlap < tile:
        raise InputError(f"--overlap {overlap}: expected 0 or more and less than --tile {tile}")


def _tiles(side: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Intervals of length ``tile`` that cover 0..side; neighbours share ``overlap`` pixels, the last two maybe more."""
    if not tile or side <= tile:
        return [(0, side)]
    return [(start, start + tile) for start in (*range(0, side - tile, tile - overlap), side - tile)]


def _ramp(first: int, last: int, side: int, overlap: int) -> Tensor:
    """Weights of a tile's rows or columns: rising and falling over the overlap, but not at the image's own edge."""
    position = torch.arange(last - first) + 1.0
    ramp = torch.full_like(position, overlap + 1)
    if first > 0:
        ramp = torch.minimum(ramp, position)
    if last < side:
        ramp = torch.minimum(ramp, position.flip(0))
    return ramp / (overlap + 1)


def find_device(name: str) -> torch.device:
    """``auto`` or a device's name; raises InputError where there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA fails by an assertion
        raise InputError(f"--device {name}: not available ({str(error).splitlines()[0]})") from None
    return device


def load_model(path: Path | None, device: str = "auto", scale: int | None = None) -> SAN:
    """The network of a file, or of the package's weights, in eval mode; raises InputError where it cannot be used."""
    if path is None and not DEFAULT_WEIGHTS.exists():
        raise InputError("--model: this installation has no weights of its own, pass the file of a trained network")
    path = path or DEFAULT_WEIGHTS
    try:
        model = SAN.from_checkpoint(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"--model {path}: {error}") from error
    if scale is not None and model.config["scale"] != scale:
        raise InputError(f"--scale {scale}: but {path} is a network for scale {model.config['scale']}")
    return model.to(find_device(device)).eval()


def progress_bar(*columns: str) -> Progress:
    """A bar with elapsed and remaining time on the terminal; ``columns`` are further texts by format."""
    texts = [TextColumn(column, markup=False) for column in ("{task.description}", *columns)]
    return Progress(
        *texts, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
