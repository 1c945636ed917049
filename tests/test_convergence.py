"""The convergence study trains what it says, goes on where it stopped, and writes its curves down."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("jsonargparse", reason="san_model needs the extra [san]")
pytest.importorskip("png", reason="san_model needs the extra [san]")
pytest.importorskip("tensorboard", reason="san_model needs the extra [san]")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import convergence
from san_model import train as training
from san_model.images import Picture, write
from san_model.options import TrainOptions

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--n-resgroups", "1", "--n-resblocks", "1", "--n-feats", "8", "--patch", "8", "--batch", "2", "--epoch", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for name in ("train/a", "train/b", "Val/HR/c"):
        coarse = torch.rand(1, 3, 6, 6, generator=generator) * 255
        image = torch.nn.functional.interpolate(coarse, size=(40, 44), mode="bicubic").clamp(0, 255)
        write(root / f"{name}.png", Picture(image[0]))
    return root


def run(folder, out, *arguments):
    line = ["--data", folder / "train", "--val", folder / "Val", "--out", out, *TINY, "--epochs", 2, *arguments]
    return convergence.main([str(argument) for argument in line])


def test_curves_of_all_variants(folder, tmp_path, capsys):
    files = ["--json", tmp_path / "result.json", "--plot", tmp_path / "result.png"]
    assert run(folder, tmp_path / "runs", *files) == 0
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "result.json").read_text())
    assert result["benchmark"] == "convergence" and 20 < result["bicubic"] < 60
    assert [curve["variant"] for curve in result["runs"]] == ["base", "ssc", "foca", "soca"]
    parameters = {curve["variant"]: curve["parameters"] for curve in result["runs"]}
    assert parameters["base"] + 1 == parameters["ssc"] < parameters["foca"] == parameters["soca"]
    for curve in result["runs"]:
        assert curve["epochs"] == [1, 2]
        assert len(curve["psnr"]) == len(curve["loss"]) == 2 and all(value > 0 for value in curve["psnr"])
        summary = result["summary"][curve["variant"]]
        assert summary["mean_last"] == pytest.approx(curve["psnr"][-1])
        assert f"{summary['mean_last']:.3f}" in printed
    assert (tmp_path / "result.png").stat().st_size > 10_000

    # Once more with another seed: what is there is not trained again.
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*-0/last.pt")}
    assert len(stamps) == 4
    assert run(folder, tmp_path / "runs", *files, "--seeds", 0, 1) == 0
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["runs"][:4] == result["runs"] and len(again["runs"]) == 8
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    for name, about in again["summary"].items():
        low, high = about["range_last"]
        assert low <= about["mean_last"] <= high and low in [
            c["psnr"][-1] for c in again["runs"] if c["variant"] == name
        ]


def test_goes_on_after_a_kill(folder, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    assert run(folder, tmp_path / "a", "--variants", "soca", "--json", whole) == 0
    step, calls = training.Run._step, []

    def killed(self, *batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *batch)

    monkeypatch.setattr(training.Run, "_step", killed)
    assert run(folder, tmp_path / "b", "--variants", "soca", "--json", parts) == 130
    monkeypatch.undo()
    assert not parts.exists()
    assert run(folder, tmp_path / "b", "--variants", "soca", "--json", parts) == 0
    (first,), (second,) = (json.loads(path.read_text())["runs"] for path in (whole, parts))
    assert first | {"seconds": None} == second | {"seconds": None}


def test_presets():
    common = ["--data", "a", "--val", "b", "--out", "c"]
    paper = convergence.parse([*common, "--preset", "gpu"])
    settings = convergence.options(paper, "soca", 3)
    assert isinstance(settings, TrainOptions) and settings.out == Path("c/soca-3")
    assert (settings.n_resgroups, settings.n_resblocks, settings.n_feats) == (20, 10, 64)
    assert (settings.iterations, settings.validate_every, settings.lr, settings.seed) == (50_000, 1000, 1e-4, 3)
    for variant in ("base", "ssc", "foca", "soca"):
        small = convergence.options(convergence.parse(common), variant, 0)
        small.check()
        assert small.network().config["variant"] == variant


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--epochs", "0"], "--epochs"), (["--variants", "loca"], "loca"), (["--json", "no/such.json"], "no/such.json")],
)
def test_wrong_arguments_are_named(folder, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(folder, tmp_path, *arguments)
    assert message in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_named(tmp_path):
    line = [sys.executable, convergence.__file__, "--data", "absent", "--val", "absent", "--out", "runs"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "--val absent: no such folder" in done.stderr and "Traceback" not in done.stderr
