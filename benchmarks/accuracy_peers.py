"""Other libraries' weight-only quantizers on the same 36 weights, as rows of ``accuracy.py``: whichever is installed.

    pip install torch hqq bitsandbytes torchao qwix onnx onnx_ir onnxruntime
    python benchmarks/accuracy_peers.py
    python benchmarks/accuracy_peers.py --only hqq

Each library quantizes every weight as its documentation says, and its own code gives back the real values, which run in
the same float function as our rows do: figures compare what the quantizers make of the weights. Those that take
statistics get those of our calibration batches. Bytes count codes at their width, and scales and zero points as the
library keeps them; seconds are those of quantizing, without statistics.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accuracy
import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.paths import leaves_with_paths

Quantized = tuple[np.ndarray, int]
Method = Callable[[np.ndarray, dict[str, Any]], Quantized]
"""(a weight [in, out], statistics of its inputs) -> (real values [in, out], bytes)"""
Peer = Iterator[tuple[str, str, Method]]
"""(scheme of `accuracy.SCHEMES`, name of the row, method)"""

GROUPED = {"int4 g64 asym": 4, "int3 g64 asym": 3, "int2 g64 asym": 2}


def hqq() -> Peer:
    import torch
    from hqq.core.quantize import Quantizer

    def method(bits: int, group: int | None) -> Method:
        def run(w: np.ndarray, stats: dict[str, Any]) -> Quantized:
            codes, meta = Quantizer.quantize(
                torch.tensor(w.T), nbits=bits, group_size=group or w.shape[0], axis=1, device="cpu",
                compute_dtype=torch.float32,
            )  # fmt: skip
            values = Quantizer.dequantize(codes, meta).numpy().T
            extra = sum(meta[name].numel() * meta[name].element_size() for name in ("scale", "zero"))
            return values, w.size * bits // 8 + extra

        return run

    for scheme, bits in GROUPED.items():
        yield scheme, "hqq", method(bits, 64)
    yield "int4 channel asym", "hqq", method(4, None)


def bitsandbytes() -> Peer:
    import bitsandbytes.functional as bnb
    import torch

    def four_bits(double: bool) -> Method:
        def run(w: np.ndarray, stats: dict[str, Any]) -> Quantized:
            codes, state = bnb.quantize_4bit(
                torch.tensor(w.T.copy()), blocksize=64, quant_type="nf4", compress_statistics=double
            )
            values = bnb.dequantize_4bit(codes, state).numpy().T
            scales = w.size // 64
            return values, w.size // 2 + (scales + 4 * (-(-scales // 256)) + 4 if double else 4 * scales)

        return run

    def eight_bits(w: np.ndarray, stats: dict[str, Any]) -> Quantized:
        codes, absmax, _ = bnb.int8_vectorwise_quant(torch.tensor(w.T.copy(), dtype=torch.float16))
        return (codes.float() * absmax[:, None].float() / 127).numpy().T, w.size + 4 * w.shape[1]

    yield "nf4 g64", "bitsandbytes nf4", four_bits(double=False)
    yield "nf4 g64", "bitsandbytes nf4, double quantization", four_bits(double=True)
    yield "int8 channel", "bitsandbytes LLM.int8() weights", eight_bits


def torchao() -> Peer:
    import torch
    from torchao import quantization as q

    def method(bits: int, granularity: Any, mapping: Any) -> Method:
        def run(w: np.ndarray, stats: dict[str, Any]) -> Quantized:
            linear = torch.nn.Linear(*w.shape, bias=False)
            linear.weight = torch.nn.Parameter(torch.tensor(w.T.copy()), requires_grad=False)
            config = q.IntxWeightOnlyConfig(
                weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity, mapping_type=mapping
            )
            q.quantize_(linear, config)
            scales = w.size // granularity.group_size if hasattr(granularity, "group_size") else w.shape[1]
            zeros = scales if mapping is q.MappingType.ASYMMETRIC else 0
            return linear.weight.dequantize().float().numpy().T, w.size * bits // 8 + 4 * scales + zeros

        return run

    for scheme, bits in GROUPED.items():
        yield scheme, "torchao intx", method(bits, q.PerGroup(64), q.MappingType.ASYMMETRIC)
    yield "int4 channel asym", "torchao intx", method(4, q.PerAxis(0), q.MappingType.ASYMMETRIC)
    yield "int8 channel", "torchao intx", method(8, q.PerAxis(0), q.MappingType.SYMMETRIC)


def qwix() -> Peer:
    from qwix._src.core import qarray  # the names under which its contrib modules import them
    from qwix.contrib import awq_core, gptq_core

    def how(qtype: str, group: int | None, calibration: str) -> Any:
        tiles = {} if group is None else {1: group}
        return qarray.HowToQuantize(
            qtype=qtype, channelwise_axes=[0], tiled_axes=tiles, calibration_method=calibration
        )  # fmt: skip

    def nbytes(q: Any, bits: int) -> int:
        zero = 0 if q.zero_point is None else q.zero_point.nbytes
        return q.qvalue.size * bits // 8 + q.scale.nbytes + zero

    def ptq(bits: int, spec: Any) -> Method:
        def run(w: np.ndarray, stats: dict[str, Any]) -> Quantized:
            q = qarray.quantize(jnp.asarray(w.T), spec)
            return np.asarray(qarray.dequantize(q)).T, nbytes(q, bits)

        return run

    def gptq(bits: int, spec: Any) -> Method:
        def run(w: np.ndarray, stats: dict[str, Any]) -> Quantized:
            q, _ = gptq_core.quantize_weight(jnp.asarray(w.T), stats["gram"]["gram"][0], spec)
            return np.asarray(qarray.dequantize(q)).T, nbytes(q, bits)

        return run

    def awq(bits: int, spec: Any) -> Method:
        def run(w: np.ndarray, stats: dict[str, Any]) -> Quantized:
            mean = stats["mean"]["abs_sum"][0] / stats["mean"]["rows"]
            q, scales = awq_core.quantize_weight(jnp.asarray(w.T), mean.reshape(-1), spec)
            return np.asarray(qarray.dequantize(q) / scales).T, nbytes(q, bits) + scales.nbytes

        return run

    for scheme, (bits, group) in {**{s: (b, 64) for s, b in GROUPED.items()}, "int4 channel asym": (4, None)}.items():
        symmetric = how(f"int{bits}", group, "absmax")
        # Its 2 and 3 bits have no zero points, and its GPTQ fails with them (and with int3).
        spec, name = (how("int4", group, "minmax"), "") if bits == 4 else (symmetric, ", symmetric")
        yield scheme, f"qwix PTQ{name}", ptq(bits, spec)
        yield scheme, f"qwix AWQ{name}", awq(bits, spec)
        yield scheme, "qwix GPTQ, symmetric", gptq(bits, symmetric)
    yield "int8 channel", "qwix PTQ", ptq(8, how("int8", None, "absmax"))
    yield "nf4 g64", "qwix PTQ", ptq(4, how("nf4", 64, "absmax"))


def onnxruntime() -> Peer:
    import onnx
    import onnxruntime as ort
    from onnx import helper, numpy_helper
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    def model(w: np.ndarray) -> Any:
        def info(name: str, n: int) -> Any:
            return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", n])

        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        weight = numpy_helper.from_array(np.ascontiguousarray(w), "w")
        graph = helper.make_graph([node], "product", [info("x", w.shape[0])], [info("y", w.shape[1])], [weight])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    def method(**options: Any) -> Method:
        def run(w: np.ndarray, stats: dict[str, Any]) -> Quantized:
            quantizer = nbits.MatMulNBitsQuantizer(model(w), block_size=64, is_symmetric=False, **options)
            quantizer.process()
            made = quantizer.model.model
            session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
            values = session.run(None, {"x": np.eye(len(w), dtype=np.float32)})[0]  # its own kernel decodes
            return values, sum(numpy_helper.to_array(t).nbytes for t in made.graph.initializer if t.name != "w")

        return run

    yield "int4 g64 asym", "ONNX Runtime MatMulNBits", method(bits=4)


PEERS = (hqq, bitsandbytes, torchao, onnxruntime, qwix)


def rows(encoder: accuracy.Encoder, only: str, chosen: str) -> Iterator[dict[str, Any]]:
    """The row of each library, scheme and method."""
    plan = encoder.plan(accuracy.SCHEMES[0].spec)
    leaves, treedef = leaves_with_paths(encoder.params)
    stats, _ = encoder.grams
    for peer in PEERS:
        if not re.search(only, peer.__name__):
            continue
        try:
            found = list(peer())
        except ImportError as error:
            print(f"left out: {error}", flush=True)
            continue
        version = f"{peer.__name__} {importlib.metadata.version(peer.__name__)}"
        for scheme, name, method in found:
            if not re.search(chosen, f"{scheme}: {name}"):
                continue
            start = time.perf_counter()
            try:
                made = {path: method(np.asarray(leaves[path]), stats[path]) for path in plan}
            except Exception as error:  # another library's failure is a finding
                print(f"{scheme}: {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                continue
            seconds = round(time.perf_counter() - start, 1)
            values = {path: jnp.asarray(w, jnp.float32) for path, (w, _) in made.items()}
            params = jax.tree.unflatten(treedef, {**leaves, **values}.values())
            figures = encoder.measure(encoder.apply, plan, params, retrieval="4" in scheme.split()[0])
            figures["bytes"] = sum(n for _, n in made.values())
            print(f"{scheme}: {name}: {figures['cosine']} ({seconds} s)", flush=True)
            yield {"scheme": scheme, "method": name, **figures, "seconds": seconds, "peer": version}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="libraries whose name this regular expression finds")
    parser.add_argument("--row", default="", metavar="TEXT", help='rows, as "scheme: name", that it finds')
    parser.add_argument("--calibration", type=int, default=700, metavar="N", help="sentences to calibrate on")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    args = parser.parse_args()
    encoder = accuracy.Encoder(args.calibration, 300, 0)
    file = args.output / "accuracy.json"
    old = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    kept = {(row["scheme"], row["method"]): row for row in old}
    for row in rows(encoder, args.only, args.row):
        kept[row["scheme"], row["method"]] = row
        accuracy.save(args.output, encoder, list(kept.values()))


if __name__ == "__main__":
    main()
