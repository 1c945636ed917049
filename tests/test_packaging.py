"""What is in the wheel and in the source archive, and what they say of themselves."""

import ast
import hashlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import isqrt_cov
import san_model

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
INSTALLED = distribution("isqrt_cov")
# Distributions whose module has another name.
MODULES = {"scikit-image": "skimage", "pillow": "PIL", "pypng": "png", "docstring-parser": "docstring_parser"}


def module_of(requirement):
    name = Requirement(requirement).name.lower()
    return MODULES.get(name, name)


def wheel_files():
    """Of the wheel that is installed, as paths; what the installation itself adds is left out."""
    added = re.compile(r"__pycache__|\.\./|/(INSTALLER|REQUESTED|RECORD|direct_url\.json)$")
    return {str(file) for file in INSTALLED.files if not added.search(str(file))}


def sources(package):
    return {str(file.relative_to(ROOT)) for file in (ROOT / package).rglob("*.py")}


def test_wheel_holds_what_it_should_and_nothing_else():
    files = wheel_files()
    about = {file for file in files if ".dist-info/" in file}
    assert {Path(file).name for file in about} >= {"METADATA", "WHEEL", "LICENSE", "entry_points.txt"}
    assert any(file.endswith(".dist-info/licenses/LICENSE") for file in about)
    expected = sources("isqrt_cov") | sources("san_model") | {"isqrt_cov/_C.so"}
    expected |= {"isqrt_cov/py.typed", "san_model/py.typed"}
    weights = {str(f.relative_to(ROOT)) for f in (ROOT / "san_model" / "weights").iterdir()}
    assert files - about == expected | weights


def test_installed_packages_are_these_sources():
    changed = []
    for file in INSTALLED.files:
        if str(file).endswith(".py") and (ROOT / file).exists():
            digests = {hashlib.sha256(Path(p).read_bytes()).digest() for p in (file.locate(), ROOT / file)}
            changed += [str(file)] if len(digests) > 1 else []
    assert not changed, "install again: pip install ."


def test_licence_version_and_readme():
    metadata = INSTALLED.metadata
    assert metadata["License-Expression"] == "BSD-3-Clause" and metadata["License-File"] == "LICENSE"
    assert not [c for c in metadata.get_all("Classifier", []) if c.startswith("License")]  # PEP 639 replaces them
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Description"].startswith("# isqrt_cov")
    assert metadata["Requires-Python"] == PYPROJECT["project"]["requires-python"]


def test_version_stands_in_one_place():
    version = PYPROJECT["project"]["version"]
    assert INSTALLED.version == isqrt_cov.build_info()["version"] == version
    texts = [ROOT / name for name in ("setup.py", "CITATION.cff", "README.md", "docs/conf.py")]
    texts += [*(ROOT / "isqrt_cov").rglob("*.py"), *(ROOT / "san_model").rglob("*.py")]
    assert not [str(file) for file in texts if version in file.read_text()]


def imported(package):
    """Top-level modules that the sources of a package import, wherever in a file."""
    found = set()
    for file in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"isqrt_cov", "san_model"}


def test_what_is_imported_is_required():
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert [module_of(r) for r in PYPROJECT["project"]["dependencies"]] == ["torch"]
    assert imported(isqrt_cov) == {"torch"}
    assert imported(san_model) - {"torch"} <= {module_of(requirement) for requirement in extras["san"]}


def test_extras_are_declared():
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert set(INSTALLED.metadata.get_all("Provides-Extra")) == set(extras)
    for extra in extras:
        needed = [
            r for r in map(Requirement, requires("isqrt_cov")) if r.marker and r.marker.evaluate({"extra": extra})
        ]
        assert needed, extra
        assert all(inner in extras for r in needed if r.name == "isqrt_cov" for inner in r.extras)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    build = [
        sys.executable,
        "-c",
        "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])",
    ]
    subprocess.run([*build, str(folder)], cwd=copy_of_the_tree(folder / "tree"), check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_what_the_sources_have_no_more_is_not_built(tmp_path):
    tree = copy_of_the_tree(tmp_path / "tree")
    left = tree / "build" / "lib" / "isqrt_cov" / "old.py"
    left.parent.mkdir(parents=True)
    left.write_text("")
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "build/lib"]
    subprocess.run(build, cwd=tree, check=True, capture_output=True)
    assert not left.exists() and left.with_name("__init__.py").exists()


def copy_of_the_tree(folder):
    """Files that git knows, or would: a build leaves its metadata behind, and finds what an earlier one left."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a checkout")
    for name in filter(lambda name: (ROOT / name).is_file(), done.stdout.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def test_source_archive_holds_all_that_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    code = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    assert code and code <= names
    assert {"LICENSE", "README.md", "CITATION.cff", "pyproject.toml", "setup.py", "isqrt_cov/py.typed"} <= names
    assert sources("isqrt_cov") | sources("san_model") <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name.startswith("tests/")]


@pytest.mark.build
def test_wheel_of_the_source_archive_is_the_one_of_the_tree(sdist, tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(sdist)]
    subprocess.run(pip, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith(("/RECORD", "/"))}
        assert names == wheel_files()
        for name in names:
            if not name.endswith(".so") and ".dist-info/" not in name:
                assert archive.read(name) == (ROOT / name).read_bytes(), name
