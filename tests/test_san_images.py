"""Image files of every kind come back as they were, and bicubic resizing is MATLAB's."""

import os
import struct
from pathlib import Path

import pytest
import torch

pytest.importorskip("png", reason="san_model needs the extra [san]")
import numpy as np
import png
import tifffile
from PIL import Image

from san_model import images
from san_model.images import InputError, Picture, bicubic, match, read, write

DATA = Path(os.environ.get("ISQRT_COV_DATA", Path(__file__).parents[2] / "shared" / "data"))
MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


def pixels(channels, bits=8, height=6, width=9, seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, (height, width, channels), dtype=np.uint16)


def save_deep(path, values):
    """A PNG with 16 bits per sample."""
    height, width, channels = values.shape
    writer = png.Writer(width, height, greyscale=channels <= 2, alpha=channels in (2, 4), bitdepth=16)
    with path.open("wb") as file:
        writer.write(file, values.reshape(height, -1))


def load_deep(path):
    width, height, rows, info = png.Reader(filename=str(path)).read()
    assert info["bitdepth"] == 16
    return np.array([list(row) for row in rows]).reshape(height, width, -1)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("mode", MODES)
def test_png_comes_back(tmp_path, mode, bits):
    values = pixels(MODES[mode], bits)
    if bits == 16:
        save_deep(tmp_path / "a.png", values)
    else:
        Image.fromarray(values.astype(np.uint8).squeeze()).save(tmp_path / "a.png")
    picture = read(tmp_path / "a.png")
    assert (picture.grey, picture.bits, picture.alpha is not None) == ("L" in mode, bits, "A" in mode)
    colour = values[..., :1].repeat(3, 2) if "L" in mode else values[..., :3]
    levels = 257 if bits == 16 else 1
    torch.testing.assert_close(
        picture.colour.double() * levels,
        torch.from_numpy(colour.astype(np.float64)).permute(2, 0, 1),
        rtol=0,
        atol=5e-3,
    )
    write(tmp_path / "b.png", picture)
    if bits == 16:
        again = load_deep(tmp_path / "b.png")
    else:
        with Image.open(tmp_path / "b.png") as image:
            assert image.mode == mode
            again = np.asarray(image).reshape(values.shape)
    assert np.array_equal(again, values)


@pytest.mark.parametrize("mode", ["1", "P", "PA", "CMYK", "I;16"])
def test_other_modes_are_read(tmp_path, mode):
    source = Image.fromarray(pixels(3).astype(np.uint8))
    suffix = "jpg" if mode == "CMYK" else "tif" if mode == "I;16" else "png"
    path = tmp_path / f"a.{suffix}"
    if mode == "I;16":
        Image.fromarray(pixels(1, 16)[..., 0]).save(path)
    elif mode == "PA":
        source.convert("P").save(path, transparency=3)
    else:
        source.convert(mode).save(path)
    picture = read(path)
    assert picture.colour.shape == (3, 6, 9) and 0 <= picture.colour.min() and picture.colour.max() <= 255
    assert picture.grey == (mode in ("1", "I;16"))
    assert (picture.alpha is not None) == (mode == "PA")
    assert picture.bits == (16 if mode == "I;16" else 8)
    with Image.open(path) as image:
        expected = torch.tensor(np.asarray(image.convert("RGB"))) if mode != "I;16" else None
    if expected is not None:
        assert torch.equal(images.read_uint8(path), expected.permute(2, 0, 1))


def test_jpeg_is_near(tmp_path):
    ramp = torch.linspace(0, 255, 48).repeat(3, 32, 1)
    write(tmp_path / "a.jpg", Picture(ramp))
    assert (read(tmp_path / "a.jpg").colour - ramp).abs().max() < 5


@pytest.mark.parametrize("bits", [8, 16])
def test_metadata_is_kept_and_the_size_in_it_is_right(tmp_path, bits):
    exif = Image.Exif()
    exif[0x010F], exif[0x0100] = "a camera", 9
    exif.get_ifd(0x8769).update({0xA002: 9, 0xA003: 6, 0x9003: "2020:01:01 00:00:00"})
    profile = b"not a real profile, but kept"
    info = images.PngImagePlugin.PngInfo()
    info.add_text("Author", "somebody")
    Image.fromarray(pixels(3).astype(np.uint8)).save(
        tmp_path / "a.png", exif=exif, icc_profile=profile, dpi=(300, 300), pnginfo=info
    )
    picture = read(tmp_path / "a.png")
    larger = Picture(torch.zeros(3, 12, 18), bits=bits, metadata=picture.metadata)
    write(tmp_path / "b.png", larger)
    write(tmp_path / "b.jpg", larger)
    for name in ("b.png", "b.jpg"):
        with Image.open(tmp_path / name) as image:
            image.load()
            assert image.size == (18, 12)
            assert image.info["icc_profile"] == profile
            assert image.info["dpi"] == pytest.approx((300, 300), rel=1e-3)
            kept = image.getexif()
            assert kept[0x010F] == "a camera" and kept[0x0100] == 18
            assert kept.get_ifd(0x8769)[0xA002] == 18 and kept.get_ifd(0x8769)[0xA003] == 12
            assert kept.get_ifd(0x8769)[0x9003] == "2020:01:01 00:00:00"
            if name == "b.png":
                assert image.text["Author"] == "somebody"
    if bits == 16:
        assert load_deep(tmp_path / "b.png").shape == (12, 18, 3)


def test_damaged_metadata_is_left_out_and_named(tmp_path):
    image = Image.fromarray(pixels(3).astype(np.uint8))
    image.save(tmp_path / "a.jpg", exif=b"Exif\0\0" + b"\0" * 30)
    image.save(tmp_path / "b.tif", dpi=(72, 72))
    content = (tmp_path / "b.tif").read_bytes()
    assert struct.pack("<LL", 72, 1) in content
    (tmp_path / "b.tif").write_bytes(content.replace(struct.pack("<LL", 72, 1), bytes(8)))  # 0 / 0
    image.save(tmp_path / "c.jpg", dpi=(72, 72), comment=b"kept")
    for name, key in (("a.jpg", "exif"), ("b.tif", "dpi")):
        picture = read(tmp_path / name)
        assert picture.lost == [f"{key}, which is damaged"] and key not in picture.metadata
        write(tmp_path / f"{name}.png", picture)
    picture = read(tmp_path / "c.jpg")
    assert picture.lost == [] and picture.metadata["comment"] == b"kept"
    write(tmp_path / "d.jpg", picture)
    assert read(tmp_path / "d.jpg").metadata["comment"] == b"kept"


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path / "a.png", Picture(torch.zeros(3, 4, 4)))
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(InputError, match=r"b\.jpg: cannot be written \(.*too long"):
        write(tmp_path / "b.jpg", Picture(torch.zeros(3, 4, 4), metadata={"exif": long_exif()}))

    def full(path, data):
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "a.png", Picture(torch.ones(3, 4, 4)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def long_exif():
    exif = Image.Exif()
    exif[0x010E] = "x" * 70_000  # a JPEG's segment has 65,533 bytes
    return exif.tobytes()


def test_deep_png_with_a_transparent_colour(tmp_path):
    values = pixels(3, 16)
    values[1, 2] = values[3, 4] = (1, 2, 65535)
    with (tmp_path / "a.png").open("wb") as file:
        writer = png.Writer(9, 6, greyscale=False, bitdepth=16, transparent=(1, 2, 65535))
        writer.write(file, values.reshape(6, -1))
    picture = read(tmp_path / "a.png")
    assert picture.bits == 16 and (picture.alpha[0] == 0).nonzero().tolist() == [[1, 2], [3, 4]]


def test_tiff_of_16_bits(tmp_path):
    values = pixels(1, 16).squeeze()
    tifffile.imwrite(tmp_path / "black.tif", values, photometric="minisblack")
    tifffile.imwrite(tmp_path / "white.tif", 65535 - values, photometric="miniswhite")
    for name in ("black.tif", "white.tif"):
        picture = read(tmp_path / name)
        assert picture.bits == 16 and picture.lost == []
        assert np.array_equal((picture.colour[0].double() * 257).round().numpy(), values)
    tifffile.imwrite(tmp_path / "colour.tif", pixels(3, 16), photometric="rgb")
    picture = read(tmp_path / "colour.tif")
    assert picture.bits == 8 and len(picture.lost) == 1 and "8 bits of each colour" in picture.lost[0]


def test_webp_is_lossless(tmp_path):
    values = torch.from_numpy(pixels(4).astype(np.float32)).permute(2, 0, 1)
    write(tmp_path / "a.webp", Picture(values[:3], values[3:]))
    picture = read(tmp_path / "a.webp")
    assert torch.equal(picture.colour, values[:3]) and torch.equal(picture.alpha, values[3:])


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "cut deep", "missing", "float"])
def test_a_bad_file_is_named(tmp_path, damage):
    path = tmp_path / ("bad.tif" if damage == "float" else "bad.png")
    if damage in ("text", "empty"):
        path.write_text("no image" if damage == "text" else "")
    elif damage == "float":
        Image.fromarray(np.zeros((4, 4), np.float32)).save(path)
    elif damage != "missing":
        if damage == "cut deep":
            save_deep(path, pixels(3, 16, 40, 40))
        else:
            Image.fromarray(pixels(3, 8, 40, 40).astype(np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=path.name):
        read(path)


def test_several_images_in_a_file_are_refused_but_not_a_preview(tmp_path):
    frames = [Image.fromarray(pixels(3).astype(np.uint8)).transpose(turn) for turn in (0, 1)]
    for name, options in {
        "a.tif": {},
        "b.png": {},
        "c.webp": {"lossless": True},
        "photo.jpg": {"format": "MPO"},
    }.items():
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        if name == "photo.jpg":
            assert read(tmp_path / name).colour.shape == (3, 6, 9)
        else:
            with pytest.raises(InputError, match=f"{name}: 2 images in one file"):
                read(tmp_path / name)


@pytest.mark.parametrize("kind", ["EPS", "GIF", "JPEG2000", "TGA"])
def test_other_formats_are_not_tried_whatever_the_suffix(tmp_path, kind):
    Image.fromarray(pixels(3).astype(np.uint8)).save(tmp_path / "a.png", format=kind)
    with pytest.raises(InputError, match=r"a\.png: cannot be read as an image \(cannot identify"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "memory does not suffice"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory does not suffice"),
        (EOFError(), "EOFError"),
    ],
)
def test_an_error_in_between_has_a_reason(tmp_path, monkeypatch, error, reason):
    """Of the decoder, of the conversion, and of what is written."""
    write(tmp_path / "a.png", Picture(torch.zeros(3, 4, 4)))

    def fail(*_):
        raise error

    for place, name in ((images, "_pixels"), (torch, "from_numpy")):
        with monkeypatch.context() as patch, pytest.raises(InputError) as caught:
            patch.setattr(place, name, fail)
            read(tmp_path / "a.png")
        assert str(caught.value) == f"{tmp_path / 'a.png'}: cannot be read as an image ({reason})"
    monkeypatch.setattr(torch, "floor", fail)
    with pytest.raises(InputError, match=rf"b\.png: cannot be written \({reason}\)"):
        write(tmp_path / "b.png", Picture(torch.zeros(3, 4, 4)))


def test_what_is_called_like_an_image_counts_as_one(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "absent")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    found = images.list_images(tmp_path, "--data")
    assert [path.name for path in found] == ["loop.png", "nowhere.png", "pipe.png"]
    for path in found:
        with pytest.raises(InputError, match=path.name):
            read(path)


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    picture = Picture(torch.zeros(3, 4, 4), alpha=torch.zeros(1, 4, 4))
    with pytest.raises(InputError, match=r"a\.jpg.*transparency"):
        write(tmp_path / "a.jpg", picture)
    with pytest.raises(InputError, match=r"unknown suffix '\.xyz'"):
        write(tmp_path / "a.xyz", picture)


def test_files_are_matched_by_stem(tmp_path):
    for name in ("a_x2.png", "a_b_x2.png", "cx2.png", "cx3.png", "other.png", "notes.txt"):
        (tmp_path / name).touch()
    names = {"a": "a_x2.png", "a_b": "a_b_x2.png", "c": "cx2.png"}
    found = match([Path(f"hr/{stem}.png") for stem in names], tmp_path, "--sr", 2)
    assert {path.stem: file.name for path, file in found.items()} == names
    with pytest.raises(InputError, match=r"--sr.*several files \(cx2\.png, cx3\.png\) for c\.png"):
        match([Path("hr/c.png")], tmp_path, "--sr")
    with pytest.raises(InputError, match=r"--sr.*no file for d\.png"):
        match([Path("hr/d.png")], tmp_path, "--sr", 2)
    with pytest.raises(InputError, match=r"--sr .*no such folder"):
        match([Path("hr/d.png")], tmp_path / "absent", "--sr", 2)


def imresize_axis(plane, factor):
    """MATLAB's imresize along axis 0 as its source has it: 1-based coordinates, Keys' kernel, mirrored borders."""
    length = plane.shape[0]
    stretch = min(factor, 1)

    def kernel(x):
        x = abs(x * stretch)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return stretch * np.where(x <= 1, near, np.where(x <= 2, far, 0))

    width = 4 / stretch
    u = np.arange(1, int(np.ceil(length * factor)) + 1) / factor + 0.5 * (1 - 1 / factor)
    indices = np.floor(u - width / 2)[:, None] + np.arange(int(np.ceil(width)) + 2)
    weights = kernel(u[:, None] - indices)
    weights /= weights.sum(1, keepdims=True)
    mirrored = np.concatenate([np.arange(length), np.arange(length)[::-1]])
    rows = plane[mirrored[(indices.astype(int) - 1) % (2 * length)]]
    return np.floor(np.einsum("ij,ijk->ik", weights, rows).round(9) + 0.5).clip(0, 255)


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("factor", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (11, 7)])
def test_bicubic_is_imresize(factor, down, size):
    height, width = (side * factor if down else side for side in size)
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    ratio = 1 / factor if down else factor
    for channel, result in zip(image, bicubic(image, factor, down), strict=True):
        rows = imresize_axis(channel.double().numpy(), ratio)
        assert np.array_equal(result.double().numpy(), imresize_axis(rows.T, ratio).T)


def test_bicubic_of_16_bits_and_of_sides_that_do_not_divide():
    flat = torch.full((1, 4, 4), 40000.0)
    assert torch.equal(bicubic(flat, 2, peak=65535), torch.full((1, 8, 8), 40000.0))
    with pytest.raises(ValueError, match="not divisible by factor 2"):
        bicubic(torch.zeros(3, 5, 4), 2, down=True)


@pytest.mark.skipif(not (DATA / "benchmark").is_dir(), reason="the benchmark images are not here")
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_bicubic_is_matlab(scale):
    hr = [DATA / "benchmark" / name for name in ("Set5/HR/bird.png", "Set14/HR/bridge.png", "Set14/HR/zebra.png")]
    for path in hr:
        lr = path.parents[1] / f"LR_bicubic/X{scale}" / f"{path.stem}x{scale}.png"
        image = images.crop_to_multiple(images.read_uint8(path), scale)
        assert torch.equal(bicubic(image, scale, down=True), images.read_uint8(lr))
