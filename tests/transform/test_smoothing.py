"""Scales and rotations: the function stays, rounding gets better."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import snippets
from narrowed import untyped

import jaxquant as jq
from jaxquant import QuantSpec, recipes
from jaxquant.ptq import bases
from jaxquant.ptq.bases import ChannelScale, Rotation

K, H, N = 24, 32, 8
RNG = np.random.default_rng(0)
OUTLIERS = np.exp(2 * RNG.normal(size=K)).astype(np.float32)  # inputs over four orders of magnitude
PARAMS = {
    "up": RNG.normal(size=(K, H)).astype(np.float32) * np.exp(RNG.normal(size=H)).astype(np.float32) / K,
    "bias": RNG.normal(size=(1, H)).astype(np.float32),
    "down": RNG.normal(size=(H, N)).astype(np.float32) / H,
}
X = (RNG.normal(size=(64, K)) @ RNG.normal(size=(K, K))).astype(np.float32) * OUTLIERS / K
COLLECT = {
    "gram": jq.calibration.Gram(),
    "absmax": jq.calibration.ChannelAbsMax(),
    "mean": jq.calibration.ChannelMean(),
}


def fn(p, x):
    return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]


def stacked(p, x):
    def layer(x, w):
        return x + jax.nn.relu(x @ w["up"]) @ w["down"], None

    return jax.lax.scan(layer, x, p)[0]


def plan_of(fn, params, spec, x=X):
    return jq.make_plan(fn, params, x, rules=[jq.Rule("up|down", spec)])


def same(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.fixture(scope="module")
def stats():
    return jq.calibrate(fn, plan_of(fn, PARAMS, recipes.w8a8()), PARAMS, [X], collect=COLLECT)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12, 20, 24, 64, 96, 384, 1536])
def test_rotations_are_orthogonal(n):
    m = bases.orthogonal(n)
    np.testing.assert_allclose(m @ m.T, np.eye(n), atol=1e-12)
    if n not in (1, 3, 7):  # Hadamard: as flat as can be
        np.testing.assert_allclose(np.abs(m), n**-0.5, atol=1e-12)


def test_a_rotation_is_its_matrix():
    rotation = Rotation.random(jax.random.key(1), 12)
    m = np.asarray(rotation.signs)[:, None] * bases.orthogonal(12)
    np.testing.assert_allclose(rotation.inputs(jnp.asarray(X[:, :12])), X[:, :12] @ m, atol=1e-4 * np.abs(X).max())
    np.testing.assert_allclose(rotation.weights(PARAMS["up"][:12]), m.T @ PARAMS["up"][:12], atol=1e-5)
    with pytest.raises(jq.QuantError, match="orthogonal: n must be positive; got n=0"):
        bases.orthogonal(0)


@pytest.mark.parametrize("transform", ["smoothquant", "awq", "equalize"])
def test_fused_scales_keep_the_function(transform, stats):
    plan = plan_of(fn, PARAMS, recipes.w4a16(group_size=8))
    pairs = jq.invariances.scale_pairs(fn, plan, PARAMS, X)
    assert len(pairs) == 1
    with_data = {"smoothquant": jq.invariances.smoothquant, "awq": jq.invariances.awq}
    moved = (
        with_data[transform](PARAMS, plan, pairs, stats)
        if transform in with_data
        else jq.invariances.equalize(PARAMS, plan, pairs, rounds=2)
    )
    assert not np.array_equal(moved["up"], PARAMS["up"])
    same(fn(moved, X), fn(PARAMS, X))
    if transform == "equalize":
        np.testing.assert_allclose(np.abs(moved["up"]).max(0), np.abs(moved["down"]).max(1), rtol=1e-4)


@pytest.mark.parametrize("kind", ["smooth", "awq", "rotation"])
def test_online_bases_keep_the_function(kind, stats):
    plan = plan_of(fn, PARAMS, recipes.w4a16(group_size=8))
    made = {
        "smooth": lambda: jq.invariances.smooth_bases(PARAMS, plan, stats),
        "awq": lambda: jq.invariances.awq_bases(PARAMS, plan, stats, ratios=4),
        "rotation": lambda: jq.invariances.rotation_bases(plan, jax.random.key(0)),
    }[kind]()
    assert set(made) == {"up", "down"}
    turned = jq.invariances.precondition_params(PARAMS, plan, made)
    same(jq.invariances.precondition(fn, plan, made)(turned, X), fn(PARAMS, X))


def test_smoothing_and_rotating_help_with_outliers():
    """One channel a hundred times as large as the others: per token, its range leaves them one step or two."""
    x = RNG.normal(size=(64, K)).astype(np.float32)
    x[:, 3] *= 100
    params = {"up": RNG.normal(size=(K, N)).astype(np.float32)}
    product = lambda p, x: x @ p["up"]  # noqa: E731
    plan = jq.make_plan(product, params, x, rules=[jq.Rule("up", recipes.w8a8())])

    def error(fn, params):
        got = jax.jit(jq.quantized(fn, plan))(jq.quantize_params(params, plan), x)
        return float(jnp.linalg.norm(got - x @ params_float))

    params_float = params["up"]
    plain = error(product, params)
    known = {"up": {"absmax": np.abs(x).max(0, keepdims=True)}}
    for made in (
        jq.invariances.smooth_bases(params, plan, known),
        jq.invariances.rotation_bases(plan, jax.random.key(0)),
    ):
        assert (
            error(
                jq.invariances.precondition(product, plan, made), jq.invariances.precondition_params(params, plan, made)
            )
            < plain / 2
        )


def test_awq_is_never_worse_on_the_data_it_saw(stats):
    """By the measure it searches, the output error of one weight; no scaling is among its choices."""
    spec, w = QuantSpec("int3", granularity="per_group", group_size=8, symmetric=False), jnp.asarray(PARAMS["up"])
    gram = np.asarray(stats["up"]["gram"]["gram"][0])

    def output_error(s):
        e = np.asarray(w - jq.ptq.rtn(w * s[:, None], spec, reduce_axes=(-2,)).dequantize() / s[:, None])
        return np.sum(e * (gram @ e))

    scale = jax.jit(lambda known: jq.ptq.scaling.awq_scale([w], [spec], known, ratios=8))(stats["up"])
    assert output_error(scale) < output_error(jnp.ones(K))


def test_experts_share_the_scale_of_their_input():
    """Each sees its own rows: SmoothQuant's scales by hand, and for AWQ the error over all experts."""
    spec, experts = QuantSpec("int3", granularity="per_group", group_size=8), 3
    params = {"gain": np.ones((1, K), np.float32), "up": RNG.normal(size=(experts, K, H)).astype(np.float32) / K}
    mine = np.arange(len(X)) % 4 == np.arange(experts)[:, None]  # a quarter of the rows is no expert's

    def fn(p, x):
        y = x * p["gain"]
        one = lambda total, e: (total + jnp.where(e[0][:, None], y, 0) @ e[1], None)  # noqa: E731
        return jax.lax.scan(one, jnp.zeros((len(x), H)), (mine, p["up"]))[0]

    plan = jq.make_plan(fn, params, X, rules=[jq.Rule("up", jq.OpSpec(spec))])
    stats = jq.calibrate(fn, plan, params, [X], collect=COLLECT)
    (pair,) = jq.invariances.scale_pairs(fn, plan, params, X)
    smooth = jq.invariances.smoothquant(params, plan, [pair], stats)
    scale = np.sqrt(np.abs(X[mine.any(0)]).max(0) / np.abs(params["up"]).max((0, 2)))
    np.testing.assert_allclose(smooth["gain"][0], 1 / scale, rtol=1e-5)
    np.testing.assert_allclose(smooth["up"], params["up"] * scale[:, None], rtol=1e-5)

    def lost(p):
        q = jax.vmap(lambda w: jq.ptq.rtn(w, spec, reduce_axes=(-2,)).dequantize())(jnp.asarray(p["up"]))
        errors = [X[rows] * p["gain"] @ (w - q) for rows, w, q in zip(mine, p["up"], q, strict=True)]
        return sum(float(np.sum(np.square(e))) for e in errors)

    moved = jq.invariances.awq(params, plan, [pair], stats)
    same(fn(moved, X), fn(params, X))
    assert lost(moved) < 0.9 * lost(params)


def test_awq_gives_the_scales_of_autoawq():
    file = snippets.ROOT / "tests/golden/awq_search_zp1_duo1.safetensors"
    with safetensors.safe_open(file, "np") as reference:
        w1, w2, x, expected = (reference.get_tensor(name) for name in ("w1", "w2", "x", "best_scales"))
    spec = QuantSpec("uint4", granularity="per_group", group_size=32, symmetric=False)
    known = {"mean": {"abs_sum": np.abs(x).sum(1), "rows": np.float32(x.shape[1])}}

    def search(ws):
        return jq.ptq.scaling.awq_scale(
            ws,
            [spec, spec],
            known,
            families=("duo",),
            module=lambda ws: (x[0] @ ws[0]) * jax.nn.sigmoid(x[0] @ ws[1]),
        )

    np.testing.assert_allclose(jax.jit(search)([jnp.asarray(w1.T), jnp.asarray(w2.T)]), expected, rtol=1e-4)


def test_awq_gives_the_clips_of_autoawq_and_clipped_loses_less():
    file = snippets.ROOT / "tests/golden/awq_search_zp1_duo1.safetensors"
    with safetensors.safe_open(file, "np") as reference:
        w1, x, expected = (reference.get_tensor(name) for name in ("w1", "x", "best_clip_w1"))
    spec = QuantSpec("uint4", granularity="per_group", group_size=32, symmetric=False)
    known, w = {"gram": {"gram": np.einsum("bri,brj->bij", x, x)}}, w1.T
    clip = jq.ptq.scaling.awq_clip(jnp.asarray(w), spec, known)
    np.testing.assert_allclose(clip.T, expected[..., 0], rtol=1e-5)

    def lost(q):  # by each group's own outputs, which is what both search by
        e = np.asarray(w - q.dequantize()).reshape(2, 32, -1)
        return np.sum((np.einsum("rgi,gio->rgo", x[0].reshape(-1, 2, 32), e)) ** 2, axis=0)

    bound = np.repeat(clip, 32, axis=0)
    searched = lost(jq.ptq.rtn(np.clip(w, -bound, bound), spec, reduce_axes=(-2,)))
    ours = lost(jq.ptq.clipped(jnp.asarray(w), spec, reduce_axes=(-2,), stats=known))
    assert np.mean(ours <= searched * 1.001) > 0.9
    assert ours.sum() < 0.95 * searched.sum()


def test_stacks():
    params = {"up": np.stack([PARAMS["up"], -PARAMS["up"]]), "down": RNG.normal(size=(2, H, K)).astype(np.float32) / H}
    plan = plan_of(stacked, params, recipes.w8a8())
    known = jq.calibrate(stacked, plan, params, [X], collect=COLLECT)
    pairs = jq.invariances.scale_pairs(stacked, plan, params, X)
    assert [pair.stack for pair in pairs] == [(2,)]
    expected = jax.jit(stacked)(params, X)
    for moved in (
        jq.invariances.smoothquant(params, plan, pairs, known),
        jq.invariances.equalize(params, plan, pairs, rounds=1),
    ):
        same(jax.jit(stacked)(moved, X), expected)
    for made in (
        jq.invariances.smooth_bases(params, plan, known),
        jq.invariances.rotation_bases(plan, jax.random.key(0)),
    ):
        turned = jq.invariances.precondition_params(params, plan, made)
        same(jax.jit(jq.invariances.precondition(stacked, plan, made))(turned, X), expected)


def test_refusals(stats):
    plan = plan_of(fn, PARAMS, recipes.w8a8())
    one = {"up": ChannelScale(jnp.ones(K))}
    with pytest.raises(jq.QuantError, match="precondition at ip: a basis for a weight that is not planned"):
        jq.invariances.precondition(fn, plan, {"ip": one["up"]})
    with pytest.raises(jq.QuantError, match="precondition at down: the basis does not fit; got channels=24"):
        jq.invariances.precondition(fn, plan, {"down": one["up"]})
    with pytest.raises(jq.QuantError, match="precondition_params at up: the weight is quantized already"):
        jq.invariances.precondition_params(jq.quantize_params(PARAMS, plan), plan, one)
    with pytest.raises(jq.QuantError, match="smoothquant at down: there is no absmax of the inputs"):
        jq.invariances.smoothquant(PARAMS, plan, jq.invariances.scale_pairs(fn, plan, PARAMS, X), {})
    with pytest.raises(jq.QuantError, match=r"awq_scale: unknown families of scales; got families=\('both',\)"):
        untyped.ptq.scaling.awq_scale([jnp.ones((2, 2))], [QuantSpec("int4")], {}, families=("both",))
    table, ids = {"t": jnp.ones((4, 3))}, jnp.zeros(2, jnp.int32)
    tied = lambda p, i: jnp.take(p["t"], i, axis=0) @ p["t"].T  # noqa: E731
    both = jq.make_plan(tied, table, ids, rules=[jq.Rule("t", recipes.w8a16())])
    with pytest.raises(jq.QuantError, match="precondition at t: the weight is used in another way too"):
        jq.invariances.precondition(tied, both, {"t": ChannelScale(jnp.ones(3))})
