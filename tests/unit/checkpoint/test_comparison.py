"""Which changes of settings a checkpoint survives."""

import dataclasses
from typing import Any

import pytest

from megatron_ponder.checkpoint.comparison import (
    FREE_SETTINGS,
    RUN_SETTINGS,
    SHAPE_SETTINGS,
    data_differences,
    other_differences,
    shape_differences,
)
from megatron_ponder.config.schema import ModelConfig, RunConfig
from tests.ranks import run_ranks
from tests.unit.checkpoint.small_run import small_config

LEARNED = {"position_embedding_type": "learned_absolute"}
CHANGES: dict[str, Any] = {
    "architecture": "qwen3",
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 64,
    "num_attention_heads": 8,
    "num_query_groups": 1,
    "kv_channels": 16,
    "max_position_embeddings": 32,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 5e5,
    "rotary_percent": 0.5,
    "rotary_seq_len_interpolation_factor": 2.0,
    "use_rope_scaling": True,
    "rope_scaling_factor": 4.0,
    "rope_scaling_low_freq_factor": 2.0,
    "rope_scaling_high_freq_factor": 8.0,
    "rope_scaling_original_max_position_embeddings": 4096,
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-6,
    "activation": "gelu",
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "add_attention_bias": True,
    "qk_layernorm": True,
    "parallel_residual": True,
    "untie_embeddings_and_output_weights": False,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "vocab_size": 70,
    "make_vocab_size_divisible_by": 40,
    "init_method": "small",
    "init_method_std": 0.01,
    "small_init_depth_counts_thoughts": True,
    "generation_defaults": "{}",
}
"""For each setting of the model a value that the small run does not have."""
BASE = {"kv_channels": 8, "max_position_embeddings": 16}
LENGTH_OF_THE_TABLE = LEARNED | {"max_position_embeddings": 16}


def base_of(name: str) -> dict[str, Any]:
    """Settings under which a setting counts."""
    return LENGTH_OF_THE_TABLE if name == "max_position_embeddings" else BASE


def test_every_model_setting_is_in_exactly_one_set() -> None:
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    assert names == SHAPE_SETTINGS | FREE_SETTINGS == CHANGES.keys()
    assert not SHAPE_SETTINGS & FREE_SETTINGS
    assert set(RunConfig().to_flat_dict()) - names > RUN_SETTINGS


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_or_reported(name: str) -> None:
    before = small_config(**base_of(name))
    now = small_config(**base_of(name) | {name: CHANGES[name]})
    shown = "vocab_size" if "vocab_size" in name else name
    named = [line for line in shape_differences(before, now) if shown in line]
    assert len(named) == (name in SHAPE_SETTINGS)
    assert any(line.startswith(f"{name}: ") for line in other_differences(before, now))
    assert not shape_differences(before, before) and not other_differences(before, before)


def _changed_shapes() -> set[str]:
    """Settings that change the name or the shape of any parameter."""
    from megatron_ponder.convert.stored_parameters import StoredParameters
    from megatron_ponder.runtime.distributed import running

    def shapes(**changes: Any) -> dict[str, tuple[int, ...]]:
        return StoredParameters(small_config(**{"num_layers": 1} | changes)).shapes

    config = small_config()
    with running(config.parallel, config.training.seed):
        before = {"rope": shapes(**BASE), "learned_absolute": shapes(**LENGTH_OF_THE_TABLE)}
        return {
            name
            for name, change in CHANGES.items()
            if shapes(**base_of(name) | {name: change})
            != before[base_of(name).get("position_embedding_type", "rope")]
        }


def test_what_may_differ_changes_no_shape() -> None:
    """The model itself says which settings must match; the others change what weights mean."""
    changed = run_ranks(_changed_shapes, 1)[0]
    assert changed <= SHAPE_SETTINGS
    assert SHAPE_SETTINGS - changed == {"parallel_residual"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_layers": 3}, "num_layers: 4 in the checkpoint, 3 now"),
        ({"hidden_size": 64, "kv_channels": 8}, "hidden_size: 32 in the checkpoint, 64 now"),
        ({"vocab_size": 70}, "padded vocabulary (vocab_size): 64 in the checkpoint, 72 now"),
        ({"normalization": "LayerNorm"}, "normalization: RMSNorm in the checkpoint, LayerNorm now"),
    ],
)
def test_other_shapes_are_named(change: dict, named: str) -> None:
    assert shape_differences(small_config(), small_config(**change)) == [named]


def test_rotary_positions_have_no_shape() -> None:
    rope = small_config(max_position_embeddings=16), small_config(max_position_embeddings=32)
    assert not shape_differences(*rope)


def test_other_changes_are_reported_unless_they_do_nothing() -> None:
    before = small_config(lr=1e-3, log_interval=1, save="a")
    now = small_config(lr=2e-3, log_interval=5, save="b", num_workers=7)
    assert other_differences(before, now) == [
        "lr: 0.001 in the checkpoint, 0.002 now",
        "min_lr: 0.0001 in the checkpoint, 0.0002 now",
    ]
    assert not shape_differences(before, now)


def test_the_tokenizer_of_the_data_includes_its_end_and_begin_ids() -> None:
    stored = {"class": "HuggingFaceTokenizer", "sha256": "a"}
    now = {"tokenizer": {**stored, "eod": "1"}}
    assert not data_differences({"tokenizer": stored}, now)  # by a version that stored no end id
    assert not data_differences(now, now)
    for changes in ({"eod": "0"}, {"sha256": "b"}, {"begin": "0"}):
        assert data_differences(now, {"tokenizer": {**now["tokenizer"], **changes}})
        assert data_differences({"tokenizer": {**now["tokenizer"], **changes}}, now)
