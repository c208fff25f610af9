"""The target that a value is asked for when its program is lowered."""

import jax
import numpy as np
from jax import export

from jaxquant.core.by_platform import Target, by_platform, target_of


class Seen:
    """Adds 1, and notes the targets that it is lowered for."""

    def __init__(self):
        self.targets = []

    def on(self, target, *operands):
        self.targets.append(target)
        return operands[0] + 1

    def like(self, *operands):
        return operands[0]

    def stands_for(self, *operands):
        return None


def test_the_chip_is_that_of_the_devices():
    seen, x = Seen(), np.arange(3)
    np.testing.assert_array_equal(jax.jit(lambda x: by_platform(seen, x))(x), x + 1)
    assert seen.targets == [target_of(jax.devices()[0])]
    assert seen.targets[0].chip == jax.devices()[0].device_kind


def test_an_exported_program_is_for_no_chip():
    """It may run on another chip than the one that exports it, which may lack instructions."""
    seen = Seen()
    export.export(jax.jit(lambda x: by_platform(seen, x)))(np.arange(3))
    assert seen.targets == [Target("cpu")]
