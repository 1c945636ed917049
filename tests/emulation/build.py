"""Compiles csrc/cuda for the emulated device, and csrc/cpu for sanitizers, with g++; no nvcc is needed.

    python tests/emulation/build.py [plain|address|thread|shadow|coverage ...]        builds everything in these modes

What is built lies in build/emulation; of it, only what a change reaches is built again.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "emulation"
CACHE = ROOT / "build" / "emulation"
CXX = os.environ.get("CXX", "g++")

COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
COMMON += [f"-I{ROOT / 'csrc'}", f"-I{EMULATION}"]
# CUDA code reads and writes floats as wider types, and unrolls loops with a pragma of its own.
KERNELS = ["-x", "c++", "-fno-strict-aliasing", "-Wno-unknown-pragmas", '-DISQRT_CUDA_ARCHITECTURES="9.0a, emulated"']
OPTIMISE = ["-Og"]  # compiled in half of -O1's time, and runs as fast; threads wait more than they compute
MODES = {
    "plain": {},
    "address": {
        "debug": ["-g"],
        "sanitizer": ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"],
        "define": ["-DEMULATION_ADDRESS_SANITIZER"],
    },
    "thread": {
        "debug": ["-g"],
        "sanitizer": ["-fsanitize=thread"],
        "define": ["-DEMULATION_THREAD_SANITIZER"],
    },
    # Each access is a call of checkers.cpp, which knows what of shared memory was written.
    "shadow": {
        "debug": ["-g"],
        "kernels": ["-fsanitize=kernel-address", "--param=asan-instrumentation-with-call-threshold=0",
                    "--param=asan-stack=0", "--param=asan-globals=0"],
        "define": ["-DEMULATION_SHADOW"],
    },
    # Kernels alone, and without optimisation: each line is then a line of its own.
    "coverage": {
        "kernels": ["-O0", "-fprofile-arcs", "-ftest-coverage"],
        "link": ["-lgcov", "-Wl,--undefined=__gcov_dump"],
    },
}  # fmt: skip
RUNTIME = ["runtime.cpp", "async.cpp", "matrices.cpp", "fibers.cpp", "checkers.cpp", "api.cpp"]
CUDA = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
CPU = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), EMULATION / "cpu_check.cpp"]
LAUNCHERS = [*CUDA, "launchers.cpp", ROOT / "csrc" / "plan.cpp"]
PROGRAMS = {  # what takes longest to compile begins first
    "check": [*LAUNCHERS, "check.cpp"],
    "conformance": ["conformance.cu"],
    "faults": ["faults.cu"],
    "isqrt_emulation": [*LAUNCHERS, "bindings.cpp"],
    "cpu_check": CPU,  # nothing is emulated
}


@functools.cache
def compiler_version():
    return subprocess.run([CXX, "--version"], capture_output=True, check=True).stdout


def digest(*parts):
    return hashlib.sha256(b"".join(p if isinstance(p, bytes) else repr(p).encode() for p in parts)).hexdigest()[:16]


def digest_of_sources(dependencies):
    """Of all files that a compiler call read, as it noted them in the language of make; None where one is gone."""
    paths = [Path(name) for name in dependencies.read_text().replace("\\\n", " ").split()[1:]]
    return digest(*(path.read_bytes() for path in paths)) if all(path.exists() for path in paths) else None


def run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")


def object_path(mode, source):
    """Kernels are all that coverage is measured of; the rest is that of the plain build."""
    folder = "plain" if mode == "coverage" and Path(source).suffix != ".cu" else mode
    return CACHE / folder / f"{Path(source).stem}.o"


def compile_object(mode, source):
    """The digest of what the object at object_path() was compiled from, now that it is up to date."""
    source = EMULATION / source  # an absolute source stays what it is
    options = MODES[mode]
    command = [CXX, *COMMON, *OPTIMISE, *options.get("debug", []), *options.get("define", [])]
    if source.name in RUNTIME or source.suffix == ".cu" or source in CPU:
        command += [f"-I{EMULATION / 'include'}"]
    if source.name not in RUNTIME:  # the sanitizer is told what happens there and must not watch
        command += options.get("sanitizer", [])
    else:  # runs far more often than it is compiled
        command += ["-O2"]
    if source.suffix == ".cu":
        command += [*KERNELS, *options.get("kernels", [])]
    if source.name == "plan.cpp":
        command += ["-DISQRT_WITH_CUDA"]
    if source.name == "bindings.cpp":
        import pybind11

        command += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    target = object_path(mode, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.parent.name == "coverage":  # where the counts go is part of the object
        command += ["-dumpdir", f"{target.parent}/", "-dumpbase", target.stem]
    stamp, dependencies = target.with_suffix(".stamp"), target.with_suffix(".d")
    call = digest([*command, source], compiler_version())
    if target.exists() and stamp.exists() and stamp.read_text() == f"{call} {digest_of_sources(dependencies)}":
        return stamp.read_text()
    scratch = target.with_suffix(f".{os.getpid()}")
    run([*command, "-c", source, "-o", scratch, "-MD", "-MF", dependencies])
    scratch.replace(target)
    stamp.write_text(f"{call} {digest_of_sources(dependencies)}")
    return stamp.read_text()


@contextlib.contextmanager
def alone():
    """One process at a time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@alone()
def build(program, mode="plain"):
    """The path of that program of PROGRAMS, up to date; a Python module has the suffix of one."""
    sources = PROGRAMS[program] if program == "cpu_check" else [*PROGRAMS[program], *RUNTIME]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        stamps = list(pool.map(lambda source: compile_object(mode, source), sources))
    module = program == "isqrt_emulation"
    target = CACHE / mode / (program + sysconfig.get_config_var("EXT_SUFFIX") if module else program)
    options = MODES[mode]
    link = [*options.get("sanitizer", []), *options.get("link", []), "-lpthread", "-ldl"]
    stamp, built_from = target.with_suffix(".stamp"), digest(stamps, link)
    if not target.exists() or not stamp.exists() or stamp.read_text() != built_from:
        objects = [object_path(mode, source) for source in sources]
        scratch = target.with_name(f"{target.name}.{os.getpid()}")
        run([CXX, *(["-shared"] if module else []), *objects, "-o", scratch, *link])
        scratch.replace(target)
        stamp.write_text(built_from)
    return target


if __name__ == "__main__":
    for mode in sys.argv[1:] or MODES:
        for program in PROGRAMS:
            kernels = program != "cpu_check" or mode in ("plain", "address", "thread")
            if kernels and (program == "isqrt_emulation") <= (mode in ("plain", "coverage")):
                print(build(program, mode))
