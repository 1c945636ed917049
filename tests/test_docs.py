"""The pages: their code runs, their links lead somewhere, their numbers are those of benchmarks/results."""

import importlib
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """As GitHub and myst make them of the headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_runs(page):
    names = {"torch": torch, "x": torch.randn(2, 64, 7, 7), "iterations": 5}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)  # one after the other, as a reader would


def test_readme_states_what_the_layer_computes():
    names = {"torch": torch, "x": torch.randn(2, 16, 9, 9), "iterations": 5}
    layer, equivalent = blocks(ROOT / "README.md")[:2]
    exec(layer, names)
    expected = names["y"]
    exec(equivalent, names)
    assert names["y"] is not expected
    torch.testing.assert_close(names["y"], expected)


@each_page
def test_relative_links_lead_somewhere(page):
    for target in LINK.findall(without_code(page.read_text())):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@each_page
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:benchmarks|csrc|docs|isqrt_cov|san_model|tests)/[\w./-]+)`", page.read_text())
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tables")


def test_tables_are_those_of_the_results(tables, capsys):
    assert tables.main(["--check"]) == 0, f"run benchmarks/tables.py: {capsys.readouterr().out} is out of date"


def test_prose_agrees_with_the_results(tables):
    spectra = tables.load("accuracy")["spectra"]
    for entry in spectra:
        at = {floor: tables._distance(entry, floor, "kernels", "float64") for floor in (None, 1e-2)}
        assert at[1e-2][3] < at[None][5]  # "three of its steps come nearer than five as printed", on every spectrum
        fewer_positions = entry["shape"][1] > entry["shape"][2] * entry["shape"][3]
        for floor in (None, 1e-2, 1e-3, 1e-4):
            for of in ("kernels", "reference"):
                _, steps = tables.nearest(entry, floor, of)
                after = tables._distance(entry, floor, of, "float32")
                # "the plain loop is NaN after 32 steps", "on photographs in either form"
                singular = fewer_positions and (of == "reference" or entry["input"] == "photo")
                assert (after[32] is None) == singular
                assert not singular or (8 <= steps <= 24 and (after[28] is None or after[28] > 10 * after[steps]))
        if (entry["input"], fewer_positions) == ("randn", True):
            assert f"{tables._distance(entry, None, 'kernels', 'float32')[32]:.1e}" == "1.8e-06"


def test_few_minimax_steps_are_as_the_readme_says(tables):
    for entry in tables.load("soca_cpu")["shapes"]:
        methods = {method["name"]: method for method in entry["methods"] if method["ran"]}
        for kind in ("photo", "randn", "decay"):  # "on photographs and on flat and decaying spectra"
            few, printed = (methods[name]["accuracy"][kind]["distance_to_exact_root"] for name in ("minimax", "ours"))
            assert few < printed
        few, printed = (methods[name]["accuracy"]["rank"]["distance_to_exact_root"] for name in ("minimax", "ours"))
        assert few < 1.15 * printed  # "about as near"
        if entry["shape"][1] == 256:  # "seven tenths of the time"
            assert round(1 / methods["minimax"]["forward_backward"]["speedup_over"]["ours"], 1) == 0.7
    (widest,) = (entry for entry in tables.load("soca_cpu_wide")["shapes"] if entry["shape"] == [2, 512, 28, 28])
    methods = {method["name"]: method for method in widest["methods"]}
    assert round(1 / methods["minimax"]["forward_backward"]["speedup_over"]["ours"], 1) == 0.6


def test_shares_of_the_covariance_layers(tables):
    readme = " ".join((ROOT / "README.md").read_text().split())
    share = {m["name"]: m["training"]["covariance_percent"] for m in tables.load("san_full_cpu")["methods"]}
    ours = f"spends {share['ours']:.1f} % of its time in this library's covariance layers"
    others = f"{share['eager']:.1f} % with plain loops, {share['eig']:.1f} % with EIG"
    assert f"{ours}, {others} (too little" in readme and f"and {share['mxm']:.0f} % in those" in readme


def test_stale_tables_are_found(tables, tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table: classifier -->\n| typed | by hand |\n<!-- end of table -->\nafter\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1 and "by hand" in page.read_text()
    assert tables.main([]) == 0
    text = page.read_text()
    assert "by hand" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert tables.main(["--check"]) == 0


def test_citation_names_both_papers():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    cited = {
        (reference["authors"][0]["family-names"], reference["year"], reference["title"].split()[0])
        for reference in citation["references"]
    }
    assert cited == {("Dai", 2019, "Second-order"), ("Li", 2018, "Towards")}
    assert "version" not in citation  # it stands in pyproject.toml alone
