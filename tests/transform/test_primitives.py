"""What the transformation relies on in JAX: each primitive that is read off a function, found in others too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractMesh, PartitionSpec

from jaxquant.transform import primitives

pytestmark = pytest.mark.every

X = jax.ShapeDtypeStruct((4, 6), jnp.bfloat16)


def equations(fn, *args):
    return jax.make_jaxpr(fn)(*args).jaxpr.eqns


def barred(x):
    return jnp.cos(lax.optimization_barrier((x, x + 1))[0])


@pytest.mark.parametrize(
    "example, shape, fn",
    [
        (primitives.jit_call, (3,), lambda x: jax.jit(lambda a: a * jnp.sum(a))(x)),
        (primitives.checkpointed, (3,), jax.checkpoint(lambda x: x * jnp.sum(x))),
        (primitives.with_custom_vjp, (3,), lambda x: primitives.with_custom_vjp(x)),
        (primitives.with_custom_jvp, (3,), jax.nn.relu),
        (primitives.stopped, (3,), lambda x: lax.stop_gradient({"a": x})["a"] * 2),
        (primitives.with_name, (3,), lambda x: primitives.with_name(x * 2)),
        (primitives.in_halves, (4,), lambda x: lax.split(x, (1, 3))[1]),
        (primitives.behind_barrier, (3,), barred),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_the_primitive_of_an_example_is_that_of_any_use(example, shape, fn):
    def flat(fn, *args):
        for eqn in equations(fn, *args):
            yield eqn.primitive
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                yield from (e.primitive for e in getattr(inner, "eqns", ()))

    assert primitives.used_by(example, shape) in set(flat(fn, X))


def test_a_ragged_dot_is_one_equation():
    sizes = jax.ShapeDtypeStruct((3,), jnp.int32)
    w = jax.ShapeDtypeStruct((3, 6, 5), jnp.bfloat16)
    assert [e.primitive for e in equations(lax.ragged_dot, X, w, sizes)][-1] is primitives.ragged_dot_p()


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
    assert eqn.primitive is primitives.shard_map_p()
    assert seen == [({"a"}, frozenset()), ({"a"}, True)]
    assert primitives.pvary_p() in {e.primitive for e in eqn.params["jaxpr"].eqns}


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
