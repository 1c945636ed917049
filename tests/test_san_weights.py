"""The weights that the package carries: they are there, light, documented, and better than bicubic interpolation."""

import importlib.metadata
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("png", reason="san_model needs the extra [san]")
pytest.importorskip("skimage", reason="san_model needs the extra [san]")
import skimage.data

from san_model.compare import CompareOptions, compare
from san_model.evaluate import EvaluateOptions, evaluate
from san_model.images import Picture, crop_to_multiple, read, read_uint8, write
from san_model.options import PRESETS, TrainOptions
from san_model.upscale import DEFAULT_WEIGHTS, UpscaleOptions, load_model, upscale

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(os.environ.get("ISQRT_COV_DATA", Path(__file__).parents[2] / "shared" / "data"))
CARD = DEFAULT_WEIGHTS.with_name("README.md")


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A folder with the middle of a photograph that the network has not been trained on."""
    source = Path(skimage.data.__path__[0]) / "coffee.png"
    if not source.exists():
        pytest.skip("this scikit-image carries no coffee.png")
    folder = tmp_path_factory.mktemp("photo", numbered=False)
    write(folder / "coffee.png", Picture(read(source).colour[:, 120:280, 200:400]))
    return folder


def test_the_package_carries_them():
    files = {str(file) for file in importlib.metadata.files("isqrt_cov") or ()}
    if any(file.startswith("san_model/") for file in files):  # not where an editable install points elsewhere
        assert {f"san_model/weights/{path.name}" for path in (DEFAULT_WEIGHTS, CARD)} <= files
    assert 0 < DEFAULT_WEIGHTS.stat().st_size < 2_000_000
    card = CARD.read_text()
    assert DEFAULT_WEIGHTS.name in card and f"{DEFAULT_WEIGHTS.stat().st_size:,} bytes" in card


def test_they_are_of_the_light_preset():
    model = load_model(None, "cpu")
    assert model.config == TrainOptions(data=[], out=Path(), **PRESETS["light"]).network().config
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert f"{sum(p.numel() for p in model.parameters()):,}" in CARD.read_text()


def test_better_than_bicubic(photograph):
    results = compare(CompareOptions([photograph], ["bicubic", "light"], 2))
    bicubic, light = (results[method]["photo"] for method in ("bicubic", "light"))
    assert light.psnr > bicubic.psnr + 1 and light.ssim > bicubic.ssim


def test_upscale_uses_them(photograph, tmp_path, capsys):
    (target,) = upscale(UpscaleOptions(photograph / "coffee.png", tmp_path))
    assert "san_light_x2.safetensors of the package" in capsys.readouterr().err
    hr = read_uint8(photograph / "coffee.png")
    assert read_uint8(target).shape == (3, 2 * hr.shape[1], 2 * hr.shape[2])
    # No colour cast: shrunk again by blocks of 2 x 2, it is the photograph.
    shrunk = torch.nn.functional.avg_pool2d(crop_to_multiple(read_uint8(target), 2).float(), 2)
    assert (shrunk - hr).mean((1, 2)).abs().max() < 1


def test_numbers_of_the_card():
    folder = DATA / "benchmark/Set5"
    if not folder.is_dir():
        pytest.skip("the benchmark images are not here")
    options = {"hr": folder / "HR", "lr": folder / "LR_bicubic/X2", "scale": 2}
    rows = [line.split("|") for line in CARD.read_text().splitlines() if line.startswith("| Set5 ")]
    printed = [float(value) for value in " ".join(rows[0][2:]).replace("/", " ").split()]
    measured = [*evaluate(EvaluateOptions(**options, bicubic=True))["mean"]]
    measured += evaluate(EvaluateOptions(**options, model=DEFAULT_WEIGHTS))["mean"]
    assert printed == [pytest.approx(value, abs=6e-3 if value > 1 else 6e-5) for value in measured]
