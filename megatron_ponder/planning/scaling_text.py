"""The report of `plan_scaling` as text: one line for each number of devices."""

from typing import Any

from megatron_ponder.planning.run import GIB
from megatron_ponder.planning.scaling import COMPARED_METHOD, MEMORY_KINDS, SENT_KINDS
from megatron_ponder.tables import text_table

HEADER = [
    *("devices", "layout", "recompute", "s/step", "compute", "TP", "CP", "bubble", "DP"),
    *("tokens/s per device", "tokens/s", "GiB/rank"),
    *(f"time / {COMPARED_METHOD}'s", f"time / {COMPARED_METHOD}'s best"),
]
NOTHING = "-"


def as_text(result: dict[str, Any]) -> str:
    """Tables one below the other."""
    assumed, same = result["assumed"], f"GiB (in parentheses: {COMPARED_METHOD}, same layout)"
    sections = [
        [
            f"PREDICTED, nothing here was run: {run_title(result)}",
            f"devices of {assumed['device_memory_gib']:g} GiB at {assumed['assumed_tflops']:g} "
            f"TFLOP/s; {assumed['nvlink_gb_per_s']:g} GB/s in a node of "
            f"{assumed['devices_per_node']}, {assumed['network_gb_per_s']:g} GB/s per device to "
            f"others, {assumed['link_efficiency']:.0%} of both reached",
        ],
        [
            f"best layouts (shares of a step; last: over {COMPARED_METHOD}'s time in the same "
            "layout, and in its own best one; v: layer chunks per stage, b: micro-batch)",
            *text_table(HEADER, table_rows(result)),
        ],
        [
            f"sent by a rank in a step, {same}",
            *text_table(["devices", *SENT_KINDS], sent_rows(result)),
        ],
        [
            f"memory of the rank that needs most, {same}",
            *text_table(
                ["devices", *MEMORY_KINDS], _gib_rows(result, "memory_bytes", MEMORY_KINDS)
            ),
        ],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def run_title(result: dict[str, Any]) -> str:
    """What is trained, in a line."""
    run = result["run"]
    return (
        f"{run['num_layers']} layers of width {run['hidden_size']}, {run['method']} "
        f"K={run['num_latent_thoughts']} R={run['num_jacobi_iterations']}, "
        f"{run['global_batch_size']} x {run['seq_length']} tokens a step"
    )


def fitting_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of numbers of devices for which a layout fits."""
    return [row for row in result["rows"] if row["layout"] is not None]


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """The cells of a table under HEADER."""
    rows = []
    for row in result["rows"]:
        cells = [str(row["world_size"])]
        if row["layout"] is None:
            rows.append([*cells, "nothing fits", *[NOTHING] * (len(HEADER) - 2)])
            continue
        ours = row["ours"]
        time, step_s = ours["time_s"], ours["step_s"]
        shares = [
            (time["compute_s"] + time["recompute_s"]) / step_s,
            *(time[f"{kind}_s"] / step_s for kind in ("tensor", "context", "bubble", "data")),
        ]
        rows.append(
            [
                *cells,
                layout_name(row["layout"]),
                row["layout"]["recompute_granularity"] or NOTHING,
                f"{step_s:#.3g}".rstrip("."),
                *(f"{share:.1%}" if share else NOTHING for share in shares),
                f"{ours['tokens_per_s_per_device']:,.0f}",
                f"{ours['tokens_per_s']:,.0f}",
                f"{sum(ours['memory_bytes'].values()) / GIB:.0f}",
                f"{step_s / row['compared']['step_s']:.2f}",
                f"{step_s / row['compared_best']['step_s']:.2f}",
            ]
        )
    return rows


def layout_name(layout: dict[str, Any], separator: str = " ") -> str:
    """The sizes that are not 1, and the micro-batch."""
    sizes = {
        "TP": layout["tensor_parallel"],
        "PP": layout["pipeline_parallel"],
        "v": layout["layer_chunks_per_stage"],
        "CP": layout["context_parallel"],
        "DP": layout["data_parallel"],
    }
    parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    return separator.join([*parts, f"b{layout['micro_batch_size']}"])


def sent_rows(result: dict[str, Any]) -> list[list[str]]:
    """Both methods' GiB sent in a step, by kind, for each number of devices."""
    return _gib_rows(result, "sent_bytes_per_step", SENT_KINDS)


def _gib_rows(result: dict[str, Any], figure: str, kinds: tuple[str, ...]) -> list[list[str]]:
    rows = []
    for row in fitting_rows(result):
        ours, compared = row["ours"][figure], row["compared"][figure]
        cells = [
            f"{ours[kind] / GIB:.2f} ({compared[kind] / GIB:.2f})" if ours[kind] else NOTHING
            for kind in kinds
        ]
        rows.append([str(row["world_size"]), *cells])
    return rows
