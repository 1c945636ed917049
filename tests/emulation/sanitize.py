"""Runs the programs of build.py under the sanitizers of its modes."""

import shutil
import subprocess

import pytest

from .build import build


def run(program, mode, *arguments):
    """Exit status and output."""
    command = [build(program, mode), *map(str, arguments)]
    # Not every kernel's random layout of the address space is one that ThreadSanitizer knows.
    for prefix in ([], ["setarch", "--addr-no-randomize"]):
        if prefix and not shutil.which(prefix[0]):
            break
        result = subprocess.run(
            [*prefix, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=600,
        )
        if "setarch:" in result.stdout:  # it may not, in a container
            break
        if "unexpected memory mapping" not in result.stdout:
            return result.returncode, result.stdout
    pytest.skip("ThreadSanitizer does not know this kernel's layout of the address space")
