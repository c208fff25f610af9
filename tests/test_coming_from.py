"""What the page for users of torchao says, run with torchao: both columns quantize with the same fineness."""

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq

PAGE = Path(__file__).parents[1] / "docs" / "coming-from.md"
OUT, IN = 48, 256


def rows():
    """(there, here) of each configuration that runs on a CPU."""
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("## torchao") : text.index("## qwix")]
    cells = re.findall(r"^\| `([^`]*Config\([^`]*\))` \| `(recipe=[^`]*)`", table, re.MULTILINE)
    return [(there.removeprefix("quantize_(model, ").replace("())", "()"), here) for there, here in cells]


def test_the_page_has_rows_to_run():
    assert len(rows()) >= 5


@pytest.mark.parametrize("there, here", rows(), ids=lambda text: text)
def test_both_columns_quantize_alike(there, here):
    """The errors of the outputs are of one size: one bit more or less is a factor of 2, larger groups more than 1.2."""
    torch: Any = pytest.importorskip("torch")
    quantization: Any = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    rng = np.random.default_rng(0)
    w = rng.normal(size=(OUT, IN)) * np.exp(rng.normal(size=(OUT, 1))) * np.exp(rng.normal(size=IN // 32)).repeat(32)
    w, x = w.astype(np.float32), rng.normal(size=(64, IN)).astype(np.float32)
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(w))
        quantization.quantize_(model, eval(there, vars(quantization) | {"torch": torch}))
        theirs = model(torch.from_numpy(x)).numpy()
    ours = jq.quantize_model(lambda p, x: x @ p["w"].T, {"w": jnp.asarray(w)}, x, **eval(f"dict({here})", {"jq": jq}))
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    off = [np.linalg.norm(y - exact, axis=0) for y in (theirs, np.asarray(ours.fn(ours.params, x), np.float64))]
    ratio = np.median(off[0] / off[1])
    assert 1 / 1.2 < ratio < 1.2, ratio
