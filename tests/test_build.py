"""The compiled library, what the package says of itself, and where setup.py ends a build before it compiles."""

import re
import runpy
import shutil
import subprocess
import sys
import types
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


@pytest.fixture
def setup_py():
    return runpy.run_path(str(Path(__file__).parents[1] / "setup.py"), run_name="setup")


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def nvcc_of(home, release, listed):
    says = f"case $1 in --version) echo 'release {release}, V{release}.1';; *) printf 'compute_%s\\n' {listed};; esac"
    script(home / "bin" / "nvcc", says)
    return home


@pytest.fixture
def extension(setup_py, monkeypatch):
    """The extension that setup.py would build for a torch of this version of CUDA, in this environment."""

    def described(torch_cuda, **environment):
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        for name in ("FORCE_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.setenv(name, "")  # and so what setup.py sets is undone
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        return setup_py["extension"](types.SimpleNamespace(CppExtension=lambda name, sources, **options: options))

    return described


@pytest.mark.parametrize(
    ("torch_cuda", "forced"), (("13.0", {"FORCE_CUDA": "0"}), (None, {"FORCE_CUDA": "0"}), (None, {}))
)
def test_nvcc_is_looked_for_only_where_cuda_is_wanted(extension, torch_cuda, forced):
    assert "nvcc" not in extension(torch_cuda, CUDA_HOME="/opt/none", **forced)["extra_compile_args"]


@pytest.mark.parametrize(("torch_cuda", "forced"), (("13.0", {}), (None, {"FORCE_CUDA": "1"})))
def test_kernels_are_compiled_where_cuda_is_wanted(extension, tmp_path, torch_cuda, forced):
    home = nvcc_of(tmp_path, "13.0", "75 80 86 87 88 89 90 100 110 103 120 121")
    options = extension(torch_cuda, CUDA_HOME=home, **forced)["extra_compile_args"]["nvcc"]
    # 10.0+PTX: compute capability 11.0 runs neither the code of 10.0 nor the PTX of 12.0.
    assert '-DISQRT_CUDA_ARCHITECTURES="8.0 8.6 8.9 9.0a 10.0+PTX 12.0+PTX"' in options
    with pytest.raises(SystemExit, match="CUDA_HOME: expected the folder of a CUDA toolkit .*none"):
        extension(torch_cuda, CUDA_HOME="/opt/none", **forced)


@pytest.mark.parametrize(
    ("architectures", "older"),
    (
        ("7.0 7.5 8.0", "7.0, 7.5"),
        ("5.2;7.5+PTX;12.0", "5.2, 7.5+PTX"),
        ("Turing;Ampere", "Turing"),
        ("Volta+Tegra",) * 2,
    ),
)
def test_architectures_that_are_too_old_are_named(extension, tmp_path, architectures, older):
    home = nvcc_of(tmp_path, "12.8", "70 75 80")
    message = f"TORCH_CUDA_ARCH_LIST: .* compute capability 8.0 or later, got {re.escape(older)} in"
    with pytest.raises(SystemExit, match=message):
        extension("12.8", CUDA_HOME=home, TORCH_CUDA_ARCH_LIST=architectures)


@pytest.mark.parametrize("architectures", ("8.0 9.0a 10.0", "8.7;12.1+PTX", "Ampere;Hopper"))
def test_other_architectures_are_taken_as_they_are(extension, tmp_path, architectures):
    options = extension("12.8", CUDA_HOME=nvcc_of(tmp_path, "12.8", ""), TORCH_CUDA_ARCH_LIST=architectures)
    define = f'-DISQRT_CUDA_ARCHITECTURES="{architectures.replace(";", " ")}"'
    assert define in options["extra_compile_args"]["nvcc"]


@pytest.mark.parametrize("listing", ("printf 'compute_%s\\n' 53 62 75", "exit 1"))
def test_an_nvcc_that_is_too_old_is_named(setup_py, tmp_path, listing):
    nvcc = script(tmp_path / "bin" / "nvcc", f"[ $1 = --version ] && echo 'release 10.2, V10.2.89' && exit; {listing}")
    with pytest.raises(SystemExit, match=f"{nvcc} of CUDA 10.2 lists no compute capability of 8.0 or later"):
        setup_py["default_architectures"](tmp_path)


@pytest.mark.parametrize("platform", ("win32", "darwin"))
def test_other_systems_than_linux_end_the_build(setup_py, monkeypatch, platform):
    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit, match=f"supports Linux only, and this is {platform}"),
    ):
        patch.setattr(sys, "platform", platform)
        setup_py["main"]()


@pytest.mark.parametrize(
    ("macros", "found"),
    (("__GNUC__ 4\n#define __clang__ 1", "clang"), ("__GNUC__ 10", "version 10"), (None, "not found")),
)
def test_a_compiler_that_is_not_meant_is_named(setup_py, tmp_path, macros, found):
    compiler = tmp_path / "c++"
    if macros:
        script(compiler, f"echo '#define {macros}'")
    with pytest.raises(SystemExit, match=f"g\\+\\+ 11 or later, and '.*/c\\+\\+ -pipe' is {found}: set CXX"):
        setup_py["check_compiler"](f"{compiler} -pipe")


def test_a_compiler_that_is_meant_passes(setup_py, tmp_path):
    setup_py["check_compiler"](str(script(tmp_path / "c++", "echo '#define __GNUC__ 11'")))
