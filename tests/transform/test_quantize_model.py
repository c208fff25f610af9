"""`quantize_model`: one call is what `make_plan`, `calibrate` and `quantize_params` do one after another."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrowed import present
from transform_cases import unequal
from transform_models import KEEP, MODELS, WEIGHTS

import jaxquant as jq
from jaxquant import QuantError, ptq, recipes

X = unequal((4, 64), 1)
PARAMS = {
    "norm": jnp.linspace(0.5, 2.0, 64)[None],
    "up": unequal((64, 32), 2, 0.2),
    "down": unequal((32, 64), 3, 0.2),
    "bias": jnp.zeros((1, 64)),
}


def mlp(p, x):
    return jax.nn.relu((x * p["norm"]) @ p["up"]) @ p["down"] + p["bias"]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("framework", "name"), MODELS)
def test_any_model_in_one_call(framework, name):
    fn, params, inputs = MODELS[framework, name]()
    ignore = [rule.pattern for rule in KEEP[name]]
    model = jq.quantize_model(fn, params, inputs, recipe="w8a16", ignore=ignore)
    assert model.report.quantized == len(model.plan.items) == WEIGHTS[name]
    assert {f.path for f in model.report.floats} == {f.path for f in model.plan.floats}
    assert model.report.nbytes[1] < model.report.nbytes[0]
    assert str(model.report).startswith(f"{WEIGHTS[name]} weights quantized: ")
    y, expected = jax.jit(model.fn)(model.params, inputs), fn(params, inputs)
    assert jnp.linalg.norm(y - expected) < 0.03 * jnp.linalg.norm(expected)


def test_it_is_the_three_steps():
    model = jq.quantize_model(mlp, PARAMS, X, recipe="w8a8:static", method="gptq", batches=[X, X / 2])
    plan = jq.make_plan(mlp, PARAMS, X, rules=[jq.Rule(".*", recipes.w8a8(static=True))])
    assert model.plan == plan
    stats = jq.calibrate(mlp, plan, PARAMS, [X, X / 2], collect={"gram": jq.calibration.Gram()})
    same(model.state, jq.act_state(plan, stats))
    same(model.params, jq.quantize_params(PARAMS, plan, method=ptq.gptq, stats=stats))
    same(model.fn(model.params, X), jq.quantized(mlp, plan, model.state)(model.params, X))


def test_without_arguments_the_first_batch_is_traced():
    model = jq.quantize_model(mlp, PARAMS, recipe="w4a16:g32", method="clipped", batches=iter([X, (X,)]))
    assert [item.rows for item in model.plan.items] == [4, 4]


@pytest.mark.parametrize("method", ["awq", "smoothquant", "awq+gptq"])
def test_scales_move_before_weights_are_rounded(method):
    """What moves into a weight leaves the norm: the function in float stays, and its quantized form is nearer to it."""
    x = X * jnp.where(jnp.arange(64) % 16 == 0, 40.0, 1.0)[None]  # a few channels carry nearly all
    recipe = "w8a8" if method == "smoothquant" else "w4a16:g32"
    model = jq.quantize_model(mlp, PARAMS, x, recipe=recipe, method=method, batches=[x])
    assert not jnp.allclose(model.params["norm"], PARAMS["norm"])
    plain = jq.quantize_model(mlp, PARAMS, x, recipe=recipe)
    lost = [jnp.linalg.norm(m.fn(m.params, x) - mlp(PARAMS, x)) for m in (model, plain)]
    assert lost[0] < lost[1]


def test_a_quantizer_of_ones_own_is_given_what_it_asks_for():
    seen = []

    def method(w, spec, *, reduce_axes, stats: Any = None):
        seen.append(stats["gram"]["gram"].shape)
        return ptq.rtn(w, spec, reduce_axes=reduce_axes)

    jq.quantize_model(mlp, PARAMS, X, recipe="w8a16", method=method, batches=[X])
    assert sorted(seen) == [(1, 32, 32), (1, 64, 64)]
    free = functools.partial(ptq.double_quantized, method=ptq.hqq)
    assert jq.quantize_model(mlp, PARAMS, X, recipe="w4a16:g32:asym", method=free).report.quantized == 2


def test_keywords_go_to_the_function_that_is_calibrated():
    fn = lambda p, x, *, gain: mlp(p, x * gain)  # noqa: E731
    states = [
        present(jq.quantize_model(fn, PARAMS, recipe="w8a8:static", batches=[X], gain=gain).state)["up"]["scale"]
        for gain in (1.0, 4.0)
    ]
    np.testing.assert_allclose(states[1], 4 * states[0], rtol=1e-6)


def test_a_method_of_ones_own_need_not_look_at_inputs():
    method = lambda w, spec, **options: ptq.rtn(w, spec, reduce_axes=options["reduce_axes"])  # noqa: E731
    model = jq.quantize_model(mlp, PARAMS, X, recipe="w8a16", method=method)
    same(model.params, jq.quantize_model(mlp, PARAMS, X, recipe="w8a16").params)
    assert model.report.nbytes[1] == sum(leaf.nbytes for leaf in model.params.values())


def test_rules_and_sizes_that_do_not_divide():
    rules = [jq.Rule("up", "w4a16:g32"), jq.Rule("down", None)]
    assert [i.path for i in jq.quantize_model(mlp, PARAMS, X, recipe=rules).plan.items] == ["up"]
    fitted = jq.quantize_model(mlp, PARAMS, X, recipe="w4a16", misfit="per_channel")  # groups of 64; 32 inputs
    assert present(fitted.plan["down"].spec.weight).granularity == "per_channel"
    assert "down: " in str(fitted.report)


def test_the_model_runs_as_it_was_saved(tmp_path):
    model = jq.quantize_model(mlp, PARAMS, X, recipe="w8a8:static", batches=[X])
    jq.io.save(tmp_path / "m.safetensors", model.params, plan=model.plan, state=model.state)
    loaded = jq.io.load_model(tmp_path / "m.safetensors")
    expected = model.fn(model.params, X)
    for known in (loaded, model):
        same(jq.quantized(mlp, known)(loaded.params, X), expected)
    with pytest.raises(QuantError, match=r"quantized: the model has a state already.*Leave state out"):
        jq.quantized(mlp, loaded, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "gptq"}, r"this is a method.*recipe='w4a16', method='gptq'"),
        ({"recipe": "awq"}, r"this is a method.*method='awq'"),
        ({"recipe": "w8a8", "method": "w4a16:g32"}, r"this is a recipe.*Pass recipe='w4a16:g32'"),
        ({"recipe": "w4a17"}, r"recipe: unknown recipe; got recipe='w4a17'. Nearest: 'w4a16'.*All: binary, fp4, fp8"),
        ({"recipe": "int4"}, r"int4 is a number type; recipes with such weights: w4a4, w4a8, w4a16"),
        ({"recipe": "w8a8:g64"}, r"w8a8 has no such option; got option='g64'.*Use each.*: asym, static"),
        ({"recipe": 4}, r"a recipe is an OpSpec, or the name of one; got got=4"),
        ({"recipe": "w8a8", "ignore": "up"}, r"ignore must be a sequence.*Pass \['up'\]"),
        ({"recipe": "w8a8", "ignore": ["head"]}, r"a rule matches no weight; got pattern='head'. Nearest"),
        ({"recipe": "w8a8", "method": "gtpq"}, r"no quantizer has this name; got method='gtpq'. Nearest: 'gptq'"),
        ({"recipe": "w8a8", "method": "awk+gptq"}, r"no such step before a quantizer.*Nearest: 'awq'"),
        ({"recipe": "w8a8", "method": 3}, r"method must be a quantizer; got method=3"),
        ({"recipe": "w8a8", "method": "gptq"}, r"gptq looks at inputs; got batches=None. Pass batches"),
        ({"recipe": "w8a8", "method": "awq", "batches": []}, r"awq looks at inputs"),
        ({"recipe": "w8a8:static"}, r"static activation ranges come from inputs"),
        ({"recipe": "w8a8", "batches": [X]}, r"nothing here looks at the batches; got batches=1"),
        ({"recipe": "w8a8", "method": "gptq", "batches": X}, r"this is a batch"),
        ({"recipe": [], "misfit": "float"}, r"misfit is for a recipe, and here are rules"),
        ({"recipe": "w8a8", "target": "gpus"}, r"target"),
    ],
)
def test_what_is_refused_says_what_to_do(arguments, message):
    with pytest.raises(QuantError, match=message):
        jq.quantize_model(mlp, PARAMS, X, **arguments)


def test_a_model_in_place_of_its_function():
    flax = pytest.importorskip("flax.linen")
    with pytest.raises(QuantError, match=r"fn must be a function of params; got fn='Dense'. Pass.*model\.apply"):
        jq.quantize_model(flax.Dense(3), {}, X, recipe="w8a8")


def test_a_function_without_scales_that_could_move():
    with pytest.raises(QuantError, match=r"awq finds no scales that could move.*precondition"):
        jq.quantize_model(lambda p, x: x @ p["up"], PARAMS, X, recipe="w4a16", method="awq", batches=[X])


def test_a_name_goes_wherever_a_method_or_a_spec_does():
    plan = jq.make_plan(mlp, PARAMS, X, rules=[jq.Rule("up|down", "w4a16:g32")])
    same(jq.quantize_params(PARAMS, plan, method="hqq"), jq.quantize_params(PARAMS, plan, method=ptq.hqq))
    with pytest.raises(QuantError, match=r"quantize_params: no quantizer has this name.*quantize_model"):
        jq.quantize_params(PARAMS, plan, method="awq")
    assert jq.OpRule("a", "w8a8") == jq.OpRule("a", recipes.w8a8())
    assert jq.Rule.from_dict({"pattern": "a", "spec": "nf4"}) == jq.Rule("a", recipes.nf4())
