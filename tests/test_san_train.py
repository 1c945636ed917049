"""Training: it learns, survives a kill at any moment to the bit, is the same distributed, and stops at NaN."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("jsonargparse", reason="san_model needs the extra [san]")
pytest.importorskip("png", reason="san_model needs the extra [san]")
pytest.importorskip("tensorboard", reason="san_model needs the extra [san]")
from safetensors.torch import load_file

from san_model import SAN
from san_model import train as training
from san_model.distributed import processes
from san_model.images import InputError, Picture, write
from san_model.options import PRESETS, TrainOptions, flag
from san_model.train import TrainingError, train

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"n_resgroups": 1, "n_resblocks": 1, "n_feats": 8, "reduction": 4, "patch": 8, "batch": 4, "lr": 1e-3}
FAST = {"iterations": 9, "validate_every": 4, "checkpoint_every": 3, "log_every": 2, "workers": 0, "device": "cpu"}
SAN_COMMAND = [sys.executable, "-m", "san_model"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A training and a validation folder of smooth random images."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for name in ("train/a", "train/b", "train/c", "val/d", "val/e"):
        coarse = torch.rand(1, 3, 6, 6, generator=generator) * 255
        image = torch.nn.functional.interpolate(coarse, size=(40, 44), mode="bicubic").clamp(0, 255)
        write(root / f"{name}.png", Picture(image[0]))
    return root


def options(images, out, **changes):
    values = {"data": [str(images / "train")], "val": [str(images / "val")], "out": Path(out)}
    return TrainOptions(**(values | TINY | FAST | changes))


def flags(options_):
    """The command line of a training."""
    line = []
    for name in [*TINY, *FAST, "data", "val", "out", "ema", "clip"]:
        value = getattr(options_, name)
        line += [flag(name), *map(str, value if isinstance(value, list) else [value])]
    return line


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def weights(out, name="last"):
    return load_file(Path(out) / f"{name}.safetensors")


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    """A finished run that others are compared with."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run")
    result = train(options(images, out, ema=0.9, clip=50.0))
    return out, result


def test_a_run_leaves_what_it_says(images, uninterrupted):
    out, result = uninterrupted
    assert result["iteration"] == 9
    assert [entry["iteration"] for entry in result["history"]] == [4, 8, 9]
    assert json.loads((out / "history.json").read_text()) == {"best": result["best"], "history": result["history"]}
    assert result["best"]["psnr"] == max(entry["psnr"]["val"] for entry in result["history"])
    assert list(out.glob("events.out.tfevents.*")) and not list(out.glob(".unfinished*"))
    modes = {path.stat().st_mode & 0o777 for path in out.iterdir()}
    (out / "any").touch()
    assert modes == {(out / "any").stat().st_mode & 0o777}  # as the umask gives them
    model = SAN.from_checkpoint(out / "last.safetensors")
    assert model.config["n_feats"] == 8
    assert_same_weights(dict(SAN.from_checkpoint(out / "last.pt").state_dict()), weights(out))  # the mean, too
    assert weights(out, "best").keys() == model.state_dict().keys()
    own = torch.load(out / "last.pt", weights_only=True)["model"]
    assert any(not torch.equal(own[key], value) for key, value in weights(out).items())


def test_it_learns(images, tmp_path):
    result = train(options(images, tmp_path, iterations=60, validate_every=30, lr=3e-3))
    first, last = (entry["loss"] for entry in result["history"])
    assert last < 0.7 * first
    assert result["history"][1]["psnr"]["val"] > result["history"][0]["psnr"]["val"]


@pytest.mark.parametrize("moment", ["step", "validation", "best", "weights", "history", "state", "rename"])
def test_it_resumes_to_the_same_bits_wherever_it_dies(images, uninterrupted, tmp_path, monkeypatch, moment):
    """An exception stands in for the kill: nothing runs after it, and the files are as they are at that moment."""

    class Killed(Exception):
        pass

    def dies(target, name, call):
        """Replaces a function by one that dies in its ``call``-th call, having begun to write where it writes."""
        original, calls = getattr(target, name), []

        def replaced(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                for argument in args:
                    if isinstance(argument, Path):
                        argument.write_bytes(b"half a fi")
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(target, name, replaced)

    target = {
        "step": (training.Run, "_step", 6), "validation": (training.Run, "_validate", 2),
        "best": (Path, "write_bytes", 2), "weights": (Path, "write_bytes", 4), "history": (training.json, "dumps", 3),
        "state": (torch, "save", 3), "rename": (training.os, "replace", 8),
    }[moment]  # fmt: skip
    dies(*target)
    settings = options(images, tmp_path, ema=0.9, clip=50.0, resume=True)
    with pytest.raises(Killed):
        train(settings)
    monkeypatch.undo()
    result = train(settings)
    out, expected = uninterrupted
    for name in ("last", "best"):
        assert_same_weights(weights(tmp_path, name), weights(out, name))
    for mine, theirs in zip(result["history"], expected["history"], strict=True):
        assert mine | {"seconds": 0} == theirs | {"seconds": 0}
    assert result["best"] == expected["best"]


def test_it_resumes_to_the_same_bits_after_sigkill(images, uninterrupted, tmp_path):
    settings = options(images, tmp_path, ema=0.9, clip=50.0, iterations=9)
    line = [*SAN_COMMAND, "train", *flags(settings), "--resume"]
    process = subprocess.Popen(line, env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "last.pt").exists()
    unfinished = tmp_path / ".unfinished-0.pt"  # as if it had died while it wrote
    unfinished.touch()
    train(options(images, tmp_path, ema=0.9, clip=50.0, resume=True, workers=1))
    assert not unfinished.exists()
    for name in ("last", "best"):
        assert_same_weights(weights(tmp_path, name), weights(uninterrupted[0], name))


def test_a_resumed_run_must_be_the_same_run(images, uninterrupted):
    out, _ = uninterrupted
    same = {"ema": 0.9, "clip": 50.0}
    with pytest.raises(InputError, match="--out .* holds a run already; --resume continues it"):
        train(options(images, out, **same))
    with pytest.raises(InputError, match="--lr 0.002: the run in .* has 0.001"):
        train(options(images, out, **same, resume=True, lr=2e-3))
    with pytest.raises(InputError, match="--data .*val, --shrink, --collages: not the images of"):
        train(options(images, out, **same, resume=True, data=[str(images / "val")]))


def test_a_damaged_checkpoint_is_named(images, tmp_path):
    (tmp_path / "last.pt").write_bytes(b"nothing of the sort")
    with pytest.raises(InputError, match=r"--resume: .*last\.pt cannot be read as a checkpoint"):
        train(options(images, tmp_path, resume=True))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"model": None}, "model: expected OrderedDict, got NoneType"),
        ({"model": {"gamma": torch.ones(2)}}, "size mismatch for gamma"),
        ({"ema": {"gamma": torch.ones(2)}}, "size mismatch for gamma"),
        ({"optimizer": 5}, "optimizer: expected dict, got int"),
        ({"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "optimizer: not of the parameters' shapes"),
        ({"optimizer": {"state": {0: {"exp_avg": 5}}}}, "cannot be read"),
        ({"iteration": "x"}, "iteration: expected int, got str"),
        ({"iteration": -5}, "is at iteration -5 of 9"),
        ({"iteration": 100}, "is at iteration 100 of 9"),
        ({"seconds": None}, "seconds: expected float, got NoneType"),
        ({"loss": [1]}, "cannot be read"),
        ({"random": [1]}, "cannot be read"),
        ({"random": [{"cpu": torch.ones(3)}]}, "cannot be read"),
        ({"best": 5}, "best: expected dict, got int"),
        ({"options": 5}, "cannot be read"),
    ],
)
def test_a_part_of_a_checkpoint_that_is_damaged_is_named(images, uninterrupted, tmp_path, damage, message):
    def damaged(whole, part):
        """The whole with what the part has in its place."""
        if not isinstance(part, dict):
            return part
        for key, value in part.items():
            whole[key] = damaged(whole[key], value)
        return whole

    torch.save(damaged(torch.load(uninterrupted[0] / "last.pt"), damage), tmp_path / "last.pt")
    with pytest.raises(InputError) as error:
        train(options(images, tmp_path, ema=0.9, clip=50.0, resume=True))
    said = str(error.value)
    assert f"--resume: {tmp_path / 'last.pt'} " in said and message in said and "\n" not in said


def test_two_trainings_never_write_one_run(images, tmp_path):
    settings = options(images, tmp_path / "run", iterations=100_000, checkpoint_every=1, workers=1)
    line = [*SAN_COMMAND, "train", *flags(settings)]
    process = subprocess.Popen(line, env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (settings.out / "last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(InputError, match="--out .*run: another training writes to it"):
            train(options(images, settings.out, resume=True))
    finally:
        process.kill()
        process.wait()
    with pytest.raises(InputError, match="holds a run already"):  # its worker lives on, and holds nothing
        train(options(images, settings.out))


def test_torchrun_gives_the_same_losses(images, uninterrupted, tmp_path):
    settings = options(images, tmp_path, ema=0.9, clip=50.0)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "san_model"]
    done = subprocess.run(
        [*line, "train", *flags(settings)], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path / "history.json").read_text())["history"]
    for mine, theirs in zip(history, uninterrupted[1]["history"], strict=True):
        # The same batches; the sums over them are rounded in another order.
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["psnr"]["val"] == pytest.approx(theirs["psnr"]["val"], abs=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed in /proc")
@pytest.mark.parametrize("fails", [False, True])
def test_no_thread_outlives_the_process_group(monkeypatch, fails):
    """One that did would meet a Python that is gone, and abort the process: now and then, at its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))

    class Holder:
        """Holds the group in a cycle, as a run does."""

        def __init__(self):
            self.network, self.cycle = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1)), self

        def run(self):
            self.network(torch.ones(1, 1)).sum().backward()
            assert any("gloo" in name for name in threads())
            if fails:
                raise TrainingError("stop")

    def threads():
        return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]

    try:
        with processes("cpu"):
            Holder().run()
    except TrainingError:  # its traceback, and what hangs on it, is there until the block ends
        assert fails and not any("gloo" in name for name in threads())
    assert not any("gloo" in name for name in threads())


@pytest.mark.parametrize("when", ["loss", "gradient"])
def test_a_nan_stops_with_the_batch_named(images, tmp_path, monkeypatch, when):
    settings = options(images, tmp_path, workers=0)
    run_step = training.Run._step

    def poisoned(self, lr, hr, indices):
        if self.iteration == 5:
            if when == "loss":
                hr = hr.float()
                hr[2, 0, 3, 3] = float("nan")
            else:
                self.model.head[0].weight.register_hook(lambda gradient: gradient * float("inf"))
        return run_step(self, lr, hr, indices)

    monkeypatch.setattr(training.Run, "_step", poisoned)
    with pytest.raises(TrainingError) as error:
        train(settings)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(
        "iteration 6: " + ("the loss is nan" if when == "loss" else "the gradient is not finite")
    )
    assert len(lines) == 5 and all(".png: LR rows " in line for line in lines[1:])
    assert [line.endswith("<- not finite") for line in lines[1:]] == [False, False, when == "loss", False]
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_schedules():
    step = TrainOptions(data=[], out=Path(), lr=1, lr_step=10, warmup=4)
    assert [step.learning_rate(i) for i in (0, 1, 3, 9, 10, 20)] == [0.25, 0.5, 1, 1, 0.5, 0.25]
    cosine = TrainOptions(data=[], out=Path(), lr=1, schedule="cosine", iterations=100)
    assert cosine.learning_rate(0) == 1 and cosine.learning_rate(50) == pytest.approx(0.5)
    assert cosine.learning_rate(100) == pytest.approx(0, abs=1e-9)


def test_presets_are_options():
    paper = TrainOptions(data=[], out=Path(), **PRESETS["paper"])
    assert (paper.patch, paper.batch, paper.lr, paper.lr_step, paper.n_resgroups) == (48, 16, 1e-4, 200_000, 20)
    paper.check()
    small = TrainOptions(data=[], out=Path(), **PRESETS["small"])
    small.check()
    assert sum(p.numel() for p in small.network().parameters()) < 500_000


@pytest.mark.parametrize("change", [{"amp": "bf16"}, {"init": True}, {"scale": 3}, {"variant": "ssc"}, {"cache": True},
                                    {"channels_last": True}, {"collages": 1}])  # fmt: skip
def test_options_work(images, uninterrupted, tmp_path, change):
    if "init" in change:
        change = {"init": uninterrupted[0] / "last.safetensors", "scale": 4}
    if "cache" in change:
        change = {"cache": tmp_path / "cache"}
    result = train(options(images, tmp_path / "run", **(change | {"iterations": 2})))
    assert result["iteration"] == 2 and result["best"]["psnr"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "--batch 0: expected 1 or more"),
        ({"ema": 1.0}, "--ema 1.0: expected at least 0 and less than 1"),
        ({"shrink": [0.5, 1.0]}, "--shrink 1.0: expected more than 0 and less than 1"),
        ({"collages": -1}, "--collages -1: expected 0 or more"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"n_feats": 9}, "--n-feats: expected a multiple of 8"),
        ({"root_iterations": 0}, "--root-iterations: expected .* got 0"),
        ({"root_iterations": 5000, "data": ["absent"]}, "--root-iterations: expected 1000 or less, got 5000"),
        ({"patch": 64}, r"a\.png: 44 x 40 is too small, 128 a side are needed"),
        ({"device": "nowhere"}, "--device nowhere: not available"),
        ({"init": Path("absent.pt")}, r"--init absent\.pt"),
        ({"data": ["absent"]}, "--data absent: no such folder"),
        ({"seed": 2**64}, "--seed 18446744073709551616: expected less than"),
    ],
)
def test_wrong_options_are_named(images, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        train(options(images, tmp_path, **change))


def test_what_cannot_be_validated_on_is_named_before_training(images, tmp_path):
    write(tmp_path / "tiny/dot.png", Picture(torch.zeros(3, 5, 40)))
    with pytest.raises(InputError, match=r"dot\.png: 40 x 4 is too small, 6 a side are needed"):
        train(options(images, tmp_path / "run", val=[str(tmp_path / "tiny")]))
    write(tmp_path / "tiny/dot.png", Picture(torch.zeros(3, 6, 40)))
    assert train(options(images, tmp_path / "run", val=[str(tmp_path / "tiny")], iterations=1))["best"]


def test_best_weights_of_other_validation_data_do_not_count(images, tmp_path, capsys):
    (tmp_path / "easy").mkdir()
    write(tmp_path / "easy/flat.png", Picture(torch.full((3, 40, 40), 128.0)))
    first = train(options(images, tmp_path / "run", iterations=2, val=[str(tmp_path / "easy")]))["best"]
    assert first["data"] == ["easy"]
    changed = {"iterations": 4, "validate_every": 2, "resume": True}
    second = train(options(images, tmp_path / "run", **changed))["best"]
    assert (second["data"], second["iteration"]) == (["val"], 4)
    assert "chosen anew, for it was by easy" in capsys.readouterr().err
    assert_same_weights(weights(tmp_path / "run", "best"), weights(tmp_path / "run"))


def test_weights_for_another_white_are_refused(images, tmp_path):
    SAN(n_resgroups=1, n_resblocks=1, n_feats=8, reduction=4, rgb_range=1).save(tmp_path / "one.safetensors")
    with pytest.raises(InputError, match=r"--init .*one\.safetensors: white is 1 for these weights, and 255 here"):
        train(options(images, tmp_path / "run", init=tmp_path / "one.safetensors"))


def test_half_a_torchrun_is_named(images, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(InputError, match="WORLD_SIZE is set.* but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        train(options(images, tmp_path / "run"))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WORLD_SIZE", "abc", "WORLD_SIZE: expected a whole number, got 'abc'"),
        ("LOCAL_RANK", "-1", "LOCAL_RANK: expected a whole number, got '-1'"),
        ("MASTER_PORT", "abc", "MASTER_PORT: expected a whole number, got 'abc'"),
        ("MASTER_PORT", "65536", "MASTER_PORT: expected less than 65536, got 65536"),
        ("RANK", "5", "RANK: expected less than WORLD_SIZE = 1, got 5"),
    ],
)
def test_what_torchrun_never_sets_is_named(images, tmp_path, monkeypatch, variable, value, message):
    variables = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, usual in variables.items():
        monkeypatch.setenv(name, value if name == variable else usual)
    with pytest.raises(InputError, match=message):
        train(options(images, tmp_path / "run"))
