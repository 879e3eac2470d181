"""A whole run, from the given config to a trained model.

Errors are detected before anything expensive is built. The order is: settings, then folders and
checkpoints, then data, then the model.
"""

import dataclasses
import importlib.metadata
import logging
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import megatron_ponder
from megatron_ponder.checkpoint.progress import Progress
from megatron_ponder.checkpoint.reader import find_checkpoint, load_checkpoint
from megatron_ponder.checkpoint.writer import prepare_folder
from megatron_ponder.config.parse import dump_yaml
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.data.datasets import (
    build_datasets,
    build_validation_sets,
    num_samples_needed,
    training_fingerprint,
)
from megatron_ponder.data.loader import build_loader
from megatron_ponder.data.manifest import describe_tokenizer, tokenizer_entry
from megatron_ponder.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ponder.errors import ConfigError, DataError
from megatron_ponder.model.size import count_parameters, forward_flops
from megatron_ponder.optim.adamw import build_optimizer
from megatron_ponder.parallel.parallel_model import build_parallel_model
from megatron_ponder.parallel.schedule import Batch
from megatron_ponder.ponder.training_plan import training_plan
from megatron_ponder.runtime.backends import log_choices, use_backends
from megatron_ponder.runtime.device import device
from megatron_ponder.runtime.distributed import (
    is_rank_zero,
    ranks,
    running,
    world_size_from_environment,
)
from megatron_ponder.train.loop import Batches, TrainingData, train
from megatron_ponder.train.metrics import Reporter
from megatron_ponder.train.sinks import open_sinks
from megatron_ponder.train.step import TrainingState

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> None:
    """Train according to `config`, on all ranks of torchrun or in a single process.

    Args:
        config: the given config; it is resolved here.

    Raises:
        PonderError: the run cannot work; the message says what to change.
    """
    start_s = time.monotonic()
    tokenizer = build_tokenizer(config.data, config.model.vocab_size)
    config = resolve(
        config,
        world_size=world_size_from_environment(),
        tokenizer_vocab_size=tokenizer.vocab_size,
    )
    if config.method.uses_pause_token and config.method.pause_token_id in tokenizer.begin:
        raise ConfigError(
            f"--pause-token-id {config.method.pause_token_id}: is also the begin token. "
            "Give another row, or leave --add-bos out."
        )
    with running(config.parallel, config.training.seed):
        log_choices(use_backends(config))
        prepare_folder(config)
        checkpoint = find_checkpoint(config.checkpoint)
        num_samples = num_samples_needed(config)
        datasets = build_datasets(config, tokenizer, num_samples)
        fingerprint = training_fingerprint(config, tokenizer, datasets[0], num_samples[0])
        validation_sets = {}
        if config.data.multiple_validation_sets:
            validation_sets = build_validation_sets(config, tokenizer, num_samples[1])
        training_state = build_training_state(config)
        _describe(config, training_state)
        _describe_tokenizer(config, tokenizer)
        progress = Progress(data=fingerprint)
        if checkpoint is not None:
            progress = load_checkpoint(
                config,
                checkpoint,
                chunks=training_state.model.chunks,
                optimizer=training_state.optimizer,
                scheduler=training_state.scheduler,
                data=fingerprint,
            )
        if progress.iteration >= config.training.train_iters:
            logger.info(
                "training is already complete: %s is at iteration %d",
                checkpoint,
                progress.iteration,
            )
            return
        sinks = open_sinks(config, progress.iteration) if is_rank_zero() else []
        reporter = Reporter(config, training_state.model.method, progress, sinks)
        try:
            data = _training_data(config, datasets, validation_sets, progress.consumed_samples)
            train(config, training_state, data, progress, reporter, start_s)
        finally:
            reporter.close()


def build_training_state(config: ResolvedConfig) -> TrainingState:
    """Build model, optimizer and LR scheduler."""
    model = build_parallel_model(config)
    optimizer, scheduler = build_optimizer(config, model.chunks)
    return TrainingState(model=model, optimizer=optimizer, scheduler=scheduler)


def _training_data(
    config: ResolvedConfig,
    datasets: tuple[Any, Any, Any],
    validation_sets: dict[str, Any],
    consumed_samples: int,
) -> TrainingData:
    """Readers of the three datasets; with several validation sets, one reader for each of them."""
    train_set, valid_set, test_set = datasets
    evaluates = bool(config.training.eval_iters)
    validates = evaluates and bool(config.training.eval_interval)
    return TrainingData(
        train=_reader(config, train_set, consumed_samples),
        valid=_reader(config, valid_set, 0)
        if valid_set is not None and validates and not validation_sets
        else None,
        validation_sets={
            name: _reader(config, each, 0) for name, each in validation_sets.items() if validates
        },
        test=_reader(config, test_set, 0) if test_set is not None and evaluates else None,
    )


def _reader(config: ResolvedConfig, dataset: Any, consumed_samples: int) -> Batches:
    """A function that starts to read `dataset` after `consumed_samples`."""
    here, vocab_size = ranks(), config.model.vocab_size

    def start() -> Iterator[Batch]:
        yield from build_loader(
            dataset,
            micro_batch_size=config.training.micro_batch_size,
            data_parallel_rank=here.data_parallel_rank,
            data_parallel_size=here.data_parallel_size,
            consumed_samples=consumed_samples,
            num_workers=config.data.num_workers,
            vocab_size=vocab_size,
        )
        raise DataError(
            f"the data ends after {len(dataset)} samples, before the run ends. Give more data, or "
            "fewer --train-iters or --eval-iters."
        )

    return start


def _device_name() -> str:
    """Name of this rank's device."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads per rank)"


def _describe(config: ResolvedConfig, training_state: TrainingState) -> None:
    """Log the whole config, the layout, the versions, the model size and the FLOPs."""
    if not is_rank_zero():
        return
    logger.info("config:\n%s", dump_yaml(config).rstrip())
    here, training = ranks(), config.training
    logger.info(
        "ranks: %d (tensor %d, pipeline %d, context %d, data parallel %d), device %s, host %s, "
        "folder %s",
        here.world_size,
        here.tensor_parallel_size,
        here.pipeline_parallel_size,
        here.context_parallel_size,
        here.data_parallel_size,
        _device_name(),
        platform.node(),
        Path.cwd(),
    )
    logger.info(
        "megatron_ponder %s, megatron-core %s, torch %s, Python %s",
        megatron_ponder.__version__,
        importlib.metadata.version("megatron-core"),
        torch.__version__,
        platform.python_version(),
    )
    counts = count_parameters(config.model)
    logger.info(
        "parameters: %s", ", ".join(f"{k} {v:,}" for k, v in dataclasses.asdict(counts).items())
    )
    method, seq_length = training_state.model.method, config.data.seq_length
    plan = training_plan(method, config.method.num_jacobi_iterations)
    flops = forward_flops(config.model, plan, seq_length).training
    logger.info(
        "%d passes at R = %d, %.4g training FLOPs per token; %d tokens per iteration",
        len(plan.passes),
        config.method.num_jacobi_iterations,
        flops / seq_length,
        training.global_batch_size * seq_length,
    )


def _describe_tokenizer(config: ResolvedConfig, tokenizer: Tokenizer) -> None:
    """Log the tokenizer, and how many rows of the vocabulary no token uses."""
    num_rows, num_ids = config.model.vocab_size, len(tokenizer.token_ids())
    logger.info(
        "tokenizer: %s; end of document %d, begin %s",
        describe_tokenizer(tokenizer_entry(tokenizer)),
        tokenizer.eod,
        " ".join(map(str, tokenizer.begin)) or "none",
    )
    if num_ids < num_rows:
        logger.info(
            "vocabulary: %d of %d rows belong to no token and are never targets; generation does "
            "not draw them",
            num_rows - num_ids,
            num_rows,
        )
