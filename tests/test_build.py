"""The compiled library and what the package says of itself."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path

import pytest

import isqrt_cov

LIBRARY = Path(isqrt_cov.__file__).with_name("_C.so")


def undefined_symbols():
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(LIBRARY)], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in listing.stdout.splitlines()]


def test_every_symbol_of_torch_is_inside_the_stable_abi():
    symbols = [s for s in undefined_symbols() if re.search(r"torch|c10|aten|at6|caffe", s, re.IGNORECASE)]
    assert symbols, "the library calls torch"
    outside = [s for s in symbols if not s.startswith(("aoti_torch_", "torch_"))]
    assert not outside


def test_no_python_symbol_is_used():
    assert not [s for s in undefined_symbols() if s.startswith(("Py", "_Py"))]


def test_libtorch_stays_needed():
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    dynamic = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch.so" in needed
    assert not [name for name in needed if "python" in name]


def test_wheel_is_for_every_python():
    tags = re.findall(r"^Tag: (.*)$", distribution("isqrt_cov").read_text("WHEEL") or "", re.MULTILINE)
    assert tags and all(tag.startswith("py3-none-linux") for tag in tags)


def test_build_info():
    info = isqrt_cov.build_info()
    assert info["version"] == version("isqrt_cov")
    assert info["simd_compiled"][-1] == "portable" and info["simd_usable"][-1] == "portable"
    assert set(info["simd_usable"]) <= set(info["simd_compiled"])
    assert not info["cuda_usable"] or info["cuda_architectures"]


def test_command_prints_what_is_usable(tmp_path):
    run = subprocess.run([sys.executable, "-m", "isqrt_cov"], cwd=tmp_path, capture_output=True, text=True, check=True)
    for word in ("isqrt_cov", "torch", "SIMD", "portable (usable)", "CUDA", version("isqrt_cov")):
        assert word in run.stdout
