"""The fused loss gives the numbers of the composed one: layouts, a trajectory, bf16, memory.

`loss_chunk_tokens` is small and does not divide the tokens, so that chunks of unequal length are
joined. The truth is the single process with the composed loss.
"""

import pytest
import torch
import torch.distributed as dist

from megatron_ponder.model.linear_cross_entropy import linear_cross_entropy
from tests.parity.layouts import (
    DIST_OPT,
    PP2,
    SP,
    TP2,
    Layout,
    batch,
    config_of,
    measure_layout,
)
from tests.parity.measure import measure
from tests.parity.test_layouts import assert_equal
from tests.parity.tolerances import (
    BF16_LOSS_ABSOLUTE,
    FUSED_TRAJECTORY_ABSOLUTE,
    largest_difference,
)
from tests.ranks import run_ranks

FUSED = {"cross_entropy_loss_fusion": True, "loss_chunk_tokens": 7}
LAYOUTS = {
    "alone": (Layout(1, FUSED), ["llama k2", "gpt2 k1", "neox ponderlm of 5"]),
    "TP2": (Layout(2, TP2 | FUSED), ["llama k2", "gpt2 k1"]),
    "TP2 + SP": (Layout(2, TP2 | SP | FUSED), ["llama k2", "gpt2 vanilla", "llama mixtures"]),
    "PP2": (Layout(2, PP2 | FUSED), ["gpt2 k1"]),
    "DP2 + dist-opt, gathered while the forward goes on": (
        Layout(
            2,
            DIST_OPT | FUSED | {"overlap_grad_reduce": True, "overlap_param_gather": True},
        ),
        ["llama k2"],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_composed_loss(name, checkpoints, single_process):
    layout, models = LAYOUTS[name]
    assert_equal(measure_layout(layout, models, checkpoints), single_process, name)


def test_twenty_steps(checkpoints):
    """The same losses to the last step, in fp32."""
    losses = []
    for settings in ({}, FUSED):
        config = config_of("llama k2", {"micro_batch_size": 4} | settings, 1)
        arguments = config, f"{checkpoints}/llama k2", batch(), 20
        (measured,) = run_ranks(measure, 1, *arguments)
        losses.append(torch.tensor(measured.losses))
    assert losses[0][-1] < losses[0][0] - 0.5
    assert largest_difference(losses[1], losses[0]) <= FUSED_TRAJECTORY_ABSOLUTE


def test_bf16(checkpoints):
    losses = []
    for settings in ({}, FUSED):
        config = config_of("llama k2", {"bf16": True, "micro_batch_size": 4} | settings, 1)
        (measured,) = run_ranks(measure, 1, config, f"{checkpoints}/llama k2", batch(), 5)
        losses.append(torch.tensor(measured.losses))
    assert largest_difference(losses[1], losses[0]) <= BF16_LOSS_ABSOLUTE


def memory_and_gradients() -> None:
    """Largest tensors that the two ways make, and gradients with weights of every token."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(30, 2, 8, generator=generator)
    weight = torch.randn(50, 8, generator=generator)
    labels = torch.randint(47, (30, 2), generator=generator)
    token_weights = torch.rand(30, 2, generator=generator)
    results = []
    for is_fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        sizes: list[int] = []
        with _Sizes(sizes):
            if is_fused:
                losses = linear_cross_entropy(
                    h,
                    w,
                    labels,
                    vocab_size=47,
                    tp_group=dist.group.WORLD,
                    sequence_parallel=False,
                    chunk_tokens=8,
                )
            else:
                logits = (h @ w.t())[..., :47].flatten(0, 1)
                losses = torch.nn.functional.cross_entropy(
                    logits, labels.flatten(), reduction="none"
                ).view(30, 2)
            (losses * token_weights).sum().backward()
        results.append((losses.detach(), h.grad, w.grad, max(sizes)))
    for ours, expected in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    assert results[0][3] <= max(8 * 50, 30 * 2 * 8)
    assert results[1][3] >= 30 * 2 * 47


class _Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the number of elements of everything that is computed."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.sizes.append(result.numel())
        return result


def test_logits_of_all_tokens_are_never_there():
    run_ranks(memory_and_gradients, 1)


def forgotten_padding(config, checkpoint) -> float:
    """The first loss of a model that takes padded rows for real ones."""
    from megatron_ponder.model.output_layer import OutputLayer

    original = OutputLayer.forward

    def forward(self, *args, **kwargs):
        self.vocab_size = self.weight.size(0)
        return original(self, *args, **kwargs)

    OutputLayer.forward = forward
    return measure(config, checkpoint, batch(), 1).losses[0]


def test_padding_in_the_loss_is_caught(checkpoints, single_process):
    config = config_of("llama k2", FUSED, 1)
    (loss,) = run_ranks(forgotten_padding, 1, config, f"{checkpoints}/llama k2")
    assert abs(loss - single_process["llama k2"].losses[0]) > 1e-3
