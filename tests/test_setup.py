"""What setup.py compiles for which environment, and where it ends a build before it compiles."""

import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension


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
        for name in ("FORCE_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "DEBUG"):
            monkeypatch.setenv(name, "")  # and so what setup.py sets is undone
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        stand_in = types.SimpleNamespace(
            CppExtension=lambda name, sources, **options: options,
            _get_cuda_arch_flags=cpp_extension._get_cuda_arch_flags,
        )
        return setup_py["extension"](stand_in)

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


@pytest.mark.parametrize("architectures", ("junk", " ", "8.0,9.0", "sm_80", "8.0;", "All", "Common", "8.0;native"))
def test_architectures_that_torch_does_not_know_are_named(extension, tmp_path, architectures):
    message = f"TORCH_CUDA_ARCH_LIST: expected compute capabilities that torch knows, .* got {architectures!r}$"
    with pytest.raises(SystemExit, match=message):
        extension("12.8", CUDA_HOME=nvcc_of(tmp_path, "12.8", ""), TORCH_CUDA_ARCH_LIST=architectures)


@pytest.mark.skipif(torch.cuda.is_available(), reason="native is what the GPU is")
def test_native_needs_a_device(extension, tmp_path):
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: .*, or native where there is a GPU, got 'native'$"):
        extension("12.8", CUDA_HOME=nvcc_of(tmp_path, "12.8", ""), TORCH_CUDA_ARCH_LIST="native")


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    (
        ("FORCE_CUDA", "yes", "0 or 1"),
        ("MAX_JOBS", "abc", "a whole number, 1 or more"),
        ("MAX_JOBS", "0", "a whole number, 1 or more"),
        ("MAX_JOBS", "-2", "a whole number, 1 or more"),
    ),
)
def test_other_values_of_variables_are_named(extension, variable, value, expected):
    with pytest.raises(SystemExit, match=f"^{variable}: expected {expected}, got '{value}'$"):
        extension(None, **{variable: value})


@pytest.mark.parametrize("architectures", ("8.0 9.0a 10.0", "8.7;12.1+PTX", "Ampere;Hopper"))
def test_other_architectures_are_taken_as_they_are(extension, tmp_path, architectures):
    options = extension("12.8", CUDA_HOME=nvcc_of(tmp_path, "12.8", ""), TORCH_CUDA_ARCH_LIST=architectures)
    define = f'-DISQRT_CUDA_ARCHITECTURES="{architectures.replace(";", " ")}"'
    assert define in options["extra_compile_args"]["nvcc"]


@pytest.mark.parametrize(
    ("listed", "expected"),
    (
        ("80 86 89 90 100 120", "8.0;8.6;8.9;9.0a;10.0+PTX;12.0+PTX"),
        ("75 80 86 87 89 90", "8.0;8.6;8.9+PTX;9.0a"),  # code of 9.0a runs on 9.0 alone
    ),
)
def test_devices_to_come_have_code(setup_py, tmp_path, listed, expected):
    assert setup_py["default_architectures"](nvcc_of(tmp_path, "13.0", listed)) == expected


def test_the_toolkit_is_the_one_that_is_asked_for(setup_py, tmp_path, monkeypatch):
    named = nvcc_of(tmp_path / "named", "12.8", "")
    monkeypatch.setenv("CUDA_HOME", str(named))
    assert setup_py["find_cuda_home"]() == str(named)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="CUDA_HOME: expected the folder of a CUDA toolkit .*nowhere"):
        setup_py["find_cuda_home"]()


def test_other_major_versions_of_cuda_end_the_build(setup_py, tmp_path):
    home = nvcc_of(tmp_path, "12.8", "")
    setup_py["check_versions"](home, None)
    setup_py["check_versions"](home, "12.6")
    with pytest.raises(SystemExit, match="of CUDA 12, and torch of CUDA 13.0: set CUDA_HOME .* or FORCE_CUDA=0"):
        setup_py["check_versions"](home, "13.0")


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
