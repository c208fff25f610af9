"""einsum agrees with jnp.einsum on the dequantized operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_reference import INTEGER, WEIGHT_ONLY, error, quantized, real, slow_but, spec_of, unequal

from jaxquant import OpSpec, QuantError, ops, recipes

SIZES = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 8, "f": 6}

EQUATIONS = [
    ("btd,dh->bth", (2, 5, 8), (8, 6)),
    ("btd,dhk->bhtk", (2, 5, 8), (8, 3, 4)),
    ("bthk,hkd->btd", (2, 5, 3, 4), (3, 4, 6)),
    ("bthk,khd->btd", (2, 5, 3, 4), (4, 3, 6)),
    ("bqhd,bkhd->bhqk", (2, 5, 3, 8), (2, 4, 3, 8)),
    ("bhqk,bkhd->bqhd", (2, 3, 5, 4), (2, 4, 3, 8)),
    ("ebd,edf->ebf", (3, 5, 8), (3, 8, 6)),
    ("...d,dh->...h", (2, 5, 8), (8, 6)),
    ("...d,dh", (2, 5, 8), (8, 6)),
    ("...td,...dh->...th", (2, 5, 8), (2, 8, 6)),
    ("...td,...dh->...th", (3, 2, 5, 8), (2, 8, 6)),
    ("...td,...dh->...th", (5, 8), (3, 2, 8, 6)),
    ("t...d,d...->...t", (5, 2, 8), (8, 2)),
    ("ij,jk", (5, 8), (8, 6)),
    ("ji,kj", (8, 5), (6, 8)),
    ("bi,bi->b", (5, 8), (5, 8)),
    ("bi,bi", (5, 8), (5, 8)),
    ("i,i", (8,), (8,)),
    ("i,j->ji", (5,), (6,)),
    ("ij,ij->ij", (5, 8), (5, 8)),
    (" b t d , d h -> b t h ", (2, 5, 8), (8, 6)),
    ("btxd,dh->bth", (2, 5, 3, 8), (8, 6)),  # x is summed in the activation
    ("xbd,dh->hb", (3, 5, 8), (8, 6)),
    (",ij->ji", (), (5, 8)),
]


@pytest.mark.parametrize("case", slow_but(EQUATIONS, *EQUATIONS[1::3]), ids=str)
def test_equations(case):
    equation, left, right = case
    check(equation, unequal(0, left), unequal(1, right))


class Parsed:
    """An equation's letters, by what becomes of them; '..0' and '..1' stand for the axes of an ellipsis."""

    def __init__(self, equation, left_ndim, right_ndim):
        inputs, arrow, output = equation.replace(" ", "").partition("->")
        self.terms, self.arrow, self.output = inputs.split(","), arrow, output
        self.left, self.right = (_names(t, n) for t, n in zip(self.terms, (left_ndim, right_ndim), strict=True))
        letters = inputs.replace(",", "").replace(".", "")
        summed = {c for c in letters if (c not in output if arrow else letters.count(c) > 1)}
        self.contracted = {c for c in summed if c in self.left and c in self.right}
        self.alone = tuple(i for i, c in enumerate(self.left) if c in summed - self.contracted)

    def axes(self, names):
        return tuple(i for i, c in enumerate(names) if c in self.contracted)

    def without_alone(self):
        """The equation once the left operand has been summed over the axes that only it has; its contracted axes."""
        left = "".join(c for c in self.terms[0] if c not in {self.left[i] for i in self.alone})
        kept = [c for i, c in enumerate(self.left) if i not in self.alone]
        return f"{left},{self.terms[1]}{self.arrow}{self.output}", self.axes(kept)


def _names(term, ndim):
    left, dots, right = term.partition("...")
    return [*left, *(f"..{i}" for i in range(ndim - len(left) - len(right)) if dots), *right]


def check(equation, x, w):
    """Weight-only, and with an asymmetric activation; both against float64."""
    parsed, act = Parsed(equation, x.ndim, w.ndim), spec_of("int8", symmetric=False)
    q = quantized(w, act, parsed.axes(parsed.right))
    products = jax.jit(lambda x, q: [ops.einsum(equation, x, q, spec=s) for s in (None, OpSpec(act=act))])(x, q)
    weight = real(q)
    summed, axes = parsed.without_alone()  # the activation is quantized after that
    y = jnp.sum(x, axis=parsed.alone)
    for got, left, bound in zip(products, (real(y), real(y, act, axes)), (10 * WEIGHT_ONLY, INTEGER), strict=True):
        want, size = np.einsum(summed, left, weight), np.sqrt(np.einsum(summed, left**2, weight**2))
        assert error(got, want, size) <= bound
    whole = np.einsum(equation, real(x), weight)
    assert error(products[0], whole, np.sqrt(np.einsum(equation, real(x) ** 2, weight**2))) <= 10 * WEIGHT_ONLY


@st.composite
def equations(draw):
    """Two operands that share some letters; each letter kept or summed; an ellipsis in front, sometimes."""
    letters = draw(st.permutations("abcdef"))
    shared, mine, yours = (draw(st.integers(0, 2)) for _ in range(3))
    both, left, right = (
        letters[:shared],
        letters[shared : shared + mine],
        letters[shared + mine : shared + mine + yours],
    )
    first = "".join(draw(st.permutations(both + left)))
    second = "".join(draw(st.permutations(both + right)))
    dots = draw(st.sampled_from([("", ""), ("...", ""), ("...", "..."), ("", "...")]))
    lead = draw(st.sampled_from([(2,), (3, 2)]))
    kept = [c for c in both if draw(st.booleans())] + [c for c in left if draw(st.integers(0, 3))] + right
    output = (dots[0] or dots[1]) + "".join(draw(st.permutations(kept)))
    equation = f"{dots[0]}{first},{dots[1]}{second}"
    if draw(st.integers(0, 3)):
        equation += f"->{output}"
    shapes = [(*(lead if d else ()), *(SIZES[c] for c in term)) for d, term in zip(dots, (first, second), strict=True)]
    return equation, *shapes


@settings(max_examples=6)
@given(equations(), st.integers(0, 5))
def test_random_equations(case, seed):
    equation, left, right = case
    check(equation, unequal(seed, left, decades=0.3), unequal(seed + 1, right, decades=0.3))


def test_weight_first():
    w, x = unequal(2, (6, 8)), unequal(3, (2, 8, 5))
    q = quantized(w, spec_of("int8"), (-1,))
    got = ops.einsum("oi,bit->bot", q, x, spec=OpSpec(act=spec_of("int8")))
    want = np.einsum("oi,bit->bot", real(q), real(x, spec_of("int8"), (1,)))
    assert error(got, want) <= INTEGER


def test_in_float_it_is_jnp():
    x, w = unequal(4, (2, 5, 8)), unequal(5, (8, 6))
    np.testing.assert_array_equal(ops.einsum("btd,dh->bth", x, w), jnp.einsum("btd,dh->bth", x, w))
    np.testing.assert_array_equal(ops.einsum("ii->i", jnp.eye(3), spec=OpSpec()), np.ones(3))
    three = ops.einsum("ab,bc,cd->ad", jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones((4, 5)))
    assert three.shape == (2, 5)
    assert ops.einsum("btd,dh->bth", x, w, preferred_element_type=jnp.bfloat16).dtype == jnp.bfloat16


def test_options_reach_the_product():
    x, w = unequal(6, (5, 8), jnp.bfloat16), unequal(7, (8, 6), jnp.bfloat16)
    assert ops.einsum("td,dh->th", x, w, spec=recipes.w8a8()).dtype == jnp.bfloat16
    wide = ops.einsum("td,dh->th", x, w, spec=recipes.w8a8(), preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32
    q = quantized(w, spec_of("int8"))
    got = ops.einsum("td,dh->th", x, q, precision="highest", preferred_element_type=jnp.float32)
    assert error(got, real(x) @ real(q)) <= INTEGER
    spec = recipes.w8a8(static=True)
    got = ops.einsum("td,dh->th", x.astype(jnp.float32), q, spec=spec, act_scale=0.05)
    assert error(got, real(x.astype(jnp.float32), spec.act, (1,), 0.05) @ real(q)) <= INTEGER


@pytest.mark.parametrize(
    "equation, left, right, rule",
    [
        ("iij,jk->ik", (3, 3, 4), (4, 5), "repeated subscripts"),
        ("ij,jk->iik", (3, 4), (4, 5), "repeated subscripts"),
        ("ij,jk->iz", (3, 4), (4, 5), "unknown subscript"),
        ("i1,1k->ik", (3, 4), (4, 5), "unknown subscript"),
        ("ij,jk->ik", (3, 4, 2), (4, 5), "do not fit the ranks"),
        ("ijl,jk->ik", (3, 4), (4, 5), "do not fit the ranks"),
        ("...ijl,jk->ik", (3, 4), (4, 5), "do not fit the ranks"),
        ("......ij,jk->ik", (3, 4), (4, 5), "unknown subscript|do not fit"),
        ("ij,jk->ik", (3, 4), (5, 5), "two sizes"),
        ("...ij,...jk->...ik", (1, 3, 4), (2, 4, 5), "two sizes"),
        ("ij,jkl->ik", (3, 4), (4, 5, 2), "cannot be summed over an axis of its own"),
        ("ij->ji", (3, 4), (4, 5), "two operands"),
        ("ij,jk,kl->il", (3, 4), (4, 5), "two operands"),
    ],
)
def test_refused(equation, left, right, rule):
    x, w = unequal(0, left), unequal(1, right)
    q = quantized(w, spec_of("int8"), (0,))
    for weight, spec in ((q, None), (w, recipes.w8a8())):
        with pytest.raises(QuantError, match=rule):
            ops.einsum(equation, x, weight, spec=spec)
