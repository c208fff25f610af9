"""A method and distillation in one call: as one after the other; and going on as if there had been no break."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_settings import optax_promotes
from narrowed import untyped
from transform_cases import unequal

import jaxquant as jq
from jaxquant import OpSpec, QuantSpec, Rule, qat
from jaxquant.calibration import Distillation, distill

pytestmark = optax_promotes

PARAMS = {"a": unequal((16, 12), 1, 0.4), "bias": unequal((1, 12), 5, 0.1), "b": unequal((12, 5), 2, 0.4)}
BATCHES = [unequal((8, 16), seed, 0.5) for seed in (3, 4, 6)]
SPEC = OpSpec(QuantSpec("int3"))
STATIC = OpSpec(QuantSpec("int3"), QuantSpec("int8", granularity="per_tensor", static=True))


def fn(p, x):
    return jnp.tanh(x @ p["a"] + p["bias"]) @ p["b"]


def adam():
    return optax.adam(optax.cosine_decay_schedule(0.02, 6))


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("spec", [SPEC, STATIC], ids=["weights", "static"])
def test_one_call_is_the_method_and_then_distillation(spec):
    losses = []
    how = Distillation(adam(), epochs=2, progress=lambda done: losses.append((done.step, float(done.loss))))
    model = jq.quantize_model(fn, PARAMS, recipe=spec, method="clipped", batches=BATCHES, distillation=how)
    plan = jq.make_plan(fn, PARAMS, BATCHES[0], rules=[Rule(".*", spec)])
    stats = jq.calibrate(fn, plan, PARAMS, BATCHES, collect={"gram": jq.calibration.Gram()})
    state = jq.act_state(plan, stats) if spec is STATIC else None
    start = jq.quantize_params(PARAMS, plan, method="clipped", stats=stats)
    *_, last = distill(fn, plan, PARAMS, start, BATCHES * 2, adam(), state=state)
    same(model.params, last.params)
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[-1][1] < losses[2][1]  # both of the third batch


def test_a_run_that_was_stopped_goes_on_to_the_same_result(tmp_path):
    """What is saved is read from a file; the method does not run again."""
    runs = []

    def method(w, spec, *, reduce_axes, stats):
        runs.append(spec.qtype)
        return jq.ptq.rtn(w, spec, reduce_axes=reduce_axes, stats=stats)

    class StoppedError(Exception):
        pass

    def stop(done):
        if done.step == 4:
            jq.io.save(tmp_path / "half.safetensors", done.resume)
            raise StoppedError

    def call(**kwargs):
        how = Distillation(adam(), epochs=2, **kwargs)
        return jq.quantize_model(fn, PARAMS, recipe=SPEC, method=method, batches=BATCHES, distillation=how)

    whole = call()
    with pytest.raises(StoppedError):
        call(progress=stop)
    count, steps = len(runs), []
    again = call(resume=jq.io.load(tmp_path / "half.safetensors"), progress=lambda done: steps.append(done.step))
    assert steps == [5, 6]
    assert len(runs) == count
    same(again.params, whole.params)


def test_a_resumed_run_has_the_static_ranges_of_scaled_activations():
    """The ranges are taken after scales have moved, so a run that goes on moves them again."""

    def scaled(p, x):
        return jnp.tanh(x * p["gain"] @ p["a"]) @ p["b"]

    params = {"gain": 1 + jnp.abs(unequal((1, 16), 7, 2.0)), "a": PARAMS["a"], "b": PARAMS["b"]}
    kept = []

    def call(**kwargs):
        how = Distillation(adam(), **kwargs)
        return jq.quantize_model(scaled, params, recipe=STATIC, method="smoothquant", batches=BATCHES, distillation=how)

    whole = call(progress=lambda done: kept.append(done.resume))
    again = call(resume=kept[1])
    same(again.state, whole.state)
    same(again.params, whole.params)


def test_the_loss_of_predictions_is_one_of_them():
    how = Distillation(adam(), epochs=10, loss=qat.distillation_loss)
    model = jq.quantize_model(fn, PARAMS, recipe=SPEC, batches=BATCHES, distillation=how)
    plain = jq.quantize_model(fn, PARAMS, BATCHES[0], recipe=SPEC)
    x = jnp.concatenate(BATCHES)
    kl = jax.jit(lambda p: qat.distillation_loss(plain.fn(p, x), fn(PARAMS, x)))
    assert kl(model.params) < 0.8 * kl(plain.params)


def first():
    plan = jq.make_plan(fn, PARAMS, BATCHES[0], rules=[Rule(".*", SPEC)])
    qparams = jq.quantize_params(PARAMS, plan)
    return plan, next(distill(fn, plan, PARAMS, qparams, BATCHES, adam()))


def refused(case: str) -> Any:
    def call(**kwargs: Any) -> Any:
        return jq.quantize_model(fn, PARAMS, BATCHES[0], recipe=SPEC, **kwargs)

    if case == "no optimizer":
        return untyped.calibration.Distillation(1e-3)
    if case == "no epochs":
        return Distillation(adam(), epochs=0)
    if case == "settings of another kind":
        return call(batches=BATCHES, distillation=adam())
    if case == "no batches":
        return call(distillation=Distillation(adam()))
    plan, done = first()
    if case == "nothing to go on from":
        return call(batches=BATCHES, distillation=Distillation(adam(), resume=done.params))
    if case == "of other parameters":
        resume = {**done.resume, "params": {"a": done.params["a"]}}
        return call(batches=BATCHES, distillation=Distillation(adam(), resume=resume))
    if case == "another optimizer":
        return next(distill(fn, plan, PARAMS, done.params, BATCHES, optax.sgd(0.1), resume=done.resume))
    other = jq.quantize_params(jax.tree.map(lambda x: 2 * x, PARAMS), plan)
    return next(distill(fn, plan, PARAMS, other, BATCHES, adam(), resume=done.resume))


REFUSED = {
    "no optimizer": r"^Distillation: tx must be an Optax transformation; got tx=0.001. Pass",
    "no epochs": r"^Distillation: epochs must be an integer above 0; got epochs=0",
    "settings of another kind": r"^quantize_model: distillation must be a Distillation; .*Distillation\(optax",
    "no batches": r"^quantize_model: a model is distilled on batches; got batches=None. Pass batches",
    "nothing to go on from": r"^quantize_model: there is nothing to go on from in resume; got resume=",
    "of other parameters": r"^quantize_model: resume is of other parameters; got paths=\('b', 'bias'\)",
    "another optimizer": r"^distill: resume is of a run with another optimizer or plan",
    "other quantized parameters": r"^distill at a: qparams differ from the parameters in resume",
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    with pytest.raises(jq.QuantError, match=REFUSED[case]):
        refused(case)
