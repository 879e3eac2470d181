"""Reports the results: loss curves, a table, a comparison in words, and samples.

Numbers are shown as measured, in whichever direction they point. Compute counts the matmuls of
every pass (`megatron_ponder.model.size`); R is drawn anew in each iteration, and the count uses the
R drawn.
"""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from training import read_metrics

from megatron_ponder.checkpoint.storage import choose_iteration, iteration_folder
from megatron_ponder.checkpoint.stored_config import read_config
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.figures import save_png
from megatron_ponder.files import write_text
from megatron_ponder.model.size import count_parameters, forward_flops
from megatron_ponder.ponder.method import load_method
from megatron_ponder.ponder.training_plan import jacobi_iterations, training_plan

COLORS = ("#6b7280", "#d97706", "#2563eb", "#059669", "#7c3aed")
INK = "#1f2937"
MAX_EXPLAINED = 2
"""With more models than this the legend omits training curves, or it would hide the plot."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One trained model."""

    name: str
    """Name in reports."""
    config: ResolvedConfig
    """Resolved settings of its training."""
    records: Sequence[dict[str, Any]]
    """Its metrics.jsonl."""
    evaluation: dict[str, Any]
    """Output of tools/evaluate.py."""
    sample: str
    """Output of tools/generate.py."""

    def curve(self, split: str) -> tuple[list[float], list[float], list[float]]:
        """Tokens, training compute in FLOPs, and loss, at each record of a split."""
        per_iteration = self.flops_by_iteration()
        spent = [0.0, *itertools.accumulate(per_iteration)]
        mine = [record for record in self.records if record["split"] == split]
        return (
            [record["consumed_tokens"] for record in mine],
            [spent[record["iteration"]] for record in mine],
            [record["lm_loss"] for record in mine],
        )

    def flops_by_iteration(self) -> list[float]:
        """Training compute of each iteration."""
        config = self.config
        method = load_method(config.method)
        assert config.training.global_batch_size is not None
        by_rounds: dict[int, float] = {}
        flops = []
        for iteration in range(1, config.training.train_iters + 1):
            r = jacobi_iterations(config.method, config.training.seed, iteration)
            if r not in by_rounds:
                plan = training_plan(method, r)
                counts = forward_flops(config.model, plan, config.data.seq_length)
                by_rounds[r] = float(counts.training * config.training.global_batch_size)
            flops.append(by_rounds[r])
        return flops

    @property
    def num_tokens(self) -> int:
        """Tokens seen in training."""
        config = self.config
        assert config.training.global_batch_size is not None
        return (
            config.training.train_iters * config.training.global_batch_size * config.data.seq_length
        )

    @property
    def flops_per_token(self) -> float:
        """Training compute per token."""
        return sum(self.flops_by_iteration()) / self.num_tokens

    @property
    def tokens_per_s(self) -> float:
        """Training speed over all ranks: the median of the log intervals."""
        return statistics.median(
            record["tokens_per_s"] for record in self.records if record["split"] == "train"
        )

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        return count_parameters(self.config.model).total


def read_result(name: str, folder: Path, evaluation: Path, sample: Path) -> Result:
    """Collect the outputs of training, evaluation and generation.

    Args:
        name: name of the model in reports.
        folder: folder of its checkpoints and metrics.
        evaluation: JSON output of tools/evaluate.py.
        sample: text output of tools/generate.py.
    """
    checkpoint = iteration_folder(folder, choose_iteration(folder, None))
    return Result(
        name=name,
        config=read_config(checkpoint),
        records=read_metrics(folder / "metrics.jsonl"),
        evaluation=json.loads(evaluation.read_text()),
        sample=sample.read_text(),
    )


def draw_curves(results: Sequence[Result], path: Path) -> None:
    """Training and validation loss, against tokens and against compute."""
    style = {
        "font.size": 11,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(12, 5), dpi=150, layout="constrained", facecolor="white")
        axes = figure.subplots(1, 2, sharey=True)
        for result, color in zip(results, COLORS, strict=False):
            for split, look in (
                ("train", {"linewidth": 1.0, "alpha": 0.4}),
                ("valid", {"linewidth": 2.0, "marker": "o", "markersize": 4}),
            ):
                tokens, flops, losses = result.curve(split)
                label = f"{result.name}, " + ("validation" if split == "valid" else "training")
                if len(results) > MAX_EXPLAINED and split == "train":
                    label = "_"  # matplotlib omits it from the legend
                axes[0].plot([n / 1e6 for n in tokens], losses, color=color, label=label, **look)
                axes[1].plot([n / 1e12 for n in flops], losses, color=color, **look)
        axes[0].set(xlabel="training tokens (millions)", ylabel="loss per token (nats)")
        axes[0].set_title("at equal tokens", loc="left", fontweight="bold")
        axes[1].set(xlabel="training compute (TFLOP, log scale)", xscale="log")
        axes[1].set_title("at equal compute", loc="left", fontweight="bold")
        axes[0].set_ylim(*_loss_limits(results))
        for axis in axes:
            axis.grid(color="#e5e7eb", linewidth=0.8, which="major")
            axis.set_axisbelow(True)
        axes[0].legend(frameon=False, loc="upper right")
        save_png(figure, path)


def table(results: Sequence[Result]) -> str:
    """One row per model."""
    header = (
        "model",
        "parameters",
        "tokens",
        "compute/token",
        "tokens/s",
        "loss",
        "perplexity",
        "bits/byte",
    )
    rows = [
        (
            result.name,
            f"{result.num_parameters / 1e6:.2f} M",
            f"{result.num_tokens / 1e6:.2f} M",
            f"{result.flops_per_token / 1e6:.1f} MFLOP",
            f"{result.tokens_per_s:,.0f}",
            f"{result.evaluation['loss']:.4f}",
            f"{result.evaluation['perplexity']:.2f}",
            f"{result.evaluation['bits_per_byte']:.4f}",
        )
        for result in results
    ]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def comparison(results: Sequence[Result]) -> str:
    """Compare each model with the first, in words."""
    first = results[0]
    lines = []
    for other in results[1:]:
        difference = other.evaluation["loss"] - first.evaluation["loss"]
        direction = "below" if difference < 0 else "above"
        ratio = other.flops_per_token / first.flops_per_token
        lines.append(
            f"{other.name}: held-out loss {abs(difference):.3f} {direction} {first.name}'s after "
            f"the same {other.num_tokens / 1e6:.1f} M tokens, with {ratio:.1f} times its compute "
            "per token."
        )
    return "\n".join(lines)


def write_report(
    results: Sequence[Result], exported: Sequence[tuple[str, Path, Path]], path: Path
) -> None:
    """Write table, comparison, exports and samples as text.

    Args:
        results: the models.
        exported: for each exported model its name, and the JSON outputs of tools/evaluate.py and of
            huggingface.py.
        path: file to write.
    """
    parts = [table(results), comparison(results)]
    samples = [(result.name, result.sample) for result in results]
    for name, ours, theirs in exported:
        here, there = (json.loads(answer.read_text()) for answer in (ours, theirs))
        parts.append(
            f"{name} exported, and evaluated with transformers alone ({there['class']}): "
            f"perplexity {there['perplexity']:.4f}, here {here['perplexity']:.4f}."
        )
        samples.append((f"{name} in transformers", there["sample"]))
    parts += [f"--- sample of {name}\n{sample.rstrip()}" for name, sample in samples]
    write_text(path, "\n\n".join(parts) + "\n")


def _loss_limits(results: Sequence[Result]) -> tuple[float, float]:
    """Limits of the loss axis, without the first iterations, which would compress the rest."""
    finals, starts = [], []
    for result in results:
        _, _, losses = result.curve("train")
        finals += [min(losses), *result.curve("valid")[2]]
        starts.append(losses[min(len(losses) - 1, len(losses) // 20)])
    low, high = min(finals), max(starts)
    return low - 0.08 * (high - low), high + 0.05 * (high - low)
