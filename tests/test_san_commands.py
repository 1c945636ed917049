"""The commands as a user types them, and what they print, write and refuse."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("jsonargparse", reason="san_model needs the extra [san]")
pytest.importorskip("png", reason="san_model needs the extra [san]")
from PIL import Image

from san import refused, run
from san_model import SAN, cli, upscale
from san_model import compare as comparing
from san_model.evaluate import EvaluateOptions, evaluate
from san_model.images import Picture, bicubic, read, read_uint8, to_uint8, write
from san_model.upscale import load_model, super_resolve

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(os.environ.get("ISQRT_COV_DATA", Path(__file__).parents[2] / "shared" / "data"))
TINY = {"n_resgroups": 1, "n_resblocks": 1, "n_feats": 8, "reduction": 4}
needs_data = pytest.mark.skipif(not (DATA / "expected.json").is_file(), reason="the benchmark images are not here")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders of small images: ``Small/HR``, its outputs by two methods, and two networks."""
    root = tmp_path_factory.mktemp("commands")
    generator = torch.Generator().manual_seed(0)
    for index, name in enumerate(["leaf", "leaf_b"]):
        coarse = torch.rand(1, 3, 7, 8, generator=generator) * 255
        image = to_uint8(
            torch.nn.functional.interpolate(coarse, size=(49, 56), mode="bicubic")[0].clamp(0, 255)
        ).float()
        write(root / "Small/HR" / f"{name}.png", Picture(image))
        noise = torch.randn(image.shape, generator=generator)
        write(root / "good_Small" / f"{name}_good_x2.png", Picture((image + noise)[:, :48]))
        write(root / "bad" / f"{name}x2.png", Picture(image + 20 * (index + 1) * noise))  # all 49 rows
    for scale in (2, 3):
        torch.manual_seed(scale)
        model = SAN(scale=scale, **TINY)
        torch.nn.init.normal_(model.non_local.non_local.W.weight)
        model.save(root / f"x{scale}.safetensors")
    return root


# --- the command line itself


@pytest.mark.parametrize("command", ["train", "evaluate", "upscale", "compare"])
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(command, "--help")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    options, _ = cli.COMMANDS[command]
    for name in options.__dataclass_fields__:
        assert name in cli.POSITIONAL or "--" + name.replace("_", "-") in text


def test_python_m_and_its_exit_status(tmp_path):
    command = [sys.executable, "-m", "san_model", "evaluate", "--bicubic", "--hr", "absent", "--scale", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "--hr absent: no such folder" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_extra_is_named(monkeypatch, capsys):
    from san_model import __main__

    monkeypatch.setitem(sys.modules, "jsonargparse", None)  # importing it raises ModuleNotFoundError
    monkeypatch.delitem(sys.modules, "san_model.cli")
    monkeypatch.delattr("san_model.cli")
    assert __main__.main() == 2
    assert capsys.readouterr().err == "san: error: jsonargparse is missing: pip install 'isqrt_cov[san]'\n"


def test_yaml_preset_and_flags(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text("preset: small\ndata: [a, b]\nout: run\nbatch: 8\nlr: 0.01\nresume: true\n")
    seen = []
    monkeypatch.setitem(cli.COMMANDS, "train", (cli.TrainOptions, seen.append))
    assert run("train", "--config", tmp_path / "run.yaml", "--lr", "0.02", "--val", "c", "d", "--no-augment") == 0
    assert run("train", "--preset", "small", "--n-feats", "48", "--data", "a", "--out", "b") == 0
    assert run("train", "--data", "a", "--out", "b") == 0
    first, second, third = seen
    assert (first.data, first.val, first.out) == (["a", "b"], ["c", "d"], Path("run"))
    assert (first.batch, first.lr, first.resume, first.augment) == (8, 0.02, True, False)
    assert (first.n_resgroups, first.schedule) == (3, "cosine")
    assert (second.n_resgroups, second.n_feats, third.n_resgroups, third.n_feats) == (3, 48, 20, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "absent", "--out", "o"], "--data absent: no such folder"),
        (["train", "--data", "absent", "--out", "o", "--batch", "many"], "batch"),
        (["train", "--out", "o"], "data"),
        (["train", "--preset"], "preset"),
        (["train", "--preset", "huge", "--data", "a", "--out", "o"], "preset"),
        (["evaluate", "--hr", "absent", "--scale", "2"], "--model, --bicubic, --sr: exactly one is needed, got none"),
        (["evaluate", "--hr", "absent", "--scale", "2", "--bicubic"], "--hr absent: no such folder"),
        (["evaluate", "--hr", "absent", "--scale", "5", "--bicubic"], "scale"),
        (["compare", "--hr", "absent", "--scale", "2", "--methods", "bicubic"], "--hr absent: no such folder"),
    ],
)
def test_wrong_command_lines_are_explained(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)


def test_an_unknown_key_of_the_yaml_file_is_named(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("data: [a]\nout: run\nlearning_rate: 1\n")
    assert "learning_rate" in refused(capsys, "train", "--config", tmp_path / "run.yaml")


# --- evaluate


def test_evaluate_writes_what_it_returns(root, tmp_path, capsys):
    arguments = ["--sr", root / "good_Small", "--hr", root / "Small/HR", "--scale", 2]
    assert run("evaluate", *arguments, "--json", tmp_path / "r/a.json", "--csv", tmp_path / "a.csv") == 0
    printed = capsys.readouterr().out
    ((title, scores),) = json.loads((tmp_path / "r/a.json").read_text()).items()
    assert title == "good_Small x2 Small" and list(scores) == ["leaf", "leaf_b", "mean"]
    assert scores["mean"] == pytest.approx([(a + b) / 2 for a, b in zip(scores["leaf"], scores["leaf_b"], strict=True)])
    assert 40 < scores["mean"][0] < 55 and f"{scores['leaf'][0]:.3f}" in printed
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["image"] for row in rows] == list(scores)
    assert [float(row["psnr"]) for row in rows] == pytest.approx([psnr for psnr, _ in scores.values()], abs=1e-6)


def test_evaluate_a_network_and_save_its_images(root, tmp_path):
    common = {"hr": root / "Small/HR", "scale": 2}
    scores = evaluate(EvaluateOptions(**common, model=root / "x2.safetensors", save=tmp_path / "out"))
    again = evaluate(EvaluateOptions(**common, sr=tmp_path / "out"))
    assert again == scores
    model = load_model(root / "x2.safetensors", "cpu")
    lr = bicubic(read_uint8(root / "Small/HR/leaf.png")[:, :48], 2, down=True)
    expected = to_uint8(model(lr[None].float())[0].detach())
    assert (read_uint8(tmp_path / "out/leaf_x2.png").int() - expected.int()).abs().max() <= 1
    identical = evaluate(EvaluateOptions(**common, sr=root / "Small/HR", json=tmp_path / "same.json"))
    assert identical["mean"].psnr == math.inf
    assert json.loads((tmp_path / "same.json").read_text())["HR x2 Small"]["mean"][0] is None


def test_evaluate_refuses(root, capsys, tmp_path):
    common = ["evaluate", "--hr", root / "Small/HR", "--scale", 2]
    assert "scale 3" in refused(capsys, *common, "--model", root / "x3.safetensors")
    assert "--bicubic and --sr" in refused(capsys, *common, "--sr", root, "--bicubic")
    assert "y-plane: only with --bicubic" in refused(capsys, *common, "--sr", root / "bad", "--protocol", "y-plane")
    assert "--overlap 9" in refused(capsys, *common, "--bicubic", "--tile", 8, "--overlap", 9)
    (tmp_path / "no.safetensors").write_text("no weights")
    assert "no.safetensors" in refused(capsys, *common, "--model", tmp_path / "no.safetensors")
    write(tmp_path / "sr/leaf.png", Picture(torch.zeros(3, 30, 56)))
    write(tmp_path / "sr/leaf_b.png", Picture(torch.zeros(3, 30, 56)))
    assert "leaf.png: 56 x 30, but 56 x 48 belongs to" in refused(capsys, *common, "--sr", tmp_path / "sr")
    write(tmp_path / "tiny/dot.png", Picture(torch.zeros(3, 12, 12)))
    assert "no file for leaf.png" in refused(capsys, *common, "--sr", tmp_path / "tiny")
    assert "dot.png: 12 x 12 is too small" in refused(
        capsys, "evaluate", "--hr", tmp_path / "tiny", "--scale", 2, "--bicubic"
    )
    bicubic_of = ["evaluate", "--scale", 2, "--bicubic", "--hr"]
    write(tmp_path / "mean/mean.png", Picture(torch.zeros(3, 40, 40)))
    assert "an image called 'mean'" in refused(capsys, *bicubic_of, tmp_path / "mean")
    for suffix in ("png", "bmp"):
        write(tmp_path / f"twice/a.{suffix}", Picture(torch.zeros(3, 40, 40)))
    assert "a.bmp and a.png are both called 'a'" in refused(capsys, *bicubic_of, tmp_path / "twice")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_that_yields_no_numbers_is_refused(root, tmp_path, capsys, value):
    model = SAN(scale=2, **TINY)
    model.tail[1].bias.data[0] = value
    model.save(tmp_path / "broken.pt")
    broken = ["--model", tmp_path / "broken.pt"]
    write(tmp_path / "a.png", Picture(torch.zeros(3, 8, 8)))
    message = "the network yields NaN or infinities"
    assert f"a.png: {message}" in refused(capsys, "upscale", tmp_path / "a.png", *broken)
    assert not (tmp_path / "a_x2.png").exists()
    common = ["--hr", root / "Small/HR", "--scale", 2]
    assert f"leaf.png: {message}" in refused(capsys, "evaluate", *common, *broken)
    assert f"leaf.png: {message}" in refused(capsys, "compare", *common, "--methods", f"A={tmp_path / 'broken.pt'}")


PUBLISHED = [
    (title, scale, dataset)
    for dataset in ("Set5", "Set14")
    for scale in (2, 3, 4, 8)
    for title in ("bicubic (MATLAB uint8 LR, MATLAB uint8 two-pass up)", "bicubic, Y-plane protocol (SRCNN demo),")
    if scale < 8 or "Y-plane" not in title
] + [("RCAN", 2, "Set5"), ("RCAN", 3, "Set5")]


@needs_data
@pytest.mark.parametrize(("title", "scale", "dataset"), PUBLISHED)
def test_evaluate_gives_the_published_numbers(title, scale, dataset):
    expected = json.loads((DATA / "expected.json").read_text())
    folder = DATA / "benchmark" / dataset
    options = {"hr": folder / "HR", "scale": scale}
    if title == "RCAN":
        key = f"RCAN x{scale} (released images) Set5"
        options |= {"sr": DATA / "sr_results" / f"RCAN_x{scale}_Set5"}
    else:
        key = f"{title} x{scale} {dataset}"
        options |= {"bicubic": True}
        options |= {"protocol": "y-plane"} if "Y-plane" in title else {"lr": folder / f"LR_bicubic/X{scale}"}
    scores = evaluate(EvaluateOptions(**options))
    assert scores.keys() == expected[key].keys()
    for name, (psnr, ssim) in expected[key].items():
        assert scores[name] == (pytest.approx(psnr, abs=1e-3), pytest.approx(ssim, abs=1e-4)), name


# --- upscale


def test_upscale_keeps_what_belongs_to_the_image(root, tmp_path):
    values = torch.rand(1, 12, 17, generator=torch.Generator().manual_seed(1)) * 255
    alpha = torch.linspace(0, 255, 17).repeat(1, 12, 1)
    metadata = {"dpi": (300, 300), "text": {"Author": "somebody"}}
    for bits in (8, 16):
        source = tmp_path / f"deep{bits}.png"
        write(source, Picture(values.repeat(3, 1, 1), alpha, True, bits, metadata))
        assert run("upscale", source, "--model", root / "x2.safetensors") == 0
        result = read(tmp_path / f"deep{bits}_x2.png")
        assert result.colour.shape == (3, 24, 34) and result.grey and result.bits == bits
        assert result.alpha.shape == (1, 24, 34) and (result.alpha[0, 0].diff() >= 0).all()
        assert result.metadata["text"] == metadata["text"] and result.metadata["dpi"][0] == pytest.approx(300, abs=1)
        expected = super_resolve(load_model(root / "x2.safetensors", "cpu"), read(source).colour).mean(0)
        assert (result.colour[0] - expected).abs().max() <= (0.5 if bits == 8 else 0.5 / 257) + 1e-3


def test_upscale_a_folder(root, tmp_path, capsys):
    for name in ("a.png", "a.jpg", "b.png"):
        write(tmp_path / "in" / name, Picture(torch.full((3, 9, 8), 77.0)))
    (tmp_path / "in/broken.png").write_text("no image")
    (tmp_path / "in/gone.png").symlink_to("absent")
    model = ["--model", root / "x3.safetensors"]
    assert "broken.png" in refused(capsys, "upscale", tmp_path / "in", *model)
    assert run("upscale", tmp_path / "in", *model, "--bad-files", "skip") == 0
    said = capsys.readouterr().err
    assert said.count("skipped") == 2 and "broken.png: cannot be read" in said and "gone.png: no such file" in said
    written = sorted(path.name for path in (tmp_path / "in_x3").iterdir())
    assert written == ["a_jpg_x3.png", "a_png_x3.png", "b_x3.png"]
    assert run("upscale", tmp_path / "in/b.png", *model, "--output", tmp_path / "out/c.jpg") == 0
    with Image.open(tmp_path / "out/c.jpg") as image:
        assert image.size == (24, 27) and image.format == "JPEG"
    write(tmp_path / "deep.png", Picture(torch.zeros(3, 9, 8), bits=16))
    capsys.readouterr()
    assert run("upscale", tmp_path / "deep.png", *model, "--output", tmp_path / "out/d.tif") == 0
    assert "d.tif lacks all but 8 bits" in capsys.readouterr().err
    assert run("upscale", tmp_path / "in/b.png", *model, "--output", tmp_path / "other") == 0
    assert (tmp_path / "other/b_x3.png").exists()


def test_upscale_refuses(root, tmp_path, capsys, monkeypatch):
    write(tmp_path / "a.png", Picture(torch.zeros(3, 8, 8)))
    model = ["--model", root / "x2.safetensors"]
    assert "would overwrite an input" in refused(
        capsys, "upscale", tmp_path / "a.png", *model, "--output", tmp_path / "a.png"
    )
    assert "input absent: no such file" in refused(capsys, "upscale", "absent", *model)
    assert "--tile -1" in refused(capsys, "upscale", tmp_path / "a.png", *model, "--tile", -1)
    assert "--model absent.pt" in refused(capsys, "upscale", tmp_path / "a.png", "--model", "absent.pt")
    assert "--device warp" in refused(capsys, "upscale", tmp_path / "a.png", *model, "--device", "warp")
    for name in ("a.png", "a.jpg", "a_png.png"):
        write(tmp_path / "same" / name, Picture(torch.zeros(3, 8, 8)))
    assert "a.png and a_png.png would both become" in refused(capsys, "upscale", tmp_path / "same", *model)
    write(tmp_path / "clear.png", Picture(torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)))
    with monkeypatch.context() as patch:
        patch.delattr(upscale, "super_resolve")  # what cannot be written is refused before the work is done
        assert "a.xyz: unknown suffix" in refused(
            capsys, "upscale", tmp_path / "a.png", *model, "--output", tmp_path / "a.xyz"
        )
        assert "c.jpg: the image has transparency" in refused(
            capsys, "upscale", tmp_path / "clear.png", *model, "--output", tmp_path / "c.jpg"
        )
    monkeypatch.setattr(upscale, "DEFAULT_WEIGHTS", tmp_path / "none.safetensors")
    assert "--model: this installation has no weights" in refused(capsys, "upscale", tmp_path / "a.png")

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(upscale, "super_resolve", exhausted)
    assert "a.png: memory does not suffice" in refused(capsys, "upscale", tmp_path / "a.png", *model)


def test_a_large_photograph_brings_no_warning(root, tmp_path, capsys, monkeypatch, recwarn):
    write(tmp_path / "a.png", Picture(torch.zeros(3, 8, 8)))
    model = ["--model", root / "x2.safetensors"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    assert run("upscale", tmp_path / "a.png", *model) == 0
    assert not [warning for warning in recwarn if warning.category is Image.DecompressionBombWarning]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    assert "a.png: cannot be read as an image (Image size" in refused(capsys, "upscale", tmp_path / "a.png", *model)


def test_upscale_uses_the_weights_of_the_package_and_says_so(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(upscale, "DEFAULT_WEIGHTS", root / "x2.safetensors")
    write(tmp_path / "a.png", Picture(torch.zeros(3, 8, 8)))
    assert run("upscale", tmp_path / "a.png", "--tile", 6, "--overlap", 2) == 0
    said = capsys.readouterr().err
    assert "x2.safetensors of the package" in said and "not those of the whole image" in said
    assert (tmp_path / "a_x2.png").exists()


class Nearest(torch.nn.Module):
    """Two groups that look at each pixel alone, so that tiles and views change nothing; it counts its runs."""

    config = {"scale": 2, "rgb_range": 255}

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.RG = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[2:]))
        for group in self.RG:
            x = group(x)
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (8, 3), (7, 0), (5, 4), (40, 8)])
@pytest.mark.parametrize("self_ensemble", [False, True])
def test_tiles_and_views_fit_together(tile, overlap, self_ensemble):
    image = torch.rand(3, 19, 30, generator=torch.Generator().manual_seed(2)) * 255
    model, steps = Nearest(), []
    result = super_resolve(model, image, tile, overlap, self_ensemble, lambda *step: steps.append(step))
    torch.testing.assert_close(result, image.repeat_interleave(2, 1).repeat_interleave(2, 2), rtol=0, atol=1e-3)
    assert all(max(size) <= (tile or 30) for size in model.sizes) or tile == 40
    assert steps == [(done + 1, 2 * len(model.sizes)) for done in range(2 * len(model.sizes))]
    assert not any(group._forward_hooks for group in model.RG)
    assert len(model.sizes) % (8 if self_ensemble else 1) == 0


def test_self_ensemble_is_the_mean_of_eight_views(root):
    model = load_model(root / "x2.safetensors", "cpu")
    image = torch.rand(3, 10, 13, generator=torch.Generator().manual_seed(3)) * 255
    with torch.no_grad():
        views = [
            (lambda x, k=k, f=f: torch.rot90(x.flip(-1) if f else x, k, (-2, -1)),
             lambda y, k=k, f=f: torch.rot90(y, -k, (-2, -1)).flip(-1) if f else torch.rot90(y, -k, (-2, -1)))
            for k in range(4) for f in (False, True)
        ]  # fmt: skip
        expected = torch.stack([back(model(there(image)[None])[0]) for there, back in views]).mean(0)
    torch.testing.assert_close(
        super_resolve(model, image, self_ensemble=True), expected.clamp(0, 255), rtol=0, atol=1e-3
    )


# --- compare


def test_compare_table(root, tmp_path, capsys):
    numbers = tmp_path / "numbers.json"
    numbers.write_text(json.dumps({"Small": [41.5, None], "Elsewhere": [30.0, 0.9]}))
    evaluated = tmp_path / "evaluated.json"
    run("evaluate", "--sr", root / "bad", "--hr", root / "Small/HR", "--scale", 2, "--json", evaluated)
    write(root / "Other/HR/stone.png", Picture(torch.full((3, 40, 40), 90.0)))
    methods = ["bicubic", f"SAN={root / 'x2.safetensors'}", f"Good={root}/good_{{dataset}}", f"Bad={root / 'bad'}",
               f"Printed={numbers}", f"Measured={evaluated}"]  # fmt: skip
    common = ["compare", "--hr", root / "Small/HR", root / "Other/HR", "--scale", 2, "--methods", *methods]
    for suffix in ("md", "csv", "json"):
        assert run(*common, "--table", tmp_path / f"table.{suffix}") == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "table.json").read_text())
    assert list(results) == ["bicubic", "SAN", "Good", "Bad", "Printed", "Measured"]
    assert results["Printed"] == {"Small": [41.5, None]} and "Other" not in results["Good"]
    assert results["Measured"] == {"Small": pytest.approx(results["Bad"]["Small"], abs=1e-5)}
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "| method | Small PSNR | Small SSIM | Other PSNR | Other SSIM |"
    good = lines[4]
    assert f"**{results['Good']['Small'][0]:.2f}**" in good and good.endswith("| - | - |")
    assert sum(line.count("**") for line in lines) == 2 * 4  # one PSNR and one SSIM for each data set
    rows = list(csv.reader((tmp_path / "table.csv").open()))
    assert rows[3][1] == f"{results['Good']['Small'][0]:.2f}" and len(rows) == 7
    assert "Printed" in printed


def test_compare_takes_what_evaluate_wrote(tmp_path, capsys, monkeypatch):
    """Whatever a data set is called; and a table that is not on a terminal is not cut."""
    monkeypatch.delenv("COLUMNS", raising=False)
    folders = [tmp_path / f"my photos, part {n}" for n in range(8)]
    for folder in folders:
        write(folder / "stone.png", Picture(torch.linspace(0, 255, 1600).view(1, 40, 40).repeat(3, 1, 1)))
    scores = evaluate(EvaluateOptions(folders[0], 2, bicubic=True, json=tmp_path / "b.json"))
    capsys.readouterr()
    arguments = ["--hr", *folders, "--scale", 2, "--methods", f"File={tmp_path / 'b.json'}", "bicubic"]
    assert run("compare", *arguments, "--table", tmp_path / "table.json") == 0
    results = json.loads((tmp_path / "table.json").read_text())
    assert results["File"] == {folders[0].name: pytest.approx(scores["mean"], abs=1e-5)}
    printed = capsys.readouterr().out
    assert printed.count(f"{scores['mean'].psnr:.2f}") == 9 and "…" not in printed


@pytest.mark.parametrize("crop", [[], ["--crop", 20, 10, 24, 16]])
def test_compare_figure(root, tmp_path, crop, capsys):
    methods = ["Bicubic=bicubic", f"Good={root}/good_Small", f"Bad={root / 'bad'}", f"SAN={root / 'x2.safetensors'}",
               f"Printed={tmp_path / 'numbers.json'}"]  # fmt: skip
    (tmp_path / "numbers.json").write_text('{"Small": [30, 0.9]}')
    figure = tmp_path / "new/figure.png"
    arguments = ["--hr", root / "Small/HR", "--scale", 2, "--image", "leaf_b", "--figure", figure, "--columns", 3]
    assert run("compare", *arguments, "--methods", *methods, *crop) == 0
    assert "without Printed" in capsys.readouterr().err
    with Image.open(figure) as image:
        colours = image.convert("RGB").resize((400, 300)).getcolors(400 * 300)
    assert len(colours) > 100
    assert not list(tmp_path.glob("*.md"))


def test_compare_refuses(root, tmp_path, capsys):
    common = ["compare", "--hr", root / "Small/HR", "--scale", 2]
    figure = ["--methods", "bicubic", "--figure", tmp_path / "f.png"]
    assert "--image nobody: not in" in refused(capsys, *common, *figure, "--image", "nobody")
    assert "--crop 1 2 3: expected left, top, width and height" in refused(capsys, *common, *figure, "--crop", 1, 2, 3)
    assert "--crop 0 0 99 9: not within" in refused(capsys, *common, *figure, "--crop", 0, 0, 99, 9)
    assert "--figure f.doc: the suffix" in refused(capsys, *common, "--methods", "bicubic", "--figure", "f.doc")
    assert "--methods RCAN: expected NAME=SOURCE" in refused(capsys, *common, "--methods", "RCAN")
    assert "no such folder" in refused(capsys, *common, "--methods", "RCAN=absent")
    assert "--methods A=bicubic: another method is called 'A', too" in refused(
        capsys, *common, "--methods", "A=light", "A=bicubic"
    )
    (tmp_path / "n.json").write_text("[1, 2]")
    assert "n.json: cannot be read as numbers" in refused(capsys, *common, "--methods", f"A={tmp_path / 'n.json'}")


def test_compare_reads_everything_before_it_measures(root, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(comparing, "measure")
    common = ["compare", "--hr", root / "Small/HR", "--scale", 2, "--methods", f"SAN={root / 'x2.safetensors'}"]
    assert "no such folder" in refused(capsys, *common, "RCAN=absent")
    numbers = tmp_path / "n.json"
    for text in ("[1, 2]", "[" * 100_000, '{"Small": [1%s, 1]}' % ("0" * 400), '{"Small": [true, 0.9]}',
                 '{"Small": [NaN, 0.9]}', '{"Small": [30, Infinity]}', '{"Small": [1e999, 0.9]}', '{"Small": "12"}',
                 '{"Small": {"mean": [30]}}', '{"Small": [[30], 1]}', '{"Small": 30}', '{"Small": {}}'):  # fmt: skip
        numbers.write_text(text)
        assert "n.json: cannot be read as numbers" in refused(capsys, *common, f"A={numbers}"), text[:40]
