"""Optimizers whose states take 8 or 4 bits per number, as Optax transformations.

A moment is split into blocks; each stores its largest magnitude in float32 and one code per number, the nearest entry
of a table. A step dequantizes the moments to float32, updates them, uses them, and quantizes them again. States are
`QTensor`s: they shard, save and restore as quantized parameters do. The 8-bit states equal those of bitsandbytes.

``scale_by_*`` chain as Optax's do; the others add weight decay and the learning rate. `Storage` says how moments are
stored. Parameters of fewer than 4096 numbers keep float32 moments, as in bitsandbytes. So do the parameters that
`Storage` exempts, by default embeddings.
"""

from jaxquant.optim.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from jaxquant.optim.moments import EIGHT_BITS, FOUR_BITS, Storage
from jaxquant.optim.optimizers import (
    adagrad8bit,
    adam4bit,
    adam8bit,
    adamw4bit,
    adamw8bit,
    ademamix8bit,
    lion8bit,
    rmsprop8bit,
    sgd8bit,
)
from jaxquant.optim.placement import shardings
from jaxquant.optim.scale import (
    State,
    scale_by_adagrad8bit,
    scale_by_adam8bit,
    scale_by_ademamix8bit,
    scale_by_lion8bit,
    scale_by_momentum8bit,
    scale_by_rms8bit,
)

__all__ = [
    "EIGHT_BITS",
    "FOUR_BITS",
    "State",
    "Storage",
    "adagrad8bit",
    "adam4bit",
    "adam8bit",
    "adamw4bit",
    "adamw8bit",
    "ademamix8bit",
    "from_bitsandbytes",
    "lion8bit",
    "rmsprop8bit",
    "scale_by_adagrad8bit",
    "scale_by_adam8bit",
    "scale_by_ademamix8bit",
    "scale_by_lion8bit",
    "scale_by_momentum8bit",
    "scale_by_rms8bit",
    "sgd8bit",
    "shardings",
    "to_bitsandbytes",
]
