"""What `tools/benchmark.py` can measure: for each command its flags and what to do with them.

Imports no torch: `--help` is instant. A command gives its result and a text that says it to people,
and writes the files that its flags ask for.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import options as flags
from benchmarks.curves_options import CurvesBenchmarkOptions
from megatron_ponder.config.schema import RunConfig

Report = tuple[dict[str, Any], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One word behind `tools/benchmark.py`."""

    options: type
    """Its flags."""
    measure: Callable[..., Report]
    """Takes the options and, if settings are taken, the config of a run."""
    takes_settings: bool = True
    """Whether it takes settings of pretraining besides."""


def _train(options: flags.TrainBenchmarkOptions, config: RunConfig) -> Report:
    from benchmarks import report, train

    result = train.benchmark_training(options, config)
    if options.plot:
        report.draw_by_r(result, Path(options.plot))
    return result, report.as_table(result)


def _pipeline(options: flags.PipelineBenchmarkOptions, config: RunConfig) -> Report:
    from benchmarks import pipeline

    result, measured = pipeline.benchmark_pipeline(options, config)
    if options.timeline:
        pipeline.draw_measured(measured, result, Path(options.timeline))
    return result, pipeline.as_text(result)


def _curves(options: CurvesBenchmarkOptions, config: RunConfig) -> Report:
    from benchmarks import curves, curves_report

    result = curves.benchmark_curves(options, config)
    if options.record:
        curves_report.write_record(result, Path(options.record))
    if options.plot:
        curves_report.draw_curves(result, Path(options.plot))
    return result, curves_report.as_text(result)


def _kernels(options: flags.KernelsBenchmarkOptions, config: RunConfig) -> Report:
    from benchmarks import kernels

    result = kernels.benchmark_kernels(options, config)
    return result, kernels.as_text(result)


def _checkpoint(options: flags.CheckpointBenchmarkOptions, config: RunConfig) -> Report:
    from benchmarks import checkpoint

    result = checkpoint.benchmark_checkpoint(options, config)
    return result, checkpoint.as_text(result)


def _generate(options: flags.GenerateBenchmarkOptions, config: RunConfig) -> Report:
    from benchmarks import generate

    result = generate.benchmark_generation(options, config)
    return result, generate.as_text(result)


def _preprocess(options: flags.PreprocessBenchmarkOptions) -> Report:
    from benchmarks import preprocess

    result = preprocess.benchmark_preprocessing(options)
    return result, preprocess.as_text(result)


COMMANDS = {
    "train": Command(options=flags.TrainBenchmarkOptions, measure=_train),
    "pipeline": Command(options=flags.PipelineBenchmarkOptions, measure=_pipeline),
    "curves": Command(options=CurvesBenchmarkOptions, measure=_curves),
    "kernels": Command(options=flags.KernelsBenchmarkOptions, measure=_kernels),
    "checkpoint": Command(options=flags.CheckpointBenchmarkOptions, measure=_checkpoint),
    "generate": Command(options=flags.GenerateBenchmarkOptions, measure=_generate),
    "preprocess": Command(
        options=flags.PreprocessBenchmarkOptions, measure=_preprocess, takes_settings=False
    ),
}
