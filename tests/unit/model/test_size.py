"""Parameters against published totals and built models; FLOPs against torch's own counter."""

import dataclasses

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_ponder.config.layout import padded_vocab_size
from megatron_ponder.config.presets import PRESETS
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.model.build import build_model
from megatron_ponder.model.size import count_parameters, forward_flops
from megatron_ponder.ponder.method import load_method
from megatron_ponder.ponder.training_plan import training_plan
from megatron_ponder.runtime import distributed
from tests.parity.layouts import GPT2, LLAMA, MODELS, NEOX, SEQ_LENGTH, VANILLA, config_of
from tests.ranks import run_ranks

# Millions, as METHOD's section 5 and the paper give them.
LLAMA_MILLIONS = {
    "llama-125m": 162.7,
    "llama-410m": 406.6,
    "llama-834m": 837.6,
    "llama-1.4b": 1420.4,
    "llama-2.8b": 2634.7,
    "llama-410m-x2depth": 710.2,
}
# EleutherAI's released models: their total, and the vocabulary rows they have.
PYTHIA_TOTALS = {
    "pythia-70m": (70_426_624, 50304),
    "pythia-160m": (162_322_944, 50304),
    "pythia-410m": (405_334_016, 50304),
    "pythia-1b": (1_011_781_632, 50304),
    "pythia-1.4b": (1_414_647_808, 50304),
    "pythia-2.8b": (2_775_208_960, 50304),
    "pythia-6.9b": (6_857_302_016, 50432),
    "pythia-12b": (11_846_072_320, 50688),
}
GPT2_TOTALS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


def total_of(preset, **settings):
    config = RunConfig().replaced(**PRESETS[preset], seq_length=1024).replaced(**settings)
    counts = count_parameters(resolve(config, world_size=1).model)
    parts = dataclasses.asdict(counts)
    assert parts.pop("total") == sum(parts.values())
    return counts.total


def test_published_totals():
    for preset, millions in LLAMA_MILLIONS.items():
        assert round(total_of(preset) / 1e6, 1) == millions, preset
    for preset, (total, vocab_size) in PYTHIA_TOTALS.items():
        assert total_of(preset, vocab_size=vocab_size) == total, preset
    for preset, total in GPT2_TOTALS.items():
        assert total_of(preset) == total, preset


def built_parameters(configs):
    counts = {}
    for name, config in configs.items():
        distributed.initialize(config.parallel, config.training.seed)
        model = build_model(config)
        counts[name] = sum(p.numel() for p in model.parameters())
    return counts


def test_built_models_have_as_many():
    """Apart from the rows that pad the vocabulary."""
    configs = {name: config_of(name, {}, 1) for name in MODELS}
    (built,) = run_ranks(built_parameters, 1, configs)
    for name, config in configs.items():
        model = config.model
        num_tables = 2 if model.untie_embeddings_and_output_weights else 1
        padding = (padded_vocab_size(model) - model.vocab_size) * model.hidden_size * num_tables
        assert padding > 0
        assert built[name] == count_parameters(model).total + padding, name


def ponderlm2(k, r):
    return {"method": "ponderlm2", "num_latent_thoughts": k, "num_jacobi_iterations": r}


def extra(k, method):
    return {"method": method, "num_latent_thoughts": k}


FLOP_CASES = {
    "llama vanilla": LLAMA | VANILLA,
    "neox vanilla": NEOX | VANILLA,
    "gpt2 vanilla": GPT2 | VANILLA,
    **{f"llama k{k} r{r}": LLAMA | ponderlm2(k, r) for k in range(3) for r in range(4)},
    "llama k1 r1, a head of its own width": LLAMA | ponderlm2(1, 1) | {"kv_channels": 6},
    "neox parallel k1 r2": NEOX | ponderlm2(1, 2) | {"parallel_residual": True},
    "gpt2 k2 r1": GPT2 | ponderlm2(2, 1),
    "llama k2 r1, mixtures": LLAMA | ponderlm2(2, 1) | {"interpolation": True},
    "llama ponderlm": LLAMA | extra(3, "ponderlm"),
    "gpt2 ponderlm, top-k": GPT2 | extra(2, "ponderlm") | {"interpolation_use_topk": True},
    "neox ponderlm, hidden states": NEOX | extra(2, "ponderlm") | {"ponderlm_feedback": "hidden"},
    "neox loop": NEOX | extra(3, "loop"),
    "llama pause": LLAMA | extra(3, "pause") | {"pause_token_id": 111},
    "llama ponderlm, two passes with a gradient": LLAMA
    | extra(3, "ponderlm")
    | {"jacobi_grad_passes": 2},
    "llama k1 r2, two passes with a gradient": LLAMA | ponderlm2(1, 2) | {"jacobi_grad_passes": 2},
}


def flop_config(name):
    """A case without padded vocabulary rows, which are computed and not counted."""
    config = config_of("llama k1", {}, 1).replaced(
        num_query_groups=None, ffn_hidden_size=None, kv_channels=None, parallel_residual=False
    )
    return resolve(config.replaced(**FLOP_CASES[name], vocab_size=112), world_size=1)


def counted_by_torch(names):
    """By name: (products of linear modules, those of attention), forward only and with backward.

    torch's counter does not know the CPU's fused attention, so attention runs in its composed form,
    two batched products of the whole square.
    """
    counts = {}
    for name in names:
        config = flop_config(name)
        distributed.initialize(config.parallel, config.training.seed)
        model = build_model(config)
        plan = training_plan(model.method, config.method.num_jacobi_iterations)
        tokens = torch.zeros(1, config.data.seq_length, dtype=torch.int64)
        counts[name] = []
        for backward in (False, True):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                loss = model(tokens, tokens, plan).mean()
                if backward:
                    loss.backward()
            by_kind = dict(counter.get_flop_counts()["Global"])
            batched = by_kind.pop(torch.ops.aten.bmm)
            assert by_kind.keys() <= {torch.ops.aten.mm, torch.ops.aten.addmm}, by_kind
            counts[name].append((sum(by_kind.values()), batched))
    return counts


def test_equals_torchs_counter():
    """Exactly, with attention counted as half of torch's square; with the backward too."""
    (counted,) = run_ranks(counted_by_torch, 1, list(FLOP_CASES))
    for name, (forward, with_backward) in counted.items():
        config = flop_config(name)
        plan = training_plan(load_method(config.method), config.method.num_jacobi_iterations)
        counts = forward_flops(config.model, plan, SEQ_LENGTH)
        linear = sum(p.linear + p.head + p.mixture for p in counts.passes)
        attention = sum(p.attention for p in counts.passes)
        assert forward == (linear, 2 * attention), name
        assert counts.total == linear + attention
        backward = [p for p in counts.passes if p.has_grad]
        linear += 2 * sum(p.linear + p.head + p.mixture for p in backward)
        attention += 2 * sum(p.attention for p in backward)
        assert with_backward == (linear, 2 * attention), name
        assert counts.training == linear + attention


def test_cost_in_vanilla_forwards():
    """Linear work grows with slots, attention with their square per pass, the head not at all."""
    config = config_of("llama k1", {}, 1)
    vanilla = load_method(config_of("llama vanilla", {}, 1).method).plan(0)
    (one,) = forward_flops(config.model, vanilla, SEQ_LENGTH).passes
    thinking = forward_flops(config.model, load_method(config.method).plan(3), SEQ_LENGTH).passes
    # 9 times the slots; in the last layer, behind the attention, only 5 are read.
    model = config.model
    heads = model.num_attention_heads * model.kv_channels
    behind = 2 * SEQ_LENGTH * model.hidden_size * (heads + 3 * model.ffn_hidden_size)
    assert sum(p.linear for p in thinking) == 9 * one.linear - 4 * behind
    assert sum(p.attention for p in thinking) == (1 + 4 * 4) * one.attention
    assert [p.head for p in thinking] == [0, 0, 0, 0, one.head]
