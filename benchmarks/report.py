"""What the benchmarks say, and how: progress, tables, figures, and the machine that the numbers belong to."""

import argparse
import datetime
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch


def positive(text: str) -> int:
    """A command-line argument that counts something."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def writable(text: str) -> Path:
    """A command-line argument that names a file to write: refused before hours of measuring, not after."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in an existing folder, got {text!r}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, got {text!r}")
    return path


def shape(text: str) -> tuple[int, int, int, int]:
    """A command-line argument (B, C, H, W)."""
    parts = text.lower().split("x")
    if len(parts) != 4 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected BxCxHxW of positive integers, such as 16x64x48x48, got {text!r}")
    return tuple(map(int, parts))


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, refused where they ask for a GPU or for a figure that cannot be had here; a CPU is used where none
    names a device.
    """
    arguments = parser.parse_args(argv)
    arguments.device = getattr(arguments, "device", "cpu")
    try:
        device = torch.device(arguments.device)
    except RuntimeError:
        parser.error(f"argument --device: expected cpu, cuda or cuda:1 and so on, got {arguments.device!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"argument --device: {arguments.device!r} needs a GPU and a torch built for it; it finds none")
    if plot := getattr(arguments, "plot", None):
        if not importlib.util.find_spec("matplotlib"):
            parser.error("argument --plot: needs matplotlib: pip install 'isqrt_cov[san]'")
        from matplotlib.backend_bases import FigureCanvasBase

        if (kind := plot.suffix.removeprefix(".").lower()) not in FigureCanvasBase.filetypes:
            known = ", ".join(sorted(FigureCanvasBase.filetypes))
            parser.error(f"argument --plot: {plot.name!r}: expected an ending of {known}, got {kind!r}")
    return arguments


def record(benchmark: str, arguments: argparse.Namespace, meaning: dict[str, str]) -> dict[str, Any]:
    """What every result file says before its numbers: of what, when, where and how they were measured. Of a file or a
    folder its name: where it lies is nobody's business.
    """
    shown = {key: value.name if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    return {
        "benchmark": benchmark,
        "format": 1,
        "date": now(),
        "machine": machine(torch.device(arguments.device)),
        "software": software(),
        "arguments": shown,
        "meaning": meaning,
    }


class Progress:
    """One line on stderr that is written over; a line for each new stage where stderr is no terminal."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def stage(self, text: str) -> None:
        self._write(text, "" if self.terminal else "\n")

    def update(self, text: str) -> None:
        if self.terminal:
            self._write(text, "")

    def clear(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _write(self, text: str, end: str) -> None:
        self.clear()
        print(f"[{time.monotonic() - self.start:4.0f} s] {text}", end=end, file=sys.stderr, flush=True)


# ---- Provenance


def _command(*arguments: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_commit() -> dict[str, Any] | None:
    """Commit of the checkout that this file lies in, and whether it has changes. Outside a checkout what ISQRT_COMMIT
    says, as `git describe --always --dirty` puts it; None where it is not set.
    """
    here = Path(__file__).resolve().parent
    commit = _command("git", "rev-parse", "HEAD", cwd=here)
    if not commit:
        told = os.environ.get("ISQRT_COMMIT")
        if not told:
            return None
        return {"commit": told.removesuffix("-dirty"), "uncommitted_changes": told.endswith("-dirty")}
    return {"commit": commit, "uncommitted_changes": bool(_command("git", "status", "--porcelain", cwd=here))}


def machine(device: torch.device) -> dict[str, Any]:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = found[1] if found else cpu
    about = {
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_at_start": os.getloadavg()[0],
        "system": platform.platform(),
        "gpu": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["gpu"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return about


def software() -> dict[str, Any]:
    about = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "git": git_commit(),
        "isqrt_cov": None,
    }
    try:
        import isqrt_cov

        about["isqrt_cov"] = isqrt_cov.build_info()
    except (ImportError, OSError) as error:
        about["isqrt_cov_missing"] = str(error)
    return about


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_json(path: str | Path, result: dict[str, Any]) -> None:
    # NaN is no JSON: a number that does not exist is null.
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    Path(path).write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n")


# ---- Tables


def number(value: float | None, digits: int = 3) -> str:
    """``value`` to so many significant digits, without an exponent from 0.001 to 99999."""
    if value is None:
        return "-"
    if value != value:
        return "nan"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e+")
    magnitude = math.floor(math.log10(abs(value))) + 1
    return f"{value:.{max(digits - magnitude, 0)}f}"


def table(rows: list[list[str]], headings: int = 1) -> str:
    """Columns as wide as their widest cell; the first is flush left. A rule follows the headings."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    lines.insert(headings, "-" * max(map(len, lines)))
    return "\n".join(line.rstrip() for line in lines)


def mebibytes(value: int | None) -> str:
    return "-" if value is None else number(value / 2**20)
