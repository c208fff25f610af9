"""What goes around learned steps: schedules, ranges that are followed, losses, batch norms, ternary weights."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_settings import needs_jit
from narrowed import present, untyped
from transform_cases import unequal

import jaxquant as jq
from jaxquant import OpSpec, QuantSpec, Rule, observers, qat, recipes

X = unequal((6, 16), 3, 0.5)
PARAMS = {"w": unequal((16, 5), 1, 0.4)}


def product(p, x):
    return x @ p["w"]


def planned(weight, act=None, fn=product, params: Any = None, x=X):
    return jq.make_plan(fn, PARAMS if params is None else params, x, rules=[Rule(".*", OpSpec(weight, act))])


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_each_step_runs_its_stage():
    plan = planned(QuantSpec("int2"))
    state = qat.learned_steps(product, plan, PARAMS, [])
    stages = {0: None, 3: qat.with_bits(plan, weight=8), 7: (plan, state)}
    run = qat.scheduled(product, stages)
    want = [
        product(PARAMS, X),
        jq.quantized(product, stages[3])(PARAMS, X),
        jq.quantized(product, plan, state)(PARAMS, X),
    ]
    compiled = jax.jit(run)
    for step, stage in ((0, 0), (2, 0), (3, 1), (6, 1), (7, 2), (1000, 2)):
        np.testing.assert_array_equal(run(step, PARAMS, X), want[stage])
        np.testing.assert_allclose(compiled(step, PARAMS, X), want[stage], rtol=1e-5, atol=1e-6)


def test_a_schedule_in_a_scan_trains_what_the_stage_has():
    """The state has a gradient in its own stage alone."""
    plan = planned(QuantSpec("int3"))
    state = qat.learned_steps(product, plan, PARAMS, [])

    def grads(step):
        f = lambda p, s: jnp.sum(qat.scheduled(product, {0: None, 2: (plan, s)})(step, p, X) ** 2)  # noqa: E731
        return jax.grad(f, argnums=(0, 1))(PARAMS, state)

    _, (dp, ds) = jax.jit(lambda: lax.scan(lambda step, _: (step + 1, grads(step)), jnp.int32(0), None, length=4))()
    moved = np.any(np.asarray(ds["w"]["weight"]["scale"]) != 0, axis=(1, 2))
    np.testing.assert_array_equal(moved, [False, False, True, True])
    np.testing.assert_allclose(dp["w"][0], 2 * X.T @ product(PARAMS, X), rtol=1e-4, atol=1e-5)


def test_bits_change_and_all_else_stays():
    spec = OpSpec(QuantSpec("int2", granularity="per_group", group_size=4), QuantSpec("uint4", symmetric=False))
    plan = jq.make_plan(product, PARAMS, X, rules=[Rule("w", spec)])
    new = qat.with_bits(plan, weight=4, act=8)["w"].spec
    assert new == OpSpec(QuantSpec("int4", granularity="per_group", group_size=4), QuantSpec("uint8", symmetric=False))
    assert qat.with_bits(plan) == plan
    fp8 = planned(QuantSpec("float8_e4m3fn"))
    assert qat.with_bits(fp8, weight=4) == fp8


PLAN = planned(QuantSpec("int4"))
REFUSED = {
    "no stages": (lambda: qat.scheduled(product, {}), r"^scheduled: a schedule is a dict of first steps and stages"),
    "a list": (lambda: qat.scheduled(product, [PLAN]), r"^scheduled: a schedule is a dict"),  # type: ignore[arg-type]
    "no stage at 0": (
        lambda: qat.scheduled(product, {5: PLAN}),
        r"^scheduled: a schedule starts at step 0. Add \{0: None",
    ),
    "a start before 0": (lambda: qat.scheduled(product, {-1: PLAN}), r"^scheduled: a stage starts at a step"),
    "a start between": (lambda: qat.scheduled(product, {0.5: PLAN}), r"^scheduled: a stage starts at a step"),  # type: ignore[dict-item]
    "a spec": (lambda: qat.scheduled(product, {0: recipes.w8a8()}), r"^scheduled: a stage is a plan"),  # type: ignore[dict-item]
    "a float step": (lambda: qat.scheduled(product, {0: PLAN})(1.0, PARAMS, X), r"^scheduled: step must be an integer"),
    "a step before 0": (lambda: qat.scheduled(product, {0: PLAN})(-1, PARAMS, X), r"^scheduled: steps count from 0"),
    "one bit": (lambda: qat.with_bits(PLAN, weight=1), r"^with_bits: there is no integer type of so many bits"),
    "a loss of other shapes": (
        lambda: qat.distillation_loss(X, X[:, :3]),
        r"^distillation_loss: logits and targets must have one shape",
    ),
    "no temperature": (
        lambda: qat.distillation_loss(X, X, temperature=0.0),
        r"^distillation_loss: temperature must be above 0",
    ),
    "a mask of classes": (
        lambda: qat.distillation_loss(X, X, counted=X > 0),
        r"^distillation_loss: counted does not fit the logits",
    ),
    "no plan": (lambda: qat.observed(product, None), r"^observed: plan must be a Plan"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    call, message = REFUSED[case]
    with pytest.raises(jq.QuantError, match=message):
        call()


# -- ranges ------------------------------------------------------------------------------------------------------------

STACK = {"w": unequal((3, 16, 16), 1, 0.2)}


def stacked(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


@pytest.mark.parametrize("fn, params", [(product, PARAMS), (stacked, STACK)], ids=["dense", "scan"])
def test_ranges_are_followed_in_the_step_and_frozen(fn, params):
    """What a step has seen is what calibration of the quantized model would have seen."""
    act = QuantSpec("int8", granularity="per_tensor", static=True, calibration=observers.EMA(0.5))
    plan = planned(None, act, fn, params)
    first = jq.calibrate(fn, plan, params, [X], collect={})

    @jax.jit
    def step(ranges, number, x):
        def loss(params):
            y, seen = qat.observed(fn, plan, jq.act_state(plan, ranges))(params, x)
            return jnp.sum(y**2), (y, seen)

        (_, (y, seen)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return y, grads, qat.update_ranges(plan, ranges, seen, frozen=number >= 2)

    ranges, history = first, []
    for number, size in enumerate((2.0, 4.0, 8.0)):
        y, grads, ranges = step(ranges, number, size * X)
        history.append(ranges)
        want = jq.quantized(fn, plan, jq.act_state(plan, first if number == 0 else history[number - 1]))(
            params, size * X
        )
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
        assert bool(jnp.any(grads["w"] != 0))
    assert jax.tree.structure(ranges) == jax.tree.structure(first)
    jax.tree.map(np.testing.assert_array_equal, history[1], history[2])  # frozen
    top = np.abs(np.asarray(X)).max()
    # The first layer's input is the batch itself: the mean of 1, 2 and 4, weighted 1, 2 and 4 over 7, of 127 steps.
    lo, hi = np.asarray(X).min(), np.asarray(X).max()
    want = max((-lo, hi)) * (1 * 1 + 2 * 2 + 4 * 4) / 7 / 127
    assert top == max(-lo, hi)
    np.testing.assert_allclose(np.ravel(jq.act_state(plan, ranges)["w"]["scale"])[0], want, rtol=1e-5)


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_torchs(temperature):
    torch = pytest.importorskip("torch")
    logits, targets = unequal((7, 5), 1, 2.0), unequal((7, 5), 2, 2.0)
    loss, grad = jax.value_and_grad(qat.distillation_loss)(logits, targets, temperature=temperature)
    x, t = (torch.tensor(np.asarray(v), dtype=torch.float64) for v in (logits, targets))
    x.requires_grad_(True)
    log = torch.nn.functional.log_softmax
    want = torch.nn.functional.kl_div(
        log(x / temperature, -1), log(t / temperature, -1), log_target=True, reduction="batchmean"
    )
    want = want * temperature**2
    want.backward()
    np.testing.assert_allclose(loss, want.detach().numpy(), rtol=1e-5)
    assert x.grad is not None
    np.testing.assert_allclose(grad, x.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_what_does_not_count_has_no_part_in_the_loss():
    logits, targets = unequal((2, 3, 5), 1, 2.0), unequal((2, 3, 5), 2, 2.0)
    counted = jnp.array([[True, True, False], [True, False, False]])
    some = jnp.concatenate([logits[0, :2], logits[1, :1]]), jnp.concatenate([targets[0, :2], targets[1, :1]])
    np.testing.assert_allclose(
        qat.distillation_loss(logits, targets, counted=counted), qat.distillation_loss(*some), rtol=1e-6
    )
    assert not jnp.any(jax.grad(qat.distillation_loss, argnums=1)(logits, targets))  # the float model is constant


# -- batch norms -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    bias: bool

    @nn.compact
    def __call__(self, x):
        for features in (4, 6):
            x = nn.Conv(features, (3, 3), use_bias=self.bias)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return x


@pytest.mark.parametrize("bias", [True, False])
def test_norms_are_folded_into_the_kernels_before_them(bias):
    model, x = Net(bias), unequal((2, 6, 6, 3), 4)
    variables = model.init(jax.random.key(0), x)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda v: v + jnp.asarray(rng.uniform(0.1, 0.5, v.shape), v.dtype), variables)
    folded = qat.fold_batch_norms(variables, {f"Conv_{i}": f"BatchNorm_{i}" for i in range(2)})
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, variables)
    apply: Any = model.apply
    np.testing.assert_allclose(apply(folded, x), apply(variables, x), rtol=1e-4, atol=1e-4)
    for i in range(2):
        assert not np.any(folded["batch_stats"][f"BatchNorm_{i}"]["mean"])
        # From a norm without a shift of its own, what is left is the identity.
        np.testing.assert_allclose(folded["params"][f"BatchNorm_{i}"]["scale"], np.sqrt(1 + 1e-5), rtol=1e-6)


def test_norms_that_do_not_follow_are_refused():
    variables = Net(False).init(jax.random.key(0), jnp.ones((1, 6, 6, 3)))
    with pytest.raises(jq.QuantError, match=r"^fold_batch_norms at Conv_0: the norm has other features"):
        qat.fold_batch_norms(variables, {"Conv_0": "BatchNorm_1"})
    with pytest.raises(jq.QuantError, match=r"^fold_batch_norms at Conv_9: there is no params/Conv_9/kernel"):
        qat.fold_batch_norms(variables, {"Conv_9": "BatchNorm_1"})


# -- ternary weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_ternary_weights_are_those_of_bitnet(granularity):
    plan = jq.make_plan(product, PARAMS, X, rules=[Rule("w", recipes.ternary(granularity))])
    w = np.asarray(PARAMS["w"], np.float64)
    mean = np.abs(w).mean(None if granularity == "per_tensor" else 0, keepdims=True)
    want = np.clip(np.round(w / mean), -1, 1)
    q = jq.quantize_params(PARAMS, plan)["w"]
    np.testing.assert_array_equal(q.logical_codes(), want)
    np.testing.assert_allclose(q.scale, mean, rtol=1e-6)
    assert jq.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_binary_weights_are_those_of_xnor_net(granularity):
    """sign(w) times mean|w|, in a bit each; trained and frozen alike."""
    plan = jq.make_plan(product, PARAMS, X, rules=[Rule("w", recipes.binary(granularity))])
    w = np.asarray(PARAMS["w"], np.float64)
    mean = np.abs(w).mean(None if granularity == "per_tensor" else 0, keepdims=True)
    qparams = jq.quantize_params(PARAMS, plan)
    np.testing.assert_allclose(qparams["w"].dequantize(), np.sign(w) * mean, rtol=1e-6)
    assert qparams["w"].nbytes == 16 * 5 // 8 + mean.size * 4
    zeros = jq.quantize(jnp.zeros((16, 5)), present(recipes.binary(granularity).weight), reduce_axes=(-2,))
    assert float(jnp.max(jnp.abs(zeros.dequantize()))) < 1e-37  # no code stands for 0
    run = jax.jit(jq.quantized(product, plan))
    np.testing.assert_allclose(run(PARAMS, X), run(qparams, X), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(run(qparams, X), np.asarray(X, np.float64) @ (np.sign(w) * mean), rtol=1e-5, atol=1e-5)


def test_binary_weights_without_their_mean_are_those_of_bitnet():
    """sign(w - mean) times mean|w|: the mean is subtracted from the float weights, and a code is still one bit."""
    centred = {"w": PARAMS["w"] - jnp.mean(PARAMS["w"])}
    plan = jq.make_plan(product, centred, X, rules=[Rule("w", recipes.binary("per_tensor"))])
    w = np.asarray(PARAMS["w"], np.float64)
    w -= w.mean()
    want = np.where(w > 0, 1, -1) * np.abs(w).mean()
    np.testing.assert_allclose(jq.quantize_params(centred, plan)["w"].dequantize(), want, rtol=1e-5)
    assert np.any(np.sign(w) != np.sign(PARAMS["w"]))


@pytest.mark.parametrize("spec", [recipes.ternary(), recipes.binary()], ids=["ternary", "binary"])
def test_gradients_pass_all_weights_with_a_mean_for_a_scale(spec):
    """As published: the product's own gradient, for weights beyond the mean, too."""
    plan = jq.make_plan(product, PARAMS, X, rules=[Rule("w", OpSpec(spec.weight))])
    cotangent = unequal((6, 5), 9)
    got = jax.grad(lambda p: jnp.sum(jq.quantized(product, plan)(p, X) * cotangent))(PARAMS)["w"]
    np.testing.assert_allclose(got, X.T @ cotangent, rtol=1e-4, atol=1e-5)


def test_the_mean_magnitude_of_batches_is_that_of_all():
    observer, parts = observers.AbsMean(), [X[:2], X[2:]]
    state = observer.init((1, 1))
    for part in parts:
        state = observer.update(state, part, (0, 1))
    lo, hi = observer.result(state, symmetric=True, roundtrip=lambda x, lo, hi: x)
    np.testing.assert_allclose(hi, np.abs(np.asarray(X)).mean(), rtol=1e-6)
    np.testing.assert_array_equal(lo, -hi)


# -- stochastic rounding -----------------------------------------------------------------------------------------------

UP_OR_DOWN = QuantSpec("int4", narrow_range=True, rounding="stochastic")  # its ends are on codes


def test_weights_and_activations_are_rounded_with_the_key():
    """Up or down by one step, the same for the same key; in the mean what is rounded; to nearest it is frozen."""
    act = QuantSpec("int8", rounding="stochastic")
    plan = planned(UP_OR_DOWN, act)
    run = jax.jit(lambda key, x: jq.quantized(product, plan, key=key)(PARAMS, x))
    keys = jax.random.split(jax.random.key(0), 256)
    np.testing.assert_array_equal(run(keys[0], X), run(keys[0], X))
    assert bool(jnp.any(run(keys[0], X) != run(keys[1], X)))
    of_weight = jq.make_plan(product, PARAMS, X, rules=[Rule(".*", OpSpec(UP_OR_DOWN))])
    values = jax.jit(jax.vmap(lambda key: jq.quantized(product, of_weight, key=key)(PARAMS, jnp.eye(16))))(keys)
    step = np.asarray(jq.quantize_params(PARAMS, qat.to_nearest(of_weight))["w"].scale)
    off = (np.asarray(values, np.float64) - np.asarray(PARAMS["w"])) / step
    assert np.abs(off).max() < 1 + 1e-4
    assert np.abs(off).max() > 0.6  # to nearest it is half a step
    assert np.abs(off.mean(0)).max() < 5 * 0.5 / np.sqrt(256)
    results = jax.jit(jax.vmap(lambda key: jq.quantized(product, plan, key=key)(PARAMS, X)))(keys)
    noise = np.asarray(results).std(0) / np.sqrt(256)
    assert np.all(np.abs(np.asarray(results).mean(0) - product(PARAMS, X)) < 5 * noise)
    nearest = qat.to_nearest(plan)
    assert nearest == planned(QuantSpec("int4", narrow_range=True), QuantSpec("int8"))
    assert isinstance(jq.quantize_params(PARAMS, nearest)["w"], jq.QTensor)


def test_gradients_pass_straight_through_what_is_rounded_with_a_key():
    """The gradient is that of the product of the values that the key gives."""
    plan = planned(UP_OR_DOWN, QuantSpec("int8", rounding="stochastic"))
    of_weight = planned(UP_OR_DOWN)
    key = jax.random.key(3)
    w = jq.quantized(product, of_weight, key=key)(PARAMS, jnp.eye(16))  # one key for a weight, whatever is beside it
    run = jax.jit(jax.grad(lambda p, x: jnp.sum(jq.quantized(product, plan, key=key)(p, x)), argnums=(0, 1)))
    dp, dx = run(PARAMS, X)
    np.testing.assert_allclose(dx, jnp.broadcast_to(w.sum(1), X.shape), rtol=1e-4, atol=1e-5)
    x = jq.quantized(lambda p, x: x @ p["w"], planned(None, plan["w"].spec.act, params={"w": jnp.eye(16)}), key=key)(
        {"w": jnp.eye(16)}, X
    )
    np.testing.assert_allclose(dp["w"], jnp.broadcast_to(x.sum(0)[:, None], (16, 5)), rtol=1e-4, atol=1e-5)


def test_layers_of_a_scan_are_rounded_with_a_key():
    plan = planned(UP_OR_DOWN, QuantSpec("int8", rounding="stochastic"), stacked, STACK)

    def loss(p, key):
        return jnp.sum(jq.quantized(jax.checkpoint(stacked), plan, key=key)(p, X) ** 2)

    run = jax.jit(jax.value_and_grad(loss))
    first, again, other = (run(STACK, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert first[0] != other[0]
    assert bool(jnp.all(jnp.isfinite(first[1]["w"])))


ALL_THREE = recipes.w8a8g8(rounding="stochastic")
NOISY = {
    "forward": OpSpec(UP_OR_DOWN, QuantSpec("int8", rounding="stochastic")),
    "gradients": ALL_THREE,
    "both": OpSpec(UP_OR_DOWN, QuantSpec("int8", rounding="stochastic"), ALL_THREE.grad),
}


@pytest.mark.parametrize("name", NOISY)
def test_devices_and_remat_do_not_change_what_a_key_gives(name):
    """Rows of x and columns of the layers on several devices: one key gives one loss and one gradient.

    Noise is that of the whole array, sums of codes are exact, and the noise of a gradient is that of its own bits.
    Another key moves the gradients a hundred times farther.
    """
    plan = jq.make_plan(stacked, STACK, X, rules=[Rule(".*", NOISY[name])])

    def step(fn, key, p, x):
        return jax.value_and_grad(lambda p: jnp.sum(jq.quantized(fn, plan, key=key)(p, x) ** 2))(p)

    key, mesh = jax.random.key(5), Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("rows", "columns"))
    plain, kept = (jax.jit(functools.partial(step, fn)) for fn in (stacked, jax.checkpoint(stacked)))
    loss, grads = plain(key, STACK, X)
    w, x = (
        jax.device_put(v, NamedSharding(mesh, spec))
        for v, spec in ((STACK["w"], P(None, None, "columns")), (X, P("rows")))
    )
    runs = {"again": plain(key, STACK, X), "remat": kept(key, STACK, X), "devices": plain(key, {"w": w}, x)}
    size = float(jnp.max(jnp.abs(grads["w"])))
    for where, (other, theirs) in runs.items():
        np.testing.assert_allclose(other, loss, rtol=1e-5, err_msg=where)
        np.testing.assert_allclose(theirs["w"], grads["w"], rtol=0, atol=1e-5 * size, err_msg=where)
    noise = plain(jax.random.key(6), STACK, X)[1]
    assert float(jnp.max(jnp.abs(noise["w"] - grads["w"]))) > 1e-3 * size


@needs_jit  # else a shard_map takes minutes
def test_a_shard_of_a_shard_map_has_a_key_of_its_own():
    """Within `jax.shard_map` an array is the shard: with one key all shards have the same noise."""
    plan = planned(UP_OR_DOWN, QuantSpec("int8", rounding="stochastic"))
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    x = jnp.concatenate([X, X])

    def rows(own, x):
        key = jax.random.key(0)
        key = jax.random.fold_in(key, lax.axis_index("d")) if own else key
        return jq.quantized(product, plan, key=key)(PARAMS, x)

    one, each = (
        np.asarray(
            jax.jit(jax.shard_map(functools.partial(rows, own), mesh=mesh, in_specs=P("d"), out_specs=P("d")))(x)
        )
        for own in (False, True)
    )
    np.testing.assert_array_equal(one[:6], one[6:])
    assert np.any(each[:6] != each[6:])


@pytest.mark.parametrize("operand", ["weight", "act"])
def test_a_missing_key_is_an_error(operand):
    plan = planned(UP_OR_DOWN, None) if operand == "weight" else planned(None, UP_OR_DOWN)
    want = rf"^quantized at w: stochastic rounding needs a key; got operand='{operand}', key=None. Pass .*to_nearest"
    with pytest.raises(jq.QuantError, match=want):
        jq.quantized(product, plan)(PARAMS, X)
    with pytest.raises(jq.QuantError, match=r"^quantized: nothing is rounded with a key"):
        jq.quantized(product, qat.to_nearest(plan), key=jax.random.key(0))
    with pytest.raises(jq.QuantError, match=r"^quantized: key must be"):
        untyped.quantized(product, plan, key=3)
    if operand == "weight":
        state = {"w": {"weight": {"scale": jnp.ones((1, 5))}}}
        with pytest.raises(jq.QuantError, match=r"^quantized at w: learned steps round to nearest"):
            jq.quantized(product, plan, state, key=jax.random.key(0))(PARAMS, X)
