"""Layouts and models drawn at random: every one that is accepted equals one process, none hangs.

A draw spreads a small model of any kind over up to eight ranks with any mixture of parallelism,
recomputation, overlap and passes without a gradient. A rank that hangs fails the test with the
stack of every rank (tests/ranks.py).
"""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import ConfigError
from megatron_ponder.parallel.parallel_model import check_hook_counts
from megatron_ponder.ponder.method import load_method
from tests.parity.layouts import (
    ACCUMULATING,
    COMMON,
    GPT2,
    HIDDEN,
    LLAMA,
    LOOP,
    MIXTURES,
    NEOX,
    PARALLEL_RESIDUAL,
    PAUSE,
    PONDERLM,
    TOP_5,
)
from tests.parity.measure import Measured, measure, save_weights
from tests.parity.tolerances import violations
from tests.ranks import run_ranks

NUM_STEPS = 2
TIMEOUT_S = 180
MAX_RANKS = 8
ONE_RANK = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "num_virtual_stages_per_pipeline_rank": 1,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "use_distributed_optimizer": False,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
    "overlap_p2p_communication": False,
    "recompute_granularity": None,
    "recompute_num_passes": None,
}
RECOMPUTATIONS = (
    {},
    {"recompute_granularity": "selective"},
    {"recompute_granularity": "full"},
    {"recompute_granularity": "full", "recompute_method": "block"},
    {"recompute_granularity": "pass"},
    {"recompute_granularity": "pass", "recompute_num_passes": 1},
)


@st.composite
def runs(draw) -> tuple[int, RunConfig]:
    """Ranks and a config as given, of which most are accepted."""
    tp, cp, dp = (draw(st.sampled_from((1, 2))) for _ in range(3))
    pp = draw(st.sampled_from((1, 2, 2, 3, 4)))
    assume(2 <= tp * pp * cp * dp <= MAX_RANKS)
    virtual = draw(st.sampled_from((1, 1, 2))) if pp > 1 else 1
    num_layers = pp * virtual * draw(st.integers(1, 2))
    first = last = None
    if pp > 1 and virtual == 1 and draw(st.booleans()):
        first = draw(st.integers(1, 2))
        last = draw(st.integers(1, 2))
        num_layers = first + last + (pp - 2) * draw(st.integers(1, 2))
    method = draw(
        st.sampled_from(
            [{"method": "vanilla"}]
            + [{"method": "ponderlm2", "num_latent_thoughts": k} for k in (0, 1, 1, 2, 3)]
            + [MIXTURES, MIXTURES | TOP_5, PONDERLM, PONDERLM | TOP_5, ACCUMULATING, HIDDEN]
            + [LOOP, PAUSE]
        )
    )
    micro = draw(st.integers(1, 2))
    shape = draw(
        st.sampled_from((LLAMA, NEOX, NEOX | PARALLEL_RESIDUAL, GPT2, LLAMA | {"kv_channels": 6}))
    )
    distributed_optimizer = draw(st.booleans())
    overlap_grad_reduce = draw(st.booleans())
    run = COMMON.replaced(
        **{**shape, "num_jacobi_iterations": draw(st.integers(0, 3)), **method},
        num_layers=num_layers,
        scale_embeds=draw(st.booleans()),
        jacobi_grad_passes=draw(st.sampled_from((None, None, 1, 2))),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        num_virtual_stages_per_pipeline_rank=virtual,
        decoder_first_pipeline_num_layers=first,
        decoder_last_pipeline_num_layers=last,
        context_parallel_size=cp,
        sequence_parallel=tp > 1 and draw(st.booleans()),
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=distributed_optimizer and overlap_grad_reduce and draw(st.booleans()),
        overlap_p2p_communication=pp > 1 and draw(st.booleans()),
        **draw(st.sampled_from(RECOMPUTATIONS)),
        seq_length=2 * cp * tp * draw(st.integers(1, 3)),
        max_position_embeddings=24,
        micro_batch_size=micro,
        global_batch_size=micro * dp * pp * draw(st.integers(1, 2)),
    )
    return tp * pp * cp * dp, run


def _measure(config: RunConfig, folder: str) -> Measured:
    generator = torch.Generator().manual_seed(1)
    shape = (config.training.global_batch_size, config.data.seq_length + 1)
    return measure(config, folder, torch.randint(101, shape, generator=generator), NUM_STEPS)


def check(world_size: int, given_run: RunConfig) -> None:
    """Lay the run beside one process, from one checkpoint."""
    try:
        config = resolve(given_run, world_size=world_size, tokenizer_vocab_size=101)
        check_hook_counts(config, load_method(config.method))
    except ConfigError:
        assume(False)
    alone = resolve(given_run.replaced(**ONE_RANK), world_size=1, tokenizer_vocab_size=101)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "weights").mkdir()
        weights = f"{folder}/weights"
        run_ranks(save_weights, 1, alone, None, weights, timeout_s=TIMEOUT_S)
        (truth,) = run_ranks(_measure, 1, alone, weights, timeout_s=TIMEOUT_S)
        for numbers in run_ranks(_measure, world_size, config, weights, timeout_s=TIMEOUT_S):
            assert not violations(numbers, truth)


UNHURRIED = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@given(runs())
@settings(UNHURRIED, max_examples=50)
def test_fifty_random_layouts(run):
    check(*run)
