"""Small models of other people's libraries, as functions of parameters and inputs.

Each builder imports its library, which the extra ``models`` installs, and returns ``fn, params, args``: a function
``fn(params, *args)`` to one float array, a tree with float leaves, and example inputs. Nothing in a library is changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["BUILDERS"]

Built = tuple[Callable[..., jax.Array], Any, tuple[Any, ...]]
BUILDERS: dict[str, Callable[[], Built]] = {}


def builder(make: Callable[[], Built]) -> Callable[[], Built]:
    BUILDERS[make.__name__] = make
    return make


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def tokens(vocabulary: int, *shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(7), shape, 0, vocabulary)


def module_of_arrays(module: Any, call: Callable[..., jax.Array], *args: Any) -> Built:
    """An Equinox module: its float arrays are the parameters."""
    import equinox

    params, static = equinox.partition(module, equinox.is_inexact_array)
    return (lambda params, *args: call(equinox.combine(params, static), *args)), params, args


# -- transformers ------------------------------------------------------------------------------------------------------


def transformers_model(config: str, model: str, settings: dict[str, Any], pick: Callable[[Any], jax.Array]) -> Built:
    import transformers

    built = getattr(transformers, model)(getattr(transformers, config)(**settings), seed=0)
    ids = tokens(settings.get("vocab_size", 64), 2, 8)
    return (lambda params, ids: pick(built(ids, params=params))), built.params, (ids,)


@builder
def transformers_bert() -> Built:
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    return transformers_model("BertConfig", "FlaxBertModel", sizes, lambda out: out.last_hidden_state)


@builder
def transformers_gpt2() -> Built:
    sizes = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    return transformers_model("GPT2Config", "FlaxGPT2LMHeadModel", sizes, lambda out: out.logits)


@builder
def transformers_llama() -> Built:
    sizes = dict(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=16,
    )  # fmt: skip
    return transformers_model("LlamaConfig", "FlaxLlamaForCausalLM", sizes, lambda out: out.logits)


@builder
def transformers_vit() -> Built:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    flax: Any = transformers  # version 4, the last with models of Flax
    model = flax.FlaxViTModel(config, seed=0)
    image = normal(1, 2, 3, 16, 16)
    return (lambda params, image: model(image, params=params).last_hidden_state), model.params, (image,)


@builder
def transformers_regnet() -> Built:
    import transformers

    config = transformers.RegNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8)
    flax: Any = transformers
    model = flax.FlaxRegNetModel(config, input_shape=(1, 32, 32, 3), seed=0)
    rest = {key: value for key, value in model.params.items() if key != "params"}
    image = normal(1, 2, 3, 32, 32)

    def fn(params: Any, image: jax.Array) -> jax.Array:
        return model(image, params={"params": params, **rest}).pooler_output

    return fn, model.params["params"], (image,)


# -- other layers of Flax ----------------------------------------------------------------------------------------------


@builder
def diffusers_unet() -> Built:
    import diffusers

    model = diffusers.FlaxUNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    params = model.init_weights(jax.random.key(0))
    args = normal(1, 1, 4, 8, 8), jnp.array([3]), normal(2, 1, 5, 16)

    def fn(params: Any, x: jax.Array, step: jax.Array, context: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x, step, context).sample

    return fn, params, args


@builder
def jraph_graph_network() -> Built:
    import flax.linen as nn
    import jraph
    import numpy as np

    class Network(nn.Module):
        @nn.compact
        def __call__(self, graph: Any) -> jax.Array:
            update = lambda name: jraph.concatenated_args(  # noqa: E731
                lambda x: nn.relu(nn.Dense(16, name=name)(x))
            )
            network = jraph.GraphNetwork(update("edge"), update("node"), update("world"))
            return network(graph).nodes

    graph = jraph.GraphsTuple(
        nodes=normal(1, 5, 8), edges=normal(2, 6, 4), globals=normal(3, 1, 4),
        senders=jnp.array([0, 1, 2, 3, 4, 0]), receivers=jnp.array([1, 2, 3, 4, 0, 2]),
        n_node=np.array([5]), n_edge=np.array([6]),
    )  # fmt: skip

    def with_features(nodes: jax.Array) -> Any:
        return graph._replace(nodes=nodes)

    model: Any = Network()
    params = model.init(jax.random.key(0), graph)
    return (lambda params, nodes: model.apply(params, with_features(nodes))), params, (graph.nodes,)


@builder
def ott_potential() -> Built:
    from ott.neural.networks import icnn

    model = icnn.ICNN(dim_data=8, dim_hidden=[16, 16])
    params = model.init(jax.random.key(0), jnp.ones(8))
    x = normal(1, 4, 8)
    return (lambda params, x: jax.vmap(lambda row: model.apply(params, row))(x)), params, (x,)


@builder
def numpyro_flax_module() -> Built:
    import flax.linen as nn
    import numpyro
    from numpyro.contrib.module import flax_module

    dense = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(4)])
    params = dense.init(jax.random.key(0), jnp.ones((1, 8)))["params"]

    def fn(params: Any, x: jax.Array) -> jax.Array:
        with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.substitute(data={"net$params": params}):
            return flax_module("net", dense, input_shape=(1, 8))(x)

    return fn, params, (normal(1, 4, 8),)


# -- libraries with modules of their own -------------------------------------------------------------------------------


@builder
def haiku_transformer() -> Built:
    import haiku

    def forward(ids: jax.Array) -> jax.Array:
        x = haiku.Embed(64, 32)(ids)
        x = x + haiku.MultiHeadAttention(2, 16, w_init=haiku.initializers.VarianceScaling())(x, x, x)
        out, _ = haiku.dynamic_unroll(haiku.LSTM(16), x, haiku.LSTM(16).initial_state(2), time_major=False)
        return haiku.Linear(8)(out)

    model = haiku.without_apply_rng(haiku.transform(forward))
    ids = tokens(64, 2, 6)
    return model.apply, model.init(jax.random.key(0), ids), (ids,)


@builder
def equinox_mlp_and_gru() -> Built:
    import equinox

    keys = jax.random.split(jax.random.key(0), 3)
    model = equinox.nn.GRUCell(8, 16, key=keys[0]), equinox.nn.MLP(16, 4, 16, 2, key=keys[1])

    def call(model: Any, x: jax.Array) -> jax.Array:
        cell, mlp = model
        return jax.vmap(lambda row: mlp(cell(row, jnp.ones(16))))(x)

    return module_of_arrays(model, call, normal(1, 4, 8))


@builder
def diffrax_neural_ode() -> Built:
    import diffrax
    import equinox

    field = equinox.nn.MLP(8, 8, 16, 1, key=jax.random.key(0))

    def call(field: Any, x: jax.Array) -> jax.Array:
        term = diffrax.ODETerm(lambda t, y, args: field(y))
        solve = lambda y: diffrax.diffeqsolve(  # noqa: E731
            term, diffrax.Euler(), 0.0, 1.0, 0.25, y, adjoint=diffrax.DirectAdjoint(), max_steps=8
        ).ys[-1]
        return jax.vmap(solve)(x)

    return module_of_arrays(field, call, normal(1, 4, 8))


@builder
def flowjax_coupling_flow() -> Built:
    import flowjax.bijections
    import flowjax.distributions
    import flowjax.flows

    flow = flowjax.flows.coupling_flow(
        jax.random.key(0), base_dist=flowjax.distributions.Normal(jnp.zeros(8)), flow_layers=2, nn_width=16,
        transformer=flowjax.bijections.Affine(),
    )  # fmt: skip
    return module_of_arrays(flow, lambda flow, x: flow.log_prob(x), normal(1, 4, 8))


@builder
def penzai_transformer() -> Built:
    from penzai import pz
    from penzai.models.transformer.variants import llamalike_common

    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=2, query_head_multiplier=1, embedding_dim=16, projection_dim=8, mlp_hidden_dim=32,
        num_decoder_blocks=1, vocab_size=64, mlp_variant="geglu_approx", tie_embedder_and_logits=True,
        rope_wavelength=10_000, rms_norm_eps=1e-6, attention_type=llamalike_common.AttentionTypeGlobalCausal(),
    )  # fmt: skip
    model = llamalike_common.build_llamalike_transformer(config, init_base_rng=jax.random.key(0))
    model, variables = pz.unbind_params(model, freeze=True)
    params = {
        str(variable.label): variable.value.untag(*variable.value.named_shape).data_array for variable in variables
    }
    named = {str(variable.label): variable for variable in variables}

    def fn(params: Any, ids: jax.Array) -> jax.Array:
        bound = [
            dataclasses.replace(v, value=pz.nx.wrap(params[name]).tag(*v.value.named_shape))
            for name, v in named.items()
        ]
        whole = pz.bind_variables(model, bound)
        out = whole(pz.nx.wrap(ids).tag("batch", "seq"), token_positions=pz.nx.arange("seq", ids.shape[1]))
        return out.untag("batch", "seq", "vocabulary").data_array

    return fn, params, (tokens(64, 2, 6),)


@builder
def keras_stateless() -> Built:
    import keras

    layers = keras.layers
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, activation="relu")(inputs)
    x = layers.DepthwiseConv2D(3)(x)
    x = layers.Dense(8)(layers.Flatten()(x))
    model = keras.Model(inputs, x)
    rest = [variable.value for variable in model.non_trainable_variables]
    params = {variable.path: jnp.asarray(variable.value) for variable in model.trainable_variables}

    def fn(params: Any, image: jax.Array) -> jax.Array:
        return model.stateless_call(list(params.values()), rest, image)[0]

    # A dict of JAX comes back in the order of its keys.
    order = {variable.path: i for i, variable in enumerate(model.trainable_variables)}
    sorted_fn = lambda params, image: fn({k: params[k] for k in sorted(params, key=order.__getitem__)}, image)  # noqa: E731
    return sorted_fn, params, (normal(1, 2, 8, 8, 3),)


@builder
def e3nn_equivariant_linear() -> Built:
    import e3nn_jax as e3nn
    from e3nn_jax.flax import Linear

    model = Linear("8x0e + 8x1o")
    x = e3nn.IrrepsArray("8x0e + 8x1o", normal(1, 4, 32))
    params = model.init(jax.random.key(0), x)
    return (lambda params, x: model.apply(params, e3nn.IrrepsArray("8x0e + 8x1o", x)).array), params, (x.array,)


@builder
def distrax_masked_flow() -> Built:
    import distrax
    import flax.linen as nn

    net: Any = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(16)])
    params = net.init(jax.random.key(0), jnp.ones(8))

    def fn(params: Any, x: jax.Array) -> jax.Array:
        def conditioner(x: jax.Array) -> jax.Array:
            return net.apply(params, x)

        def bijector(both: jax.Array) -> Any:
            shift, scale = jnp.split(both, 2, axis=-1)
            return distrax.ScalarAffine(shift=shift, log_scale=jnp.tanh(scale))

        layer = distrax.MaskedCoupling(mask=jnp.arange(8) % 2 == 0, conditioner=conditioner, bijector=bijector)
        return layer.forward(x)

    return fn, params, (normal(1, 4, 8),)
