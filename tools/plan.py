"""Says what a run needs before it runs: memory per rank, FLOPs, pipeline bubble, communication.

    python tools/plan.py --config examples/llama/ponderlm2-1.4b.yaml --world-size 64
    python tools/plan.py --config X.yaml --world-size 1024 --pipeline-model-parallel-size 8 \
        --bf16 --device-memory-gib 78
    python tools/plan.py --config X.yaml --world-size 16 --pipeline-model-parallel-size 4 \
        --timeline step.png --json
    python tools/plan.py scaling --preset pythia-12b --bf16 --global-batch-size 1024 \
        --num-jacobi-iterations 3 --world-sizes 8 64 512 4096 --picture scaling.png

Takes every setting of megatron_ponder.pretrain (its --help lists them), checks them as training
does, and the flags below. Needs no GPU, no data and no other ranks. A layout that training would
refuse ends with exit code 2 and what to change; one that is too large for --device-memory-gib is
reported as such, with what each of several changes would bring, and exit code 0.

`scaling` looks for the best layout of every number of devices: see its own --help.

Memory is within 10% of measured peaks. Time is FLOPs over --assumed-tflops: compare layouts by it,
do not expect it. docs/parallelism.md explains all of it.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from megatron_ponder.config.parse import parse_args
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import exit_on_user_error
from megatron_ponder.planning.options import PlanOptions
from megatron_ponder.planning.scaling_options import ScalingOptions


@exit_on_user_error
def main() -> None:
    """Parse flags, plan, print."""
    is_scaling = sys.argv[1:2] == ["scaling"]
    command, kind = (_scale, ScalingOptions) if is_scaling else (_plan, PlanOptions)
    command(*_parse(kind, "tools/plan.py", sys.argv[1 + is_scaling :]))


def _parse(kind: type, prog: str, arguments: Sequence[str]) -> tuple[Any, RunConfig]:
    options, settings = tyro.cli(
        kind, prog=prog, description=__doc__, args=arguments, return_unknown_args=True
    )
    config = parse_args(settings, prog=prog)
    from megatron_ponder import log

    log.configure()  # before imports that warn
    return options, config


def _plan(options: PlanOptions, config: RunConfig) -> None:
    from megatron_ponder.planning.picture import draw_step
    from megatron_ponder.planning.report import plan_run, resolve_on_paper
    from megatron_ponder.planning.text import as_text

    config = resolve_on_paper(config, options.world_size)
    result = plan_run(options, config)
    print(json.dumps(result, indent=1) if options.json else as_text(result))
    if options.timeline:
        draw_step(options, config, Path(options.timeline))


def _scale(options: ScalingOptions, config: RunConfig) -> None:
    from megatron_ponder.planning.scaling import plan_scaling
    from megatron_ponder.planning.scaling_picture import draw_scaling
    from megatron_ponder.planning.scaling_text import as_text

    result = plan_scaling(options, config)
    print(json.dumps(result, indent=1) if options.json else as_text(result))
    if options.picture:
        draw_scaling(result, Path(options.picture))


if __name__ == "__main__":
    sys.exit(main())
