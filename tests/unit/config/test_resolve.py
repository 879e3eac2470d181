"""Derived settings, and a message for every combination that cannot work."""

import re
from typing import Any

import pytest

from megatron_ponder.config.layout import layers_of_pipeline_ranks, padded_vocab_size
from megatron_ponder.config.resolve import resolve, resolve_for_inference
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import ConfigError

PP2 = {"pipeline_model_parallel_size": 2, "global_batch_size": 2}
UNEVEN = {"decoder_first_pipeline_num_layers": 3, "decoder_last_pipeline_num_layers": 12}
BASE: dict[str, Any] = {"vocab_size": 1000, "data_path": ("data",)}


def resolved(world_size: int = 1, tokenizer: int | None = None, **settings: Any) -> RunConfig:
    config = RunConfig().replaced(**{**BASE, **settings})
    return resolve(config, world_size=world_size, tokenizer_vocab_size=tokenizer)


def test_derived_settings() -> None:
    config = resolved(
        world_size=8, tensor_model_parallel_size=2, micro_batch_size=3, train_iters=500, lr=1e-3
    )
    model, optimizer = config.model, config.optimizer
    assert (model.ffn_hidden_size, model.num_query_groups, model.kv_channels) == (3072, 12, 64)
    assert model.max_position_embeddings == config.data.seq_length
    assert config.training.global_batch_size == 12
    assert (optimizer.min_lr, optimizer.lr_decay_iters) == (1e-4, 500)
    assert (optimizer.lr_warmup_iters, optimizer.lr_wsd_decay_iters) == (5, 50)
    assert config.model.init_method is None
    assert all(
        value is not None
        for name, value in config.to_flat_dict().items()
        if name in ("vocab_size", "global_batch_size", "min_lr", "lr_warmup_iters")
    )


def test_the_tokenizer_says_the_vocabulary_and_padding_does_not_depend_on_the_layout() -> None:
    config = resolved(vocab_size=None, tokenizer=1001)
    assert config.model.vocab_size == 1001 and padded_vocab_size(config.model) == 1024


SHARED_WEIGHTS = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (2, SHARED_WEIGHTS),
        (2, PP2 | {"num_virtual_stages_per_pipeline_rank": 2, "overlap_p2p_communication": True}),
        (2, PP2 | {"decoder_first_pipeline_num_layers": 7, "micro_batch_size": 1}),
        (2, {"context_parallel_size": 2}),
        (4, SHARED_WEIGHTS | SHARDED | {"overlap_param_gather": True, "global_batch_size": 64}),
        (1, {"recompute_granularity": "full", "recompute_num_layers": 3, "train_iters": 3}),
        (1, {"cross_entropy_loss_fusion": True, "loss_chunk_tokens": 64}),
    ],
)
def test_a_model_of_any_run_can_be_read(
    world_size: int, settings: dict[str, Any], num_ranks: int
) -> None:
    run = resolved(world_size=world_size, **settings)
    config = resolve_for_inference(run, num_ranks=num_ranks)
    assert (config.model, config.method, config.data) == (run.model, run.method, run.data)
    assert config.parallel.tensor_model_parallel_size == num_ranks
    assert config.training.global_batch_size == 1


def test_given_values_stay() -> None:
    config = resolved(min_lr=0.0, lr_warmup_iters=0, max_position_embeddings=4096, kv_channels=32)
    assert config.optimizer.min_lr == 0.0 and config.optimizer.lr_warmup_iters == 0
    assert config.model.max_position_embeddings == 4096 and config.model.kv_channels == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 0}, "--num-layers 0: must be at least 1"),
        ({"num_latent_thoughts": -1}, "--num-latent-thoughts -1: must be at least 0"),
        ({"num_jacobi_iterations": -2}, "--num-jacobi-iterations -2: must be at least 0"),
        ({"hidden_dropout": 1.0}, "--hidden-dropout 1.0"),
        ({"lr": 0.0}, "--lr 0.0: must be above 0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"lr_warmup_fraction": 1.5}, "--lr-warmup-fraction 1.5"),
        ({"tensor_model_parallel_size": 2}, "= 2 x 1 x 1 = 2 does not divide the 1 ranks"),
        ({"world_size": 6, "context_parallel_size": 4}, "1 x 1 x 4 = 4 does not divide the 6"),
        (
            {"world_size": 5, "pipeline_model_parallel_size": 5, "global_batch_size": 5},
            "cannot be shared equally by the pipeline ranks (5). --pipeline-model-parallel-size 4",
        ),
        (
            {"world_size": 3, "pipeline_model_parallel_size": 3, **UNEVEN, "global_batch_size": 3},
            "of which the ends take what they are given, cannot be shared equally",
        ),
        (
            {"world_size": 2, **PP2, "num_virtual_stages_per_pipeline_rank": 4},
            "--num-virtual-stages-per-pipeline-rank 4: does not divide the layers",
        ),
        (
            {"world_size": 2, **PP2, "global_batch_size": 3},
            "gives each pipeline 3 micro-batches, which must be a multiple of "
            "--pipeline-model-parallel-size 2. The next that works is 4.",
        ),
        ({"num_virtual_stages_per_pipeline_rank": 2}, "needs --pipeline-model-parallel-size"),
        ({"overlap_p2p_communication": True}, "needs --pipeline-model-parallel-size"),
        ({"decoder_last_pipeline_num_layers": 3}, "needs --pipeline-model-parallel-size"),
        ({"overlap_param_gather": True}, "--overlap-param-gather needs --use-distributed-optim"),
        (
            {"world_size": 2, "context_parallel_size": 2, "seq_length": 126},
            "--seq-length 126: not a multiple of 4, as 2 x --context-parallel-size 2 need. "
            "The nearest that works is 124.",
        ),
        (
            {"recompute_granularity": "full", "recompute_num_layers": 5},
            "--recompute-num-layers 5: does not divide the layers that a rank computes in a row "
            "(12). The nearest that works is 4.",
        ),
        ({"recompute_num_passes": 1}, "--recompute-num-passes needs --recompute-granularity pass"),
        (
            {"recompute_granularity": "pass", "recompute_num_passes": 0},
            "--recompute-num-passes 0: must be at least 1",
        ),
        (
            {"recompute_granularity": "selective", "transformer_impl": "transformer_engine"},
            "--recompute-granularity selective: TransformerEngine's layers",
        ),
        ({"jacobi_grad_passes": 0}, "--jacobi-grad-passes 0: must be at least 1"),
        ({"world_size": 2, "sequence_parallel": True}, "--sequence-parallel needs"),
        ({"hidden_size": 770}, "--hidden-size 770: not a multiple of --num-attention-heads 12"),
        ({"num_query_groups": 5}, "not a multiple of --num-query-groups 5"),
        ({"rotary_percent": 0.01}, "--rotary-percent 0.01"),
        (
            {"world_size": 8, "tensor_model_parallel_size": 8},
            "--num-attention-heads 12: not a multiple of --tensor-model-parallel-size 8",
        ),
        (
            {"world_size": 2, "tensor_model_parallel_size": 2, "num_query_groups": 3},
            "--num-query-groups 3: not a multiple of --tensor-model-parallel-size 2",
        ),
        (
            {
                "world_size": 2,
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "seq_length": 127,
            },
            "--seq-length 127: not a multiple of 2",
        ),
        ({"vocab_size": None}, "--vocab-size must be given"),
        ({"tokenizer": 1001}, "vocabulary of 1001 is larger than the model's --vocab-size 1000"),
        ({"min_jacobi_iterations": 4, "random_jacobi_iterations": True}, "is above --max-jacobi"),
        ({"global_batch_size": 7, "micro_batch_size": 2}, "--global-batch-size 7: not a multiple"),
        ({"min_lr": 1.0}, "--min-lr 1.0"),
        ({"lr_warmup_iters": 1000}, "--lr-warmup-iters 1000: must be below --lr-decay-iters 1000"),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2000},
            "--lr-wsd-decay-iters 2000: must not be above",
        ),
        (
            {
                "position_embedding_type": "learned_absolute",
                "max_position_embeddings": 1024,
                "seq_length": 2048,
            },
            "--seq-length 2048: longer than the 1024 learned positions",
        ),
        ({"train_data_path": ("b",)}, "give either --data-path or --train-data-path"),
        ({"data_path": ("0.5", "a", "b")}, "--data-path 0.5 a b: must be prefixes only"),
        ({"data_path": ("0", "a")}, "every weight must be above 0"),
        ({"split": "1,2"}, "--split 1,2"),
        ({"finetune": True}, "--finetune and --ckpt-step need --load"),
        ({"save_interval": 10}, "--save-interval needs --save"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolved(**settings)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        resolved(global_batch_size=7, micro_batch_size=2, min_lr=1.0, num_query_groups=5)
    assert str(error.value).count("\n  - ") == 3


@pytest.mark.parametrize(
    ("num_ranks", "first", "last", "expected"),
    [
        (1, None, None, [12]),
        (4, None, None, [3, 3, 3, 3]),
        (4, 1, 5, [1, 3, 3, 5]),
        (4, None, 3, [3, 3, 3, 3]),
        (4, None, 6, [2, 2, 2, 6]),
        (4, 3, None, [3, 3, 3, 3]),
        (3, 6, 5, [6, 1, 5]),
        (2, 5, 7, [5, 7]),
    ],
)
def test_layers_of_pipeline_ranks(
    num_ranks: int, first: int | None, last: int | None, expected: list[int]
) -> None:
    config = resolved(
        world_size=num_ranks,
        pipeline_model_parallel_size=num_ranks,
        global_batch_size=num_ranks,
        decoder_first_pipeline_num_layers=first,
        decoder_last_pipeline_num_layers=last,
    )
    assert layers_of_pipeline_ranks(config) == expected


@pytest.mark.parametrize(
    ("num_ranks", "first", "last"),
    [(5, None, None), (4, 1, 6), (3, 6, 6), (3, 11, 2), (2, 5, 6), (13, None, None)],
)
def test_layers_that_pipeline_ranks_cannot_share(
    num_ranks: int, first: int | None, last: int | None
) -> None:
    """A remainder, or a rank that is left without a layer."""
    with pytest.raises(ConfigError, match="--num-layers 12: .*cannot be shared equally"):
        test_layers_of_pipeline_ranks(num_ranks, first, last, [])


CP2 = {"context_parallel_size": 2}
FP8 = {"fp8_format": "hybrid", "bf16": True}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fp8_format": "hybrid"}, "--fp8-format hybrid needs --bf16"),
        (FP8 | {"transformer_impl": "local"}, "needs --transformer-impl transformer_engine"),
        (FP8 | {"ffn_hidden_size": 1000}, "--ffn-hidden-size over .* is 1000, not a multiple"),
        (FP8 | {"seq_length": 100, "max_position_embeddings": 100}, "100 tokens"),
        (FP8 | CP2 | {"seq_length": 24}, "12 tokens"),
        (FP8 | {"kv_channels": 10}, "the queries' width over .* is 120, not a multiple"),
        (FP8 | {"kv_channels": 8, "num_query_groups": 1}, "the keys' width over .* is 8, not a"),
        (FP8 | {"hidden_size": 780, "ffn_hidden_size": 3072}, "--hidden-size is 780, not a mult"),
        ({"loss_chunk_tokens": 5}, "--loss-chunk-tokens needs --cross-entropy-loss-fusion"),
        (
            {"attention_backend": "te", "context_parallel_attention": "gather"} | CP2,
            "te with --context-parallel-attention gather",
        ),
    ],
)
def test_backends_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(world_size=settings.get("context_parallel_size", 1), **settings)
    resolved(**FP8)
