"""Prints the table of docs/parallelism.md: python -m tests.parity.table (about two minutes).

The largest difference between each layout and one process, over all models, ranks and steps.
"""

import tempfile
from pathlib import Path

from tests.parity.measure import Measured
from tests.parity.test_layouts import LAYOUTS, MODELS, config_of, measure_models, write_checkpoints
from tests.parity.tolerances import largest_difference
from tests.ranks import run_ranks


def differences(actual: Measured, expected: Measured) -> list[float]:
    """Logits, loss, gradient norm (relative), gradients (to their largest entry), weights."""
    gradients = [
        largest_difference(actual.gradients[name], gradient)
        / max(float(gradient.abs().max()), 1e-6)
        for name, gradient in expected.gradients.items()
    ]
    weights = [largest_difference(actual.weights[name], w) for name, w in expected.weights.items()]
    losses = zip(actual.losses, expected.losses, strict=True)
    norms = zip(actual.grad_norms, expected.grad_norms, strict=True)
    return [
        largest_difference(actual.logits, expected.logits),
        max(abs(a - e) for a, e in losses),
        max(abs(a - e) / e for a, e in norms),
        max(gradients),
        max(weights),
    ]


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            (Path(folder) / model).mkdir()
        single = {model: config_of(model, {}, 1) for model in MODELS}
        run_ranks(write_checkpoints, 1, single, folder)
        (truth,) = run_ranks(measure_models, 1, single, folder)
        for name, layout in LAYOUTS.items():
            size = layout.world_size
            runs = {model: config_of(model, layout.settings, size) for model in MODELS}
            by_rank = run_ranks(measure_models, size, runs, folder)
            found = [differences(m[model], truth[model]) for m in by_rank for model in MODELS]
            worst = [max(column) for column in zip(*found, strict=True)]
            print(f"| {name} | {size} | " + " | ".join(f"{v:.1e}" for v in worst) + " |")


if __name__ == "__main__":
    main()
