"""A run small enough for a test of a second: a tiny model on made-up tokens, inside ranks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ponder.checkpoint.progress import Progress
from megatron_ponder.checkpoint.reader import load_checkpoint, locate
from megatron_ponder.checkpoint.writer import save_checkpoint
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.optim.adamw import build_optimizer
from megatron_ponder.parallel.parallel_model import build_parallel_model
from megatron_ponder.parallel.schedule import Batch
from megatron_ponder.runtime import distributed
from megatron_ponder.train.step import StepResult, TrainingState, train_step
from tests.parity.measure import gather_weights

VOCAB_SIZE = 61
SEQ_LENGTH = 16
GLOBAL_BATCH_SIZE = 4


def small_config(world_size: int = 1, **changes: object) -> ResolvedConfig:
    """Four layers, with all that a checkpoint has to reshard: gated MLP, query groups."""
    settings: dict[str, object] = {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": VOCAB_SIZE,
        "make_vocab_size_divisible_by": 8,
        "seq_length": SEQ_LENGTH,
        "tokenizer_type": "NullTokenizer",
        "micro_batch_size": 1,
        "global_batch_size": GLOBAL_BATCH_SIZE,
        "data_path": ("unused",),
        "lr": 1e-2,
        "lr_warmup_iters": 0,
        "train_iters": 8,
        "random_jacobi_iterations": True,
        "min_jacobi_iterations": 1,
        "max_jacobi_iterations": 3,
    }
    config = RunConfig().replaced(**{**settings, **changes})
    return resolve(config, world_size=world_size, tokenizer_vocab_size=VOCAB_SIZE)


def iteration_batches(config: ResolvedConfig, iteration: int) -> Iterator[Batch]:
    """This rank's micro-batches of one iteration, the same samples in every layout."""
    generator = torch.Generator().manual_seed(iteration)
    tokens = torch.randint(0, VOCAB_SIZE, (GLOBAL_BATCH_SIZE, SEQ_LENGTH + 1), generator=generator)
    here = distributed.ranks()
    size = config.training.micro_batch_size
    for part in tokens.split(size)[here.data_parallel_rank :: here.data_parallel_size]:
        yield {
            "tokens": part[:, :-1].contiguous(),
            "labels": part[:, 1:].contiguous(),
            "loss_mask": torch.ones(part.size(0), SEQ_LENGTH),
        }


def build_training_state(config: ResolvedConfig) -> TrainingState:
    """Model, optimizer and schedule; starts the layout."""
    distributed.initialize(config.parallel, config.training.seed)
    model = build_parallel_model(config)
    optimizer, scheduler = build_optimizer(config, model.chunks)
    return TrainingState(model=model, optimizer=optimizer, scheduler=scheduler)


def run_iterations(
    config: ResolvedConfig, training_state: TrainingState, progress: Progress, last: int
) -> list[StepResult]:
    """Iterations up to and including `last`."""
    steps = []
    for iteration in range(progress.iteration + 1, last + 1):
        batches = iteration_batches(config, iteration)
        step = train_step(
            config, training_state, batches, iteration=iteration, wants_stop=False
        ).fetch()
        assert step.is_updated
        progress.iteration = iteration
        progress.consumed_tokens += step.num_tokens
        steps.append(step)
    return steps


def parts(training_state: TrainingState) -> dict[str, Any]:
    """What saving and loading take."""
    return {
        "chunks": training_state.model.chunks,
        "optimizer": training_state.optimizer,
        "scheduler": training_state.scheduler,
    }


def save_midway(config: ResolvedConfig, at: int, last: int) -> dict[str, object]:
    """Train to `at`, save into config's --save, train on to `last`."""
    training_state = build_training_state(config)
    progress = Progress()
    run_iterations(config, training_state, progress, at)
    save_checkpoint(config, progress=progress, **parts(training_state))
    steps = run_iterations(config, training_state, progress, last)
    draw = torch.rand(3)
    result = {"steps": steps, "weights": gather_weights(training_state.model), "draw": draw}
    return result


def resume(config: ResolvedConfig, last: int) -> dict[str, object]:
    """Load the newest checkpoint of config's --load, train on to `last`."""
    training_state = build_training_state(config)
    assert config.checkpoint.load is not None
    checkpoint = locate(Path(config.checkpoint.load), config.checkpoint.ckpt_step)
    progress = load_checkpoint(config, checkpoint, **parts(training_state))
    steps = run_iterations(config, training_state, progress, last)
    draw = torch.rand(3)
    result = {"steps": steps, "weights": gather_weights(training_state.model), "draw": draw}
    return result
