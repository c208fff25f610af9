"""NNX and JAX transformations of models with float and with quantized weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_settings import draws, makes_nan, needs_jit, optax_promotes
from narrowed import present, untyped
from nnx_cases import MLP, SPECS, Block, assign, calibrated, close, pure, run_stack, stack, value, wavy

import jaxquant as jq
from jaxquant import recipes

SHORT = ["w8a8", pytest.param("w4a16 grouped", marks=pytest.mark.slow), pytest.param("nvfp4", marks=pytest.mark.slow)]
X = wavy((3, 16))


def models(spec):
    """The model that trains and the quantized one."""
    model = MLP(nnx.Rngs(0), spec)
    return model, jq.nnx.quantize(model)


@pytest.fixture(scope="module", params=SHORT)
def pair(request):
    return models(SPECS[request.param])


def same_values(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_split_merge_state_update_clone(pair):
    for model in pair:
        want = model(X)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        np.testing.assert_array_equal(nnx.merge(graphdef, params, rest)(X), want)
        np.testing.assert_array_equal(nnx.clone(model)(X), want)
        other = MLP(nnx.Rngs(1), model.first.spec)
        nnx.update(other, nnx.state(model))
        np.testing.assert_array_equal(other(X), want)
        other = MLP(nnx.Rngs(1), model.first.spec)
        nnx.update(other, pure(model))  # a plain dict, as a checkpoint gives it
        np.testing.assert_array_equal(other(X), want)
        np.testing.assert_array_equal(nnx.merge(graphdef, pure(model))(X), want)


def test_quantized_weights_are_params_of_the_same_graph(pair):
    model, q = pair
    assert nnx.split(model)[0] == nnx.split(q)[0]
    is_leaf = lambda x: isinstance(x, jq.QTensor)  # noqa: E731
    assert jax.tree.structure(pure(model)) == jax.tree.structure(
        jax.tree.map(lambda x: 0, pure(q, nnx.Param), is_leaf=is_leaf)
    )


def test_jit(pair):
    for model in pair:
        close(nnx.jit(lambda m, x: m(x))(model, X), model(X), 1e-5)
    graphdef, state = nnx.split(pair[1])
    close(jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, X), pair[1](X), 1e-5)


@needs_jit
def test_jit_traces_once_for_equal_models():
    traces = []

    @nnx.jit
    def run(model, x):
        traces.append(0)
        return model(x)

    for seed in range(2):
        run(jq.nnx.quantize(MLP(nnx.Rngs(seed), recipes.w8a8())), X)
    assert len(traces) == 1


def test_vmap_over_examples_and_over_models(pair):
    for model in pair:
        y = nnx.jit(nnx.vmap(lambda m, x: m(x), in_axes=(None, 0)))(model, X)
        close(y, model(X), 1e-5)

    @nnx.jit
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return MLP(rngs, pair[0].first.spec)

    both = make(nnx.Rngs(0))
    run = nnx.jit(nnx.vmap(lambda m, x: m(x), in_axes=(0, None)))
    frozen = jq.nnx.quantize(both)
    assert value(frozen.first.kernel).shape == (2, 16, 32)
    close(run(frozen, X), run(both, X), 1e-5)


@pytest.mark.parametrize("spec", ["w8a8", "w4a16 grouped", "nvfp4", "w8a8 static", "per tensor"])
def test_scan_over_a_stack(spec):
    per_tensor = jq.OpSpec(jq.QuantSpec("int8", granularity="per_tensor"))
    model = stack(3, per_tensor if spec == "per tensor" else SPECS[spec])
    calibrated(model, X, call=run_stack)
    q = jq.nnx.quantize(model)
    y = run_stack(q, X)
    close(y, run_stack(model, X), 1e-5)
    x = X
    for i in range(3):  # layer by layer; codes and scales are those of each layer alone
        layer = jq.nnx.QuantLinear(16, 16, spec=model.dense.spec, rngs=nnx.Rngs(0))
        nnx.update(layer, jax.tree.map(lambda a, i=i: a[i], nnx.state(model.dense)))
        x = jnp.tanh(jq.nnx.quantize(layer)(x))
    close(y, x, 1e-5)


def test_gradients_through_scan():
    model = stack(3, recipes.w8a8())
    grads = nnx.jit(nnx.grad(lambda m: jnp.sum(run_stack(m, X) ** 2)))(model)

    def unrolled(state):
        x = X
        for i in range(3):
            block = Block(nnx.Rngs(0), recipes.w8a8())
            nnx.update(block, jax.tree.map(lambda a, i=i: a[i], state))
            x = block(x)
        return jnp.sum(x**2)

    want = jax.jit(jax.grad(unrolled))(nnx.to_pure_dict(nnx.state(model)))
    close(grads["dense"]["kernel"][...], want["dense"]["kernel"], 1e-5)
    close(grads["dense"]["bias"][...], want["dense"]["bias"], 1e-5)


def test_remat(pair):
    run = nnx.remat(lambda m, x: m(x))
    for model in pair:
        loss = [lambda m, f=f: jnp.sum(f(m, X) ** 2) for f in (run, lambda m, x: m(x))]
        a, b = (nnx.jit(nnx.grad(f, argnums=nnx.DiffState(0, jq.nnx.trainable)))(model) for f in loss)
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            close(x, y, 1e-5)


@pytest.mark.parametrize("transform", ["jit", "grad", "remat", "scan"])
def test_calibration_under_transformations(transform):
    spec = recipes.w8a8(static=True)
    if transform == "scan":
        model = stack(2, spec)
        calibrated(model, X, call=run_stack)
        ranges = value(model.dense.act_range.hi)
        assert ranges.shape == (2,)
        assert float(ranges[0]) == pytest.approx(float(np.abs(X).max()))
        assert float(ranges[1]) < 1  # what tanh lets through
        return
    model = jq.nnx.QuantLinear(16, 4, spec=spec, rngs=nnx.Rngs(0))
    run = {
        "jit": nnx.jit(lambda m, x: m(x)),
        "grad": nnx.grad(lambda m, x: jnp.sum(m(x))),
        "remat": nnx.grad(lambda m, x: jnp.sum(nnx.remat(lambda m, x: m(x))(m, x))),
    }[transform]
    calibrated(model, X, 2 * X, call=run)
    assert float(value(model.act_range.hi)) == pytest.approx(2 * float(np.abs(X).max()))


def test_eval_shape(pair):
    for spec, build in ((pair[0].first.spec, lambda m: m), (pair[0].first.spec, jq.nnx.quantize)):
        abstract = nnx.eval_shape(lambda s=spec, b=build: b(MLP(nnx.Rngs(0), s)))
        got = nnx.eval_shape(lambda m, x: m(x), abstract, jax.ShapeDtypeStruct(X.shape, X.dtype))
        assert got.shape == (3, 4)
    nnx.update(abstract, pure(pair[1]))  # no float weight was ever made
    np.testing.assert_array_equal(abstract(X), pair[1](X))


def test_bfloat16_model():
    model = jq.nnx.QuantLinear(
        16, 4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, spec=recipes.w8a8(), rngs=nnx.Rngs(0)
    )
    q = jq.nnx.quantize(model)
    for m in (model, q):
        assert nnx.jit(lambda m, x: m(x))(m, X).dtype == jnp.bfloat16
    assert nnx.grad(lambda m: jnp.sum(m(X)).astype(jnp.float32))(model)["kernel"][...].dtype == jnp.bfloat16


# -- wrap, quantize, functional ---------------------------------------------------------------------------------------


class Mixed(nnx.Module):
    """All kinds of layers, a shared one, a container, attention."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(8, 16, rngs=rngs)
        self.blocks = nnx.Sequential(nnx.Linear(16, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 16, rngs=rngs))
        self.conv = nnx.Conv(16, 16, 3, rngs=rngs)
        self.einsum = nnx.Einsum("btd,df->btf", (16, 16), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)
        self.same = self.head

    def __call__(self, index):
        x = self.blocks(self.embed(index))
        x = self.attention(self.einsum(self.conv(x)))
        return self.same(x), self.embed.attend(x)


INDEX = jnp.array([[1, 2, 3], [7, 0, 1]])
WEIGHTS = ["embed/embedding", "conv/kernel", "einsum/kernel", "head/kernel", "blocks/layers/0/kernel"] + [
    f"attention/{name}/kernel" for name in ("query", "key", "value", "out")
]


def at(tree, path):
    for part in path.split("/"):
        tree = tree[int(part) if part not in tree else part]
    return tree


def test_wrap_runs_and_quantizes_a_model_of_flax_layers():
    model = Mixed(nnx.Rngs(0))

    def run(model, x):
        graphdef, state = nnx.split(model)
        return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)

    before, want = pure(model), run(model, INDEX)
    wrapped = jq.nnx.wrap(model, [jq.Rule("layers/2", None), jq.Rule(".*", recipes.w8a16())])
    assert set(wrapped.plan(INDEX)) == set(WEIGHTS)
    q = wrapped.quantize(INDEX)
    params = pure(q.model)
    assert all(isinstance(at(params, path), jq.QTensor) for path in WEIGHTS)
    assert isinstance(at(params, "blocks/layers/2/kernel"), jax.Array)
    for a, b, c in zip(run(q, INDEX), run(wrapped, INDEX), want, strict=True):
        close(a, b, 1e-5)
        close(a, c, 0.05)
    # The user's model is as it was, and nothing of the copy is bound to it.
    same_values(pure(model), before)
    assert value(q.model.head.bias).unsafe_buffer_pointer() == value(model.head.bias).unsafe_buffer_pointer()
    assign(q.model.head.bias, value(q.model.head.bias) + 1)
    same_values(pure(model), before)


@draws
@optax_promotes
def test_a_wrapped_model_trains_and_keeps_its_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(16, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.w = nnx.Param(jnp.linspace(-1.0, 1.0, 32).reshape(8, 4))
            self.seen = nnx.BatchStat({"calls": jnp.zeros((), jnp.int32)})

        def __call__(self, x):
            assign(self.seen, {"calls": value(self.seen)["calls"] + 1})
            return self.dropout(self.norm(self.dense(x))) @ self.w[...]

    model, float_model = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    wrapped = jq.nnx.wrap(model, [jq.Rule(".*", recipes.w8a8())])
    assert set(wrapped.plan(X)) == {"dense/kernel", "w"}
    optimizer = nnx.Optimizer(wrapped, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(wrapped, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(X) ** 2))(wrapped)
        optimizer.update(wrapped, grads)
        return loss

    count = value(present(model.dropout.rngs).count)
    losses = [float(step(wrapped, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert value(present(model.dropout.rngs).count) == count + 20
    assert value(model.seen)["calls"] == 20
    assert value(wrapped.quantize(X).model.seen)["calls"] == 20
    float_model(X)
    wrapped_once = jq.nnx.wrap(Net(nnx.Rngs(0)), [jq.Rule(".*", recipes.w8a8())])
    wrapped_once(X)
    close(value(wrapped_once.model.norm.mean), value(float_model.norm.mean), 0.05)
    assert bool(jnp.any(value(float_model.norm.mean) != 0))


def test_rules_replace_specs_and_none_removes_them():
    model = MLP(nnx.Rngs(0), recipes.w8a8(static=True))
    changed = jq.nnx.quantize(model, [jq.Rule("first", None), jq.Rule("second", recipes.w8a16())])
    assert changed.first.spec is None
    assert isinstance(value(changed.first.kernel), jax.Array)
    assert changed.second.spec == recipes.w8a16()
    assert not nnx.state(changed, jq.nnx.QuantStat)
    assert model.first.spec == recipes.w8a8(static=True)


def test_quantize_with_a_method_and_statistics():
    seen = []

    def method(w, spec, *, reduce_axes, stats):
        seen.append((w.shape, reduce_axes, stats))
        return jq.quantize(w, spec, reduce_axes=reduce_axes)

    q = jq.nnx.quantize(MLP(nnx.Rngs(0), recipes.w8a16()), method=method, stats={"second/kernel": "here"})
    assert seen == [((16, 32), (-2,), None), ((32, 4), (-2,), "here")]
    again = jq.nnx.quantize(q)  # nothing left to do
    same_values(pure(again), pure(q))


def test_stacked_statistics_go_with_their_layer():
    def method(w, spec, *, reduce_axes, stats):
        return jq.quantize(w * stats, spec, reduce_axes=reduce_axes)

    model = stack(3, recipes.w8a16())
    q = jq.nnx.quantize(model, method=method, stats={"dense/kernel": jnp.array([1.0, 2.0, 4.0])})
    plain = value(jq.nnx.quantize(model).dense.kernel)
    np.testing.assert_allclose(value(q.dense.kernel).scale[2], 4 * plain.scale[2], rtol=1e-6)


def test_functional():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = jq.nnx.QuantLinear(16, 8, spec=recipes.w8a16(), rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, *, shift=0.0):
            return self.dropout(self.norm(self.dense(x))) + shift

    model = Net(nnx.Rngs(0))
    fn, params = jq.nnx.functional(model)
    assert set(params) == {"dense", "norm"}
    before = pure(model)
    y = jax.jit(fn)(params, X)
    np.testing.assert_allclose(fn(params, X), y, atol=1e-5)
    np.testing.assert_allclose(fn(params, X, shift=1.0), y + 1, atol=1e-5)  # the same dropout: no state is carried over
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), pure(model, nnx.BatchStat), {"norm": {
        "mean": before["norm"]["mean"], "var": before["norm"]["var"]}}))  # fmt: skip
    grads = jax.grad(lambda p: jnp.sum(fn(p, X) ** 2))(params)
    assert grads["dense"]["kernel"].shape == (16, 8)
    q = jq.quantize_params(params, [jq.Rule("kernel", recipes.w8a16())])
    close(jax.jit(fn)(q, X), y, 1e-4)
    np.testing.assert_array_equal(y, jax.jit(fn)(params, X))
    np.testing.assert_allclose(model(X), y, atol=1e-5)  # the first call of the model itself


def test_functional_of_a_flax_model_under_the_transformation():
    model = MLP(nnx.Rngs(0), flax=True)
    fn, params = jq.nnx.functional(model)
    plan = jq.make_plan(fn, params, X, rules=[jq.Rule(".*", recipes.w8a8())])
    got = jax.jit(jq.quantized(fn, plan))(jq.quantize_params(params, plan), X)
    close(got, jq.nnx.wrap(model, [jq.Rule(".*", recipes.w8a8())]).quantize(X)(X), 1e-5)


RULE = jq.Rule(".*", recipes.w8a16())


BAD = {
    "one rule, no list": (
        lambda: untyped.nnx.wrap(MLP(nnx.Rngs(0), flax=True), RULE),
        "wrap: rules must be a sequence of Rule",
    ),
    "not a rule": (lambda: untyped.nnx.quantize(MLP(nnx.Rngs(0), flax=True), ["kernel"]), "sequence of Rule"),
    "a rule that matches nothing": (
        lambda: jq.nnx.quantize(MLP(nnx.Rngs(0)), [jq.Rule("frist", recipes.w8a16()), RULE]),
        "quantize: a rule matches no weight; got pattern='frist'. Nearest weights: 'first/kernel'",
    ),
    "a rule that matches nothing in a trace": (
        lambda: jq.nnx.wrap(MLP(nnx.Rngs(0), flax=True), [jq.Rule("frist", recipes.w8a16())])(X),
        "make_plan: .*pattern='frist'.*'first/kernel'",
    ),
    "a rule for a bias": (
        lambda: jq.nnx.quantize(MLP(nnx.Rngs(0)), [jq.Rule("bias", recipes.w8a16())]),
        "matches no weight",
    ),
    "None for what is not there": (
        lambda: jq.nnx.quantize(MLP(nnx.Rngs(0)), [jq.Rule("head", None), RULE]),
        "matches no weight; got pattern='head'",
    ),
    "Flax's own layer": (
        lambda: jq.nnx.quantize(MLP(nnx.Rngs(0), flax=True), [RULE]),
        r"quantize at first/kernel: Linear cannot run on a QTensor by itself.*jq.nnx.wrap",
    ),
    "no spec anywhere": (lambda: jq.nnx.quantize(MLP(nnx.Rngs(0))), "quantize: no layer has a spec for its weight"),
    "a group that does not divide": (
        lambda: jq.nnx.quantize(MLP(nnx.Rngs(0), recipes.w4a16(group_size=12))),
        "quantize_params at first/kernel: group_size must divide the length 16",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name):
    fn, message = BAD[name]
    with pytest.raises(jq.QuantError, match=message):
        fn()


@makes_nan
def test_nan_in_a_weight_names_it_and_changes_nothing():
    model = MLP(nnx.Rngs(0), recipes.w8a16())
    assign(model.second.kernel, value(model.second.kernel).at[3, 1].set(jnp.nan))
    with pytest.raises(jq.QuantError, match="second/kernel: a weight must be finite"):
        jq.nnx.quantize(model)
    assert isinstance(value(model.first.kernel), jax.Array)
