"""Builds isqrt_cov/_C.so against the torch that is installed; everything else is in pyproject.toml."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

TORCH_TARGET = "0x020a000000000000ULL"  # the stable ABI of torch 2.10: loads there and in every later torch
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")


def import_torch():
    """Returns torch.utils.cpp_extension; lets pip's isolated build see the environment it installs into."""
    if importlib.util.find_spec("torch") is None:
        probe = "import importlib.util as u, json, sys; print(json.dumps(sys.path if u.find_spec('torch') else []))"
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
        answer = subprocess.run(
            [sys.executable, "-c", probe], env=env, cwd=os.sep, capture_output=True, text=True, check=True
        )
        sys.path += [p for p in json.loads(answer.stdout) if p and p not in sys.path]
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "isqrt_cov builds against an installed torch, and finds none: run `pip install torch` first. Where it is"
            " hidden from the build, build without isolation: `pip install --no-build-isolation .`, `uv pip install"
            " --no-build-isolation .`, `python -m build --no-isolation`, with setuptools 77 or later"
        )
    try:
        import torch.utils.cpp_extension as cpp_extension
    except ImportError as error:
        raise SystemExit(f"isqrt_cov builds against an installed torch, which does not import: {error}") from None
    return cpp_extension


def find_cuda_home():
    """The folder of the CUDA toolkit, or None: the one that is named, the usual one, or that of the nvcc on PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            if not (Path(home) / "bin" / "nvcc").exists():
                raise SystemExit(f"{variable}: expected the folder of a CUDA toolkit with bin/nvcc, got {home!r}")
            return home
    if Path("/usr/local/cuda/bin/nvcc").exists():  # first: what PATH leads to may be a script in another folder
        return "/usr/local/cuda"
    nvcc = shutil.which("nvcc")
    return str(Path(nvcc).resolve().parents[1]) if nvcc else None


def cuda_release(cuda_home):
    """The version of its nvcc, "13.0" for example, or "" where that says none."""
    version = subprocess.run([f"{cuda_home}/bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", version)
    return found[1] if found else ""


def check_versions(cuda_home, torch_cuda):
    """Ends the build where torch would end it, in one line."""
    major = cuda_release(cuda_home).partition(".")[0]
    if torch_cuda and major and major != torch_cuda.partition(".")[0]:
        raise SystemExit(
            f"The nvcc of {cuda_home} is of CUDA {major}, and torch of CUDA {torch_cuda}: set CUDA_HOME to a toolkit"
            " of the same major version, or FORCE_CUDA=0 for a build without CUDA kernels"
        )


def check_architectures(cpp_extension, architectures):
    """Ends the build where ptxas would, with an error for each instruction that older devices do not have, and where
    torch would."""
    older = r"[1-7]\.|Kepler|Maxwell|Pascal|Volta|Turing"  # torch takes names, too
    if found := [a for a in architectures.split() if re.match(older, a)]:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST: the CUDA kernels need compute capability 8.0 or later, got {', '.join(found)} in"
            f" {architectures!r}: leave out what is older, or unset the variable, or set FORCE_CUDA=0 for a build"
            " without CUDA kernels"
        )
    try:
        cpp_extension._get_cuda_arch_flags()  # of the variable
    except (ValueError, IndexError):
        raise SystemExit(
            "TORCH_CUDA_ARCH_LIST: expected compute capabilities that torch knows, as in '8.0;9.0a;12.0+PTX', or native"
            f" where there is a GPU, got {os.environ['TORCH_CUDA_ARCH_LIST']!r}"
        ) from None


def default_architectures(cuda_home):
    """Those of ARCHITECTURES that this nvcc knows, two of them also as PTX: 10.0 for 11.0 (Jetson Thor), where code of
    10.0 does not run, and for devices to come the last one without an "a", for code of those runs nowhere else."""
    nvcc = str(Path(cuda_home) / "bin" / "nvcc")
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    listed = listing.stdout.split()  # none of an nvcc that is too old for the option
    known = [a for a in ARCHITECTURES if "compute_" + a.strip("a").replace(".", "") in listed]
    general = [a for a in known if not a.endswith("a")]
    if not general:
        raise SystemExit(
            f"{nvcc} of CUDA {cuda_release(cuda_home)} lists no compute capability of 8.0 or later, which the CUDA"
            " kernels need: set CUDA_HOME to a later toolkit, or FORCE_CUDA=0 for a build without CUDA kernels"
        )
    return ";".join(a + "+PTX" if a in ("10.0", general[-1]) else a for a in known)


def check_compiler(compiler):
    """Ends the build where csrc/cpu/simd.h would, in one line: there, other errors follow from it."""
    command = shlex.split(compiler)
    if not command or shutil.which(command[0]) is None:
        found = "not found"
    else:
        command += ["-dM", "-E", "-x", "c++", os.devnull]
        macros = subprocess.run(command, capture_output=True, text=True).stdout
        gcc = re.search(r"__GNUC__ (\d+)", macros)
        if "__clang__" in macros:
            found = "clang"
        elif gcc and int(gcc[1]) < 11:
            found = f"version {gcc[1]}"
        else:
            return
    raise SystemExit(f"isqrt_cov is compiled with g++ 11 or later, and {compiler!r} is {found}: set CXX to such a g++")


def extension(cpp_extension):
    import torch

    forced, jobs = os.environ.get("FORCE_CUDA"), os.environ.get("MAX_JOBS")
    if forced not in (None, "0", "1"):
        raise SystemExit(f"FORCE_CUDA: expected 0 or 1, got {forced!r}")
    if jobs and not (jobs.isdecimal() and int(jobs)):
        raise SystemExit(f"MAX_JOBS: expected a whole number, 1 or more, got {jobs!r}")
    wanted = forced == "1" or (forced is None and torch.version.cuda is not None)
    cuda_home = find_cuda_home() if wanted else None
    if forced == "1" and cuda_home is None:
        raise SystemExit("FORCE_CUDA=1, but no nvcc was found: set CUDA_HOME to the folder of the CUDA toolkit")
    if torch.version.cuda is not None and cuda_home is None:
        print("isqrt_cov is built without CUDA kernels: " + ("FORCE_CUDA=0" if forced else "no nvcc was found"))
    debug = os.environ.get("DEBUG") == "1"  # other programs, too, have a variable of this name

    common = ["-std=c++20", "-O0" if debug else "-O3", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    host = [*common, "-fvisibility=hidden", "-Wall"]
    if debug or "-g" not in f"{os.environ.get('CFLAGS')} {os.environ.get('CXXFLAGS')}".split():
        host.append("-g" if debug else "-g0")  # Python's own flags have -g, which makes ten megabytes
    sources = sorted(Path("csrc").rglob("*.cpp"))
    options = {"extra_compile_args": {"cxx": [*host, "-ffp-contract=fast"]}}
    # libtorch.so must stay needed, whatever the linker's default: torch's CUDA symbols are found only through it.
    options["extra_link_args"] = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    if cuda_home is not None:
        check_versions(cuda_home, torch.version.cuda)
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = default_architectures(cuda_home)
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ")
        check_architectures(cpp_extension, architectures)
        cpp_extension.CUDA_HOME = cuda_home
        kernels = sorted(Path("csrc").rglob("*.cu"))
        sources += kernels
        threads = max(1, int(jobs) // len(kernels)) if jobs else 0  # 0: as many as there are cores
        define = ["-DISQRT_WITH_CUDA"]
        options["extra_compile_args"]["cxx"] += define
        options["extra_compile_args"]["nvcc"] = [
            *common, *define, f'-DISQRT_CUDA_ARCHITECTURES="{architectures}"', "-Xcompiler", "-fvisibility=hidden",
            f"--threads={threads}",  # architectures at a time, of each file that ninja compiles
        ]  # fmt: skip
        options["include_dirs"] = [str(Path(cuda_home) / "include")]
        options["library_dirs"] = [str(Path(cuda_home) / name) for name in ("lib64", "lib")]  # lib: nvcc's wheels
        options["extra_link_args"] += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return cpp_extension.CppExtension("isqrt_cov._C", [str(p) for p in sources], py_limited_api=True, **options)


def main():
    if sys.platform != "linux":
        raise SystemExit(f"isqrt_cov supports Linux only, and this is {sys.platform}")
    cpp_extension = import_torch()
    from setuptools import setup
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.build_py import build_py

    class PlatformWheel(bdist_wheel):
        """The library uses no Python symbol: one wheel for every Python of a platform."""

        def get_tag(self):
            return ("py3", "none", super().get_tag()[2])

    class BuildPackages(build_py):
        def run(self):
            for package in {name.partition(".")[0] for name in self.packages or ()}:
                # What an earlier build left there, and the sources have no more, would be in the wheel.
                shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
            super().run()

    class Build(cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)):
        def finalize_options(self):
            super().finalize_options()
            self.force = True  # without ninja, which sees to it, setuptools looks at sources alone, and at no header

        def build_extensions(self):
            if self.use_ninja:  # for which torch chooses the compiler
                check_compiler(cpp_extension.get_cxx_compiler())
            # torch lets nvcc tell which headers a source has read only where torch has CUDA itself.
            newest = max(header.stat().st_mtime for header in Path("csrc").rglob("*.*h"))
            for compiled in Path(self.build_temp, "csrc", "cuda").glob("*.o"):
                if compiled.stat().st_mtime < newest:
                    compiled.unlink()
            super().build_extensions()

    setup(
        ext_modules=[extension(cpp_extension)],
        cmdclass={
            "build_ext": Build,
            "build_py": BuildPackages,
            "bdist_wheel": PlatformWheel,
        },
    )


if __name__ == "__main__":
    main()
