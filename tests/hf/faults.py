"""Ways to be wrong that the tests must notice, planted in a loaded model's modules."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

MonkeyPatch = pytest.MonkeyPatch


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault, and golden cases in which it shows."""

    cases: tuple[str, ...]
    plant: Callable[[MonkeyPatch, Any, Any], None]
    """Called with the patcher, the model's module `passes`, and the model."""


K1, K2 = "llama_ponderlm2_k1_j3", "llama_ponderlm2_k2_j2"


def _position_per_slot(patch: MonkeyPatch, passes: Any, model: Any) -> None:
    run = passes.StockModel.run

    def wrong(self: Any, slots: Any, *, mask: Any, **rest: Any) -> Any:
        end = mask.size(1)
        rest["position_ids"] = torch.arange(end - slots.size(1), end).expand(slots.size(0), -1)
        return run(self, slots, mask=mask, **rest)

    patch.setattr(passes.StockModel, "run", wrong)


def _cache_counted_in_slots(patch: MonkeyPatch, passes: Any, model: Any) -> None:
    add = passes.ThoughtCache.add

    def wrong(self: Any, num_tokens: int, num_rounds: Any) -> None:
        add(self, num_tokens * self.slots_per_token, num_rounds)

    patch.setattr(passes.ThoughtCache, "add", wrong)


def _unscaled_embedding(patch: MonkeyPatch, passes: Any, model: Any) -> None:
    patch.setattr(type(model), "_scale", lambda self, embeddings: embeddings)


def _one_round_short(patch: MonkeyPatch, passes: Any, model: Any) -> None:
    patch.setattr(model.config, "num_jacobi_iterations", model.config.num_jacobi_iterations - 1)


def _norm_in_every_pass(patch: MonkeyPatch, passes: Any, model: Any) -> None:
    switch = passes.StockModel._switch

    def wrong(self: Any, *, is_norm_off: bool, is_table_off: bool) -> None:
        switch(self, is_norm_off=False, is_table_off=is_table_off)

    patch.setattr(passes.StockModel, "_switch", wrong)


def _thoughts_before_token(patch: MonkeyPatch, passes: Any, model: Any) -> None:
    def wrong(tokens: Any, thoughts: Any) -> Any:
        if thoughts is None:
            return tokens
        return torch.cat((thoughts, tokens.unsqueeze(2)), dim=2).flatten(1, 2)

    patch.setattr(passes, "interleave", wrong)


FAULTS = {
    "position per slot": Fault((K1, K2, "gpt_neox_pause_k2"), _position_per_slot),
    "cache counted in slots": Fault((K1, K2), _cache_counted_in_slots),
    "unscaled embedding": Fault((K2, "llama_ponderlm_k2", "llama_loop_k2"), _unscaled_embedding),
    "one round short": Fault((K2, "gpt_neox_ponderlm2_k1_j3"), _one_round_short),
    "norm in every pass": Fault(("llama_loop_k2", "gpt_neox_loop_k2"), _norm_in_every_pass),
    "thoughts before token": Fault((K2, "llama_pause_k2"), _thoughts_before_token),
}


@contextlib.contextmanager
def plant(fault: Fault, model: Any) -> Iterator[None]:
    """The model is wrong inside the context, and right again after it."""
    package = type(model).__module__.rpartition(".")[0]
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch, sys.modules[f"{package}.passes"], model)
        yield
