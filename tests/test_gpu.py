"""The one command for a machine with a GPU: what it would run there, tried out without one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_san  # noqa: E402
import bench_soca  # noqa: E402
import curves  # noqa: E402
import gpu  # noqa: E402
import options  # noqa: E402


def outcome_of(command, out, seconds=60, limit=60.0, dry=False):
    return gpu.run_step(gpu.Step("step", command, seconds), out, dict(os.environ), limit, dry)


def test_each_outcome_of_a_step(tmp_path):
    passed = outcome_of(["bash", "-c", "echo said"], tmp_path)
    assert (passed.status, passed.exit, passed.log) == ("passed", 0, "step.log")
    assert (tmp_path / "step.log").read_text().splitlines() == ["$ bash -c 'echo said'", "said"]
    failed = outcome_of(["bash", "-c", "echo the reason; exit 3"], tmp_path)
    assert (failed.status, failed.exit, failed.reason) == ("failed", 3, "exit status 3: the reason")
    missing = outcome_of(["no-such-program"], tmp_path)
    assert (missing.status, missing.reason) == ("not run", "no-such-program was not found")
    assert outcome_of(["true"], tmp_path, limit=0.0).reason == "no time was left"
    assert outcome_of(["true"], tmp_path, dry=True).reason == "needs a GPU"


def test_step_that_takes_too_long_is_ended_with_its_children(tmp_path):
    ended = outcome_of(["bash", "-c", "sleep 600 & echo $!; wait"], tmp_path, seconds=1)
    assert (ended.status, ended.reason) == ("timed out", "after 1 s")
    child = int((tmp_path / "step.log").read_text().split()[-1])

    def alive():
        try:
            return "zombie" not in Path(f"/proc/{child}/status").read_text()
        except OSError:
            return False

    for _ in range(100):  # killed at once, gone a little later
        if alive():
            time.sleep(0.1)
    assert not alive()


def test_step_that_takes_too_long_still_reports(tmp_path):
    ended = outcome_of(["bash", "-c", "trap 'echo reported; exit 2' INT; sleep 600 & wait"], tmp_path, seconds=1)
    assert (ended.status, ended.exit) == ("timed out", 2)
    assert (tmp_path / "step.log").read_text().splitlines()[-1] == "reported"


def test_step_that_ignores_the_interrupt_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_S", 0.2)
    ended = outcome_of(["bash", "-c", "trap '' INT; sleep 600; true"], tmp_path, seconds=1)
    assert (ended.status, ended.exit) == ("timed out", -9)


def test_dry_run(tmp_path, capsys):
    command = ["--dry-run", "--out", str(tmp_path), "--commit", "abc", "--steps"]
    assert gpu.main([*command, "sanitize"]) == 0
    printed = capsys.readouterr().out
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        assert f"compute-sanitizer --tool {tool}" in printed
    assert gpu.main([*command, "ncu_16x64x48x48"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["commit"] == "abc" and summary["software"]["torch"] == torch.__version__ and summary["dry_run"]
    status = {step["step"]: step["status"] for step in summary["steps"]}
    assert status == dict.fromkeys([*gpu.SANITIZERS, "ncu_16x64x48x48"], "not run") | {"machine": "passed"}
    assert "| memcheck | not run: needs a GPU |" in (tmp_path / "summary.md").read_text()


def test_a_failing_step_does_not_stop_the_next(tmp_path, monkeypatch):
    failing, passing = (gpu.Step(name, [name], 9) for name in ("false", "true"))
    monkeypatch.setattr(gpu, "all_steps", lambda arguments: [failing, passing])
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert gpu.main(["--out", str(tmp_path), "--steps", "true"]) == 0
    status = [(s["step"], s["status"]) for s in json.loads((tmp_path / "summary.json").read_text())["steps"]]
    assert status == [("false", "failed"), ("true", "passed")]


def test_an_outcome_stays_until_the_step_has_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "all_steps", lambda arguments: [gpu.Step(name, [name], 9) for name in ("true", "false")])

    def steps(*arguments):
        gpu.main(["--out", str(tmp_path), *arguments])
        steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
        return [(step["step"], step["status"], step["commit"]) for step in steps]

    assert steps("--commit", "a", "--steps", "true") == [("true", "passed", "a")]
    # Of this budget nothing is left beyond what a step that takes too long has for its report.
    no_time = [("true", "passed", "a"), ("false", "not run", "b")]
    assert steps("--commit", "b", "--seconds", str(gpu.GRACE_S)) == no_time
    assert steps("--commit", "c") == [("true", "passed", "c"), ("false", "failed", "c")]
    assert "| true | passed | 0 | c | true.log |" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_step_ends_with_the_program(tmp_path, number):
    """Whatever was left behind would use the GPU beside what comes next."""
    log = tmp_path / "step.log"
    code = (
        "import os, pathlib, signal, sys; sys.path.insert(0, 'benchmarks'); import gpu;"
        "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number));"
        "step = gpu.Step('step', ['bash', '-c', 'echo $$; exec sleep 600'], 600);"
        f"gpu.run_step(step, pathlib.Path({str(tmp_path)!r}), dict(os.environ), 600.0, False)"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=gpu.ROOT,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    for _ in range(300):
        if log.exists() and len(log.read_text().split("\n")) > 2:
            break
        time.sleep(0.1)
    child = int(log.read_text().split()[-1])
    program.send_signal(number)
    assert program.wait(30) != 0
    assert not Path(f"/proc/{child}").exists()


def test_what_has_not_run_on_a_gpu_yet_is_a_step_of_its_own(tmp_path):
    steps = {step.name: step for step in gpu.all_steps(gpu.parse(["--out", str(tmp_path)]))}
    known, new = ([*steps[name].dry[2:], "--rounds", "1"] for name in ("options", "options_new"))
    measured = [
        {name for name in options.OPTIONS if options.wanted(options.parse(arguments[1:]), name)}
        for arguments in (known, new)
    ]
    assert measured[0] & measured[1] == {"base"} and measured[0] | measured[1] == set(options.OPTIONS)
    assert all("warpgroup" in name for name in measured[1] - {"base"})


def test_benchmarks_understand_what_they_are_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    steps = {step.name: step for step in gpu.all_steps(gpu.parse(["--out", str(tmp_path)]))}
    assert {name for group in gpu.GROUPS.values() for name in group} < set(steps)

    def arguments(command, program):
        return command[command.index(f"benchmarks/{program}.py") + 1 :]

    for program in (bench_soca, bench_san, options, curves):
        name = program.__name__
        for step in steps.values():
            for command in (step.command, step.dry):
                if f"benchmarks/{name}.py" in command:
                    program.parse(arguments(command, name))


def test_conformance_is_built_as_its_head_says(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SCRATCH", tmp_path)
    arguments = gpu.parse(["--out", str(tmp_path / "out")])
    program = tmp_path / "conformance"
    built = f"nvcc -std=c++20 -O3 -arch=native -Icsrc tests/emulation/conformance.cu -o {program}"
    step = gpu.conformance(arguments)
    assert step.dry in (["bash", "-c", built.replace("native", "sm_80")], "needs nvcc")
    assert f"then {built.replace('native', 'sm_90a')}; else {built}; fi && {program}" in step.command[-1]
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "CONFORMANCE", tmp_path / "conformance.cu")
    assert gpu.conformance(arguments).dry == "conformance.cu is not there"


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--steps", "everything"], "argument --steps: 'everything' is none of machine, conformance, "),
        (["--wheel", "none.whl"], "argument --wheel: no file"),
        (["--shape", "16x64x48"], "argument --shape: expected BxCxHxW of positive integers"),
        (["--out", "/dev/null/out"], "argument --out: [Errno 20] Not a directory"),
    ),
)
def test_wrong_arguments(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        gpu.parse(["--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


def test_a_summary_of_something_else_is_not_touched(tmp_path, capsys):
    summary = tmp_path / "summary.json"
    summary.write_text('{"tests": 3}')
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert "summary.json is of another program or version" in capsys.readouterr().err
    assert summary.read_text() == '{"tests": 3}'
