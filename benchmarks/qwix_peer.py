"""qwix (https://github.com/google/qwix) from the same float parameters, for ``digits_accuracy.py --peer``.

qwix takes a fixed fraction of each channel's absmax, or a multiple of its root mean square; which one is for the user
to say. Its default is reported, and of the settings in `RANGES` the one with the best mean accuracy on the *training*
images. Weight-only rows quantize and dequantize with its numerics and run the float model, since it has no weight-only
convolution. QAT uses our recipe with its training provider; int2 activations do not compile on CPU there, uint2 do.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import qwix

from jaxquant.demo import digits

RANGES = ("absmax", "absmax,0.8", "absmax,0.65", "absmax,0.5", "rms,1", "rms,1.5", "rms,2")


def _ptq(params: Any, qtype: str, how: str) -> Any:
    def quantized(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 1:  # a bias
            return leaf
        q = qwix.quantize(leaf, qtype, channelwise_axes=[leaf.ndim - 1], calibration_method=how)
        return qwix.dequantize(q)

    return jax.tree.map(quantized, params)


def _accuracies(model: nn.Module, params: Any, data: digits.Digits) -> tuple[float, float]:
    """On the training images and on the test images."""
    apply = digits.logits(model)
    train = np.argmax(apply(params, data.train_images), axis=-1) == data.train_labels
    return float(np.mean(train)), data.accuracy(apply(params, data.test_images))


def _default_and_chosen(
    name: str, measure: Callable[[str], list[tuple[float, float]]]
) -> Iterator[tuple[str, list[float]]]:
    found = {how: measure(how) for how in RANGES}
    chosen = max(found, key=lambda how: statistics.fmean(train for train, _ in found[how]))
    for how, choice in ((RANGES[0], "default"), (chosen, "chosen")):
        yield f"{name} {how} ({choice})", [test for _, test in found[how]]


def rows(
    model: nn.Module, floats: Sequence[Any], data: digits.Digits, *, qat: bool
) -> Iterator[tuple[str, list[float]]]:
    """Yields name and test accuracies (one per seed) of each row.

    Args:
      model: the float model; qwix intercepts Flax's own operations in it.
      floats: its trained parameters, one tree per seed.
      data: the images.
      qat: whether to train at 2 bits too.
    """

    def ptq(how: str, qtype: str) -> list[tuple[float, float]]:
        return [_accuracies(model, _ptq(params, qtype, how), data) for params in floats]

    def trained(how: str, act: str | None) -> list[tuple[float, float]]:
        rule = qwix.QtRule(weight_qtype="int2", act_qtype=act, weight_calibration_method=how)
        quantized = qwix.quantize_model(model, qwix.QtProvider([rule]))
        params = (digits.train(quantized, p, data, digits.QAT, seed=i).params for i, p in enumerate(floats))
        return [_accuracies(quantized, p, data) for p in params]

    for qtype in ("int8", "int4", "int3", "int2"):
        yield from _default_and_chosen(f"qwix {qtype}, channel,", lambda how, qtype=qtype: ptq(how, qtype))
    if qat:
        yield from _default_and_chosen("qwix QAT int2, channel,", lambda how: trained(how, None))
        yield from _default_and_chosen(
            "qwix QAT W2A2: int2, channel; uint2 activations;", lambda how: trained(how, "uint2")
        )
