"""What nvcc made of each kernel, read out of a compiled library by cuobjdump: resources and SASS instructions."""

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# The widths in bits of memory accesses that are told apart; SASS writes them as suffixes, none for 32.
WIDTHS = (8, 16, 32, 64, 128)
MEMORY = ("LDG", "STG", "LDS", "STS")
# What else is counted, by opcode. Tensor cores have one of these names: HMMA, DMMA, IMMA, HGMMA (wgmma), UTCHMMA, ...
COUNTED = {
    "LDL": r"LDL",
    "STL": r"STL",
    "generic": r"LD|ST",  # loads and stores whose address space the compiler could not tell
    "FFMA": r"FFMA2?",
    "DFMA": r"DFMA",
    "tensor": r"\w*[A-Z]MMA",
    "WARPGROUP": r"WARPGROUP",  # begins and waits of wgmma
    "LDSM": r"LDSM|LDTM|UTCCP",
    "LDGSTS": r"LDGSTS",  # cp.async
    "SHFL": r"SHFL",
    "BAR": r"BAR",
    "cluster": r"UCGABAR_ARV|UCGABAR_WAIT",  # barrier.cluster
    "STAS": r"STAS",  # st.async
    "MEMBAR": r"MEMBAR",  # a fence: of the whole device where it orders what other blocks see
    "wait": r"ACQBULK",  # griddepcontrol.wait
}
# Whatever uses global memory, among them generic accesses.
GLOBAL = re.compile(r"LDG\w*|STG|LD|ST|ATOMG?|REDG?|UBLKCP|UTMALDG|UTMASTG")
DTYPES = {"BFloat16": "bfloat16", "Half": "float16", "float": "float32", "double": "float64"}

_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)((?:\.\w+)*)")
_COUNTED = {name: re.compile(pattern) for name, pattern in COUNTED.items()}


@dataclass
class Kernel:
    """One kernel as compiled for one architecture."""

    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0  # static; from sm_90 on 1024 bytes of it are the system's
    barriers: int = 0
    instructions: int = 0
    counts: Counter = field(default_factory=Counter)  # of COUNTED, and of MEMORY as (opcode, bits)


class ToolMissing(RuntimeError):
    """A program that reads CUDA binaries is not installed."""


def find_cuobjdump() -> Path:
    """The toolkit's, or that of the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    folders += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin"))
    found = shutil.which("cuobjdump", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]))
    if found is None:
        raise ToolMissing("cuobjdump was not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return Path(found)


def read(library: Path) -> tuple[list[Kernel], str]:
    """Every kernel in ``library`` by architecture and name, and the compiler."""
    tool = find_cuobjdump()
    # cuobjdump starts nvdisasm, which lies beside it.
    environment = os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}

    def dump(option: str) -> Iterator[str]:
        process = subprocess.Popen(
            [tool, option, library], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        with process:
            last = ""
            for line in process.stdout:
                last = line
                yield line
        if process.returncode != 0 and "does not contain device code" not in last:
            raise RuntimeError(f"cuobjdump {option} {library}: {last.strip()}")

    kernels: dict[tuple[str, str], Kernel] = {}
    parse_resources(dump("--dump-resource-usage"), kernels)
    compiler = parse_elf(dump("-elf"), kernels)
    parse_sass(dump("-sass"), kernels)
    names = demangle([mangled for _, mangled in kernels])
    for kernel, name in zip(kernels.values(), names, strict=True):
        kernel.name = shorten(name)
    return sorted(kernels.values(), key=lambda k: (number(k.architecture), k.name)), compiler


def number(architecture: str) -> int:
    """90 of sm_90a"""
    return int(re.sub(r"\D", "", architecture))


# ---- cuobjdump's output; kernels are found, or made, by (architecture, mangled name)


def parse_resources(lines: Iterator[str], kernels: dict[tuple[str, str], Kernel]) -> None:
    """``cuobjdump --dump-resource-usage``"""
    architecture = name = ""
    for line in lines:
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):$", line):
            name = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            kernels[architecture, name] = Kernel(name, architecture, registers, stack, local, shared)


def parse_elf(lines: Iterator[str], kernels: dict[tuple[str, str], Kernel]) -> str:
    """``cuobjdump -elf``: the number of barriers stands among a kernel's attributes. Returns the compiler."""
    architecture = name = attribute = compiler = ""
    for line in lines:
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\.nv\.info\.(\S+)", line):
            name = found[1]
        elif found := re.match(r"\s*Attribute:\s*(\S+)", line):
            attribute = found[1]
        elif attribute == "EIATTR_NUM_BARRIERS" and (found := re.match(r"\s*Value:\s*(0x\w+)", line)):
            kernels[architecture, name].barriers = int(found[1], 16)
        elif found := re.match(r"\s*Tool Version:.*(release .*)", line):
            compiler = f"nvcc {found[1]}"
    return compiler


def parse_sass(lines: Iterator[str], kernels: dict[tuple[str, str], Kernel]) -> None:
    """``cuobjdump -sass``"""
    architecture, kernel = "", None
    for line in lines:
        if found := _INSTRUCTION.match(line):
            if kernel is not None:
                count(kernel, found[1], found[2].split(".")[1:])
        elif found := re.match(r"arch = (\w+)", line):
            architecture, kernel = found[1], None
        elif found := re.match(r"\s*Function : (\S+)", line):
            kernel = kernels.get((architecture, found[1]))  # functions that kernels call are part of them


def count(kernel: Kernel, opcode: str, suffixes: list[str]) -> None:
    """One instruction, such as LDG with the suffixes E and 128."""
    kernel.instructions += opcode != "NOP"
    if opcode in MEMORY:
        kernel.counts[opcode, next((bits for bits in map(_bits, suffixes) if bits), 32)] += 1
    if GLOBAL.fullmatch(opcode) and not kernel.counts["wait"]:
        kernel.counts["before wait"] += 1
    for name, pattern in _COUNTED.items():
        kernel.counts[name] += pattern.fullmatch(opcode) is not None


def _bits(suffix: str) -> int:
    found = re.fullmatch(r"[US]?(8|16|32|64|128)", suffix)
    return int(found[1]) if found else 0


# ---- Names


def demangle(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        raise ToolMissing("c++filt was not found: install binutils")
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


VARIANTS = ("Mirrored", "InFull")  # of csrc/cuda/roots.cu


def shorten(name: str) -> str:
    """``void isqrt::cuda::(anonymous namespace)::pool_kernel<isqrt::Half>(...)`` is ``pool<float16>``."""
    name = re.sub(r"\(anonymous namespace\)::|\bisqrt::(cuda::)?", "", name)
    name = re.sub(r"\((?:bool|int|unsigned int|long)\)(-?\d+)", r"\1", name)  # template arguments that are numbers
    name = re.sub(r"\((?:<unnamed>::)?Variant\)(\d)", lambda v: VARIANTS[int(v[1])], name)
    name = re.sub(r"^void ", "", name)
    depth = 0
    for at, character in enumerate(name):  # up to the parameters
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            name = name[:at]
            break
    for type_name, dtype in DTYPES.items():
        name = re.sub(rf"\b{type_name}\b", dtype, name)
    return re.sub(r"_kernel\b", "", name).replace(" >", ">")
