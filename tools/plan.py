r"""Predicts what a run needs: memory per rank, FLOPs, pipeline bubble, communication.

    python tools/plan.py --config examples/llama/ponderlm2-1.4b.yaml --world-size 64
    python tools/plan.py --config X.yaml --world-size 64 --bf16 --device-memory-gib 78
    python tools/plan.py --preset gpt2 --seq-length 1024 --world-size 8 --timeline step.png
    python tools/plan.py scaling --help

Takes the flags below and every setting of megatron_ponder.pretrain (its --help lists them), and
checks the settings as training does. Needs no GPU, no data and no other ranks. If training would
refuse the settings, the exit code is 2 and the message says what to change. A run that is too large
for --device-memory-gib is no error: the report says so, and what single changes would bring.

The peak memory is within 10% of measured ones. Time is FLOPs over --assumed-tflops: use it to
compare layouts, not to predict seconds. docs/parallelism.md explains all figures.

`tools/plan.py scaling` searches the best layout for each of several numbers of devices.
"""

import json
import sys
from collections.abc import Sequence
from inspect import getdoc
from pathlib import Path

from megatron_ponder import log
from megatron_ponder.config.parse import parse_options_and_settings
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import exit_on_user_error
from megatron_ponder.planning.options import PlanOptions, ScalingOptions


def parse(argv: Sequence[str] | None) -> tuple[PlanOptions | ScalingOptions, RunConfig]:
    """The flags; those of a search if `scaling` comes first."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["scaling"]:
        description, prog = getdoc(ScalingOptions), "tools/plan.py scaling"
        return parse_options_and_settings(
            ScalingOptions, argv[1:], prog=prog, description=description
        )
    return parse_options_and_settings(PlanOptions, argv, prog="tools/plan.py", description=__doc__)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, plan, print."""
    options, config = parse(argv)
    log.configure()  # before imports that warn
    if isinstance(options, ScalingOptions):
        _scale(options, config)
    else:
        _plan(options, config)


def _plan(options: PlanOptions, config: RunConfig) -> None:
    from megatron_ponder.planning.picture import draw_step
    from megatron_ponder.planning.report import plan_run
    from megatron_ponder.planning.run import PlannedRun
    from megatron_ponder.planning.text import as_text

    run = PlannedRun.resolved(config, options.world_size)
    result = plan_run(options, run)
    print(json.dumps(result, indent=1) if options.json else as_text(result))
    if options.timeline:
        draw_step(run, Path(options.timeline), options.assumed_tflops)


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
