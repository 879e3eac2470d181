"""Fills the scaling tables and pictures of docs: python -m tests.unit.planning.scaling_document."""

from pathlib import Path
from typing import Any

from megatron_ponder.config.parse import parse_args
from megatron_ponder.planning.options import ScalingOptions
from megatron_ponder.planning.scaling import SENT_KINDS, plan_scaling
from megatron_ponder.planning.scaling_picture import draw_scaling
from megatron_ponder.planning.scaling_text import HEADER, fitting_rows, sent_rows, table_rows
from megatron_ponder.tables import markdown_table
from tests.rules.sources import ROOT

DOCUMENT, ASSETS = ROOT / "docs/parallelism.md", ROOT / "docs/assets"
BEGIN, END = "<!-- scaling tables: begin -->\n", "<!-- scaling tables: end -->"
PRESETS = ("llama-1.4b", "llama-2.8b", "pythia-12b")
DRAWN = {"llama-1.4b": "scaling_1.4b.png", "pythia-12b": "scaling_12b.png"}
FLAGS = "--bf16 --num-latent-thoughts 1 --num-jacobi-iterations 3 --global-batch-size 1024".split()


def scale(preset: str) -> dict[str, Any]:
    config = parse_args(["--preset", preset, *FLAGS], prog="scaling_document")
    return plan_scaling(ScalingOptions(), config)


def tables(results: dict[str, dict[str, Any]]) -> str:
    """What stands between the markers."""
    steps, sent = [], []
    for preset, result in results.items():
        steps += [[preset, *cells] for cells in table_rows(result)]
        for cells, row in zip(sent_rows(result), fitting_rows(result), strict=True):
            busiest = max(sum(passed.values()) for passed in row["ours"]["sent_bytes_per_pass"])
            sent.append([preset, *cells, f"{busiest / (1 << 20):,.0f}" if busiest else "-"])
    return "\n".join(
        [
            *markdown_table(["model", *HEADER], steps),
            "",
            "GiB sent by the rank that sends most in a step, in parentheses by vanilla's in the "
            "same layout; last, MiB in the longest pass of one micro-batch:",
            "",
            *markdown_table(["model", "devices", *SENT_KINDS, "a pass, MiB"], sent),
            "",
        ]
    )


def written(document: Path = DOCUMENT) -> str:
    """What the document has between the markers."""
    return document.read_text("utf-8").split(BEGIN)[1].split(END)[0]


def main() -> None:
    results = {preset: scale(preset) for preset in PRESETS}
    before, rest = DOCUMENT.read_text("utf-8").split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(before + BEGIN + tables(results) + END + after, "utf-8")
    for preset, name in DRAWN.items():
        draw_scaling(results[preset], ASSETS / name, name=preset)


if __name__ == "__main__":
    main()
