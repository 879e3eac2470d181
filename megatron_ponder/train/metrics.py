"""Reports of a run: one record and one log line per log interval and per evaluation.

The log line uses Megatron-LM's field names, so tools that parse its logs can parse ours. Loss and R
are means over the iterations since the last line. Gradient norm and learning rate are those of the
last iteration. Times and rates exclude evaluation and saving. FLOPs are those of the passes that
were actually run, forward and backward (`model.size`), without recomputation.
"""

import dataclasses
import functools
import logging
import math
import resource
from collections.abc import Sequence

import torch

from megatron_ponder.checkpoint.progress import Progress
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.model.size import forward_flops
from megatron_ponder.ponder.method import Method
from megatron_ponder.ponder.training_plan import training_plan
from megatron_ponder.runtime.distributed import ranks
from megatron_ponder.runtime.peak_flops import peak_tflops
from megatron_ponder.train.evaluation import Evaluation
from megatron_ponder.train.sinks import Record, Sink, write_all
from megatron_ponder.train.step import StepResult

logger = logging.getLogger(__name__)

KIB_PER_GIB = 1 << 20
BYTES_PER_GIB = 1 << 30


@dataclasses.dataclass(kw_only=True)
class _Timed:
    """Sums over the iterations that this process has run since the last log line."""

    iterations: int = 0
    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0


class Reporter:
    """Collects results and reports them. Every rank has one; only rank 0's has sinks."""

    def __init__(
        self, config: ResolvedConfig, method: Method, progress: Progress, sinks: Sequence[Sink]
    ) -> None:
        """Resume the log window that `progress` holds."""
        self._config = config
        self._method = method
        self._progress = progress
        self._sinks = sinks
        self._timed = _Timed()
        self._world_size = ranks().world_size
        self._peak_tflops = peak_tflops(bf16=config.training.bf16)
        self._iteration_flops = functools.cache(self._count_iteration_flops)

    def add(self, step: StepResult, seconds: float) -> None:
        """Add one iteration to the log window.

        Args:
            step: its result.
            seconds: its duration, including data loading.
        """
        sums = self._progress.log_window
        values = {
            "iterations": 1,
            "jacobi_iterations": step.num_jacobi_iterations,
            "skipped": not step.is_updated,
            "loss": step.loss if step.is_updated else 0.0,
        }
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value
        timed = self._timed
        timed.iterations += 1
        timed.seconds += seconds
        timed.tokens += step.num_tokens
        timed.flops += self._iteration_flops(step.num_jacobi_iterations)

    def report_training(self, step: StepResult) -> None:
        """Report the log window that ends with `step`, and start the next."""
        record = self._training_record(step)
        self._progress.log_window.clear()
        self._timed = _Timed()
        logger.info("%s", _training_line(record, self._config))
        write_all(self._sinks, record)

    def report_evaluation(
        self, split: str, evaluation: Evaluation, dataset: str | None = None
    ) -> None:
        """Report an evaluation at the current iteration.

        Args:
            split: valid or test.
            evaluation: its result.
            dataset: name of the validation dataset, if there are several.
        """
        record: Record = {
            "split": split,
            **({"dataset": dataset} if dataset else {}),
            "iteration": self._progress.iteration,
            "lm_loss": evaluation.loss,
            "perplexity": evaluation.perplexity,
            "num_jacobi_iterations": evaluation.num_jacobi_iterations,
            "num_tokens": evaluation.num_tokens,
            "consumed_tokens": self._progress.consumed_tokens,
        }
        name = {"valid": "validation", "test": "test"}[split]
        name = f"{name} ({dataset})" if dataset else name
        logger.info(
            "%s loss at iteration %d | lm loss value: %.6E | lm loss PPL: %.6E |",
            name,
            self._progress.iteration,
            evaluation.loss,
            evaluation.perplexity,
        )
        write_all(self._sinks, record)

    def close(self) -> None:
        """Close the sinks."""
        for sink in self._sinks:
            sink.close()

    def _training_record(self, step: StepResult) -> Record:
        """The record of the log window."""
        progress, timed, sums = self._progress, self._timed, self._progress.log_window
        num_updated = sums["iterations"] - sums["skipped"]
        num_jacobi = sums["jacobi_iterations"] / sums["iterations"]
        seconds_per_iteration = timed.seconds / timed.iterations
        tflops = timed.flops / timed.seconds / self._world_size / 1e12
        num_left = self._config.training.train_iters - progress.iteration
        return {
            "split": "train",
            "iteration": progress.iteration,
            "lm_loss": sums["loss"] / num_updated if num_updated else math.nan,
            "grad_norm": step.grad_norm,
            "learning_rate": step.learning_rate,
            "num_jacobi_iterations": int(num_jacobi) if num_jacobi.is_integer() else num_jacobi,
            "skipped_iterations": progress.skipped_iterations,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_tokens,
            "elapsed_ms_per_iteration": 1e3 * seconds_per_iteration,
            "tokens_per_s": timed.tokens / timed.seconds,
            "tflops_per_device": tflops,
            "mfu": tflops / self._peak_tflops if self._peak_tflops else None,
            "peak_memory_gib": peak_memory_gib(),
            "eta_s": num_left * seconds_per_iteration,
        }

    def _count_iteration_flops(self, num_jacobi_iterations: int) -> float:
        """FLOPs of one iteration over all devices."""
        plan = training_plan(self._method, num_jacobi_iterations)
        config = self._config
        per_sequence = forward_flops(config.model, plan, config.data.seq_length).training
        return float(per_sequence * config.training.global_batch_size)


def peak_memory_gib() -> float:
    """Peak memory of this process in GiB: on the CUDA device; without one, resident on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / BYTES_PER_GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KIB_PER_GIB


def _training_line(record: Record, config: ResolvedConfig) -> str:
    """The log line of a record: Megatron-LM's fields, then ours."""
    mfu = f" MFU: {record['mfu']:.1%} |" if record["mfu"] is not None else ""
    return (
        f"iteration {record['iteration']:8d}/{config.training.train_iters:8d} |"
        f" consumed samples: {record['consumed_samples']:12d} |"
        f" elapsed time per iteration (ms): {record['elapsed_ms_per_iteration']:.1f} |"
        f" throughput per GPU (TFLOP/s/GPU): {record['tflops_per_device']:.4g} |"
        f" learning rate: {record['learning_rate']:.6E} |"
        f" global batch size: {config.training.global_batch_size:5d} |"
        f" lm loss: {record['lm_loss']:.6E} |"
        f" grad norm: {record['grad_norm']:.3f} |"
        f" number of skipped iterations: {record['skipped_iterations']:3d} |"
        f" tokens per second: {record['tokens_per_s']:.0f} |{mfu}"
        f" jacobi iterations: {record['num_jacobi_iterations']:.4g} |"
        f" peak memory (GiB): {record['peak_memory_gib']:.2f} |"
        f" time left: {duration(record['eta_s'])} |"
    )


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss, with days in front if there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}"
