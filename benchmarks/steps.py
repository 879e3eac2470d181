"""Training steps of both sides, and the functions that a process runs on them.

Ours is the training step of a run. The reference is written as one would write it around stock
layers: gradients summed over micro-batches, autocast if the run is in bf16, fused AdamW, clipping.
Both start from the same weights and take the same random tokens. Neither synchronises with the
device for its loss within a step.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.phases import Phase, named_phases, unnamed
from benchmarks.processes import Held
from benchmarks.step_memory import held_bytes, step_bytes
from benchmarks.stock_reference import build_stock_reference
from benchmarks.timing import synchronize_device
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.convert.weight_names import to_megatron
from megatron_ponder.parallel.schedule import Batch
from megatron_ponder.ponder.training_plan import jacobi_iterations
from megatron_ponder.runtime.device import device
from megatron_ponder.runtime.distributed import initialize
from megatron_ponder.train.metrics import peak_memory_gib
from megatron_ponder.train.run import build_training_state
from megatron_ponder.train.step import train_step

Loss = Callable[[], float]
"""Reads a step's loss, which synchronises with the device."""


class Steps(Protocol):
    """A side."""

    def step(self, iteration: int, phase: Phase = unnamed) -> Loss:
        """Launch an optimizer step.

        Args:
            iteration: its number, from 1.
            phase: names the parts of the step.

        Returns:
            The loss before the update.
        """


class OurSteps:
    """This package's training step.

    Args:
        config: resolved, in the layout that is running.
        starts_from_reference: take the reference's initial weights.
    """

    def __init__(self, config: ResolvedConfig, *, starts_from_reference: bool = False) -> None:
        self.config = config
        self.training_state = build_training_state(config)
        if starts_from_reference:
            weights = build_stock_reference(config).stock_weights(config.model)
            state = to_megatron({k: w.detach() for k, w in weights.items()}, config.model)
            (model,) = self.training_state.model.modules
            model.load_state_dict(state, strict=False)
            self.training_state.optimizer.reload_model_params()
        self.batches = random_batches(config)

    def step(self, iteration: int, phase: Phase = unnamed) -> Loss:
        """See `Steps`."""
        with named_phases(self.training_state, phase):
            step = train_step(
                self.config,
                self.training_state,
                self.batches,
                iteration=iteration,
                wants_stop=False,
            )
        return lambda: step.fetch().loss


class ReferenceSteps:
    """The method on stock transformers layers, without megatron-core."""

    def __init__(self, config: ResolvedConfig) -> None:
        self.config = config
        self.model = build_stock_reference(config).to(device()).train()
        optim = config.optimizer
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": optim.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=optim.lr,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_eps,
            fused=True,
        )
        self.batches = random_batches(config)

    def step(self, iteration: int, phase: Phase = unnamed) -> Loss:
        """See `Steps`."""
        training = self.config.training
        num_microbatches = training.global_batch_size // training.micro_batch_size
        r = jacobi_iterations(self.config.method, training.seed, iteration)
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=device())
        for _ in range(num_microbatches):
            with phase("forward"):
                batch = next(self.batches)
                tokens, labels = (
                    batch[key].to(device(), non_blocking=True) for key in ("tokens", "labels")
                )
                with torch.autocast(device().type, torch.bfloat16, enabled=training.bf16):
                    loss = self.model(tokens, labels, r) / num_microbatches
            with phase("backward"):
                loss.backward()
            loss_sum += loss.detach()
        with phase("gradients"):
            clip = self.config.optimizer.clip_grad or math.inf
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        with phase("optimizer"):
            self.optimizer.step()
        return loss_sum.item


def random_batches(config: ResolvedConfig) -> Iterator[Batch]:
    """Random tokens, the same for all sides."""
    generator = torch.Generator().manual_seed(config.training.seed)
    shape = (config.training.micro_batch_size, config.data.seq_length + 1)
    while True:
        ids: Tensor = torch.randint(config.model.vocab_size, shape, generator=generator)
        yield {
            "tokens": ids[:, :-1].contiguous(),
            "labels": ids[:, 1:].contiguous(),
            "loss_mask": torch.ones(shape[0], shape[1] - 1),
        }


def build_ours(
    held: Held, name: str, config: ResolvedConfig, starts_from_reference: bool = False
) -> float:
    """In a process: hold our steps under a name; models held at once have one layout.

    Returns:
        Peak memory of the process before, in GiB.
    """
    before_gib = peak_memory_gib()
    initialize(config.parallel, config.training.seed)
    held[name] = OurSteps(config, starts_from_reference=starts_from_reference)
    return before_gib


def build_reference_side(held: Held, name: str, config: ResolvedConfig) -> float:
    """In a process: hold the reference's steps under a name; as `build_ours`."""
    before_gib = peak_memory_gib()
    held[name] = ReferenceSteps(config)
    return before_gib


def take_steps(
    held: Held, name: str, first_iteration: int, num_steps: int
) -> tuple[list[float], float, float]:
    """In a process: train.

    Returns:
        Loss of each step; seconds from a common start of all ranks; seconds of CPU time.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
    synchronize_device()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    steps = range(first_iteration, first_iteration + num_steps)
    losses = [held[name].step(iteration) for iteration in steps]
    synchronize_device()
    seconds, cpu_seconds = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    return [read() for read in losses], seconds, cpu_seconds


def measure_memory(held: Held, name: str) -> int:
    """In a process: bytes of our side held between steps, and added by one, to the byte."""
    between = sum(held_bytes(held[name].training_state).values())
    return between + step_bytes(lambda: held[name].step(1)())


def peak_gib(held: Held) -> float:
    """In a process: its peak memory so far."""
    return peak_memory_gib()


def drop(held: Held, name: str) -> None:
    """In a process: free a model, cycles included."""
    del held[name]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
