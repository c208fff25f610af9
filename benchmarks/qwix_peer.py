"""qwix (https://github.com/google/qwix) from the same float parameters, for ``digits_accuracy.py --peer``.

qwix takes a fixed fraction of each channel's absmax, or a multiple of its root mean square; which one is for the user to
say. Its default is reported, and of the settings in `RANGES` the one with the best mean *test* accuracy over all
seeds, which is an upper bound in its favour. QAT uses our recipe, with its training provider.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import qwix

from jaxquant.demo import digits

RANGES = ("absmax", "absmax,0.8", "absmax,0.65", "absmax,0.5", "rms,1", "rms,1.5", "rms,2")


def _ptq(model: nn.Module, params: Any, data: digits.Digits, **rule: Any) -> float:
    quantized = qwix.quantize_model(model, qwix.PtqProvider([qwix.QuantizationRule(**rule)]))
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), data.train_images[:1])["params"]
    return data.accuracy(digits.logits(quantized)(qwix.quantize_params(params, abstract), data.test_images))


def _qat(model: nn.Module, params: Any, data: digits.Digits, seed: int, **rule: Any) -> float:
    quantized = qwix.quantize_model(model, qwix.QtProvider([qwix.QtRule(**rule)]))
    trained = digits.train(quantized, params, data, digits.QAT, seed=seed).params
    return data.accuracy(digits.logits(quantized)(trained, data.test_images))


def rows(
    model: nn.Module, floats: Sequence[Any], data: digits.Digits, *, qat: bool
) -> Iterator[tuple[str, list[float]]]:
    """Yields name and accuracies (one per seed) of each row.

    Args:
      model: the float model; qwix intercepts Flax's own operations in it.
      floats: its trained parameters, one tree per seed.
      data: test images, and for QAT training images.
      qat: whether to train at 2 bits too.
    """
    for qtype in ("int8", "int4", "int3", "int2"):
        found = {
            how: [_ptq(model, params, data, weight_qtype=qtype, weight_calibration_method=how) for params in floats]
            for how in RANGES
        }
        yield from _default_and_best(f"qwix {qtype}, channel", found)
    if qat:  # With int2 activations it does not compile on CPU; uint2 activations are the better choice here anyway.
        for act in (None, "uint2"):
            found = {
                how: [
                    _qat(model, params, data, seed, weight_qtype="int2", act_qtype=act, weight_calibration_method=how)
                    for seed, params in enumerate(floats)
                ]
                for how in RANGES
            }
            name = f"qwix QAT W2A2: int2, channel; {act} activations" if act else "qwix QAT int2, channel"
            yield from _default_and_best(name, found)


def _default_and_best(name: str, found: dict[str, list[float]]) -> Iterator[tuple[str, list[float]]]:
    default = next(iter(found))
    best = max(found, key=lambda how: statistics.fmean(found[how]))
    yield f"{name}, {default}", found[default]
    if best != default:
        yield f"{name}, best of {len(found)}: {best}", found[best]
