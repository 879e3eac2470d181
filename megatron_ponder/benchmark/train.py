"""Training speed and memory, beside the plain PyTorch model doing the same work in the same run.

Both sides live in processes of their own at the same time, take the same steps on the same random
tokens from the same weights, and are timed in turns (ours, reference, ours, reference, ...), so
that a machine that slows down slows both. The loss of both sides' first step is compared: a
benchmark of two different computations says nothing. Peak memory is each process's own.

With R values given, our side is also measured once for each R, in a fresh process each, which shows
what a step costs as a function of R. Left out: more than one process per side, and data loading.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import math
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ponder import log
from megatron_ponder.benchmark.options import TrainBenchmarkOptions
from megatron_ponder.benchmark.process import side
from megatron_ponder.benchmark.reference import build_reference, loss_function
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import CheckpointConfig, RunConfig
from megatron_ponder.convert.weight_names import to_megatron
from megatron_ponder.errors import ConfigError
from megatron_ponder.model.size import forward_flops
from megatron_ponder.parallel.schedule import Batch
from megatron_ponder.ponder.method import load_method
from megatron_ponder.ponder.schedule import jacobi_iterations, training_plan
from megatron_ponder.runtime.device import device
from megatron_ponder.train.run import build_trainee
from megatron_ponder.train.step import train_step

LOSS_TOLERANCE = {False: 1e-4, True: 5e-2}
"""By bf16: between the first losses of the two sides; autocast rounds elsewhere than we do."""

TrainStep = Callable[[int], float]
"""Takes one optimizer step, iteration numbers counting from 1; returns the loss before it."""


def benchmark_training(options: TrainBenchmarkOptions, config: RunConfig) -> dict[str, Any]:
    """Measure a config.

    Args:
        options: how long, and what besides.
        config: as given; resolved here for one process.

    Returns:
        What is printed, by name: `ours`, `reference`, `speedup` (reference's time over ours, above
        1: ours is faster; the median over rounds, with the least and the largest), `by_r`, and what
        it ran on.

    Raises:
        ConfigError: the settings cannot work, or the reference does not have them.
    """
    config = dataclasses.replace(config, checkpoint=CheckpointConfig())
    config = resolve(config, world_size=1)
    names = ["ours"] if options.no_reference else ["ours", "reference"]
    rounds = _measure_in_turns(config, names, options)
    result: dict[str, Any] = environment(config)
    for name in names:
        result[name] = _summary(config, rounds[name], options.steps)
    if not options.no_reference:
        losses = [result[name]["first_loss"] for name in names]
        if not math.isclose(*losses, abs_tol=LOSS_TOLERANCE[config.training.bf16]):
            raise AssertionError(f"the two sides compute different things: losses {losses}")
        ratios = [
            theirs / ours
            for ours, theirs in zip(rounds["ours"].ms, rounds["reference"].ms, strict=True)
        ]
        result["speedup"] = {
            "median": statistics.median(ratios),
            "least": min(ratios),
            "largest": max(ratios),
        }
    result["by_r"] = [_measure_r(config, r, options) for r in options.r_values]
    return result


@dataclasses.dataclass(kw_only=True)
class _Rounds:
    """One side's measurements."""

    first_loss: float = math.nan
    ms: list[float] = dataclasses.field(default_factory=list)
    """Milliseconds per step of each round."""
    baseline_gib: float = 0.0
    """Held before the model was built: interpreter and libraries."""
    peak_gib: float = 0.0


def _measure_in_turns(
    config: RunConfig, names: Sequence[str], options: TrainBenchmarkOptions
) -> dict[str, _Rounds]:
    """Time the sides alternately."""
    total = len(names) * (options.rounds + 1)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(log.progress(total, "benchmark", " rounds"))
        sides = {name: stack.enter_context(side(name, config)) for name in names}
        rounds = {name: _Rounds() for name in names}
        for name, ask in sides.items():
            losses, _ = ask(options.warmup_steps)
            rounds[name].first_loss = losses[0]
            bar.update()
        for _ in range(options.rounds):
            for name, ask in sides.items():
                _, seconds = ask(options.steps)
                rounds[name].ms.append(1e3 * seconds / options.steps)
                bar.update()
        for name, ask in sides.items():
            rounds[name].baseline_gib, rounds[name].peak_gib = ask(0)
    return rounds


def _measure_r(config: RunConfig, r: int, options: TrainBenchmarkOptions) -> dict[str, Any]:
    """Our side at one R, in a process of its own."""
    config = config.replaced(num_jacobi_iterations=r, random_jacobi_iterations=False)
    (rounds,) = _measure_in_turns(config, ["ours"], options).values()
    summary = _summary(config, rounds, options.steps)
    keys = ("ms_per_step", "peak_memory_gib", "step_memory_gib", "tflops")
    return {"num_jacobi_iterations": r} | {key: summary[key] for key in keys}


def build_step(name: str, config: RunConfig) -> TrainStep:
    """One side's training step: ours or reference."""
    return {"ours": _our_step, "reference": _reference_step}[name](config)


def _our_step(config: RunConfig) -> TrainStep:
    """This package's training step, from the reference's initial weights."""
    trainee = build_trainee(config)
    torch.manual_seed(config.training.seed)
    with torch.device("cpu"):
        weights = dict(build_reference(config).named_parameters()) if _has_reference(config) else {}
    if weights:
        state = to_megatron({k: w.detach() for k, w in weights.items()}, config.model)
        (model,) = trainee.model.modules
        model.load_state_dict(state, strict=False)
        trainee.optimizer.reload_model_params()
    batches = random_batches(config)

    def step(iteration: int) -> float:
        return train_step(config, trainee, batches, iteration=iteration, wants_stop=False).loss

    return step


def _reference_step(config: RunConfig) -> TrainStep:
    """The same in plain PyTorch, written as one would: autocast, fused AdamW, clipping."""
    torch.manual_seed(config.training.seed)
    model = build_reference(config).to(device())
    optim, training = config.optimizer, config.training
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": optim.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=optim.lr,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_eps,
        fused=True,
    )
    batches = random_batches(config)
    assert training.global_batch_size is not None
    num_microbatches = training.global_batch_size // training.micro_batch_size

    def step(iteration: int) -> float:
        r = jacobi_iterations(config.method, training.seed, iteration)
        optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=device())
        for _ in range(num_microbatches):
            batch = next(batches)
            with torch.autocast(device().type, torch.bfloat16, enabled=training.bf16):
                logits = model(batch["tokens"].to(device()), r)
            loss = loss_function(logits, batch["labels"].to(device())) / num_microbatches
            loss.backward()
            loss_sum += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad or math.inf)
        optimizer.step()
        return loss_sum.item()

    return step


def _has_reference(config: RunConfig) -> bool:
    """Whether the plain model exists for these settings."""
    try:
        with torch.device("meta"):
            build_reference(config)
    except ConfigError:
        return False
    return True


def random_batches(config: RunConfig) -> Iterator[Batch]:
    """Random tokens, the same for both sides."""
    generator = torch.Generator().manual_seed(config.training.seed)
    shape = (config.training.micro_batch_size, config.data.seq_length + 1)
    assert config.model.vocab_size is not None
    while True:
        ids: Tensor = torch.randint(config.model.vocab_size, shape, generator=generator)
        yield {
            "tokens": ids[:, :-1].contiguous(),
            "labels": ids[:, 1:].contiguous(),
            "loss_mask": torch.ones(shape[0], shape[1] - 1),
        }


def _summary(config: RunConfig, rounds: _Rounds, steps_per_round: int) -> dict[str, Any]:
    """One side's figures; rates are of the median round."""
    training = config.training
    assert training.global_batch_size is not None
    ms = statistics.median(rounds.ms)
    tokens = training.global_batch_size * config.data.seq_length
    plan = training_plan(load_method(config.method), config.method.num_jacobi_iterations)
    flops = forward_flops(config.model, plan, config.data.seq_length).training
    has_one_r = not config.method.random_jacobi_iterations
    return {
        "ms_per_step": ms,
        "ms_per_step_of_rounds": rounds.ms,
        "tokens_per_s": tokens / ms * 1e3,
        # Which R the timed steps drew is not one number: no rate is better than a wrong one.
        "tflops": flops * training.global_batch_size / ms * 1e3 / 1e12 if has_one_r else None,
        "peak_memory_gib": rounds.peak_gib,
        "step_memory_gib": rounds.peak_gib - rounds.baseline_gib,
        "first_loss": rounds.first_loss,
        "steps": steps_per_round * len(rounds.ms),
    }


def environment(config: RunConfig) -> dict[str, Any]:
    """What the figures hold for."""
    is_cuda = device().type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if is_cuda else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron_core": importlib.metadata.version("megatron-core"),
        },
        "config": config.to_flat_dict(),
    }
