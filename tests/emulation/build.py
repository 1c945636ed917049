"""Compiles csrc/cuda for the emulated device with g++; no nvcc is needed.

    python tests/emulation/build.py [plain|address|thread ...]        builds everything in these modes

What is built lies in build/emulation and is built again only when a source, a header or an option has changed.
"""

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
}
RUNTIME_SOURCES = ["runtime.cpp", "fibers.cpp", "api.cpp"]
PROGRAMS = {
    "check": ["check.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))],
    "faults": ["faults.cu"],
    "isqrt_emulation": ["bindings.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))],
}


def fingerprint(command):
    """Of a compiler call: the call itself, the compiler, and all text that it could include."""
    digest = hashlib.sha256(repr(command).encode())
    digest.update(subprocess.run([CXX, "--version"], capture_output=True, check=True).stdout)
    folders = [(ROOT / "csrc", "*.h"), (ROOT / "csrc" / "cuda", "*.cu*"), (EMULATION, "**/*.*")]
    for path in sorted({p for folder, pattern in folders for p in folder.glob(pattern)}):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")


def compile_object(mode, source):
    source = EMULATION / source  # an absolute source stays what it is
    options = MODES[mode]
    command = [CXX, *COMMON, *options["optimise"]]
    if source.name in RUNTIME_SOURCES:  # the sanitizer is told what happens there and must not watch
        command += [*options["define"], f"-I{EMULATION / 'include'}"]
    else:
        command += options["sanitizer"]
        command += KERNELS if source.suffix == ".cu" else []
    if source.name == "bindings.cpp":
        import pybind11

        command += ["-fvisibility=hidden", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    target = CACHE / mode / f"{source.stem}-{fingerprint([*command, source])}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(f".{os.getpid()}")
        run([*command, "-c", source, "-o", scratch])
        scratch.replace(target)
    return target


def build(program, mode="plain"):
    """The path of that program of PROGRAMS, up to date; a Python module has the suffix of one."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda s: compile_object(mode, s), [*PROGRAMS[program], *RUNTIME_SOURCES]))
    digest = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
    module = program == "isqrt_emulation"
    target = CACHE / mode / digest / (program + sysconfig.get_config_var("EXT_SUFFIX") if module else program)
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
