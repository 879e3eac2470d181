"""Runs parts of the package on the fake device; started by test_fake_cuda.py as a process.

Its argument is JSON: a list of cases. It prints one line of JSON: for each case, by part, what went
wrong (null: nothing) and what waited for the device.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.fake_cuda import device as fake

fake.install()

from megatron_ponder.config.schema import RunConfig  # noqa: E402
from megatron_ponder.inference.continuation import continuation  # noqa: E402
from megatron_ponder.model import ponder_gpt_model  # noqa: E402
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel  # noqa: E402
from megatron_ponder.optim.adamw import build_optimizer  # noqa: E402
from megatron_ponder.optim.update import clipped_update, gradient_norm  # noqa: E402
from megatron_ponder.parallel.parallel_model import build_parallel_model  # noqa: E402
from megatron_ponder.parallel.schedule import run_microbatches  # noqa: E402
from megatron_ponder.ponder.training_plan import training_plan  # noqa: E402
from megatron_ponder.runtime import distributed  # noqa: E402
from megatron_ponder.train.step import TrainingState  # noqa: E402
from tests.parity.layouts import config_of  # noqa: E402

SMALL = {"num_layers": 2, "micro_batch_size": 2}
Part = Callable[[RunConfig, TrainingState], None]


def batches(config: RunConfig) -> Iterator[dict[str, Tensor]]:
    """What a loader gives: on the CPU."""
    shape = (config.training.micro_batch_size, config.data.seq_length)
    while True:
        ids = torch.ones(shape, dtype=torch.int64)
        yield {"tokens": ids, "labels": ids.clone(), "loss_mask": torch.ones(shape)}


def forward_backward(
    config: RunConfig, training_state: TrainingState, forward_only: bool = False
) -> None:
    """All micro-batches of a step."""
    training, model = config.training, training_state.model
    model.zero_grad_buffer()
    size = training.micro_batch_size * distributed.ranks().data_parallel_size
    totals = run_microbatches(
        model,
        batches(config),
        plan=training_plan(model.method, config.method.num_jacobi_iterations),
        num_microbatches=training.global_batch_size // size,
        micro_batch_size=training.micro_batch_size,
        seq_length=config.data.seq_length,
        forward_only=forward_only,
        overlap_p2p_communication=config.parallel.overlap_p2p_communication,
    )
    assert totals.device == fake.PLACE


@torch.no_grad()
def evaluate(config: RunConfig, training_state: TrainingState) -> None:
    """The forward of a step, in evaluation mode."""
    training_state.model.train(False)
    forward_backward(config, training_state, forward_only=True)
    training_state.model.train()


def update(config: RunConfig, training_state: TrainingState) -> None:
    """Norm, clipping and update as of a training step, twice: the first allocates."""
    optimizer = training_state.optimizer
    for _ in range(2):
        optimizer.prepare_grads()
        norm = gradient_norm(optimizer)
        clipped_update(optimizer, norm, torch.isfinite(norm))
    states = optimizer.chained_optimizers[0].optimizer.state.values()
    assert {state["exp_avg"].device for state in states} == {fake.PLACE}


def generate(config: RunConfig, training_state: TrainingState) -> None:
    """Prefill and decode two prompts of different length, with a cache and without."""
    (module,) = training_state.model.modules
    module.eval()
    prompts = [torch.ones(5, dtype=torch.int64), torch.ones(3, dtype=torch.int64)]
    plan = module.method.plan(config.method.num_jacobi_iterations)
    for use_cache in (True, False):
        with continuation(module, plan, use_cache=use_cache) as text:
            assert text.begin(prompts).device == fake.PLACE
            text.add([1, 2])
            text.keep_rows([1])
            text.add([3])
    module.train()


PARTS: dict[str, Part] = {
    "forward and backward": forward_backward,
    "evaluation": evaluate,
    "update": update,
    "generation": generate,
}


def planted(fault: str | None) -> contextlib.AbstractContextManager:
    """Something that works on a CPU and must be found here."""
    if fault is None:
        return contextlib.nullcontext()
    if fault == "rotary table on the CPU":
        table = ponder_gpt_model.rotary_table
        misplaced = lambda *given: table(*given).cpu()  # noqa: E731
        return mock.patch.object(ponder_gpt_model, "rotary_table", misplaced)
    original = PonderGPTModel.norm_outputs

    def norm_outputs(self: PonderGPTModel, pass_: Any, hidden: Tensor) -> Tensor:
        factor = {
            "reads a number": lambda: hidden.amax().item(),
            "copies to the device": lambda: hidden.new_tensor([1.0]),
        }[fault]()
        return original(self, pass_, hidden * factor)

    return mock.patch.object(PonderGPTModel, "norm_outputs", norm_outputs)


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """One model on one rank of a layout, part by part."""
    config = config_of(case["model"], SMALL | case["settings"], case["world_size"])
    found: dict[str, Any] = {}
    ranks = fake.fake_ranks(case["rank"], case["world_size"])
    with ranks, planted(case["fault"]), fake.FakeDevice() as mode:
        distributed.initialize(config.parallel, config.training.seed)
        model = build_parallel_model(config)
        for _, parameter in model.named_parameters():
            assert parameter.device == fake.PLACE
        optimizer, scheduler = build_optimizer(config, model.chunks)
        training_state = TrainingState(model=model, optimizer=optimizer, scheduler=scheduler)
        for name in case["parts"]:
            mode.waits.clear()
            problem = None
            try:
                PARTS[name](config, training_state)
            except (RuntimeError, AssertionError) as error:
                problem = f"{type(error).__name__}: {error}"
            found[name] = {"problem": problem, "waits": list(mode.waits)}
        distributed.leave_layout()  # the next case has other ranks
    return found


if __name__ == "__main__":
    print(json.dumps([run_case(case) for case in json.loads(sys.argv[1])]))
