"""What the transformation relies on in JAX: the primitive of one use of a function is that of all uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractMesh, PartitionSpec

from jaxquant.transform import primitives

pytestmark = pytest.mark.every

X = jax.ShapeDtypeStruct((4, 6), jnp.bfloat16)


def equations(fn, *args):
    return jax.make_jaxpr(fn)(*args).jaxpr.eqns


def barred(x):
    return jnp.cos(lax.optimization_barrier((x, x + 1))[0])


@jax.custom_vjp
def tripled(x):
    return 3 * x


tripled.defvjp(lambda x: (3 * x, None), lambda _, g: (3 * g,))


@pytest.mark.parametrize(
    "fn, other",
    [
        (jax.jit, lambda x: jax.jit(lambda a: a * jnp.sum(a))(x)),
        (jax.checkpoint, jax.checkpoint(lambda x: x * jnp.sum(x))),
        (jax.custom_vjp, tripled),
        (jax.custom_jvp, jax.nn.relu),
        (lax.composite, lambda x: lax.composite(jnp.cos, name="cosine")(x)),
        (lax.stop_gradient, lambda x: lax.stop_gradient({"a": x})["a"] * 2),
        (checkpoint_name, lambda x: checkpoint_name(x * 2, "twice")),
        (lax.split, lambda x: lax.split(x, (1, 3))[1]),
        (lax.optimization_barrier, barred),
        (lax.ragged_dot, lambda x: lax.ragged_dot(x, jnp.ones((3, 6, 5), x.dtype), jnp.array([1, 0, 3]))),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
@jax.disable_jit(False)
def test_the_primitive_of_one_use_is_that_of_any_other(fn, other):
    def flat(fn, *args):
        for eqn in equations(fn, *args):
            yield eqn.primitive
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                yield from (e.primitive for e in getattr(inner, "eqns", ()))

    assert primitives.used_by(fn) in set(flat(other, X))


def test_primitives_differ_and_only_new_functions_may_have_none():
    found = {fn: primitives.used_by(fn) for fn in primitives.USES}
    without = {fn for fn, primitive in found.items() if primitive is None}
    assert without <= {jnp.stack, jnp.unstack}
    assert len(set(found.values()) - {None}) == len(found) - len(without)


def test_values_of_a_shard_map_say_along_which_axes_they_vary():
    mesh, seen = AbstractMesh((2, 2), ("a", "b")), []

    def body(x, y):
        seen.append((primitives.varying_axes(x), primitives.varying_axes(y)))
        both = primitives.marked_varying(y, ("a",))
        seen.append((primitives.varying_axes(both), both is primitives.marked_varying(both, ("a",))))
        return x + both

    spec = PartitionSpec("a")
    fn = jax.shard_map(body, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    (eqn,) = equations(fn, jax.ShapeDtypeStruct((4, 6), jnp.float32), jax.ShapeDtypeStruct((2, 6), jnp.float32))
    assert eqn.primitive is primitives.used_by(jax.shard_map)
    assert seen == [({"a"}, frozenset()), ({"a"}, True)]
    assert primitives.used_by(primitives.marked_varying) in {e.primitive for e in eqn.params["jaxpr"].eqns}


class TestInlined:
    """A jaxpr put into another."""

    @staticmethod
    def fn(x, y):
        with jax.named_scope("inner"):
            z = jnp.sin(x) @ y
        return z, jax.nn.relu(z) + 1.0

    args = (jnp.arange(6.0).reshape(2, 3) / 5, jnp.arange(12.0).reshape(3, 4) / 7)

    def test_the_equations_are_those_that_evaluation_gives(self):
        closed = jax.make_jaxpr(self.fn)(*self.args)

        def text(run):
            def outer(x, y):
                with jax.named_scope("outer"):
                    return run(x * 2, y)

            return jax.make_jaxpr(outer)(*self.args).pretty_print(name_stack=True)

        assert "outer/inner" in text(jaxpr_as_fun(closed))
        assert text(primitives.inlined(closed)) == text(jaxpr_as_fun(closed))

    def test_values_that_are_no_part_of_a_jaxpr_are_evaluated(self):
        run = primitives.inlined(jax.make_jaxpr(self.fn)(*self.args))
        np.testing.assert_array_equal(run(*self.args)[1], self.fn(*self.args)[1])
        got = jax.grad(lambda x: jnp.sum(run(x, self.args[1])[1] ** 2))(self.args[0])
        np.testing.assert_array_equal(got, jax.grad(lambda x: jnp.sum(self.fn(x, self.args[1])[1] ** 2))(self.args[0]))

    def test_effects_stay(self):
        def loud(x):
            jax.debug.callback(lambda v: None, x)
            return x + 1

        run = primitives.inlined(jax.make_jaxpr(loud)(1.0))
        outer = jax.make_jaxpr(lambda x: run(x * 2))(1.0)
        assert outer.effects == jax.make_jaxpr(loud)(1.0).effects
        assert outer.effects
