"""From the settings as given to settings that code can rely on: derived values, and all checks.

Every problem is collected, so that a user sees all of them at once. Left out: whether files exist
and whether a method's name is known (data/ and ponder/ say so when they look).
"""

import math
from collections.abc import Iterator

from megatron_ponder.config.schema import ModelConfig, RunConfig
from megatron_ponder.errors import ConfigError


def resolve(
    config: RunConfig, *, world_size: int, tokenizer_vocab_size: int | None = None
) -> RunConfig:
    """Fill in every derived setting and check the whole.

    `init_method` alone stays None where it was: its default is the method's.

    Args:
        config: as given.
        world_size: number of ranks.
        tokenizer_vocab_size: ids that the tokenizer can produce; None where there is no tokenizer.

    Raises:
        ConfigError: one line per problem, each with what to change.
    """
    problems = [*_sizes(config), *_ranges(config), *_layout(config, world_size)]
    if not problems:
        config = _derive(config, world_size, tokenizer_vocab_size)
        problems = [
            *_shape(config.model),
            *_shards(config),
            *_vocabulary(config.model, tokenizer_vocab_size),
            *_method(config),
            *_batch(config, world_size),
            *_schedule(config),
            *_data(config),
            *_checkpoints(config),
        ]
    if problems:
        raise ConfigError("the settings do not fit together:\n  - " + "\n  - ".join(problems))
    return config


def padded_vocab_size(model: ModelConfig) -> int:
    """Rows of embedding and output layer: a multiple of make_vocab_size_divisible_by.

    Independent of the layout, so that a checkpoint has the same shapes everywhere.
    """
    assert model.vocab_size is not None
    multiple = model.make_vocab_size_divisible_by
    return math.ceil(model.vocab_size / multiple) * multiple


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Ranks that hold the same weights and different samples."""
    parallel = config.parallel
    model_parallel_size = (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )
    return world_size // model_parallel_size


def _derive(config: RunConfig, world_size: int, tokenizer_vocab_size: int | None) -> RunConfig:
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
        "lr_wsd_decay_iters": decay_iters // 10,
    }
    given = config.to_flat_dict()
    return config.replaced(**{k: v for k, v in defaults.items() if given[k] is None})


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
        "vocab_size",
        "make_vocab_size_divisible_by",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_virtual_stages_per_pipeline_rank",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "context_parallel_size",
        "jacobi_grad_passes",
        "recompute_num_layers",
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
        "ckpt_step",
        "keep_checkpoints",
        "log_interval",
    ]
    at_least_zero = [
        "num_latent_thoughts",
        "num_jacobi_iterations",
        "min_jacobi_iterations",
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
                yield f"{_flag(name)} {values[name]}: must be at least {low}."


def _ranges(config: RunConfig) -> Iterator[str]:
    """Settings that must lie in an interval."""
    values = config.to_flat_dict()
    for name in ("hidden_dropout", "attention_dropout", "adam_beta1", "adam_beta2"):
        if not 0 <= values[name] < 1:
            yield f"{_flag(name)} {values[name]}: must be at least 0 and below 1."
    for name in ("lr", "norm_epsilon", "adam_eps", "rotary_base", "rotary_percent"):
        if not 0 < values[name] < math.inf:
            yield f"{_flag(name)} {values[name]}: must be above 0."
    if not 0 <= values["lr_warmup_fraction"] <= 1:
        yield f"--lr-warmup-fraction {values['lr_warmup_fraction']}: must be from 0 to 1."


def _layout(config: RunConfig, world_size: int) -> Iterator[str]:
    """The number of ranks, and layouts that are not there yet."""
    parallel = config.parallel
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    if min(sizes) >= 1 and world_size % math.prod(sizes):
        yield (
            "--tensor-model-parallel-size x --pipeline-model-parallel-size x "
            f"--context-parallel-size = {' x '.join(map(str, sizes))} = {math.prod(sizes)} does "
            f"not divide the {world_size} ranks that were started (torchrun --nproc-per-node)."
        )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size <= 1:
        yield "--sequence-parallel needs --tensor-model-parallel-size of at least 2."
    if parallel.overlap_param_gather and not (
        parallel.use_distributed_optimizer and parallel.overlap_grad_reduce
    ):
        yield (
            "--overlap-param-gather needs --use-distributed-optimizer (else every rank has all "
            "weights) and --overlap-grad-reduce."
        )
    if parallel.pipeline_model_parallel_size == 1:
        for name in (
            "num_virtual_stages_per_pipeline_rank",
            "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
            "overlap_p2p_communication",
        ):
            if getattr(parallel, name) not in (1, None, False):
                yield f"{_flag(name)} needs --pipeline-model-parallel-size of at least 2."


def _shape(model: ModelConfig) -> Iterator[str]:
    """The model by itself."""
    heads, groups = model.num_attention_heads, model.num_query_groups
    assert groups is not None and model.kv_channels is not None
    if model.hidden_size % heads and model.kv_channels * heads != model.hidden_size:
        yield f"--hidden-size {model.hidden_size}: not a multiple of --num-attention-heads {heads}."
    if heads % groups:
        yield f"--num-attention-heads {heads}: not a multiple of --num-query-groups {groups}."
    if model.position_embedding_type == "rope":
        rotated = model.rotary_percent * model.kv_channels
        if model.rotary_percent > 1 or int(rotated) < 2 or int(rotated) % 2:
            yield (
                f"--rotary-percent {model.rotary_percent}: rotates {rotated:g} of the "
                f"{model.kv_channels} channels of a head; it must be an even number, at least 2."
            )


def _shards(config: RunConfig) -> Iterator[str]:
    """What tensor and sequence parallelism cut into equal parts."""
    model, size = config.model, config.parallel.tensor_model_parallel_size
    divided = {
        "--num-attention-heads": model.num_attention_heads,
        "--num-query-groups": model.num_query_groups,
        "--ffn-hidden-size": model.ffn_hidden_size,
    }
    if model.vocab_size is not None:
        divided["the padded vocabulary (--make-vocab-size-divisible-by)"] = padded_vocab_size(model)
    for name, value in divided.items():
        assert value is not None
        if value % size:
            yield f"{name} {value}: not a multiple of --tensor-model-parallel-size {size}."
    yield from _sequence_shards(config)
    yield from _layer_split(config)


def _sequence_shards(config: RunConfig) -> Iterator[str]:
    """The sequence over context-parallel ranks, and each shard over tensor-parallel ones."""
    parallel, length = config.parallel, config.data.seq_length
    context, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    multiple, why = 1, []
    if context > 1:
        multiple, why = 2 * context, [f"2 x --context-parallel-size {context}"]
    if parallel.sequence_parallel:
        multiple = math.lcm(multiple, context * tensor)
        why.append(f"--tensor-model-parallel-size {tensor} of each shard (--sequence-parallel)")
    if length % multiple:
        nearest = max(multiple, length // multiple * multiple)
        yield (
            f"--seq-length {length}: not a multiple of {multiple}, as {' and '.join(why)} need. "
            f"The nearest that works is {nearest}."
        )


def _layer_split(config: RunConfig) -> Iterator[str]:
    """Layers over pipeline ranks and their virtual stages."""
    parallel, num_layers = config.parallel, config.model.num_layers
    num_ranks = parallel.pipeline_model_parallel_size
    num_chunks = parallel.num_virtual_stages_per_pipeline_rank
    if num_ranks == 1:
        return
    ends = (parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers)
    given = [layers for layers in ends if layers is not None]
    left, ranks_left = num_layers - sum(given), num_ranks - len(given)
    share = left / ranks_left if ranks_left else 0
    if left < ranks_left or left % max(ranks_left, 1) or (not ranks_left and left):
        uneven = "what --decoder-first/last-pipeline-num-layers leave of " if given else ""
        works = [p for p in range(num_ranks, 0, -1) if num_layers % p == 0][0]
        yield (
            f"--num-layers {num_layers}: {uneven}the layers cannot be shared equally by "
            f"{ranks_left} of {num_ranks} pipeline ranks. --pipeline-model-parallel-size {works} "
            "works without uneven ends; or give --decoder-first-pipeline-num-layers and "
            "--decoder-last-pipeline-num-layers so that the rest is a multiple."
        )
    elif any(layers % num_chunks for layers in [*given, *([share] if ranks_left else [])]):
        yield (
            f"--num-virtual-stages-per-pipeline-rank {num_chunks}: does not divide the layers of "
            f"every pipeline rank ({', '.join(f'{n:g}' for n in sorted({*given, share} - {0}))})."
        )


def _vocabulary(model: ModelConfig, tokenizer_vocab_size: int | None) -> Iterator[str]:
    """The tokenizer against the model."""
    if model.vocab_size is None:
        yield "--vocab-size must be given, or a tokenizer that says it (--tokenizer-model)."
    elif tokenizer_vocab_size is not None and tokenizer_vocab_size > model.vocab_size:
        yield (
            f"the tokenizer's vocabulary of {tokenizer_vocab_size} is larger than the model's "
            f"--vocab-size {model.vocab_size}: give a --vocab-size of at least "
            f"{tokenizer_vocab_size}, or another tokenizer."
        )


def _method(config: RunConfig) -> Iterator[str]:
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


def _batch(config: RunConfig, world_size: int) -> Iterator[str]:
    """The global batch over ranks and micro-batches."""
    micro, whole = config.training.micro_batch_size, config.training.global_batch_size
    replicas = data_parallel_size(config, world_size)
    assert whole is not None
    if whole % (micro * replicas):
        yield (
            f"--global-batch-size {whole}: not a multiple of --micro-batch-size {micro} x "
            f"{replicas} data-parallel ranks."
        )
        return
    num_microbatches = whole // (micro * replicas)
    num_stages = config.parallel.pipeline_model_parallel_size
    if num_microbatches % num_stages:
        nearest = math.ceil(num_microbatches / num_stages) * num_stages * micro * replicas
        yield (
            f"--global-batch-size {whole}: gives each pipeline {num_microbatches} micro-batches, "
            f"which must be a multiple of --pipeline-model-parallel-size {num_stages}. The next "
            f"that works is {nearest}."
        )


def _schedule(config: RunConfig) -> Iterator[str]:
    """Warm-up, decay and the bounds of the learning rate."""
    optim = config.optimizer
    assert optim.min_lr is not None and optim.lr_decay_iters is not None
    assert optim.lr_warmup_iters is not None and optim.lr_wsd_decay_iters is not None
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


def _data(config: RunConfig) -> Iterator[str]:
    """Lengths, and which datasets are named."""
    data, model = config.data, config.model
    assert model.max_position_embeddings is not None
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
            yield f"{_flag(name)} {' '.join(getattr(data, name))}: {problem}"
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


def _checkpoints(config: RunConfig) -> Iterator[str]:
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


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
