"""Which lines of csrc a run of the kernels has executed, and which ones need not be."""

import gzip
import json
import subprocess
import tempfile
from pathlib import Path

from .build import CUDA, ROOT, object_path

# What does not run on the emulated device: a file, what the line contains, and why.
NOT_RUN = (("csrc/cuda/roots.cu", "std::string architectures()", "for build_info(); no kernel has a part in it"),)


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
    """What did not run and should have, in words; and what NOT_RUN says although it ran, or is gone."""
    lines, functions = counts()
    if not lines:
        return ["nothing was compiled for coverage"]
    complaints, used = [], set()

    def excused(file, line):
        text = (ROOT / file).read_text().splitlines()[line - 1]
        entries = [entry for entry in NOT_RUN if entry[0] == file and entry[1] in text]
        used.update(entries)
        return entries != []

    for (file, line), count in sorted(lines.items()):
        if count == 0 and not excused(file, line):
            complaints.append(f"{file}:{line} did not run")
    for (file, line, name), count in sorted(functions.items()):
        if count == 0 and not excused(file, line):
            complaints.append(f"{file}:{line} did not run as {name}")
    complaints += [f"coverage.NOT_RUN, which runs or is gone: {entry}" for entry in NOT_RUN if entry not in used]
    return complaints
