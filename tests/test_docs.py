"""The pages under docs/: their Python blocks run, in order and in one namespace; each module has a page."""

import json
import re
import statistics
import traceback

import jax
import pytest
import snippets
from jax_settings import documented

import jaxquant
from jaxquant.ops.kernels.cpu.machine import int8_dots

pytestmark = pytest.mark.every

DOCS = snippets.ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAMES = {page: page.relative_to(DOCS).as_posix() for page in PAGES}
NAVIGATION = (snippets.ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@documented
@pytest.mark.parametrize("page", [page for page in PAGES if snippets.blocks(page, "python")], ids=NAMES.get)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    if page.name == "index.md" and int8_dots() == "none":
        pytest.skip("the page shows a plan with an int8 product, which XLA serves no fast code for here")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    with jax.numpy_rank_promotion("allow"):  # the reader's JAX allows it
        for block in snippets.blocks(page, "python"):
            if not block.skipped:
                snippets.run(page, block, namespace)


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_every_page_is_in_the_navigation(page):
    assert NAMES[page] in NAVIGATION


def test_every_module_has_a_page():
    package = snippets.ROOT / "jaxquant"
    modules = {file.stem for file in package.glob("[a-z]*.py")} | {
        folder.name for folder in package.iterdir() if (folder / "__init__.py").exists()
    }
    elsewhere = {"demo", "files", "quantize_files", "layers"}  # on the pages of the command line, and of linen and nnx
    assert modules - elsewhere == {page.stem for page in (DOCS / "api").glob("*.md")}


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_names_in_text_exist(page):
    """Every `jq.name` and `jq.module.name` on a page is one that the package has."""
    text = page.read_text(encoding="utf-8")
    for names in set(re.findall(r"\bjq((?:\.\w+)+)", text)):
        value = jaxquant
        for name in names.split(".")[1:3]:
            value = getattr(value, name)


def test_accuracies_are_those_of_the_benchmark():
    """Each row of the table on the choice of a scheme is in the results of benchmarks/accuracy.py."""
    results = (snippets.ROOT / "benchmarks/results/accuracy.txt").read_text(encoding="utf-8").split("\n\n")
    table = (DOCS / "choose.md").read_text(encoding="utf-8").split("| scheme | to nearest |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) == 6
    for scheme, *cells in rows:
        (block,) = (block for block in results if block.lstrip().startswith(f"{scheme} ("))
        found = {line[:40].strip(): line[40:].split()[0] for line in block.splitlines() if "0." in line[40:]}
        assert cells == [found[way] for way in ("RTN", "GPTQ", "GPTQ, descended")]


def test_digits_are_those_of_the_benchmark():
    """Each cell of the table on trained digits is in the results of benchmarks/qat_digits.py."""
    ways = ("ranges", "lsq", "lsq, least error", "lsq, KL", "lsq, by token", "lsq+", "pact")
    text = (snippets.ROOT / "benchmarks/results/qat_digits.txt").read_text(encoding="utf-8")
    networks = {block[:3]: block for block in text.split("\n\n")[1:]}
    table = (
        (DOCS / "qat.md").read_text(encoding="utf-8").split("| network, weights and activations |")[1].split("\n\n")[0]
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) == 6
    for case, *cells in rows:
        network, scheme = case.split(", ")
        found = {line[:30].strip(): line[30:].split()[0] for line in networks[network].splitlines()[1:]}
        assert cells == [found.get(f"{scheme}, {way}", "-") for way in ways]


def test_the_language_model_is_that_of_the_benchmark():
    """Each cell of both tables on a small language model is in the results of benchmarks/qat_language_model.py."""
    results = (snippets.ROOT / "benchmarks/results/qat_language_model.json").read_text(encoding="utf-8")
    rows = {name: {k: statistics.fmean(v) for k, v in row.items()} for name, row in json.loads(results)["rows"].items()}

    def increase(row: str, base: str = "float") -> str:
        return f"{100 * (rows[row]['bits'] / rows[base]['bits'] - 1):+.2f} %"

    def table(head: str) -> list[list[str]]:
        lines = (DOCS / "qat.md").read_text(encoding="utf-8").split(head)[1].split("\n\n")[0].splitlines()[2:]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    heads = ("W4A8", "W4A8 with zero points", "W4A16", "W2 without 0", "W2")
    schemes = [f"{head}, groups of 64" for head in heads]
    start = "learned steps from GPTQ, KL"
    ways = {
        "to nearest": "to nearest",
        "GPTQ, then coordinate descent": "GPTQ, descended",
        "learned steps": "learned steps, KL",
        "learned steps, of activations too": "learned steps, of activations too, KL",
        "learned steps from GPTQ": start,
        "the same, 1,200 steps": f"{start}, 4 x the steps",
        "the same, 2,400 steps": f"{start}, 8 x the steps",
    }
    found = table("| way | W4A8 |")
    assert [way for way, *_ in found] == list(ways)
    for way, *cells in found:
        names = [f"{scheme}: {ways[way]}" for scheme in schemes]
        assert cells == [f"{increase(n)} ({rows[n]['kl']:.4f})" if n in rows else "-" for n in names]

    found = table("| part on labels |")
    assert [part for part, *_ in found] == ["1/20", "1/2"]
    for (_, *cells), labels in zip(found, ("a twentieth on labels", "labels"), strict=True):
        ours, control = f"{schemes[0]}: {start} and {labels}", f"float: KL and {labels}"
        assert cells == [increase(ours), increase(control), increase(ours, control)]


def test_quoted_source_is_the_source():
    quoted = next(block for block in snippets.blocks(DOCS / "how-it-works.md", "python") if block.skipped)
    assert quoted.code in (snippets.ROOT / "jaxquant/transform/weight_views.py").read_text(encoding="utf-8")


def test_blocks_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n```python\nx = 1\n```\n\n<!-- not run -->\n```python\nx = 2\n```\n```sh\nls\n```\n")
    first, second = snippets.blocks(page, "python")
    assert (first.code, first.line, first.skipped) == ("x = 1\n", 3, False)
    assert second.skipped
    page.write_text("\n```python\nassert 1 / 0\n```\n")
    (block,) = snippets.blocks(page, "python")
    with pytest.raises(ZeroDivisionError) as caught:
        snippets.run(page, block, {})
    frames = traceback.extract_tb(caught.tb)
    assert frames[2].lineno == 3
    page.write_text("\n```python\nprint(1)\n```\n\n```text\n2\n```\n")
    (block,) = snippets.blocks(page, "python")
    with pytest.raises(AssertionError):
        snippets.run(page, block, {})
