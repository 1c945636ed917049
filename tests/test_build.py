"""The compiled library and what the package says of itself."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
import torch

import isqrt_cov

LIBRARY = Path(isqrt_cov.__file__).with_name("_C.so")


# glibc's and libstdc++'s symbols have versions, but for those of C++ that the torch linked with happened to export too.
VERSIONS = ("GLIBC_", "GLIBCXX_", "CXXABI_", "GCC_")
CXX_LIBRARY = re.compile(r"_Z(T[ISTV])?(N[KRO]*)?S[tabdios]")


def undefined_symbols():
    """Names of what the library needs, and of that what it can do without."""
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(LIBRARY)], capture_output=True, text=True, check=True)
    found = [line.split() for line in listing.stdout.splitlines()]
    return [name for kind, name in found if kind == "U"], [name for kind, name in found if kind != "U"]


def test_every_symbol_of_torch_is_inside_the_stable_abi():
    needed, weak = undefined_symbols()
    symbols = [s for s in needed + weak if re.search(r"torch|c10|aten|at6|caffe", s, re.IGNORECASE)]
    assert symbols, "the library calls torch"
    outside = [s for s in symbols if not s.startswith(("aoti_torch_", "torch_"))]
    assert not outside


def test_everything_else_comes_with_the_system():
    """Nothing of CUDA in particular: its runtime is linked statically, and it loads the driver's library itself."""
    needed = [s for s in undefined_symbols()[0] if not s.startswith(("aoti_torch_", "torch_"))]
    versions = {s: s.partition("@")[2] for s in needed}
    assert not [s for s in needed if not versions[s].startswith(VERSIONS) and not CXX_LIBRARY.match(s)]


def test_no_python_symbol_is_used():
    assert not [s for s in sum(undefined_symbols(), []) if s.startswith(("Py", "_Py"))]


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


def test_operators_are_registered():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("isqrt_cov::")}
    queries = {"isqrt_cov::plan", "isqrt_cov::build_info"}
    kernels = {f"isqrt_cov::{name}" for name in ("covariance_pool", "matrix_root", "cov_sqrt")}
    kernels |= {f"{name}_backward" for name in kernels}
    assert names == queries | kernels
    for name in kernels:
        for key in ("CPU", "CUDA", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)
        schema = getattr(torch.ops.isqrt_cov, name.partition("::")[2]).default._schema
        assert {str(result.type) for result in schema.returns} == {"Tensor"}
        assert "engine" in {argument.name for argument in schema.arguments}


@pytest.mark.skipif(bool(isqrt_cov.build_info()["cuda_architectures"]), reason="this build has CUDA kernels")
def test_a_build_without_cuda_says_so():
    operator, of_cuda = torch.ops.isqrt_cov.covariance_pool.default, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match="was built without CUDA kernels: install it again"):
        operator.redispatch(of_cuda, torch.zeros(1, 2, 3))


def test_a_library_of_a_later_torch_says_so(tmp_path):
    """As an older torch sees it: a symbol is not there."""
    package = shutil.copytree(Path(isqrt_cov.__file__).parent, tmp_path / "isqrt_cov")
    name = next(s for s in undefined_symbols()[0] if s.startswith("torch_")).encode()
    library = package / "_C.so"
    library.write_bytes(library.read_bytes().replace(name, name[:-1] + b"#"))
    run = subprocess.run([sys.executable, "-c", "import isqrt_cov"], cwd=tmp_path, capture_output=True, text=True)
    assert f"ImportError: isqrt_cov needs torch 2.10 or later, and this is {torch.__version__}: " in run.stderr


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
