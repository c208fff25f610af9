"""Other libraries' quantized products, for ``matmul.py --peers``: whichever of them is installed.

    pip install qwix aqtp torch torchao onnx onnxruntime

Each is used as its documentation says for inference: weights prepared once, float32 in and out, a
thread for each core.

Of torchao 0.18 what runs on a CPU is here: int8, compiled by `torch.compile` (which needs a C++ compiler), and its
prototype of 4-bit weights between casts to bfloat16, the dtype in which it is fast: 100 times as fast as in float32.
`Int4WeightOnlyConfig` does not run: its plain layout wants the package mslk, ``plain_int32`` "does not support device
'cpu' yet", ``tile_packed_to_4d`` wants CUDA. Nor do 4-bit weights with int8 activations, since the packages on PyPI are
built without the kernel ``da8w4_linear_cpu``. `IntxWeightOnlyConfig` does, as float products of codes kept in int8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np

PACKAGES = ("qwix", "aqtp", "torch", "torchao", "onnx", "onnxruntime")

Run = Callable[[], Any]
Prepared = Callable[[np.ndarray], Iterator[tuple[str, Run]]]


def prepare(w: np.ndarray) -> Callable[[np.ndarray], dict[str, Run]]:
    """Every peer with this [K, N] weight: a function of x [M, K] that gives the contestants by name."""
    peers: list[Prepared] = []
    for peer in (_qwix, _aqt, _torch, _torchao, _onnxruntime):
        try:
            peers.append(peer(w))
        except ImportError as error:
            print(f"left out: {error}")
    return lambda x: dict(contestant for peer in peers for contestant in peer(x))


def _jitted(fn: Callable[..., jax.Array], *args: Any) -> Run:
    program = jax.jit(fn).lower(*args).compile()
    return lambda: jax.block_until_ready(program(*args))


def _qwix(w: np.ndarray) -> Prepared:
    import qwix

    numbers = (((1,), (0,)), ((), ()))
    channel = qwix.quantize(jnp.asarray(w), jnp.int8, channelwise_axes=[1])
    grouped = qwix.quantize(jnp.asarray(w), jnp.int4, channelwise_axes=[1], tiled_axes={0: 128})

    def w8a8(x: jax.Array, q: Any) -> jax.Array:
        return qwix.dot_general(qwix.quantize(x, jnp.int8, channelwise_axes=[0]), q, numbers)

    def weight_only(x: jax.Array, q: Any) -> jax.Array:
        return qwix.dot_general(x, q, numbers)

    def contestants(x: np.ndarray) -> Iterator[tuple[str, Run]]:
        yield "qwix W8A8", _jitted(w8a8, jnp.asarray(x), channel)
        yield "qwix W8A16", _jitted(weight_only, jnp.asarray(x), channel)
        yield "qwix W4A16 group 128", _jitted(weight_only, jnp.asarray(x), grouped)

    return contestants


def _aqt(w: np.ndarray) -> Prepared:
    import aqt.jax.v2.config as aqt_config

    dot = aqt_config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)
    dot = aqt_config.set_context(dot, None, train_step=None) if hasattr(aqt_config, "set_context") else dot

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return dot(x, w, (((1,), (0,)), ((), ())))

    def contestants(x: np.ndarray) -> Iterator[tuple[str, Run]]:
        yield "AQT W8A8 (quantizes w each time)", _jitted(product, jnp.asarray(x), jnp.asarray(w))

    return contestants


def _torch(w: np.ndarray) -> Prepared:
    import torch

    linear = _linear(w)
    dynamic = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear}, torch.qint8)

    def contestants(x: np.ndarray) -> Iterator[tuple[str, Run]]:
        given = torch.from_numpy(x.copy())

        def run(model: Any) -> Any:
            with torch.inference_mode():
                return model(given)

        yield "torch float32", functools.partial(run, linear)
        yield "torch dynamic int8", functools.partial(run, dynamic)

    return contestants


def _linear(w: np.ndarray, dtype: Any = None) -> Any:
    import torch

    torch.set_num_threads(measure.cores())
    linear = torch.nn.Linear(*w.shape, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(np.ascontiguousarray(w.T)))
    return linear.to(dtype)


def _torchao(w: np.ndarray) -> Prepared:
    import torch
    import torch._inductor.config
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    torch._inductor.config.compile_threads = 1

    def quantized(config: Any, dtype: Any = None) -> Any:
        model = torch.nn.Sequential(_linear(w, dtype))
        quantize_(model, config)
        return model

    int8 = {
        "torchao dynamic int8": quantized(Int8DynamicActivationInt8WeightConfig()),
        "torchao int8 weight-only": quantized(Int8WeightOnlyConfig()),
    }
    four = quantized(PrototypeInt4WeightOnlyConfig(group_size=128), torch.bfloat16)

    def contestants(x: np.ndarray) -> Iterator[tuple[str, Run]]:
        given = torch.from_numpy(x.copy())

        def run(model: Any) -> Any:
            with torch.inference_mode():
                return model(given)

        torch.compiler.reset()  # for every shape a program of its own
        for name, model in int8.items():
            yield name, functools.partial(run, torch.compile(model))
        yield "torchao int4 weight-only 128, in bfloat16", functools.partial(run, lambda x: four(x.bfloat16()).float())

    return contestants


def _onnxruntime(w: np.ndarray) -> Prepared:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    k, n = w.shape
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = measure.cores(), 1
    options.log_severity_level = 3

    def session(nodes: list[Any], initializers: dict[str, np.ndarray]) -> Any:
        graph = helper.make_graph(
            nodes,
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, n])],
            [numpy_helper.from_array(value, name) for name, value in initializers.items()],
        )
        domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=domains, ir_version=8)
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    absmax = np.abs(w)
    scale = (absmax.max(axis=0) / 127).astype(np.float32)
    int8 = np.clip(np.rint(w / scale), -127, 127).astype(np.int8)
    node = functools.partial(helper.make_node, outputs=["y"], domain="com.microsoft")
    sessions = {
        "ONNX Runtime float32": session([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w}),
        "ONNX Runtime dynamic int8": session([node("DynamicQuantizeMatMul", ["x", "w", "s"])], {"w": int8, "s": scale}),
    }
    group = 128
    blocks = w.T.reshape(n, k // group, group)
    s = np.abs(blocks).max(axis=2, keepdims=True) / 7
    codes = (np.clip(np.rint(blocks / s), -8, 7) + 8).astype(np.uint8)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    for level, name in ((0, "ONNX Runtime MatMulNBits"), (4, "ONNX Runtime MatMulNBits A8")):
        four = node("MatMulNBits", ["x", "w", "s"], K=k, N=n, bits=4, block_size=group, accuracy_level=level)
        sessions[f"{name} 128"] = session([four], {"w": packed, "s": s.astype(np.float32).reshape(-1)})

    def contestants(x: np.ndarray) -> Iterator[tuple[str, Run]]:
        for name, ready in sessions.items():
            yield name, functools.partial(ready.run, None, {"x": x})

    return contestants
