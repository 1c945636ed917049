"""Bank conflicts and coalescing: every access to shared and global memory that the emulated kernels execute.

    python tests/emulation/lint.py        a line for each access, the worst first

Kernels are compiled with ThreadSanitizer's instrumentation and without ThreadSanitizer: `lint_recorder.cpp` has the
functions that instrumented code calls. g++ does not split copies of structures here (-fno-tree-sra), so that an access
is as wide as the source has it. nvcc may still join or split accesses; their widths in the SASS stand in the same page
as what this finds.
"""

import hashlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from emulation import build  # noqa: E402

PROGRAMS = {"lint_cases": ["lint_cases.cpp", *build.CUDA], "lint_seeds": ["lint_seeds.cu"]}
INSTRUMENTED = ["-O1", "-g", "-fno-tree-sra", "-fno-threadsafe-statics", "-fsanitize=thread"]  # one thread at a time
WRAPPED = [
    "-Wl,--wrap=_ZN9emulation10copy_asyncEPvPKvjiRKNS_6CallerE",
    "-Wl,--wrap=_ZN9emulation13load_matricesERA4_jPKvbRKNS_6CallerE",
]
# What stands here serves all kernels: an access in there is told by the line that asks for it.
SHARED_SOURCE = ("block.cuh", "number.cuh", "launch.cuh", "ptx.cuh", "views.h", "lint_recorder.cpp")

CASES_TEXT = "for one sample, in two chunks where nothing else is said, or 3 steps"
TOTAL_KEYS = ("kernel", "case", "memory", "access")
LINE_KEYS = (*TOTAL_KEYS, "bytes", "line")


class Frame(NamedTuple):
    function: str
    file: str
    line: str


@dataclass(frozen=True)
class Access:
    """One instruction of a kernel in one case: how often warps executed it, and its bank cycles or sectors."""

    kernel: str
    case: str
    memory: str
    access: str
    bytes: int
    line: str
    executions: int
    cycles: int
    ideal: int


@dataclass(frozen=True)
class Report:
    """Cells by heading, for each tuple of TOTAL_KEYS and of LINE_KEYS."""

    totals: dict[tuple[str, ...], dict[str, str]]
    lines: dict[tuple[str, ...], dict[str, str]]


def fingerprint(*command: object) -> str:
    """Of a compiler call, the compiler, and everything that it could include."""
    digest = hashlib.sha256(repr(command).encode() + build.compiler_version())
    for folder in (build.ROOT / "csrc", build.EMULATION):
        for path in sorted(folder.rglob("*.*")):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@build.alone()
def compile_program(program: str) -> Path:
    """The path of ``lint_cases`` or ``lint_seeds``, up to date."""

    def compile_object(source: str | Path) -> Path:
        source = build.EMULATION / source
        command = [build.CXX, *build.COMMON, f"-I{build.EMULATION / 'include'}"]
        command += build.KERNELS if source.suffix == ".cu" else []
        command += INSTRUMENTED if source.suffix == ".cu" else ["-O2"]
        target = build.CACHE / "lint" / f"{source.stem}-{fingerprint(command, source)}.o"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            build.run([*command, "-c", source, "-o", target])
        return target

    sources = [*PROGRAMS[program], "lint_recorder.cpp", *build.RUNTIME]
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_object, sources))
    target = build.CACHE / "lint" / program
    build.run([build.CXX, "-no-pie", *WRAPPED, *objects, "-o", target, "-lpthread", "-ldl"])
    return target


def run(program: str, name: Callable[[str], str] = str) -> list[Access]:
    """What ``program`` records; ``name`` makes a kernel's name from its demangled one."""
    binary = compile_program(program)
    lines = subprocess.run([binary], capture_output=True, text=True, check=True).stdout.splitlines()
    records = [line.split("\t") for line in lines]
    frames = locate(binary, {address for record in records for address in record[-1].split()})
    accesses = []
    for case, memory, access, size, executions, cycles, ideal, chain in records:
        calls = [frame for address in chain.split() for frame in frames[address]]
        launch = max(i for i, call in enumerate(calls) if "cudaLaunchKernelEx" in call.function)
        in_kernel = calls[launch + 1 :]
        numbers = int(executions), int(cycles), int(ideal)
        accesses.append(
            Access(name(in_kernel[0].function), case, memory, access, int(size), place(in_kernel), *numbers)
        )
    return accesses


def locate(binary: Path, addresses: set[str]) -> dict[str, list[Frame]]:
    """The calls that return to each of these addresses, the outermost first: several where functions are inlined."""
    before = "\n".join(hex(int(address, 16) - 1) for address in addresses)
    command = ["addr2line", "-a", "-i", "-f", "-C", "-e", binary]
    output = subprocess.run(command, input=before, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[Frame]] = {}
    for answer in re.split(r"^0x", output, flags=re.MULTILINE)[1:]:
        at, *lines = answer.splitlines()
        frames = []
        for function, location in zip(lines[::2], lines[1::2], strict=True):
            file, _, line = re.sub(r" \(discriminator \d+\)", "", location).rpartition(":")
            frames.insert(0, Frame(function, Path(file).name, line))
        found[hex(int(at, 16) + 1)] = frames
    return found


def place(calls: list[Frame]) -> str:
    """`file:line` of an access; what serves all kernels comes after the line that called it."""
    lines = [f"{call.file}:{call.line}" for call in calls]
    own = next((i for i in reversed(range(len(calls))) if calls[i].file not in SHARED_SOURCE), 0)
    return lines[own] if own == len(calls) - 1 else f"{lines[own]} ({lines[-1]})"


def summed(accesses: list[Access], keys: tuple[str, ...]) -> dict[tuple[str, ...], dict[str, str]]:
    executions, cycles, ideal = Counter(), Counter(), Counter()
    for a in accesses:
        key = tuple(str(getattr(a, k)) for k in keys)
        executions[key] += a.executions
        cycles[key] += a.cycles
        ideal[key] += a.ideal
    return {
        key: {"warp accesses": str(executions[key]), "x ideal": f"{cycles[key] / ideal[key]:.2f}"}
        for key in sorted(executions)
    }


def report(name: Callable[[str], str] = str) -> Report:
    accesses = run("lint_cases", name)
    return Report(summed(accesses, TOTAL_KEYS), summed(accesses, LINE_KEYS))


if __name__ == "__main__":
    rows = report().lines
    for key in sorted(rows, key=lambda k: -float(rows[k]["x ideal"])):
        print(f"{rows[key]['x ideal']:>6} x  {rows[key]['warp accesses']:>8}  {'  '.join(key)}")
