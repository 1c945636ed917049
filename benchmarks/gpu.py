#!/usr/bin/env python3
"""Everything that needs a GPU, in one command and into one folder; no network is needed.

    make gpu WHEEL=build/cuda/isqrt_cov-0.1.0-py3-none-linux_x86_64.whl OUT=out/gpu
    make gpu OUT=out/gpu STEPS="tests sanitize"           some of it; a later run into the same folder adds to it
    make gpu DRY_RUN=1                                    prints the commands and runs what needs no GPU

Each step writes its own log; a step that fails or takes too long does not stop the next. summary.json and summary.md
are written after each step and say what ran on which GPU with which driver, torch and commit. `make kernels` builds the
wheel on a machine with nvcc. Further wheels in WHEEL are installed with it: whatever a test imports and that machine
lacks.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = ROOT / "build" / "gpu"  # what is installed and built on the way
CONFORMANCE = ROOT / "tests" / "emulation" / "conformance.cu"

SHAPES = (
    "16x64x48x48 32x256x14x14 1x64x256x256 64x128x28x28 128x256x14x14 8x64x48x48 64x64x48x48 16x512x14x14 "
    "1x64x1000x1000"
).split()
# What stands for these where there is no GPU.
SMALL = "2x16x8x8"
DTYPES = ("float32", "bfloat16")
# Launches to profile, the first ones of bench_soca's warm-up, which goes forward, then forward and backward: with 64
# channels 4 and 6; with 256 some 15 and 30, and whatever follows.
PROFILED = {"16x64x48x48": 10, "32x256x14x14": 64, "1x64x256x256": 10}
# Some tests of every engine and element type: under compute-sanitizer they take long.
SANITIZED = "not memory and (clusters or (cov_sqrt_matches and (33 or 100 or 256)) or (half_is_computed and 40))"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables", "Occupancy",
    "LaunchStats", "WarpStateStats",
)  # fmt: skip
NEW = "warpgroup"  # the engine that has not run on a GPU yet
GRACE_S = 20  # what a step that took too long has for its report


@dataclass
class Step:
    """A command, how long it may take, and what replaces it where there is no GPU: nothing, with the reason."""

    name: str
    command: list[str]
    seconds: int
    dry: list[str] | str = "needs a GPU"
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    step: str
    status: str  # passed, failed, timed out, not run
    reason: str
    exit: int | None
    seconds: float
    command: str
    log: str | None


def machine(arguments: argparse.Namespace) -> Step:
    code = (
        "import json, sys, torch, isqrt_cov; sys.path.insert(0, 'benchmarks'); import report;"
        "device = torch.device('cuda' if torch.cuda.is_available() else 'cpu');"
        "print(json.dumps({'machine': report.machine(device), 'software': report.software()}))"
    )
    command = [arguments.python, "-P", "-c", code]
    return Step("machine", command, 120, command)


def conformance(arguments: argparse.Namespace) -> Step:
    """Builds the program as its head says and runs it."""
    if not CONFORMANCE.exists():
        return Step("conformance", [], 0, f"{CONFORMANCE.relative_to(ROOT)} is not there")
    found = re.search(r"nvcc .*?conformance\.cu", CONFORMANCE.read_text())
    if found is None:
        return Step("conformance", [], 0, f"{CONFORMANCE.name} does not say how it is built")
    program = shlex.quote(str(SCRATCH / "conformance"))
    build = f"{found[0]} -o {program}"
    dry = ["bash", "-c", build.replace("=native", "=sm_80")] if shutil.which("nvcc") else "needs nvcc"
    # What nvcc calls native has nothing of sm_90a.
    is_hopper = "nvidia-smi --query-gpu=compute_cap --format=csv,noheader | grep -qx 9.0"
    command = f"if {is_hopper}; then {build.replace('=native', '=sm_90a')}; else {build}; fi && {program}"
    return Step("conformance", ["bash", "-c", command], 240, dry)


def all_steps(arguments: argparse.Namespace) -> list[Step]:
    python, out = arguments.python, arguments.out
    pytest = [python, "-P", "-m", "pytest", "-m", "cuda", "-q", "-rs", "-p", "no:cacheprovider"]
    pytest += ["--continue-on-collection-errors"]  # of tests whose imports are not installed there
    side_by_side = ["-n", str(arguments.processes)] if arguments.processes > 1 else []
    tests = [*pytest, *side_by_side, f"--junitxml={out / 'tests.xml'}"]
    # First what a failure of all else would be understood by.
    steps = [machine(arguments), conformance(arguments), Step("tests", tests, 540, tests)]
    if arguments.wheel:
        install = [python, "-m", "pip", "install", "--no-index", "--no-deps", "--upgrade", "--target"]
        install += [str(SCRATCH / "site"), *map(str, arguments.wheel)]
        steps.insert(0, Step("install", install, 120, install))
    for tool in SANITIZERS:
        check = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
        # initcheck has to see torch's kernels too: they write what ours read.
        check += [] if tool == "initcheck" else ["--kernel-name", "kernel_substring=isqrt"]
        # Calls of the runtime that torch makes and handles itself are no fault of a kernel.
        check += ["--report-api-errors", "no"] if tool == "memcheck" else []
        own_allocations = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that bounds are those of the tensors
        steps.append(Step(tool, [*check, *pytest, "--maxfail=5", "-k", SANITIZED], 300, environment=own_allocations))
    soca = [python, "-P", "benchmarks/bench_soca.py"]
    for dtype in DTYPES:
        measured = [*soca, "--dtype", dtype]
        record = ["--json", str(out / f"soca_{dtype}.json"), "--plot", str(out / f"soca_{dtype}.png")]
        full = [*measured, "--device", "cuda", "--rounds", "21", "--shape", *arguments.shape, *record]
        dry = [*measured, "--quick", "--rounds", "1", "--shape", SMALL, *record]
        steps.append(Step(f"bench_soca_{dtype}", full, 540, dry))
    # What has not run on a GPU yet has a process of its own, which no other number is lost with.
    for name, more, small in (
        ("options", ["--without", NEW], ["--shape", SMALL]),
        ("options_new", ["--only", NEW], ["--shape", SMALL]),
        ("curves", [], ["--quick"]),
    ):
        program = f"benchmarks/{name.removesuffix('_new')}.py"
        measured = [python, "-P", program, "--json", str(out / f"{name}.json"), *more]
        plot = ["--plot", str(out / "curves.png")] if name == "curves" else []
        steps.append(Step(name, [*measured, "--device", "cuda", *plot], 300, [*measured, "--rounds", "1", *small]))
    san = [python, "-P", "benchmarks/bench_san.py"]
    for dtype in DTYPES:
        measured = [*san, "--dtype", dtype, "--json", str(out / f"san_{dtype}.json")]
        full = [*measured, "--device", "cuda", "--preset", "full", "--batch", "16", "--patch", "48"]
        dry = [*measured, "--batch", "1", "--patch", "8", "--image", "8", "--rounds", "1"]
        steps.append(Step(f"bench_san_{dtype}", full, 540, dry))
    for shape, launches in PROFILED.items():
        profile = ["ncu", "--clock-control", "none", "--kernel-name-base", "mangled", "--kernel-name", "regex:isqrt"]
        profile += ["--launch-count", str(launches)]
        profile += [option for section in SECTIONS for option in ("--section", section)]
        run = [*soca, "--device", "cuda", "--methods", "ours", "--rounds", "1", "--input", "randn", "--shape", shape]
        steps.append(Step(f"ncu_{shape}", [*profile, *run], 240))
    return steps


GROUPS = {
    "sanitize": SANITIZERS,
    "bench": (
        "options",
        "options_new",
        "curves",
        *(f"bench_{of}_{dtype}" for of in ("soca", "san") for dtype in DTYPES),
    ),
    "ncu": tuple(f"ncu_{shape}" for shape in PROFILED),
}
ALWAYS = ("install", "machine")


def chosen(steps: list[Step], wanted: Sequence[str]) -> list[Step]:
    names = {name for word in wanted for name in GROUPS.get(word, (word,))} | set(ALWAYS)
    return [step for step in steps if not wanted or step.name in names]


def run_step(step: Step, out: Path, environment: dict[str, str], seconds: float, dry: bool) -> Outcome:
    """Runs it, its output going to a log of its name; a step that takes too long is ended with all it has started."""
    command = step.dry if dry else step.command
    shown = shlex.join(step.command)
    reason = command if isinstance(command, str) else step.dry if not command else ""
    if not reason and shutil.which(command[0], path=environment.get("PATH")) is None:
        reason = f"{command[0]} was not found"
    if not reason and seconds < 1:
        reason = "no time was left"
    if reason:
        return Outcome(step.name, "not run", str(reason), None, 0.0, shown, None)
    log, start = out / f"{step.name}.log", time.monotonic()
    with log.open("w") as file:
        print(f"$ {shlex.join(command)}", file=file, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment | step.environment, stdout=file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
            # A shell's background job ignores interrupts, and so would whatever it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            code = process.wait(min(step.seconds, seconds))
            status, reason = ("passed", "") if code == 0 else ("failed", f"exit status {code}: {last_line(log)}")
        except subprocess.TimeoutExpired:
            code = end(process)
            status, reason = "timed out", f"after {min(step.seconds, seconds):.0f} s"
        except BaseException:  # a GPU that another process still uses would spoil whatever is measured next
            end(process)
            raise
    return Outcome(step.name, status, reason, code, time.monotonic() - start, shlex.join(command), log.name)


def end(process: subprocess.Popen) -> int:
    """Ends it with all it has started: by an interrupt, after which pytest still says what it found, then by force."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):  # it left none behind
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:120].replace("|", "/")


# ---- Summary


def provenance(out: Path, arguments: argparse.Namespace) -> dict:
    """What the step `machine` found."""
    about = {"commit": arguments.commit, "wheel": [path.name for path in arguments.wheel or []]}
    log = out / "machine.log"
    if log.exists() and (found := re.search(r"^\{.*\}$", log.read_text(), re.MULTILINE)):
        about |= json.loads(found[0])
    return about


def earlier_steps(out: Path) -> list[dict]:
    """Those of the summary in this folder, if there is one; ValueError where it is not of this program."""
    path = out / "summary.json"
    if not path.exists():
        return []
    steps = json.loads(path.read_text())["steps"]
    if not all({"step", "status", "commit", "wheel"} <= set(step) for step in steps):
        raise ValueError("its steps are others")
    return steps


def summarise(out: Path, about: dict, outcomes: list[Outcome], dry: bool) -> None:
    """Writes summary.json and summary.md; what an earlier run into this folder has, and this one did not run, stays."""
    of_this = {"commit": about["commit"], "wheel": about["wheel"]}
    steps = {step["step"]: step for step in earlier_steps(out)}
    for outcome in outcomes:
        if outcome.status != "not run" or steps.get(outcome.step, {}).get("status", "not run") == "not run":
            steps.pop(outcome.step, None)  # to the end
            steps[outcome.step] = asdict(outcome) | of_this
    path = out / "summary.json"
    path.write_text(json.dumps({"dry_run": dry, **about, "steps": list(steps.values())}, indent=1) + "\n")
    software, hardware = about.get("software", {}), about.get("machine", {})
    gpu = hardware.get("gpu") or {}
    facts = {
        "GPU": gpu.get("name", "none"),
        "driver": gpu.get("driver"),
        "torch": software.get("torch"),
        "CUDA of torch": software.get("torch_cuda"),
        "Python": software.get("python"),
        "compiled for": (software.get("isqrt_cov") or {}).get("cuda_architectures"),
        "commit": about["commit"] or "not said",
        "wheel": ", ".join(about["wheel"]) or "as installed",
    }
    lines = ["# What ran on the GPU" if not dry else "# Dry run without a GPU", ""]
    lines += [f"* {name}: {value}" for name, value in facts.items() if value]
    lines += ["", "| step | status | seconds | commit | log |", "| --- | --- | --- | --- | --- |"]
    for step in steps.values():
        status = step["status"] + (f": {step['reason']}" if step["reason"] else "")
        cells = [step["step"], status, f"{step['seconds']:.0f}", step["commit"][:12], step["log"] or ""]
        lines.append(f"| {' | '.join(cells)} |")
    (out / "summary.md").write_text("\n".join(lines) + "\n")


def shape(text: str) -> str:
    """A command-line argument; what takes it is another process, perhaps of another Python."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected BxCxHxW of positive integers, such as 16x64x48x48, got {text!r}")
    return text


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "Groups of steps: " + "; ".join(f"{name}: {' '.join(steps)}" for name, steps in GROUPS.items())
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/gpu"), metavar="FOLDER", help="for logs and results (default: out/gpu)")
    add("--wheel", type=Path, nargs="*", default=[], metavar="FILE", help="default: isqrt_cov as it is installed")
    add("--steps", nargs="*", default=[], metavar="STEP", help="default: all; groups below")
    add(
        "--seconds",
        type=float,
        default=float("inf"),
        help="for everything together: a step that finds none left is skipped",
    )
    add("--shape", type=shape, nargs="+", default=SHAPES, metavar="BxCxHxW", help="for bench_soca")
    add("--processes", type=int, default=1, metavar="N", help="that run the tests side by side, with pytest-xdist")
    add("--commit", default="", help="of the sources, for the summary")
    add("--python", default=sys.executable, help="the interpreter with torch (default: this one)")
    add("--dry-run", action="store_true", help="run what needs no GPU")
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out.absolute()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        earlier_steps(arguments.out)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    except (ValueError, KeyError, TypeError):
        parser.error(f"argument --out: {arguments.out}/summary.json is of another program or version")
    arguments.wheel = [path.absolute() for path in arguments.wheel]
    for path in arguments.wheel:
        if not path.is_file():
            parser.error(f"argument --wheel: no file {path}")
    known = [step.name for step in all_steps(arguments)] + list(GROUPS)
    for word in arguments.steps:
        if word not in known:
            parser.error(f"argument --steps: {word!r} is none of {', '.join(known)}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    out, start = arguments.out, time.monotonic()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")  # nvcc, ncu and compute-sanitizer
    os.environ["PATH"] += f"{os.pathsep}{toolkit}/bin"
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if arguments.commit:
        environment["ISQRT_COMMIT"] = arguments.commit  # for the results, where there is no checkout
    if arguments.wheel:
        paths = [str(SCRATCH / "site"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    outcomes: list[Outcome] = []
    for step in chosen(all_steps(arguments), arguments.steps):
        left = arguments.seconds - (time.monotonic() - start) - GRACE_S
        print(f"== {step.name}\n$ {shlex.join(step.command)}", flush=True)
        outcome = run_step(step, out, environment, left, arguments.dry_run)
        outcomes.append(outcome)
        print(f"   {outcome.status}{': ' * bool(outcome.reason)}{outcome.reason} ({outcome.seconds:.0f} s)", flush=True)
        summarise(out, provenance(out, arguments), outcomes, arguments.dry_run)
    print(f"\n{(out / 'summary.md').read_text()}")
    good = ("passed", "not run") if arguments.dry_run else ("passed",)
    return 0 if all(outcome.status in good for outcome in outcomes) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # not without ending the step
    sys.exit(main())
