#!/usr/bin/env python3
"""What the CUDA kernels are made of, as nvcc compiled them and as they use memory: benchmarks/results/kernels.md.

    python benchmarks/kernels.py --write      writes the page anew
    python benchmarks/kernels.py --check      fails where the present build is worse than the page says
    ... --accesses                            the memory accesses alone; the rest of the page stays

The instructions are read out of a library that was built with CUDA, the installed one or that of --library. The memory
accesses are those that the emulation of tests/emulation executes; they need g++ and no CUDA. `make kernels` builds the
library for the architectures of the page and checks it, `make kernels WRITE=1` writes the page.
"""

import argparse
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]  # also when this file is imported

import sass  # noqa: E402
from emulation import lint  # noqa: E402

PAGE = ROOT / "benchmarks" / "results" / "kernels.md"

# ptxas may need a few registers more or less after any change; a block of 256 threads loses a neighbour on its
# multiprocessor only at the next multiple of 8.
REGISTER_MARGIN = 8
# Of the wide share of an instruction, and of bank cycles and sectors over the ideal.
WIDE_LOST, ACCESS_MARGIN = 0.75, 1.05


@dataclass(frozen=True)
class Expectation:
    """Kernels (a pattern of their whole name) that have at least one of these instructions from sm_`since` on."""

    kernel: str
    instruction: str
    since: int
    why: str
    until: int = 999

    def concerns(self, architecture: str, kernel: str) -> bool:
        number = sass.number(architecture)
        return re.fullmatch(self.kernel, kernel) is not None and self.since <= number <= self.until


# Kernels are launched before those before them have finished, and wait.
WAITING_SINCE = 90

PRODUCTS = r"(root|root_backward|pool|pool_backward|product)<.*"
EXPECTATIONS = (
    Expectation(PRODUCTS, "tensor", 80, "products run on tensor cores, in float32 as three of float16"),
    Expectation(r"\w+_cluster<.*", "tensor", WAITING_SINCE, "the same; there are no clusters before"),
    Expectation(r"(warpgroup_product<.*|\w+_warpgroup)", "tensor", 90, "wgmma, which sm_90a alone has", until=90),
    Expectation(r".*", "wait", WAITING_SINCE, "kernels may still run whose results it reads"),
    Expectation(r"\w+_cluster<.*", "STAS", WAITING_SINCE, "blocks send each other their results, without a fence"),
    Expectation(r"(pool<.*, true>|pool_backward<.*|product<.*)", "LDGSTS", 80, "operands are on their way all at once"),
)
# Each of these is a fault, except for the kernels listed here: (kernel, heading) with the reason.
FORBIDDEN = ("stack", "local", "LDL + STL", "generic", "MEMBAR", "before wait")
FOR_WGMMA = "what threads have copied or written is for wgmma: a fence of the block, not of the device"
WITH_WGMMA = ("warpgroup_product<false>", "warpgroup_product<true>", "root_warpgroup", "root_backward_warpgroup")
EXCUSED: dict[tuple[str, str], str] = {(kernel, "MEMBAR"): FOR_WGMMA for kernel in WITH_WGMMA}

Row = dict[str, str]  # by heading
Rows = dict[tuple[str, ...], Row]  # by the cells that identify a row

# ---- Instructions: a row for each architecture and kernel


def instruction_rows(kernels: list[sass.Kernel]) -> Rows:
    def wide(kernel, opcode):
        return f"{kernel.counts[opcode, 128]} of {sum(kernel.counts[opcode, bits] for bits in sass.WIDTHS)}"

    rows: Rows = {}
    for k in kernels:
        if (k.architecture, k.name) in rows:
            raise ValueError(f"{k.architecture}: two kernels are called {k.name}; sass.shorten has to tell them apart")
        rows[k.architecture, k.name] = {
            "registers": str(k.registers),
            "stack": str(k.stack),
            "local": str(k.local),
            "shared": str(k.shared),
            "barriers": str(k.barriers),
            "instructions": str(k.instructions),
            "LDL + STL": str(k.counts["LDL"] + k.counts["STL"]),
            **{f"{opcode} 128-bit": wide(k, opcode) for opcode in sass.MEMORY},
            **{name: str(k.counts[name]) for name in sass.COUNTED if name not in ("LDL", "STL")},
            "before wait": str(k.counts["before wait"] if sass.number(k.architecture) >= WAITING_SINCE else 0),
        }
    return rows


def first_number(row: Row, heading: str) -> int:
    """Of a cell such as `16` or `16 of 139`; columns in which all is zero are left out of the page."""
    return int(row.get(heading, "0").split()[0])


def wide_share(row: Row, heading: str) -> float:
    wide, _, total = row.get(heading, "0 of 0").split()
    return int(wide) / max(int(total), 1)


def instruction_faults(page: Rows, present: Rows) -> list[str]:
    """What is worse in the present build than on the page, or not as it must be; nothing where all is well."""
    faults = []
    for (architecture, kernel), row in present.items():
        where = f"{kernel} on {architecture}"
        for heading in FORBIDDEN:
            if first_number(row, heading) and (kernel, heading) not in EXCUSED:
                faults.append(f"{where}: {heading} is {row[heading]} and must be 0")
        for e in EXPECTATIONS:
            if e.concerns(architecture, kernel) and first_number(row, e.instruction) == 0:
                faults.append(f"{where}: no {e.instruction} ({e.why})")
        if first_number(row, "WARPGROUP") > first_number(row, "tensor"):  # three for each four are usual
            faults.append(f"{where}: ptxas has serialized wgmma, see its messages (C75..)")
        before = page.get((architecture, kernel))
        if before is None:
            faults.append(f"{where}: not on the page, write it anew")
            continue
        registers, allowed = first_number(row, "registers"), first_number(before, "registers") + REGISTER_MARGIN
        if registers > allowed:
            faults.append(
                f"{where}: {registers} registers, {before['registers']} on the page (margin {REGISTER_MARGIN})"
            )
        for heading in (f"{opcode} 128-bit" for opcode in sass.MEMORY):
            if wide_share(row, heading) < WIDE_LOST * wide_share(before, heading):
                faults.append(f"{where}: {heading} {row[heading]}, {before[heading]} on the page: wide accesses lost")
        for name in ("tensor", "LDSM", "LDGSTS"):
            if first_number(before, name) and not first_number(row, name):
                faults.append(f"{where}: no {name} instruction left, {before[name]} on the page")
    for architecture, kernel in sorted(page.keys() - present.keys()):
        faults.append(f"{kernel} on {architecture}: on the page, but not in the library")
    return faults


def idle_rules(present: Rows) -> list[str]:
    """Rules that concern no kernel, which happens when kernels are renamed."""
    idle = [e for e in EXPECTATIONS if not any(e.concerns(*key) for key in present)]
    faults = [f"no kernel is {e.kernel}, of which {e.instruction} is expected" for e in idle]
    names = {kernel for _, kernel in present}
    gone = [key for key in EXCUSED if key[0] not in names]
    return faults + [f"no kernel is {kernel}, whose {heading} is excused" for kernel, heading in gone]


# ---- Memory accesses: a row for each kernel, case and source line, and their totals


def access_faults(page: Rows, present: Rows) -> list[str]:
    """Totals only: lines of source move."""
    faults = []
    for key, row in present.items():
        before = page.get(key)
        what = " ".join(key)
        if before is None:
            faults.append(f"{what}: not on the page, write it anew")
        elif float(row["x ideal"]) > ACCESS_MARGIN * float(before["x ideal"]):
            faults.append(f"{what}: {row['x ideal']} x ideal, {before['x ideal']} on the page")
    faults += [f"{' '.join(key)}: on the page, but not executed" for key in sorted(page.keys() - present.keys())]
    return faults


# ---- The page


def table(keys: tuple[str, ...], rows: Rows) -> str:
    """Columns of zeros are left out, unless a rule looks at them."""
    headings = list(dict.fromkeys(heading for row in rows.values() for heading in row))
    shown = [h for h in headings if h in FORBIDDEN or any(row[h] not in ("0", "0 of 0") for row in rows.values())]
    lines = [[*keys, *shown], ["---"] * (len(keys) + len(shown))]
    lines += [[*(f"`{k}`" if "<" in k else k for k in key), *(row[h] for h in shown)] for key, row in rows.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def read_table(page: str, title: str, keys: int) -> Rows:
    """The table in the section of that title."""
    section = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    if section is None:
        raise ValueError(f"{PAGE.name} has no section {title!r}: write it anew")
    lines = [line.strip("| ").replace("`", "").split(" | ") for line in section[1].splitlines() if line.startswith("|")]
    headings = lines[0][keys:]
    return {tuple(line[:keys]): dict(zip(headings, line[keys:], strict=True)) for line in lines[2:]}


INSTRUCTIONS, TOTALS, ACCESSES = "Instructions", "Memory accesses of each kernel", "Memory accesses by source line"
INTRODUCTION = f"""# The CUDA kernels

Written by `python benchmarks/kernels.py --write`; CI fails where a build is worse.

## {INSTRUCTIONS}

Compiled by {{compiler}}. `shared` is static shared memory, from sm_90 on with 1024 bytes of the system's; what a launch
asks for comes on top. `16 of 139` are instructions of 128 bits among all of that name. `LDL + STL` are spills and other
local memory, `generic` accesses whose address space nvcc could not tell, `tensor` all instructions of the tensor cores,
`LDSM` loads of their operands, `LDGSTS` asynchronous copies, `wait` where a kernel waits for those before it and
`before wait` what it does in global memory earlier. Columns of zeros are left out. Instructions are counted where
they stand, not how often they run.
"""
ACCESS_INTRODUCTION = f"""
## {TOTALS}

As executed by the emulation, {lint.CASES_TEXT}. For shared memory: cycles of the banks over those
without a conflict; for global memory: sectors of 32 bytes over the fewest that hold the same bytes. There is no cache:
what a warp read a moment ago counts again. Lanes that leave out a turn of a loop are lined up with the later turns of
others, so that the figures of accesses under a condition are approximate.
"""


LINES_INTRODUCTION = f"""
## {ACCESSES}

Those that are not ideal; {{others}} others are. `file:line (file:line)` is a line that calls the one with the access.
"""


def instruction_text(instructions: Rows, compiler: str) -> str:
    return INTRODUCTION.format(compiler=compiler) + "\n" + table(("architecture", "kernel"), instructions) + "\n"


def access_text(accesses: lint.Report) -> str:
    conflicts = {key: row for key, row in accesses.lines.items() if row["x ideal"] != "1.00"}
    return "\n".join(
        [
            ACCESS_INTRODUCTION,
            table(lint.TOTAL_KEYS, accesses.totals),
            LINES_INTRODUCTION.format(others=len(accesses.lines) - len(conflicts)),
            table(lint.LINE_KEYS, conflicts),
            "",
        ]
    )


def installed_library() -> Path | None:
    spec = importlib.util.find_spec("isqrt_cov")
    return spec and spec.origin and Path(spec.origin).with_name("_C.so")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with benchmarks/results/kernels.md")
    action.add_argument("--write", action="store_true", help="write benchmarks/results/kernels.md")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--library", type=Path, metavar="FILE", help="default: the installed isqrt_cov/_C.so")
    which.add_argument("--accesses", action="store_true", help="the memory accesses alone, which need no library")
    arguments = parser.parse_args(argv)
    page = PAGE.read_text() if PAGE.exists() else ""
    instructions, compiler = ({}, "") if arguments.accesses else read_library(parser, arguments.library)
    accesses = lint.report(sass.shorten)
    if arguments.write:
        kept = page.partition(ACCESS_INTRODUCTION.lstrip("\n").partition("\n")[0])[0].rstrip("\n") + "\n"
        page = (kept if arguments.accesses else instruction_text(instructions, compiler)) + access_text(accesses)
        PAGE.write_text(page)
        print(f"wrote {PAGE}")
    faults = access_faults(read_table(page, TOTALS, len(lint.TOTAL_KEYS)), accesses.totals)
    if not arguments.accesses:
        faults += instruction_faults(read_table(page, INSTRUCTIONS, 2), instructions) + idle_rules(instructions)
        print(f"{len(instructions)} kernels compiled by {compiler}")
    for fault in faults:
        print(fault)
    print(f"{len(faults) or 'no'} faults")
    return 1 if faults else 0


def read_library(parser: argparse.ArgumentParser, library: Path | None) -> tuple[Rows, str]:
    library = library or installed_library()
    if library is None or not library.is_file():
        parser.error(f"argument --library: no file {library or '(isqrt_cov is not installed)'}")
    try:
        kernels, compiler = sass.read(library)
    except sass.ToolMissing as error:
        parser.error(str(error))
    if not kernels:
        parser.error(f"argument --library: {library} was built without CUDA; build it with FORCE_CUDA=1")
    return instruction_rows(kernels), compiler


if __name__ == "__main__":
    sys.exit(main())
