"""Where the error is: the numbers against NumPy, the page as a page."""

import dataclasses
import html
import json
import math
import re
from html.parser import HTMLParser

import jax
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import OpSpec, QuantSpec, Rule, report
from jaxquant.report.compare import Comparison, Input, Layer
from jaxquant.report.page import Axis, render

RNG = np.random.default_rng(0)
PARAMS = {
    "table": RNG.normal(size=(7, 16)).astype(np.float32),
    "blocks": {
        "up": RNG.normal(size=(2, 16, 24)).astype(np.float32) / 4,
        "down": RNG.normal(size=(2, 24, 16)).astype(np.float32) / np.array([[[5.0]], [[50.0]]], np.float32),
    },
    "head": RNG.normal(size=(16, 5)).astype(np.float32) * np.exp(RNG.normal(size=5)).astype(np.float32),
}
BATCHES = [RNG.integers(0, 7, (4, 3)), RNG.integers(0, 7, (4, 3))]


def fn(p, tokens):
    def layer(x, w):
        return x + jax.nn.relu(x @ w["up"]) @ w["down"], None

    return jax.lax.scan(layer, p["table"][tokens], p["blocks"])[0] @ p["head"]


@pytest.fixture(scope="module")
def made():
    rules = [Rule("table", OpSpec(QuantSpec("int8"))), Rule("blocks", OpSpec(QuantSpec("int4"), QuantSpec("int8")))]
    plan = jq.make_plan(fn, PARAMS, BATCHES[0], rules=rules)
    return plan, jq.quantize_params(PARAMS, plan)


@pytest.fixture(scope="module")
def found(made):
    plan, qparams = made
    return jq.compare(fn, PARAMS, qparams, BATCHES, plan=plan, labels=[f"<input {i}>" for i in range(8)])


def sqnr(a, b):
    return 10 * np.log10(np.sum(np.square(a)) / np.sum(np.square(a - b)))


def test_layers_in_the_order_in_which_they_run(found):
    assert [x.path for x in found.layers] == ["table", *(f"blocks/{n}[{i}]" for n in ("up", "down") for i in (0, 1))]
    assert [x.op for x in found.layers] == ["take"] + ["dot_general"] * 4


def test_weights(made, found):
    down = made[1]["blocks"]["down"]
    values = down.dequantize()
    for i, layer in zip((0, 1), found.layers[3:], strict=True):
        w, q = PARAMS["blocks"]["down"][i], np.asarray(values[i])
        assert layer.weight_sqnr == pytest.approx(sqnr(w, q), abs=1e-3)
        assert layer.weight_cosine == pytest.approx(
            float(np.sum(w * q) / np.linalg.norm(w) / np.linalg.norm(q)), abs=1e-6
        )
        assert layer.bytes_after == down.nbytes // 2
        assert layer.bytes_before == 24 * 16 * 4


def test_inputs(made, found):
    """The second layer's input: what the table and the first layer make of it."""
    q = jq.dequantize_params(made[1])
    tokens = np.concatenate(BATCHES)

    def second(p):
        x = p["table"][tokens]
        return x + np.maximum(x @ p["blocks"]["up"][0], 0) @ p["blocks"]["down"][0]

    up = found.layers[2]
    assert up.path == "blocks/up[1]"
    assert up.input_sqnr == pytest.approx(sqnr(second(PARAMS), second(jax.tree.map(np.asarray, q))), abs=0.05)
    assert found.layers[0].input_sqnr is None
    assert 30 < up.act_sqnr < 60  # int8, one scale per token


def test_outputs(made, found):
    plan, qparams = made
    tokens = np.concatenate(BATCHES)
    y, z = np.asarray(fn(PARAMS, tokens)), np.asarray(jq.quantized(fn, plan)(qparams, tokens))
    assert found.sqnr == pytest.approx(sqnr(y, z), abs=1e-2)
    each = np.sum((y - z) ** 2, axis=(1, 2)) / np.sum(y**2, axis=(1, 2))
    np.testing.assert_allclose([x.error for x in found.inputs], each, rtol=1e-3)
    p, q = jax.nn.log_softmax(y), jax.nn.log_softmax(z)
    np.testing.assert_allclose(found.kl, np.mean(np.sum(np.exp(p) * (p - q), -1)), rtol=1e-2)
    assert found.worst(1)[0].number == int(np.argmax(each))
    assert found.bytes_after == sum(
        x.nbytes for x in jax.tree.leaves(qparams, is_leaf=lambda x: isinstance(x, jq.QTensor))
    )


def test_without_a_plan_weights_only(made):
    _, qparams = made
    alone = jq.compare(fn, PARAMS, qparams, BATCHES[:1])
    assert {x.path for x in alone.layers} >= {"table", "blocks/up[0]"}
    assert all(x.act_sqnr is None for x in alone.layers)


def test_nothing_changed(made):
    plan = jq.Plan((dataclasses.replace(made[0].items[0], spec=OpSpec()),))
    same = jq.compare(fn, PARAMS, PARAMS, BATCHES[:1], plan=plan)
    assert same.sqnr == np.inf
    assert same.cosine == pytest.approx(1.0)
    assert json.loads(same.to_json())["sqnr"] is None
    assert "unchanged" in _page(same)


def test_refusals(made):
    with pytest.raises(jq.QuantError, match="compare: there are no batches"):
        jq.compare(fn, PARAMS, made[1], [])
    with pytest.raises(jq.QuantError, match="compare: there are no QTensors among qparams"):
        jq.compare(fn, PARAMS, PARAMS, BATCHES)
    with pytest.raises(jq.QuantError, match="compare: the function has no float outputs"):
        jq.compare(lambda p, t: fn(p, t).argmax(-1), PARAMS, made[1], BATCHES)


def test_json_and_table(found):
    data = json.loads(found.to_json())
    assert len(data["layers"]) == 5
    assert data["inputs"][3]["label"] == "<input 3>"
    assert "blocks/down[1]" in str(found)


def _page(found):
    from jaxquant.report.page import render

    return render(found, "A & B")


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(found, tmp_path):
    found.save(tmp_path / "page.html", title="A & B")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    assert not {name for _, attrs in tags.seen for name in attrs} & {"src", "href"}
    assert "http" not in text
    assert "url(" not in text
    assert "&lt;input 3&gt;" in text  # labels are text, not markup
    assert "A &amp; B" in text


def test_a_picture(found, tmp_path):
    found.plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_one_layer_and_no_input_error():
    layer = Layer("w", "dot_general", "int8", (2, 2), 16, 8, np.inf, 1.0, np.inf, 1.0)
    assert "exact" in _page(Comparison((layer,), (Input(0, "", 0.0, 1.0, 0.0),), 16, 8, np.inf))


@pytest.mark.parametrize("values", [[1.0, 2.0], [-3.0, 250.0], [5.0], [], [0.0, 0.001]])
def test_axes_hold_their_values(values):
    axis = Axis.of(values)
    assert axis.low <= min(values, default=axis.low)
    assert axis.high >= max(values, default=axis.high)
    assert 2 <= len(axis.ticks) <= 9
    assert [axis.place(t) for t in (axis.low, axis.high)] == [0.0, 100.0]


def test_it_is_loaded_on_use():
    assert jq.compare is report.compare
    assert "compare" in dir(jq)


def test_a_verdict_in_words(found, tmp_path):
    """First thing on the page: the numbers in it are those of the comparison."""
    off = 10 ** (-found.sqnr / 20)
    worst = min(found.layers, key=lambda x: x.weight_sqnr)
    for part in (f"{found.bytes_before / found.bytes_after:.2f} times smaller", f"{off:.2%} of their size", worst.path):
        assert part in found.verdict
    for sqnr, words in ((45, "hardly differ"), (25, "differ a little"), (12, "differ clearly"), (3, "not those of")):
        assert words in dataclasses.replace(found, sqnr=float(sqnr)).verdict
    assert dataclasses.replace(found, sqnr=math.inf).verdict.endswith("the outputs are unchanged.")
    page = render(found, "title")
    assert page.index("title</h1>") < page.index(str(html.escape(found.verdict))) < page.index('class="cards"')


def test_no_column_is_empty(found):
    def columns(page, heading):
        table = page[page.index(heading) :]
        rows = re.findall(r"<tr>(.*?)</tr>", table[: table.index("</table>")], re.DOTALL)
        each = (re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL) for row in rows)
        cells = [[re.sub(r"<.*?>", "", cell).strip() for cell in row] for row in each]
        return list(zip(*cells, strict=True))

    bare = dataclasses.replace(
        found,
        inputs=tuple(dataclasses.replace(x, label="") for x in found.inputs),
        layers=tuple(dataclasses.replace(x, input_sqnr=None, input_cosine=None, act_sqnr=None) for x in found.layers),
    )
    for one in (found, bare):
        for heading in ("The inputs that change most", "All layers"):
            for name, *values in columns(render(one, "title"), heading):
                assert any(value not in ("", "–") for value in values), name


def test_ticks_are_whole_numbers():
    for values in ([0.0, 1.2], [3.1, 3.4], [-2.0, 40.0]):
        assert all(tick == int(tick) for tick in Axis.of(values).ticks)


def test_groups_need_no_plan():
    """Without a plan weights are what their leaves are, in groups too."""
    w = RNG.normal(size=(32, 8)).astype(np.float32)
    x = RNG.normal(size=(4, 32)).astype(np.float32)
    q = jq.quantize(w, QuantSpec("int4", granularity="per_group", group_size=8), reduce_axes=(-2,))
    one = report.compare(lambda p, x: x @ p["w"], {"w": w}, {"w": q}, [x])
    off = w - np.asarray(q.dequantize())
    np.testing.assert_allclose(one.layers[0].weight_sqnr, 10 * np.log10((w**2).sum() / (off**2).sum()), rtol=1e-5)
    assert one.layers[0].bytes_after == q.nbytes
