"""What watches the emulated kernels: sanitizers find nothing in them and each seeded fault, and PTX wrappers agree."""

import os
import re
import shutil
import subprocess

import pytest

from common import needs_emulation
from emulation.build import EMULATION, ROOT
from emulation.sanitize import run

pytestmark = needs_emulation

# ---- Sanitizers

SANITIZED = (("address", (1, 3, 17, 64, 100)), ("thread", (1, 17, 65)), ("shadow", (1, 17, 65, 100)))


@pytest.mark.parametrize(("mode", "channels"), SANITIZED)
def test_sanitizers_find_nothing_in_pooling(mode, channels):
    status, output = run("check", mode, "pooling", *channels)
    assert status == 0, output[:4000]


@pytest.mark.parametrize(("mode", "channels"), SANITIZED)
def test_sanitizers_find_nothing_in_newton_schulz(mode, channels):
    status, output = run("check", mode, "newton_schulz", *channels)
    assert status == 0, output[:4000]


@pytest.mark.parametrize("mode", ("plain", "address", "thread", "shadow"))
def test_wrappers_do_what_a_plain_loop_does(mode):
    status, output = run("conformance", mode)
    assert status == 0 and "named_barrier: ok" in output, output[:4000]


def test_every_wrapper_is_checked():
    """A line of output names the wrappers that a check is of: "copy_async<4>, copy_async_wait: ok"."""
    source = (ROOT / "csrc" / "cuda" / "ptx.cuh").read_text()
    emulated = re.sub(r"^#if defined\(__CUDACC__\).*?^#", "", source, flags=re.MULTILINE | re.DOTALL)
    wrappers = re.findall(r"__device__\s[^(;{]*\b(\w+)\(", emulated)
    checked = [re.split("[;:]", line)[0] for line in run("conformance", "plain")[1].splitlines()]
    assert len(wrappers) > 15
    assert set(wrappers) == {name.split("<")[0] for line in checked for name in line.split(", ")}


@pytest.mark.parametrize("architecture", ("80", "90", "90a", "100"))
def test_wrappers_compile_for_a_device(architecture, tmp_path):
    nvcc = shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [nvcc, "-std=c++20", f"-arch=sm_{architecture}", f"-I{ROOT / 'csrc'}", "--Werror=all-warnings"]
    subprocess.run([*command, "-c", EMULATION / "conformance.cu", "-o", tmp_path / "conformance.o"], check=True)


# Each fault of faults.cu, a mode that finds it, and what the report says; None where it shows the line of the fault.
FAULTS = (
    # Barriers
    ("read_too_early", "thread", None),
    ("write_too_early", "thread", None),
    ("write_too_early", "plain", "depends on the order"),
    ("same_warp", "thread", None),
    ("divergent_barrier", "plain", None),
    ("early_return", "plain", None),
    ("named_wrong_count", "plain", None),
    ("named_missing_lane", "plain", None),
    ("named_for_block", "thread", None),
    ("missing_lane", "plain", None),
    ("matrix_missing_lane", "plain", None),
    ("between_blocks", "thread", None),
    ("unordered_kernel", "plain", "without having waited for the kernels before it"),
    # Bounds, alignment, what was never written
    ("global_bounds", "address", None),
    ("dynamic_bounds", "address", None),
    ("static_bounds", "address", None),
    ("misaligned", "address", None),
    ("matrix_misaligned", "plain", None),
    ("uninitialised", "shadow", None),
    ("uninitialised", "plain", "not finite"),
    # Asynchronous copies
    ("copy_without_wait", "shadow", None),
    ("copy_without_wait", "plain", "not finite"),
    ("copy_without_barrier", "thread", None),
    ("copy_too_early", "thread", None),
    ("copy_bounds", "address", None),
    ("copy_misaligned", "plain", None),
    # Warpgroups
    ("warpgroup_not_begun", "plain", "multiplies without having begun"),
    ("warpgroup_not_committed", "plain", "not finite"),
    ("warpgroup_not_waited_for", "plain", "not finite"),
    ("warpgroup_not_fenced", "plain", "reads what was copied, and no fence followed"),
    ("warpgroup_stored", "shadow", "reads what was written, and no fence followed"),
    ("warpgroup_no_barrier", "thread", None),
    ("warpgroup_no_warp", "plain", "deadlock"),
    # Clusters
    ("store_without_wait", "shadow", None),
    ("store_without_wait", "plain", "not finite"),
    ("store_without_cluster", "plain", "a block that is in no cluster"),
    ("store_wrong_size", "plain", None),
    ("store_too_early", "thread", None),
    ("block_for_cluster", "thread", None),
    ("returns_too_early", "plain", "returns while this is on its way to it"),
    ("outside_cluster", "plain", "maps to block 3 of a cluster of 2"),
    ("cluster_without_arrival", "plain", None),
    ("cluster_without_wait", "plain", "returned without having waited where it arrived"),
    ("static_in_cluster", "plain", "static shared memory in a cluster"),
)


@pytest.mark.parametrize(("fault", "mode", "expected"), FAULTS, ids=lambda value: value or "")
def test_seeded_fault_is_found(fault, mode, expected):
    status, output = run("faults", mode, fault)
    lines = (EMULATION / "faults.cu").read_text().splitlines()
    if expected is None:
        (line,) = (number for number, text in enumerate(lines, 1) if text.endswith(f"fault: {fault}"))
        expected = f"faults.cu:{line}"
    assert status != 0
    assert expected in output, output[:4000]


def test_every_fault_is_looked_for():
    kernels = re.findall(r'\{"(\w+)", \[', (EMULATION / "faults.cu").read_text())
    assert len(kernels) > 20 and set(kernels) == {fault for fault, _, _ in FAULTS}


@pytest.mark.parametrize("mode", ("plain", "address", "thread", "shadow"))
def test_without_faults_nothing_is_found(mode):
    status, output = run("faults", mode, "none")
    assert status == 0, output[:4000]
