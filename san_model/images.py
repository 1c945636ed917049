"""Image files as tensors, and MATLAB's bicubic resizing.

A picture's colours are float32 on the scale 0..255 whatever the file holds, so that 8 bits are whole numbers and
16 bits (v / 257) come back exactly. Greyscale is three equal channels; alpha is kept apart from the colours.
"""

import io
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import png
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin, TiffImagePlugin

from .checkpoint import replacing

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
FORMATS = {  # that are read and written, as Pillow names them
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP",
}  # fmt: skip
SUFFIXES = tuple(FORMATS)
PNG_COLOUR_TYPES = {0: "grey", 2: "colour", 4: "grey and alpha", 6: "colour and alpha"}  # those that may have 16 bits
METADATA = ("icc_profile", "exif", "dpi", "comment")  # that is kept, beside a PNG's texts
BITS, PHOTOMETRIC = 258, 262  # of a TIFF
EXIF_SIZES = ((0x0100, 0x0101), (0xA002, 0xA003))  # (width, height): of the image, and in the sub-directory below
EXIF_DIRECTORY = 0x8769


class InputError(ValueError):
    """What the user passed cannot be used; the message names the argument or the file and says why."""


@dataclass
class Picture:
    """An image file in memory."""

    colour: torch.Tensor  # (3, H, W) float32, 0..255
    alpha: torch.Tensor | None = None  # (1, H, W) float32, 0..255
    grey: bool = False  # the file has one colour channel: so will the file that is written
    bits: int = 8
    metadata: dict[str, Any] = field(default_factory=dict)  # as Pillow names it: icc_profile, exif, dpi, comment, text
    lost: list[str] = field(default_factory=list)  # what of the file is not here, in words


def read(path: str | Path) -> Picture:
    """Reads an image file; raises InputError, with its name and the reason, where that fails."""
    path = Path(path)
    try:
        return _decode(path)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (
        Exception
    ) as error:  # decoders raise what they like on a damaged file: OSError, SyntaxError, struct.error, ...
        raise InputError(f"{path}: cannot be read as an image ({_reason(error)})") from error


def _decode(path: Path) -> Picture:
    if path.is_fifo() and path.suffix:  # one among image files; the shell's own, as /dev/stdin, have no suffix
        raise InputError(f"{path}: a pipe, expected an image file")
    with Image.open(path, formats=list(FORMATS.values())) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # a camera's JPEG, with a preview behind the photograph
            raise InputError(f"{path}: {frames} images in one file, expected a single one")
        image.load()
        metadata = {key: image.info[key] for key in METADATA if image.info.get(key)}
        lost = _remove_damaged(metadata)
        metadata["text"] = dict(getattr(image, "text", {}))
        if image.mode == "CMYK":
            metadata.pop("icc_profile", None)  # it describes the inks, not the colours they are turned into
        deep = _read_deep_png(path)
        pixels, bits = (deep, 16) if deep is not None else _pixels(image, path)
        if bits < max(_tiff_tag(image, BITS, (bits,))):
            lost.append("all but 8 bits of each colour: with 16 those of a PNG are read, and grey ones of a TIFF")
    planes = torch.from_numpy(pixels.astype(np.float32) / (257 if bits == 16 else 1)).permute(2, 0, 1).contiguous()
    has_alpha = planes.shape[0] in (2, 4)
    grey = planes.shape[0] <= 2
    return Picture(
        colour=planes[:1].repeat(3, 1, 1) if grey else planes[:3].contiguous(),
        alpha=planes[-1:].contiguous() if has_alpha else None,
        grey=grey,
        bits=bits,
        metadata=metadata,
        lost=lost,
    )


def lacks_memory(error: Exception) -> bool:
    """Whether an error is that of an allocation, by Python, numpy or torch."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _reason(error: Exception) -> str:
    return "memory does not suffice" if lacks_memory(error) else str(error) or type(error).__name__


def _remove_damaged(metadata: dict[str, Any]) -> list[str]:
    """Takes out what could not be written again; returns what that was."""
    removed = []
    for key, is_whole in {
        "exif": lambda block: bool(_exif_with_size(block, 1, 1)),
        "dpi": lambda dpi: all(0 < float(value) < 2**16 for value in dpi),
    }.items():
        try:
            whole = key not in metadata or is_whole(metadata[key])
        except Exception:  # as decoders do
            whole = False
        if not whole:
            del metadata[key]
            removed.append(f"{key}, which is damaged")
    return removed


def _pixels(image: Image.Image, path: Path) -> tuple[np.ndarray, int]:
    """(H, W, channels) with grey, grey and alpha, RGB or RGBA; and the bits per sample."""
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image)[..., None]
        is_white_zero = _tiff_tag(image, PHOTOMETRIC, 1) == 0
        return (65535 - pixels if is_white_zero else pixels), 16
    if image.mode in ("I", "F"):
        raise InputError(f"{path}: 32 bits per sample are not supported, only 8 and 16")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        mode += "A"
    pixels = np.asarray(image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], -1), 8


def _tiff_tag(image: Image.Image, tag: int, default: Any) -> Any:
    return image.tag_v2.get(tag, default) if isinstance(image, TiffImagePlugin.TiffImageFile) else default


def _read_deep_png(path: Path) -> np.ndarray | None:
    """The pixels of a PNG with 16 bits per sample (Pillow would halve them), None for any other file."""
    with path.open("rb") as file:
        header = file.read(26)
    if header[:8] != b"\x89PNG\r\n\x1a\n" or header[24] != 16 or header[25] not in PNG_COLOUR_TYPES:
        return None
    width, height, rows, info = png.Reader(filename=str(path)).read()
    pixels = np.stack([np.asarray(row, dtype=np.uint16) for row in rows]).reshape(height, width, info["planes"])
    if "transparent" not in info:
        return pixels
    opaque = (pixels != np.asarray(info["transparent"])).any(2, keepdims=True)
    return np.concatenate([pixels, opaque * np.uint16(65535)], 2)


def write(path: str | Path, picture: Picture) -> None:
    """Writes a picture in the format that the suffix names; 16 bits only as PNG, alpha not as JPEG or BMP.

    The file has its name once it is whole. Raises InputError where the format does not hold it.
    """
    path = Path(path)
    check_target(path, picture.alpha is not None)
    deep = picture.bits == 16 and path.suffix.lower() == ".png"
    levels, kind = (257, np.uint16) if deep else (1, np.uint8)
    buffer = io.BytesIO()
    try:
        planes = picture.colour.mean(0, keepdim=True) if picture.grey else picture.colour
        if picture.alpha is not None:
            planes = torch.cat([planes, picture.alpha])
        whole = torch.floor(planes.double() * levels + 0.5).clamp(0, 255 * levels)
        pixels = whole.permute(1, 2, 0).numpy().astype(kind)
        if deep:
            _write_deep_png(buffer, pixels, picture.metadata)
        else:
            image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
            options = _save_options(path, picture)
            image.save(buffer, format=FORMATS[path.suffix.lower()], **options)
    except Exception as error:  # an EXIF block that is too long for the format, ...
        raise InputError(f"{path}: cannot be written ({_reason(error)})") from error
    with replacing(path) as unfinished:
        unfinished.write_bytes(buffer.getvalue())


def check_target(path: Path, alpha: bool = False) -> None:
    """Raises InputError where the suffix names no format to write an image in, with transparency if need be."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: unknown suffix {path.suffix!r}, one of {', '.join(SUFFIXES)} is needed")
    if alpha and path.suffix.lower() in (".jpg", ".jpeg", ".bmp"):
        raise InputError(f"{path}: the image has transparency, which {path.suffix} cannot hold; write a .png")


def check_kept(argument: str, targets: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raises InputError where a file to write is one that is read, by whatever link."""
    kept = _identities(inputs)
    for target in targets:
        if _identities([target]) & kept:
            raise InputError(f"{argument} {target}: would overwrite an input")


def _identities(files: Iterable[Path]) -> set[tuple[int, int]]:
    """Of those that exist."""
    found = [file.stat() for file in files if file.exists()]
    return {(status.st_dev, status.st_ino) for status in found}


def _save_options(path: Path, picture: Picture) -> dict[str, Any]:
    height, width = picture.colour.shape[1:]
    options = {key: value for key, value in picture.metadata.items() if key != "text"}
    if "exif" in options:
        options["exif"] = _exif_with_size(options["exif"], width, height)
    if path.suffix.lower() in (".jpg", ".jpeg"):
        options |= {"quality": 95, "subsampling": 0}
    if path.suffix.lower() == ".webp":
        options |= {"lossless": True, "exact": True}
    if path.suffix.lower() == ".png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for key, value in picture.metadata.get("text", {}).items():
            options["pnginfo"].add_text(key, value)
    return options


def _exif_with_size(data: bytes, width: int, height: int) -> bytes:
    """The same EXIF block; where it states the size of the image, the new one."""
    exif = Image.Exif()
    exif.load(data)
    for directory, tags in zip((exif, exif.get_ifd(EXIF_DIRECTORY)), EXIF_SIZES, strict=True):
        for tag, value in zip(tags, (width, height), strict=True):
            if tag in directory:
                directory[tag] = value
    return exif.tobytes()


def _write_deep_png(file: io.BytesIO, pixels: np.ndarray, metadata: dict[str, Any]) -> None:
    height, width, channels = pixels.shape
    body = io.BytesIO()
    writer = png.Writer(width, height, greyscale=channels <= 2, alpha=channels in (2, 4), bitdepth=16)
    writer.write(body, pixels.reshape(height, -1))
    # Pillow knows how each piece of metadata is stored: let it write them around one pixel, and take its chunks.
    carrier = io.BytesIO()
    shell = Picture(torch.zeros(3, height, width), metadata=metadata)
    Image.new("L" if channels <= 2 else "RGB", (1, 1)).save(
        carrier, format="PNG", **_save_options(Path("x.png"), shell)
    )
    extra = [c for c in png.Reader(bytes=carrier.getvalue()).chunks() if c[0] not in (b"IHDR", b"IDAT", b"IEND")]
    header, *rest = png.Reader(bytes=body.getvalue()).chunks()
    png.write_chunks(file, [header, *extra, *rest])


def read_uint8(path: str | Path) -> torch.Tensor:
    """The colours alone, (3, H, W) uint8, as networks are trained and measured."""
    return to_uint8(read(path).colour)


def to_uint8(colour: torch.Tensor) -> torch.Tensor:
    """Rounded (halves up, as MATLAB does) and clipped to 0..255."""
    return torch.floor(colour + 0.5).clamp(0, 255).to(torch.uint8)


def list_images(folder: str | Path, argument: str) -> list[Path]:
    """The image files of a folder by name; raises InputError in the name of ``argument`` where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{argument} {folder}: no such folder")
    # Hidden files are no images: macOS leaves some beside them that are called like them.
    visible = (path for path in folder.iterdir() if not path.name.startswith("."))
    # A link to nowhere is an image that is missing, and it is for the reader to say so.
    found = sorted(path for path in visible if path.suffix.lower() in SUFFIXES and not path.is_dir())
    if not found:
        raise InputError(f"{argument} {folder}: no images in it ({', '.join(SUFFIXES)})")
    return found


def by_key(items: Iterable[Item], key: Callable[[Item], Key], clash: Callable[[Item, Item], str]) -> dict[Key, Item]:
    """Items by their keys; raises InputError(clash(first, second)) where two have the same."""
    found: dict[Key, Item] = {}
    for item in items:
        if key(item) in found:
            raise InputError(clash(found[key(item)], item))
        found[key(item)] = item
    return found


def match(images: Iterable[Path], folder: str | Path, argument: str, scale: int | None = None) -> dict[Path, Path]:
    """For each image the file of ``folder`` that begins with its stem.

    A file belongs to the longest stem that it begins with (``a_b_x2.png`` to ``a_b``, not to ``a``). Of several files
    for one image the one called exactly as it, or with ``x{scale}`` behind, is taken.
    """
    images = list(images)
    candidates: dict[str, list[Path]] = {path.stem: [] for path in images}
    for path in list_images(folder, argument):
        stems = [stem for stem in candidates if path.stem.startswith(stem)]
        if stems:
            candidates[max(stems, key=len)].append(path)
    matched = {}
    for path in images:
        files = candidates[path.stem]
        exact = [f for f in files if f.stem in (path.stem, f"{path.stem}x{scale}")]
        files = exact if len(exact) == 1 else files
        if len(files) != 1:
            what = f"several files ({', '.join(f.name for f in files)})" if files else "no file"
            raise InputError(f"{argument} {folder}: {what} for {path.name}: none or many begin with {path.stem!r}")
        matched[path] = files[0]
    return matched


def bicubic(image: torch.Tensor, factor: int, down: bool = False, peak: int | None = 255) -> torch.Tensor:
    """MATLAB's ``imresize(..., 'bicubic')`` of whole numbers 0..peak by an integer factor, bit for bit.

    image: (channels, H, W) of any dtype; where ``down``, sides divisible by factor. Returns the same dtype. Without a
    ``peak`` nothing is rounded or clipped, as MATLAB does with floating-point images.
    """
    if down and (image.shape[1] % factor or image.shape[2] % factor):
        raise ValueError(f"image: sides {tuple(image.shape[1:])} are not divisible by factor {factor}")
    resized = image.unsqueeze(0).double()
    for dim in (2, 3):  # height first, and whole numbers in between
        resized = _resize_axis(resized, dim, factor, down)
        # The products are sums of rounded float64: 20 bits behind the point decide what is a half, as in MATLAB.
        if peak is not None:
            resized = torch.floor((resized * 2**20).round() / 2**20 + 0.5).clamp(0, peak)
    return resized.squeeze(0).to(image.dtype)


def _resize_axis(image: torch.Tensor, dim: int, factor: int, down: bool) -> torch.Tensor:
    n, pad = image.shape[dim], (4 * factor if down else 4)
    index = torch.arange(-pad, n + pad, device=image.device).remainder(2 * n)  # symmetric, however small the image is
    image = image.index_select(dim, torch.where(index >= n, 2 * n - 1 - index, index))
    size = list(image.shape[2:])
    size[dim - 2] = size[dim - 2] // factor if down else size[dim - 2] * factor
    image = F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)
    crop = pad // factor if down else pad * factor
    return image.narrow(dim, crop, image.shape[dim] - 2 * crop)


def crop_to_multiple(image: torch.Tensor, factor: int) -> torch.Tensor:
    """The upper left part whose sides are divisible by factor."""
    height, width = image.shape[-2:]
    return image[..., : height - height % factor, : width - width % factor]
