"""Says what a run needs before it runs: memory per rank, FLOPs, pipeline bubble, communication.

    python tools/plan.py --config examples/llama/ponderlm2-1.4b.yaml --world-size 64
    python tools/plan.py --config X.yaml --world-size 1024 --pipeline-model-parallel-size 8 \
        --bf16 --device-memory-gib 78
    python tools/plan.py --config X.yaml --world-size 16 --pipeline-model-parallel-size 4 \
        --timeline step.png --json

Takes every setting of megatron_ponder.pretrain (its --help lists them), checks them as training
does, and the flags below. Needs no GPU, no data and no other ranks. A layout that training would
refuse ends with exit code 2 and what to change; one that is too large for --device-memory-gib is
reported as such, with what each of several changes would bring, and exit code 0.

Memory is derived from what the layers keep and from the order in which megatron-core runs them;
tests hold it to within 10% of measured peaks. Time is FLOPs over --assumed-tflops: compare layouts
by it, do not expect it. docs/parallelism.md explains the schedule and the memory.
"""

import json
import sys
from pathlib import Path

import tyro

from megatron_ponder.config.parse import parse_args
from megatron_ponder.errors import exit_on_user_error
from megatron_ponder.planning.options import PlanOptions


@exit_on_user_error
def main() -> None:
    """Parse flags, plan, print."""
    options, settings = tyro.cli(
        PlanOptions, prog="tools/plan.py", description=__doc__, return_unknown_args=True
    )
    config = parse_args(settings, prog="tools/plan.py")
    from megatron_ponder import log

    log.configure()  # before the imports below, some of which warn
    from megatron_ponder.planning.picture import draw_step
    from megatron_ponder.planning.report import plan_run, resolve_on_paper
    from megatron_ponder.planning.text import as_text

    config = resolve_on_paper(config, options.world_size)
    result = plan_run(options, config)
    print(json.dumps(result, indent=1) if options.json else as_text(result))
    if options.timeline:
        draw_step(options, config, Path(options.timeline))


if __name__ == "__main__":
    sys.exit(main())
