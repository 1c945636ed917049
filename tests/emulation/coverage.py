"""Which lines of csrc a run of the kernels has executed, and which ones need not be."""

import gzip
import json
import subprocess
import tempfile
from pathlib import Path

import pytest

from .build import CUDA, ROOT, object_path


def whole_module_runs(request):
    """Whether all tests of the asking module run in their order, whatever might leave some out: of fewer there is no
    coverage to ask for."""
    module = request.node.getparent(pytest.Module)
    chosen = [item.nodeid for item in request.session.items if item.getparent(pytest.Module) is module]
    return chosen == [item.nodeid for item in module.collect()]


def counts():
    """{(file, line): how often it ran} for the lines of csrc that the compiler made code of, summed over instances of a
    template; and {(file, line, name): how often it ran} for every instance of every function."""
    lines, functions = {}, {}
    for source in CUDA:
        notes = object_path("coverage", source).with_suffix(".gcno")
        with tempfile.TemporaryDirectory() as folder:
            command = ["gcov", "--json-format", "--demangled-names", "--object-directory", notes.parent, notes.name]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            (report,) = Path(folder).glob("*.gcov.json.gz")
            files = json.loads(gzip.decompress(report.read_bytes()))["files"]
        for file in files:
            path = (ROOT / file["file"]).resolve()
            if not path.is_relative_to(ROOT / "csrc"):
                continue
            name = str(path.relative_to(ROOT))
            for line in file["lines"]:
                key = name, line["line_number"]
                lines[key] = lines.get(key, 0) + line["count"]
            for function in file["functions"]:
                key = name, function["start_line"], function["demangled_name"]
                functions[key] = functions.get(key, 0) + function["execution_count"]
    return lines, functions


def forget():
    """What was counted before."""
    for source in CUDA:
        object_path("coverage", source).with_suffix(".gcda").unlink(missing_ok=True)


def missed():
    """What did not run, in words."""
    lines, functions = counts()
    if not lines:
        return ["nothing was compiled for coverage"]
    complaints = [f"{file}:{line} did not run" for (file, line), count in sorted(lines.items()) if count == 0]
    return complaints + [
        f"{file}:{line} did not run as {name}" for (file, line, name), count in sorted(functions.items()) if count == 0
    ]
