"""Compiles csrc/cuda for the emulated device with g++; no nvcc is needed.

    python tests/emulation/build.py [plain|address|thread|shadow ...]        builds everything in these modes

What is built lies in build/emulation and is built again only when a source, a header or an option has changed.
"""

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

COMMON = [
    "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", f"-I{EMULATION}",
]  # fmt: skip
# CUDA code reads and writes floats as wider types, and unrolls loops with a pragma of its own.
KERNELS = ["-x", "c++", "-fno-strict-aliasing", "-Wno-unknown-pragmas", f"-I{EMULATION / 'include'}",
           '-DISQRT_CUDA_ARCHITECTURES="emulated"']  # fmt: skip
MODES = {
    "plain": {"optimise": ["-O2"], "sanitizer": [], "define": []},
    "address": {
        "optimise": ["-O1", "-g"],
        "sanitizer": ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"],
        "define": ["-DEMULATION_ADDRESS_SANITIZER"],
    },
    "thread": {
        "optimise": ["-O1", "-g"],
        "sanitizer": ["-fsanitize=thread"],
        "define": ["-DEMULATION_THREAD_SANITIZER"],
    },
    # Each access is a call of checkers.cpp, which knows what of shared memory was written.
    "shadow": {
        "optimise": ["-O1", "-g"],
        "sanitizer": ["-fsanitize=kernel-address", "--param=asan-instrumentation-with-call-threshold=0",
                      "--param=asan-stack=0", "--param=asan-globals=0"],
        "define": ["-DEMULATION_SHADOW"],
    },
}
RUNTIME_SOURCES = ["runtime.cpp", "async.cpp", "matrices.cpp", "fibers.cpp", "checkers.cpp", "api.cpp"]
PROGRAMS = {
    "check": ["check.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))],
    "faults": ["faults.cu"],
    "isqrt_emulation": ["bindings.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))],
}


@functools.cache
def compiler_version():
    return subprocess.run([CXX, "--version"], capture_output=True, check=True).stdout


def digest(*parts):
    return hashlib.sha256(b"".join(p if isinstance(p, bytes) else repr(p).encode() for p in parts)).hexdigest()[:16]


def contents(dependencies):
    """Of the files that a compiler call read, as it noted them in the language of make; None where one is gone."""
    paths = [Path(name) for name in dependencies.read_text().replace("\\\n", " ").split()[1:]]
    return [path.read_bytes() for path in paths] if all(path.exists() for path in paths) else None


def run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")


def compile_object(mode, source):
    source = EMULATION / source  # an absolute source stays what it is
    options = MODES[mode]
    command = [CXX, *COMMON, *options["optimise"], *options["define"]]
    if source.name in RUNTIME_SOURCES:  # the sanitizer is told what happens there and must not watch
        command += [f"-I{EMULATION / 'include'}"]
    else:
        command += options["sanitizer"]
        command += KERNELS if source.suffix == ".cu" else []
    if source.name == "bindings.cpp":
        import pybind11

        command += ["-fvisibility=hidden", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    name = CACHE / mode / f"{source.stem}-{digest(command, source, compiler_version())}"
    dependencies = name.with_suffix(".d")
    if dependencies.exists() and (read := contents(dependencies)):
        target = name.with_name(f"{name.name}-{digest(*read)}.o")
        if target.exists():
            return target
    name.parent.mkdir(parents=True, exist_ok=True)
    scratch = name.with_suffix(f".{os.getpid()}")
    run([*command, "-c", source, "-o", scratch, "-MD", "-MF", f"{scratch}.d"])
    Path(f"{scratch}.d").replace(dependencies)
    target = name.with_name(f"{name.name}-{digest(*contents(dependencies))}.o")
    scratch.replace(target)
    return target


def build(program, mode="plain"):
    """The path of that program of PROGRAMS, up to date; a Python module has the suffix of one."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda s: compile_object(mode, s), [*PROGRAMS[program], *RUNTIME_SOURCES]))
    module = program == "isqrt_emulation"
    target = CACHE / mode / digest(objects) / (program + sysconfig.get_config_var("EXT_SUFFIX") if module else program)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f"{target.name}.{os.getpid()}")
        run([CXX, *MODES[mode]["sanitizer"], *(["-shared"] if module else []), *objects, "-o", scratch, "-lpthread"])
        scratch.replace(target)
    return target


if __name__ == "__main__":
    for mode in sys.argv[1:] or MODES:
        for program in PROGRAMS:
            if mode == "plain" or program != "isqrt_emulation":
                print(build(program, mode))
