"""Loss curves of training to two bits, from one float model: ranges or learned steps, labels or the float model.

    python benchmarks/qat_curves.py     # a minute; writes docs/assets/qat_curves.png

The model and its training are those of the page docs/tutorial-qat.md, whose blocks this runs first.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxquant as jq

DOCS = Path(__file__).parents[1] / "docs"
STEPS = 200


def tutorial() -> dict[str, Any]:
    """What the page defines."""
    page, names = (DOCS / "tutorial-qat.md").read_text(encoding="utf-8"), {}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
                exec(block, names)
        finally:
            os.chdir(before)
    return names


def curve(t: dict[str, Any], *, learned: bool, kl: bool) -> jax.Array:
    """Cross entropy on the held-out images after each step."""
    model, params, (x, y), held_out = t["model"], t["params"], t["seen"], t["held_out"]
    plan, targets = t["plan"], model(params, x)
    state = jq.qat.learned_steps(model, plan, params, [x]) if learned else {}
    fixed = None if learned else t["ranges"]

    def run(trained: Any, x: jax.Array) -> jax.Array:
        return jq.quantized(model, plan, trained[1] if learned else fixed)(trained[0], x)

    def loss(trained: Any) -> jax.Array:
        out = run(trained, x)
        return jq.qat.distillation_loss(out, targets) if kl else t["cross_entropy"](out, y)

    start = (params, state)
    tx = optax.multi_transform(t["rates"], jq.qat.labels(*start))

    def step(carry: Any, _: Any) -> Any:
        trained, opt_state = carry
        value = t["cross_entropy"](run(trained, held_out[0]), held_out[1])
        updates, opt_state = tx.update(jax.grad(loss)(trained), opt_state, trained)
        return (t["clamped"](optax.apply_updates(trained, updates)), opt_state), value

    return jax.jit(lambda s: jax.lax.scan(step, (s, tx.init(s)), None, length=STEPS))(start)[1]


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    t = tutorial()
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for steps in ("calibrated ranges", "learned steps"):
        for goal in ("labels", "float model"):
            values = curve(t, learned=steps == "learned steps", kl=goal == "float model")
            axes.plot(values, "-" if goal == "float model" else "--", label=f"{steps}, {goal}")
            print(f"{steps}, {goal}: {float(values[0]):.3f}, in the end {float(jnp.mean(values[-10:])):.3f}")
    base = float(t["cross_entropy"](t["model"](t["params"], t["held_out"][0]), t["held_out"][1]))
    axes.axhline(base, color="grey", lw=1, label="float")
    axes.set(xlabel="step", ylabel="cross entropy, held out", yscale="log", title="2-bit weights and activations")
    axes.legend()
    print(f"float: {base:.3f}")
    figure.savefig(DOCS / "assets" / "qat_curves.png", dpi=120)


if __name__ == "__main__":
    main()
