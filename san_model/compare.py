"""Methods side by side: a figure of one image, and a table of data sets."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .data import by_name, dataset_name
from .evaluate import (
    Method,
    Target,
    bicubic_method,
    check_writable,
    folder_method,
    jsonable,
    measure,
    model_method,
    named,
    show,
    targets,
    write_csv,
    write_text,
    writing,
)
from .images import InputError, by_key, list_images
from .metrics import Score, luma, mean, score
from .upscale import check_tile, console, load_model, progress_bar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WEIGHTS = (".safetensors", ".pt", ".pth")
FIGURES = (".png", ".pdf", ".svg")
TABLES = (".md", ".csv", ".json")
Datasets = dict[str, tuple[Path, list[Target]]]  # the HR folder and its images, by name
Marked = TypeVar("Marked")  # a text made to stand out
Found = Method | Score | None  # what a method has for a data set: a way to its images, or only its numbers, or nothing
Source = Callable[[Path, list[Target]], Found]


@dataclass
class CompareOptions:
    """Shows methods side by side: a crop of one image (--figure), and PSNR-Y / SSIM-Y on whole data sets (--table).

    A method is given as NAME=SOURCE. SOURCE is the word bicubic, the word light for the package's own weights, the
    weights of a network (.safetensors, .pt, .pth), a folder of output images, or a .json file with its numbers:
    {"Set5": [psnr, ssim], ...} as an article prints them, or what evaluate --json wrote. In a folder's path {dataset}
    and {scale} stand for the data set's name and the scale. A method that lacks a data set gets a dash there. The best
    are highlighted.

    Args:
        hr: folders of HR images, one per data set
        methods: the methods, NAME=SOURCE (or bicubic, light alone) in the order in which they are to be shown
        scale: factor between LR and HR
        figure: file for the figure, .png, .pdf or .svg
        image: stem of the image in the figure, by default the first
        crop: left, top, width and height of the crop in HR pixels, by default the quarter with the most detail
        columns: crops in a row of the figure
        table: file for the table, .md, .csv or .json
        tile: side in input pixels of the tiles that networks cut an image into, 0 for none
        overlap: input pixels over which neighbouring tiles are blended
        self_ensemble: mean of a network's results for the eight flips and rotations
        device: cpu, cuda, cuda:1, ...; auto is cuda where there is one
    """

    hr: list[Path]
    methods: list[str]
    scale: Literal[2, 3, 4, 8]
    figure: Path | None = None
    image: str | None = None
    crop: list[int] = field(default_factory=list)
    columns: int = 4
    table: Path | None = None
    tile: int = 0
    overlap: int = 16
    self_ensemble: bool = False
    device: str = "auto"


def compare(options: CompareOptions) -> dict[str, dict[str, Score]]:
    """Runs the command; returns the mean scores, {method: {data set: score}}, where no figure alone is asked for."""
    check_tile(options.tile, options.overlap)
    for name, suffixes in (("figure", FIGURES), ("table", TABLES)):
        path = getattr(options, name)
        if path is not None and path.suffix not in suffixes:
            raise InputError(f"--{name} {path}: the suffix has to be one of {', '.join(suffixes)}")
    if options.columns < 1:
        raise InputError(f"--columns {options.columns}: expected 1 or more")
    methods = by_key(
        options.methods,
        lambda method: method.partition("=")[0],
        lambda _, method: f"--methods {method}: another method is called {method.partition('=')[0]!r}, too",
    )
    sources = {name: _source(method, options) for name, method in methods.items()}
    datasets = {name: (hr, targets(hr, options.scale)) for name, hr in by_name(options.hr, "--hr").items()}
    if options.figure and not options.table:
        shown, _ = _chosen(options.image, datasets)
        datasets = {shown: datasets[shown]}
    # Whatever can be refused without measuring is refused before anything is measured.
    found = {name: {key: source(*datasets[key]) for key in datasets} for name, source in sources.items()}
    check_writable({"--figure": options.figure, "--table": options.table})
    if options.figure:
        _figure(options.figure, options, found, datasets)
    results: dict[str, dict[str, Score]] = {}
    if options.table or not options.figure:
        for name, by_dataset in found.items():
            means = {key: _mean(f"{name} {key}", what, datasets[key][1]) for key, what in by_dataset.items()}
            results[name] = {key: value for key, value in means.items() if value is not None}
        _table(options, list(datasets), results)
    return results


def _source(method: str, options: CompareOptions) -> Source:
    """Of NAME=SOURCE."""
    _, equals, place = method.partition("=")
    if not equals:
        place = method
    path = Path(place.replace("{scale}", str(options.scale)))
    if place == "bicubic":
        return lambda hr, dataset: bicubic_method
    if place == "light" or path.suffix in WEIGHTS:
        model = load_model(None if place == "light" else path, options.device, options.scale)
        network = model_method(model, options.tile, options.overlap, options.self_ensemble)
        return lambda hr, dataset: network
    if path.suffix == ".json":
        return lambda hr, dataset: _numbers(path, dataset_name(hr), options.scale)
    if not equals:
        raise InputError(f"--methods {method}: expected NAME=SOURCE, bicubic or light")
    return lambda hr, dataset: _folder(path, method, hr, dataset)


def _folder(path: Path, method: str, hr: Path, dataset: list[Target]) -> Method | None:
    folder = Path(str(path).replace("{dataset}", dataset_name(hr)))
    if folder != path and not folder.is_dir():
        return None
    argument = f"--methods {method}:"
    files = list_images(folder, argument)
    if not any(file.stem.startswith(target.paths.hr.stem) for file in files for target in dataset):
        return None  # the images of another data set
    return folder_method(folder, dataset, argument)


def _numbers(path: Path, dataset: str, scale: int) -> Score | None:
    """The numbers of a data set in a file, under its name or a title of evaluate's, NAME x2 DATASET (PROTOCOL)."""
    title = re.compile(rf"(.* x{scale} )?{re.escape(dataset)}( \((rgb|y-plane)\))?", re.DOTALL)
    try:
        content = json.loads(path.read_bytes())
        for key, value in content.items():
            if title.fullmatch(key):
                psnr, ssim = value["mean"] if isinstance(value, dict) else value
                return Score(_number(psnr), _number(ssim))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        expected = 'expected {"data set": [psnr, ssim], ...}'
        raise InputError(f"--methods {path}: cannot be read as numbers ({error}); {expected}") from error
    return None


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def _mean(title: str, found: Found, dataset: list[Target]) -> Score | None:
    if found is None or isinstance(found, Score):
        return found
    with progress_bar() as progress:
        return mean([measure(found, target) for target in progress.track(dataset, description=title)])


# --- the table


def _best(scores: list[Score | None]) -> Score:
    """The highest PSNR and the highest SSIM, as printed."""
    known = [_rounded(value) for value in scores if value is not None]
    columns = zip(*known, strict=True) if known else ((), ())
    return Score(*(max((v for v in column if not math.isnan(v)), default=math.nan) for column in columns))


def _rounded(value: Score) -> Score:
    return Score(round(value.psnr, 2), round(value.ssim, 4))


def _cells(value: Score | None, best: Score, bold: Callable[[str], Marked]) -> list[str | Marked]:
    """PSNR and SSIM as text; ``bold`` marks the best."""
    if value is None:
        return ["-", "-"]
    cells: list[str | Marked] = []
    for number, top, text in zip(_rounded(value), best, (f"{value.psnr:.2f}", f"{value.ssim:.4f}"), strict=True):
        cells.append("-" if math.isnan(number) else bold(text) if number == top else text)
    return cells


def _table(options: CompareOptions, datasets: list[str], results: dict[str, dict[str, Score]]) -> None:
    best = {name: _best([scores.get(name) for scores in results.values()]) for name in datasets}
    header = ["method", *(f"{name} {metric}" for name in datasets for metric in ("PSNR", "SSIM"))]

    def rows(bold: Callable[[str], Marked]) -> list[list[str | Marked]]:
        return [
            [method, *(cell for name in datasets for cell in _cells(scores.get(name), best[name], bold))]
            for method, scores in results.items()
        ]

    if options.table is not None:
        if options.table.suffix == ".csv":
            write_csv(options.table, header, rows(str))
        elif options.table.suffix == ".json":
            content = {method: jsonable(scores) for method, scores in results.items()}
            write_text(options.table, json.dumps(content, indent=1) + "\n")
        else:
            rule = ["---", *["---:"] * (len(header) - 1)]
            cells = [[cell.replace("|", r"\|") for cell in row] for row in (header, rule, *rows("**{}**".format))]
            write_text(options.table, "".join("| " + " | ".join(row) + " |\n" for row in cells))
    table = Table(*header, title=f"x{options.scale}, PSNR-Y [dB] and SSIM-Y")
    for row in rows(lambda text: Text(text, "bold")):
        table.add_row(*row)
    show(table)


# --- the figure


def _figure(file: Path, options: CompareOptions, found: dict[str, dict[str, Found]], datasets: Datasets) -> None:
    """HR with the crop marked, then the crop of HR and of each method, PSNR and SSIM of the whole image below."""
    from matplotlib.figure import Figure  # here: it takes a second to import
    from matplotlib.patches import Rectangle

    shown, target = _chosen(options.image, datasets)
    _, hr = target.images()
    left, top, width, height = _crop(options.crop, hr, target)
    images: dict[str, Tensor] = {}
    for name, by_dataset in found.items():
        method = by_dataset[shown]
        if callable(method):
            images[name] = method(target)
        else:
            console.print(f"--figure: without {name}, which has no images of {shown}")
    scores = {name: named(target, partial(score, image, hr, options.scale)) for name, image in images.items()}
    best = _best(list(scores.values()))

    crops = {"HR": hr} | images
    columns = min(options.columns, len(crops))
    rows = math.ceil(len(crops) / columns)
    cell = 2.0  # inches
    whole = cell * rows * 1.25 * hr.shape[2] / hr.shape[1]  # as high as all rows of crops together
    size = (whole + columns * cell * max(1, width / height), rows * cell * 1.3 + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(rows, columns + 1, width_ratios=[whole, *[cell * max(1, width / height)] * columns])
    overview = figure.add_subplot(grid[:, 0])
    overview.imshow(_pixels(hr))
    overview.add_patch(
        Rectangle((left - 0.5, top - 0.5), width, height, edgecolor="red", facecolor="none", linewidth=1.5)
    )
    overview.set_xlabel(f"{target.paths.hr.stem} ({shown}, x{options.scale})")
    for number, (name, image) in enumerate(crops.items()):
        axes = figure.add_subplot(grid[number // columns, number % columns + 1])
        axes.imshow(_pixels(image[:, top : top + height, left : left + width]), interpolation="nearest")
        _label(axes, name, scores.get(name), best)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[], anchor="N")
        label = axes.xaxis.label  # names: a $ is a $, and bytes that are no UTF-8 have no glyph
        label.set(parse_math=False, text=label.get_text().encode(errors="backslashreplace").decode())
    with writing(file) as unfinished:
        figure.savefig(unfinished, dpi=200, bbox_inches="tight")
    console.print(f"figure: {file}")


def _label(axes: "Axes", name: str, value: Score | None, best: Score) -> None:
    """The method's name, PSNR / SSIM; each number that is the best of all in bold red."""
    if value is None:
        axes.set_xlabel(f"{name}\nPSNR / SSIM")
        return
    axes.set_xlabel(f"{name}\n ")  # room for the second line
    texts = f"{value.psnr:.2f} ", f" {value.ssim:.4f}"
    for text, number, top, side in zip(texts, _rounded(value), best, ("right", "left"), strict=True):
        style: dict[str, Any] = {"color": "red", "weight": "bold"} if number == top else {}
        axes.annotate(text, (0.5, 0), (0, -17), "axes fraction", "offset points", ha=side, va="top", **style)
    axes.annotate("/", (0.5, 0), (0, -17), "axes fraction", "offset points", ha="center", va="top")


def _pixels(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def _chosen(stem: str | None, datasets: Datasets) -> tuple[str, Target]:
    """The data set's name and the target of the image with this stem."""
    for name, (_, dataset) in datasets.items():
        for target in dataset:
            if stem in (None, target.paths.hr.stem):
                return name, target
    raise InputError(f"--image {stem}: not in {', '.join(str(hr) for hr, _ in datasets.values())}")


def _crop(crop: list[int], hr: Tensor, target: Target) -> tuple[int, int, int, int]:
    """Left, top, width, height, within the image."""
    rows, columns = hr.shape[1:]
    if not crop:
        side = max(min(rows, columns) // 4, 1)
        plane, half = luma(hr), max(side // 2, 1)
        places = [(left, top) for top in range(0, rows - side + 1, half) for left in range(0, columns - side + 1, half)]
        left, top = max(places, key=lambda place: plane[place[1] : place[1] + side, place[0] : place[0] + side].var())
        return left, top, side, side
    given = f"--crop {' '.join(map(str, crop))}"
    if len(crop) != 4:
        raise InputError(f"{given}: expected left, top, width and height")
    left, top, width, height = crop
    if min(left, top) < 0 or min(width, height) < 1 or left + width > columns or top + height > rows:
        raise InputError(f"{given}: not within {target.paths.hr}, {columns} x {rows}")
    return left, top, width, height
