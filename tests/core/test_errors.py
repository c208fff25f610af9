"""Messages: one form, and nothing in them that a terminal acts on."""

import pickle
import unicodedata

import hypothesis
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant.core.errors import printable, quant_error

pytestmark = pytest.mark.every

#: Escapes, a C1 code, line ends of three kinds, a change of the direction of writing, a lone surrogate.
HOSTILE = "a\x1b[2J\x07\x9b1m\r\n\u2028\u202eb\ud800"


@hypothesis.given(text=st.text())
def test_what_is_printable_stays_and_the_rest_is_an_escape(text):
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    assert shown.encode("ascii", "ignore") or not text.isascii() or not text
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize("category", ["Cc", "Cf", "Zl", "Zp", "Cs"])
def test_no_character_of_these_kinds_comes_through(category):
    found = [chr(i) for i in range(0x11000) if unicodedata.category(chr(i)) == category]
    assert found
    assert all(printable(c) == c.encode("unicode_escape").decode() for c in found)


def test_names_in_errors_are_escaped_wherever_they_stand():
    error = quant_error("f", f"a rule about {HOSTILE}", todo=f"Rename {HOSTILE}", path=HOSTILE, name=HOSTILE)
    lines = str(error).split("\n")
    assert all(line.isprintable() for line in lines)
    assert len(lines) == 3  # the line feeds of rule and todo are the caller's; the path's and the value's are escaped
    assert str(error).startswith(r"f at a\x1b[2J\x07\x9b1m\r\n\u2028\u202eb\ud800: a rule")


def test_paths_of_parameters_are_escaped_in_tables_and_errors():
    name = "w\x1b[2J\nforged"
    params = {name: jnp.ones((64, 8))}
    f = lambda p, x: x @ p[name]  # noqa: E731
    plan = jq.make_plan(f, params, jnp.ones((2, 64)), rules=[jq.Rule("w", jq.recipes.w8a16())])
    tables = [str(plan), str(jq.explain(jq.quantized(f, plan), jq.quantize_params(params, plan), jnp.ones((2, 64))))]
    with pytest.raises(jq.QuantError) as error:
        jq.make_plan(f, params, jnp.ones((2, 64)), rules=[jq.Rule("w", jq.recipes.w4a16(group_size=48))])
    with pytest.raises(jq.QuantError) as other:
        jq.make_plan(f, params, jnp.ones((2, 64)), rules=[jq.Rule("v", jq.recipes.w8a16())])
    for text in [*tables, str(error.value), str(other.value)]:
        assert r"w\x1b[2J\nforged" in text
        assert all(line.isprintable() for line in text.split("\n"))


def test_an_error_knows_its_place_and_takes_one():
    error = quant_error("f", "a: rule", todo="Do it", x=1)
    placed = error.at("a/b: c")
    assert str(placed) == "f at a/b: c: a: rule; got x=1. Do it."
    again = pickle.loads(pickle.dumps(placed))
    for one in (placed, again):
        assert (str(one), one.function, one.path, one.text) == (str(placed), "f", "a/b: c", "a: rule; got x=1. Do it.")
    assert (error.path, str(error)) == (None, "f: a: rule; got x=1. Do it.")
