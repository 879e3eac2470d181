"""README.md of an exported folder: what the model is, what it saw, how well it did, how to load it.

Figures are those of the run: tokens from the checkpoint, losses from metrics.jsonl beside it.
Imports no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.model.size import count_parameters

METRICS_FILE = "metrics.jsonl"


def write_model_card(
    folder: Path, config: ResolvedConfig, *, iteration: int, consumed_tokens: int, run_folder: Path
) -> None:
    """Write README.md.

    Args:
        folder: to write into.
        config: the run's, resolved.
        iteration: of the checkpoint.
        consumed_tokens: trained on until then.
        run_folder: where metrics.jsonl may be.
    """
    evaluations = last_evaluations(run_folder / METRICS_FILE, iteration)
    sections = [_front_matter(config), _facts(config, iteration, consumed_tokens)]
    if evaluations:
        sections.append(_figures(evaluations))
    sections.append(_usage(config))
    (folder / "README.md").write_text("\n".join(sections), encoding="utf-8")


def last_evaluations(metrics: Path, iteration: int) -> list[dict[str, Any]]:
    """The last evaluation of each dataset up to an iteration; none without the file."""
    if not metrics.is_file():
        return []
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        if record.get("split") in ("valid", "test") and record.get("iteration", 0) <= iteration:
            latest[record["split"], record.get("dataset", "")] = record
    return list(latest.values())


def _front_matter(config: ResolvedConfig) -> str:
    method = config.method.method
    return (
        "---\n"
        "library_name: transformers\n"
        "pipeline_tag: text-generation\n"
        f"tags: [{config.model.architecture}, megatron_ponder, {method}]\n"
        "---\n"
    )


def _facts(config: ResolvedConfig, iteration: int, consumed_tokens: int) -> str:
    """The model and its training."""
    model, counts = config.model, count_parameters(config.model)
    without_tables = counts.total - counts.embedding - counts.head
    rows: dict[str, Any] = {
        "architecture": f"{model.architecture}, {model.num_layers} layers, width "
        f"{model.hidden_size}, {model.num_attention_heads} heads",
        "parameters": f"{counts.total:,} ({without_tables:,} without embedding and output layer)",
        **_method_rows(config),
        "training": f"{iteration:,} iterations, {consumed_tokens:,} tokens"
        if iteration
        else "none since it was imported",
        "sequence length": f"{config.data.seq_length:,} tokens",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["# Model", "", "| | |", "|---|---|", *lines, ""])


def _method_rows(config: ResolvedConfig) -> dict[str, Any]:
    """Method, K and R, as far as they mean something."""
    settings = config.method
    if settings.method == "vanilla":
        return {"method": "vanilla: a plain language model"}
    rows: dict[str, Any] = {
        "method": settings.method,
        "K (`num_latent_thoughts`)": settings.num_latent_thoughts,
    }
    if settings.method == "ponderlm2":
        drawn = f"{settings.min_jacobi_iterations} to {settings.max_jacobi_iterations}, drawn"
        trained = drawn if settings.random_jacobi_iterations else settings.num_jacobi_iterations
        rows["R (`num_jacobi_iterations`)"] = (
            f"{settings.num_jacobi_iterations} (in training: {trained})"
        )
        rows["fed back"] = "mixture of embeddings" if settings.interpolation else "hidden state"
    rows["embeddings scaled"] = "yes" if settings.scale_embeds else "no"
    return rows


def _figures(evaluations: list[dict[str, Any]]) -> str:
    """What the run measured."""
    lines = ["| data | iteration | loss | perplexity |", "|---|---|---|---|"]
    for record in evaluations:
        name = " ".join(filter(None, (record["split"], record.get("dataset"))))
        lines.append(
            f"| {name} | {record['iteration']} | {_number(record, 'lm_loss')} "
            f"| {_number(record, 'perplexity')} |"
        )
    return "\n".join(["## Evaluation of the training run", "", *lines, ""])


def _number(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _usage(config: ResolvedConfig) -> str:
    """How to load it."""
    is_stock = config.method.method == "vanilla"
    argument = "" if is_stock else ", trust_remote_code=True"
    code = (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained(folder{argument})\n"
        f"model = AutoModelForCausalLM.from_pretrained(folder{argument})\n"
        'inputs = tokenizer("The ", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n"
        "```\n"
    )
    note = (
        "It loads as transformers' own class.\n"
        if is_stock
        else "The modelling files are in this folder and need torch and transformers only; read "
        "them before you let\n`trust_remote_code` run them. Without it transformers refuses the "
        "folder, since a stock class would compute\nanother model from the same weights.\n"
    )
    return f"## Use\n\n{code}\n{note}"
