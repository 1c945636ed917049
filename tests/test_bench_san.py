"""The benchmark of the whole network runs, and says what it has to say."""

import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors", reason="san_model needs the extra [san]")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_san.py"
TINY = ["--patch", "8", "--batch", "2", "--image", "12", "--rounds", "2", "--threads", "1"]


def run(folder, *arguments):
    command = [sys.executable, str(SCRIPT), *TINY, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_measures_every_method_and_writes_it_down(tmp_path):
    done = run(tmp_path, "--json", "result.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["benchmark"] == "bench_san"
    assert result["network"]["n_resgroups"] == 4 and result["arguments"]["patch"] == 8
    assert [method["name"] for method in result["methods"]] == ["ours", "eig", "eager", "baddbmm", "mxm"]
    for method in result["methods"]:
        assert method["ran"], method
        assert f"\n{method['name']} " in done.stdout
        for block in ("training", "inference"):
            about = method[block]
            assert len(about["samples_ms"]) == len(about["covariance_samples_ms"]) == 2
            assert 0 < about["covariance_ms"] < about["median_ms"]
            assert 0 < about["covariance_percent"] < 100
            assert about["peak_torch_bytes"] > 0 and about["times_first"] > 0
        # All but EIG compute the same function; what is left on a scale of 0..255 is float32's rounding.
        assert method["difference"] < (256 if method["name"] == "eig" else 1e-2)


def test_bfloat16(tmp_path):
    done = run(tmp_path, "--dtype", "bfloat16", "--methods", "ours", "eager", "eig", "--json", "half.json")
    assert done.returncode == 0, done.stderr
    ours, eager, eig = json.loads((tmp_path / "half.json").read_text())["methods"]
    # On a scale of 0..255, of which bfloat16 has 8 bits.
    assert ours["ran"] and eager["ran"] and eager["difference"] < 2
    assert eig["ran"], eig["reason"]  # for which there is no bfloat16


def test_what_was_measured_before_an_interrupt_is_kept(monkeypatch, tmp_path, one_thread):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    bench_san = importlib.import_module("bench_san")
    timed, calls = bench_san.measure.time_ms, itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == 6:  # of round 2
            raise KeyboardInterrupt
        return timed(*arguments)

    monkeypatch.setattr(bench_san.measure, "time_ms", interrupted)
    file = tmp_path / "r.json"
    argv = ["--patch", "8", "--batch", "1", "--image", "8", "--methods", "ours", "eager", "--json", str(file)]
    assert bench_san.main(argv) == 0
    result = json.loads(file.read_text())
    assert result["rounds"] == 1
    assert all(len(method["training"]["samples_ms"]) == 1 for method in result["methods"])


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_convolutions_run_in_the_dtype(dtype, monkeypatch, one_thread):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    bench_san = importlib.import_module("bench_san")
    subject = bench_san.Subject(bench_san.parse([*TINY, "--dtype", dtype]))
    subject.use("ours")
    seen = set()
    subject.model.RG[0].conv_last.register_forward_hook(lambda module, inputs, output: seen.add(str(output.dtype)))
    subject.inference()
    subject.training()
    assert seen == {f"torch.{dtype}"}


def test_says_why_a_method_does_not_run(tmp_path):
    # M = 2048 x 2048, and two matrices of M x M floats: 128 TiB.
    done = run(tmp_path, "--methods", "mxm", "--image", "2048", "--batch", "1")
    assert done.returncode == 1
    assert "mxm did not run: its M x M matrices take" in done.stdout


@pytest.mark.parametrize(
    "argument, value", [("--rounds", "0"), ("--preset", "huge"), ("--json", "no/such/folder.json")]
)
def test_wrong_arguments_are_named(argument, value, tmp_path):
    done = run(tmp_path, argument, value)
    assert done.returncode == 2
    assert argument in done.stderr and value in done.stderr
