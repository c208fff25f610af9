"""The page in a real browser: nothing overlaps, is cut or is too pale, at the widths of a phone and of a screen."""

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxquant.report.compare import Comparison, Input, Layer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("PyQt6.QtWebEngineCore" if importlib.util.find_spec("PyQt6") else "PyQt6") is None,
    reason="no browser: pip install -e '.[browser]'",
)


def comparison():
    """Twelve layers with long names, an exact input, and labels of several words."""
    rng = np.random.default_rng(0)
    layers = []
    for i in range(24):
        path = f"encoder/layers_{i // 2}/{'attention/query_projection' if i % 2 else 'mlp'}/kernel"
        seen = float("inf") if i == 0 else float(rng.uniform(8, 25))
        before, after = 2**16, int(2**16 / rng.uniform(3, 7))
        kind = "int4, group 32 on axis -2, symmetric"
        layers.append(Layer(
            path, "dot_general", kind, (1024, 4096), before, after, float(rng.uniform(15, 45)), 0.99591, seen, 0.99,
            float(rng.uniform(40, 60)),
        ))  # fmt: skip
    errors = np.exp(rng.normal(size=96) - 4)
    inputs = [
        Input(i, f"a sentence that is number {i} of them", float(e), float(1 - e / 2), float(e / 3))
        for i, e in enumerate(errors)
    ]
    return Comparison(tuple(layers), tuple(inputs), 24 * 2**16, sum(x.bytes_after for x in layers), 14.7)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """(scheme, width) -> the measures of the page."""
    folder = tmp_path_factory.mktemp("page")
    comparison().save(folder / "page.html", title="A model of twelve layers, quantized to four bits")
    found = {}
    for scheme in ("light", "dark"):
        program = [sys.executable, str(Path(__file__).with_name("browser.py")), str(folder / "page.html")]
        done = subprocess.run([*program, str(folder / "page"), scheme], capture_output=True, text=True, timeout=120)
        if done.returncode and "cannot open shared object file" in done.stderr:
            pytest.skip(f"the browser lacks a library of the system: {done.stderr.splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
        for one in json.loads(done.stdout):
            assert one["dark"] == (scheme == "dark")
            found[scheme, one["width"]] = one
            picture = folder / f"page-{scheme}-{one['width']}.png"
            assert picture.stat().st_size > 10_000
    return found


VIEWS = [(scheme, width) for scheme in ("light", "dark") for width in (400, 1200)]
every_view = pytest.mark.parametrize("view", VIEWS, ids=lambda view: f"{view[0]} {view[1]}")


@pytest.mark.every
@every_view
def test_it_fits(seen, view):
    """The page does not scroll sideways; on a screen its tables do not either; axes are long enough to be read."""
    one = seen[view]
    assert one["wanted"] <= one["width"]
    assert len(one["tracks"]) == 24
    assert min(_wide(t["box"]) for t in one["tracks"]) > one["width"] / 3
    assert max(one["lines"]) < 80  # words, and not one below the other
    if view[1] == 1200:
        for table in one["tables"]:
            assert table["wanted"] <= table["visible"]
    assert not any(name["cut"] for name in one["names"])


@pytest.mark.every
@every_view
def test_marks_are_on_their_axes_and_nothing_overlaps(seen, view):
    one = seen[view]
    for track in one["tracks"]:
        left, top, right, bottom = track["box"]
        for mark in track["marks"]:  # a mark is centred on its place
            assert left - 8 <= mark[0] <= mark[2] <= right + 8
            assert top <= mark[1] + 4 <= mark[3] - 4 <= bottom
    assert [len(t["marks"]) for t in one["tracks"]] == [2] + [3] * 23  # an exact input has none
    for ticks in one["ticks"]:
        for a, b in itertools.pairwise(ticks):
            assert a[2] <= b[0], "two ticks overlap"
    boxes = [x["box"] for key in ("names", "tracks") for x in one[key]]
    for a, b in itertools.combinations(boxes, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (a, b)


@pytest.mark.every
@every_view
def test_text_can_be_read_and_marks_are_painted(seen, view):
    """Contrast of 4.5 at least (WCAG 2.2, 1.4.3), and the colors of the style sheet on the picture."""
    one = seen[view]
    for ink, ground, text in one["texts"]:
        a, b = sorted((_luminance(ink), _luminance(ground)))
        assert (b + 0.05) / (a + 0.05) >= 4.5, (text, ink, ground)
    assert one["painted"] == [mark["color"] for mark in one["marks"]]
    assert len(one["marks"]) > 24


@pytest.mark.every
def test_a_click_on_a_heading_sorts(seen):
    up, down = seen["light", 1200]["sorted"]
    assert up == sorted(x.bytes_after for x in comparison().layers)
    assert down == up[::-1]


def _wide(box):
    return box[2] - box[0]


def _luminance(color):
    """Relative luminance, by WCAG 2.2."""
    c = np.array([int(x) for x in re.findall(r"[0-9]+", color)[:3]]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
