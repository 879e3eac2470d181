"""From the settings as given to settings that code can rely on: derived values, and all checks.

Every problem is collected, so that a user sees all of them at once. Left out: whether files exist
and whether a method's name is known (data/ and ponder/ say so when they look). What ranks share is
in layout.py.
"""

import dataclasses
import math
from collections.abc import Iterator

from megatron_ponder.config.layout import (
    backend_problems,
    batch_problems,
    data_parallel_size,
    flag_of,
    layout_problems,
    shard_problems,
)
from megatron_ponder.config.resolved import ResolvedConfig, ResolvedModelConfig
from megatron_ponder.config.schema import (
    BackendConfig,
    CheckpointConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
)
from megatron_ponder.errors import ConfigError

PAUSE_TOKEN_ID = 50288
"""The authors' pause token: a row of GPT-NeoX's padded vocabulary that no text gives."""


_DERIVED_OF_RUN = (
    "global_batch_size",
    "min_lr",
    "lr_decay_iters",
    "lr_warmup_iters",
    "lr_wsd_decay_iters",
)
"""Derived settings that depend on ranks and length of a run, and mean nothing without it."""


def resolve(
    config: RunConfig, *, world_size: int, tokenizer_vocab_size: int | None = None
) -> ResolvedConfig:
    """Fill in every derived setting and check the whole.

    `init_method` alone stays None if it was: its default is the method's.

    Args:
        config: as given.
        world_size: number of ranks.
        tokenizer_vocab_size: ids that the tokenizer can produce; None without a tokenizer.

    Raises:
        ConfigError: one line per problem, each with what to change.
    """
    _raise_if_any(
        *_sizes(config),
        *_ranges(config),
        *_missing_vocabulary(config.model, tokenizer_vocab_size),
        *layout_problems(config, world_size),
    )
    resolved = _derive(config, world_size, tokenizer_vocab_size)
    _raise_if_any(
        *_shape(resolved.model),
        *shard_problems(resolved),
        *backend_problems(resolved),
        *_vocabulary(resolved.model, tokenizer_vocab_size),
        *_method(resolved),
        *batch_problems(resolved, world_size),
        *_lr_schedule(resolved),
        *_data(resolved),
        *_checkpoints(resolved),
    )
    return resolved


def resolve_for_inference(config: ResolvedConfig, *, num_ranks: int) -> ResolvedConfig:
    """The config of a trained model on ranks that all share each layer.

    The run's layout, batch, LR schedule and checkpoints do not matter there, nor do its backends:
    the model may be used on another machine, and generation caches keys and values of torch's
    attention.

    Args:
        config: the run's.
        num_ranks: tensor-parallel ranks.

    Raises:
        ConfigError: the model cannot be divided among so many ranks.
    """
    alone = dataclasses.replace(
        reopen(config).replaced(micro_batch_size=1, recompute_granularity=None),
        parallel=ParallelConfig(tensor_model_parallel_size=num_ranks),
        backend=BackendConfig(attention_backend="sdpa"),
        checkpoint=CheckpointConfig(),
    )
    return resolve(alone, world_size=num_ranks, tokenizer_vocab_size=None)


def restore(stored: RunConfig) -> ResolvedConfig:
    """A config that was resolved before it was stored; only single values are checked again.

    Imports by earlier versions left what depends on ranks and length of a run open; it is derived
    for one rank.

    Raises:
        ConfigError: the size of the vocabulary is missing, or a value is out of its range.
    """
    _raise_if_any(*_sizes(stored), *_ranges(stored), *_missing_vocabulary(stored.model, None))
    return _derive(stored, 1, None)


def reopen(config: ResolvedConfig) -> RunConfig:
    """The config with those values derived again that depend on ranks and length of the run."""
    return RunConfig.from_flat_dict(config.to_flat_dict() | dict.fromkeys(_DERIVED_OF_RUN))


def _raise_if_any(*problems: str) -> None:
    """Report all problems at once."""
    if problems:
        raise ConfigError("the settings do not fit together:\n  - " + "\n  - ".join(problems))


def _derive(config: RunConfig, world_size: int, tokenizer_vocab_size: int | None) -> ResolvedConfig:
    """Values for the settings that are None."""
    model, optim, training = config.model, config.optimizer, config.training
    decay_iters = optim.lr_decay_iters or training.train_iters
    defaults = {
        "ffn_hidden_size": 4 * model.hidden_size,
        "num_query_groups": model.num_attention_heads,
        "kv_channels": model.hidden_size // model.num_attention_heads,
        "max_position_embeddings": config.data.seq_length,
        "vocab_size": tokenizer_vocab_size,
        "global_batch_size": training.micro_batch_size * data_parallel_size(config, world_size),
        "min_lr": optim.lr / 10,
        "lr_decay_iters": decay_iters,
        "lr_warmup_iters": round(optim.lr_warmup_fraction * decay_iters),
        "lr_wsd_decay_iters": max(decay_iters // 10, 1),
    }
    values = config.to_flat_dict()
    values |= {name: default for name, default in defaults.items() if values[name] is None}
    if config.method.uses_pause_token and config.method.pause_token_id is None:
        values |= _pause_row(values["vocab_size"], tokenizer_vocab_size or 0)
    return ResolvedConfig.from_flat_dict(values, given=config)


def _pause_row(vocab_size: int, tokenizer_vocab_size: int) -> dict[str, int]:
    """The row of the pause token: the authors' if it is there and no text uses it, else a new one.

    A new one is a real row, not one of the padding, which an export leaves out.
    """
    if tokenizer_vocab_size <= PAUSE_TOKEN_ID < vocab_size:
        return {"pause_token_id": PAUSE_TOKEN_ID}
    return {"pause_token_id": vocab_size, "vocab_size": vocab_size + 1}


def _sizes(config: RunConfig) -> Iterator[str]:
    """Settings that count something."""
    at_least_one = [
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "max_position_embeddings",
        "rope_scaling_original_max_position_embeddings",
        "vocab_size",
        "make_vocab_size_divisible_by",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_virtual_stages_per_pipeline_rank",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "context_parallel_size",
        "jacobi_grad_passes",
        "interpolation_topk",
        "recompute_num_layers",
        "recompute_num_passes",
        "loss_chunk_tokens",
        "distributed_timeout_minutes",
        "seq_length",
        "train_iters",
        "micro_batch_size",
        "global_batch_size",
        "exit_interval",
        "exit_duration_in_mins",
        "lr_decay_iters",
        "lr_wsd_decay_iters",
        "save_interval",
        "keep_checkpoints",
        "log_interval",
    ]
    at_least_zero = [
        "num_latent_thoughts",
        "num_jacobi_iterations",
        "min_jacobi_iterations",
        "pause_token_id",
        "ckpt_step",
        "num_workers",
        "seed",
        "eval_interval",
        "eval_iters",
        "lr_warmup_iters",
        "weight_decay",
        "clip_grad",
        "init_method_std",
    ]
    values = config.to_flat_dict()
    for names, least in ((at_least_one, 1), (at_least_zero, 0)):
        for name in names:
            # A duration may be a fraction of a minute.
            low = 0 if name == "exit_duration_in_mins" else least
            if values[name] is not None and not values[name] >= low:  # also refuses NaN
                yield f"{flag_of(name)} {values[name]}: must be at least {low}."


def _ranges(config: RunConfig) -> Iterator[str]:
    """Settings that must lie in an interval."""
    values = config.to_flat_dict()
    for name in ("hidden_dropout", "attention_dropout", "adam_beta1", "adam_beta2"):
        if not 0 <= values[name] < 1:
            yield f"{flag_of(name)} {values[name]}: must be at least 0 and below 1."
    above_zero = ["lr", "norm_epsilon", "adam_eps", "rotary_base", "rotary_percent"]
    if values["rotary_seq_len_interpolation_factor"] is not None:
        above_zero.append("rotary_seq_len_interpolation_factor")
    above_zero += [f"rope_scaling_{name}" for name in ("factor", "low_freq_factor")]
    for name in above_zero:
        if not 0 < values[name] < math.inf:
            yield f"{flag_of(name)} {values[name]}: must be above 0."
    low, high = values["rope_scaling_low_freq_factor"], values["rope_scaling_high_freq_factor"]
    if not low < high:
        yield (
            f"--rope-scaling-low-freq-factor {low}: must be below --rope-scaling-high-freq-factor "
            f"{high}."
        )
    if not 0 <= values["lr_warmup_fraction"] <= 1:
        yield f"--lr-warmup-fraction {values['lr_warmup_fraction']}: must be from 0 to 1."


def _shape(model: ResolvedModelConfig) -> Iterator[str]:
    """The model by itself."""
    heads, groups = model.num_attention_heads, model.num_query_groups
    if model.hidden_size % heads and model.kv_channels * heads != model.hidden_size:
        yield f"--hidden-size {model.hidden_size}: not a multiple of --num-attention-heads {heads}."
    if heads % groups:
        yield f"--num-attention-heads {heads}: not a multiple of --num-query-groups {groups}."
    is_scaled = model.use_rope_scaling or model.rotary_seq_len_interpolation_factor is not None
    if is_scaled and model.position_embedding_type != "rope":
        yield (
            "--use-rope-scaling and --rotary-seq-len-interpolation-factor need "
            "--position-embedding-type rope."
        )
    if model.use_rope_scaling and model.rotary_seq_len_interpolation_factor is not None:
        yield "give either --use-rope-scaling or --rotary-seq-len-interpolation-factor, not both."
    if model.position_embedding_type == "rope":
        rotated = model.rotary_percent * model.kv_channels
        if model.rotary_percent > 1 or int(rotated) < 2 or int(rotated) % 2:
            yield (
                f"--rotary-percent {model.rotary_percent}: rotates {rotated:g} of the "
                f"{model.kv_channels} channels of a head; it must be an even number, at least 2."
            )


def _missing_vocabulary(model: ModelConfig, tokenizer_vocab_size: int | None) -> Iterator[str]:
    """Nothing says how large the vocabulary is."""
    if model.vocab_size is None and tokenizer_vocab_size is None:
        yield "--vocab-size must be given, or a tokenizer that says it (--tokenizer-model)."


def _vocabulary(model: ResolvedModelConfig, tokenizer_vocab_size: int | None) -> Iterator[str]:
    """The tokenizer against the model."""
    if tokenizer_vocab_size is not None and tokenizer_vocab_size > model.vocab_size:
        yield (
            f"the tokenizer's vocabulary of {tokenizer_vocab_size} is larger than the model's "
            f"--vocab-size {model.vocab_size}: give a --vocab-size of at least "
            f"{tokenizer_vocab_size}, or another tokenizer."
        )


def _method(config: ResolvedConfig) -> Iterator[str]:
    """Thoughts and their iterations."""
    method = config.method
    if (
        method.random_jacobi_iterations
        and method.min_jacobi_iterations > method.max_jacobi_iterations
    ):
        yield (
            f"--min-jacobi-iterations {method.min_jacobi_iterations} is above "
            f"--max-jacobi-iterations {method.max_jacobi_iterations}."
        )
    vocab_size, pause = config.model.vocab_size, method.pause_token_id
    if pause is None or not method.uses_pause_token:
        return
    if pause >= vocab_size:
        yield (
            f"--pause-token-id {pause}: not in the vocabulary of {vocab_size}. Give a row that no "
            "text uses, or leave it out: then one is added."
        )


def _lr_schedule(config: ResolvedConfig) -> Iterator[str]:
    """Warm-up, decay and the bounds of the learning rate."""
    optim = config.optimizer
    if not 0 <= optim.min_lr <= optim.lr:
        yield f"--min-lr {optim.min_lr}: must be from 0 to --lr {optim.lr}."
    if optim.lr_warmup_iters >= optim.lr_decay_iters and optim.lr_warmup_iters > 0:
        yield (
            f"--lr-warmup-iters {optim.lr_warmup_iters}: must be below --lr-decay-iters "
            f"{optim.lr_decay_iters} (by default --train-iters)."
        )
    if optim.lr_decay_style == "WSD" and optim.lr_wsd_decay_iters > optim.lr_decay_iters:
        yield (
            f"--lr-wsd-decay-iters {optim.lr_wsd_decay_iters}: must not be above "
            f"--lr-decay-iters {optim.lr_decay_iters}."
        )


def _data(config: ResolvedConfig) -> Iterator[str]:
    """Lengths, and which datasets are named."""
    data, model = config.data, config.model
    has_learned_positions = model.position_embedding_type == "learned_absolute"
    if has_learned_positions and data.seq_length > model.max_position_embeddings:
        yield (
            f"--seq-length {data.seq_length}: longer than the {model.max_position_embeddings} "
            "learned positions of the model (--max-position-embeddings)."
        )
    apart = data.train_data_path or data.valid_data_path or data.test_data_path
    if data.data_path and apart:
        yield "give either --data-path or --train-data-path and its siblings, not both."
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        if problem := _blend_problem(getattr(data, name)):
            yield f"{flag_of(name)} {' '.join(getattr(data, name))}: {problem}"
    for name in ("reset_position_ids", "reset_attention_mask"):
        if getattr(data, name):
            yield (
                f"{flag_of(name)}: attention here sees the whole sequence, also documents before "
                "and their thoughts, so that documents in a sequence cannot be kept apart. Leave "
                "it out; --eod-mask-loss keeps a document's first token out of the loss."
            )
    if data.instruction_data and not data.eod_as_target:
        yield "--no-eod-as-target: with --instruction-data a model must learn to end a response."
    if data.multiple_validation_sets and not data.valid_data_path:
        yield "--multiple-validation-sets needs --valid-data-path."
    shares = data.split.split(",")
    if len(shares) != 3 or not all(_is_number(s) for s in shares) or sum(map(float, shares)) <= 0:
        yield f"--split {data.split}: must be three shares that are not all 0, e.g. 969,30,1."


def _blend_problem(blend: tuple[str, ...]) -> str | None:
    """What is wrong with 'prefix ...' or 'weight prefix weight prefix ...', if anything."""
    if not any(_is_number(part) for part in blend):
        return None
    weights, prefixes = blend[0::2], blend[1::2]
    if len(weights) != len(prefixes) or not all(_is_number(weight) for weight in weights):
        return "must be prefixes only, or weight prefix weight prefix ..."
    if not all(float(weight) > 0 for weight in weights):
        return "every weight must be above 0."
    return None


def _checkpoints(config: ResolvedConfig) -> Iterator[str]:
    """Flags that need another one."""
    checkpoint = config.checkpoint
    if checkpoint.load is None and (checkpoint.finetune or checkpoint.ckpt_step is not None):
        yield "--finetune and --ckpt-step need --load."
    if checkpoint.save is None and checkpoint.save_interval is not None:
        yield "--save-interval needs --save."


def _is_number(text: str) -> bool:
    """Whether the text is a finite number, not negative."""
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False
