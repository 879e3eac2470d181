"""What ranks share: whether a layout fits the model, the sequence and the batch.

The checks of `config.resolve` that know of parallelism. A problem names the nearest value that
works, where there is one.
"""

import math
from collections.abc import Iterator

from megatron_ponder.config.resolved import ResolvedConfig, ResolvedModelConfig
from megatron_ponder.config.schema import RunConfig


def padded_vocab_size(model: ResolvedModelConfig) -> int:
    """Rows of embedding and output layer: a multiple of make_vocab_size_divisible_by.

    Independent of the layout, so that a checkpoint has the same shapes everywhere.
    """
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


def microbatches_per_step(config: ResolvedConfig, world_size: int) -> int:
    """Micro-batches of a training iteration on each data-parallel rank."""
    training = config.training
    per_forward = training.micro_batch_size * data_parallel_size(config, world_size)
    return training.global_batch_size // per_forward


def layout_problems(config: RunConfig, world_size: int) -> Iterator[str]:
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
    if parallel.context_parallel_attention == "transformer_engine" and not config.training.bf16:
        yield "--context-parallel-attention transformer_engine needs --bf16; use auto or gather."
    if parallel.overlap_param_gather and not (
        parallel.use_distributed_optimizer and parallel.overlap_grad_reduce
    ):
        yield (
            "--overlap-param-gather needs --use-distributed-optimizer (else every rank has all "
            "weights) and --overlap-grad-reduce."
        )
    if parallel.pipeline_model_parallel_size == 1:
        unused = {
            "num_virtual_stages_per_pipeline_rank": parallel.num_virtual_stages_per_pipeline_rank
            > 1,
            "decoder_first_pipeline_num_layers": parallel.decoder_first_pipeline_num_layers,
            "decoder_last_pipeline_num_layers": parallel.decoder_last_pipeline_num_layers,
            "overlap_p2p_communication": parallel.overlap_p2p_communication,
        }
        for name in (name for name, is_given in unused.items() if is_given):
            yield f"{flag_of(name)} needs --pipeline-model-parallel-size of at least 2."


def shard_problems(config: ResolvedConfig) -> Iterator[str]:
    """What tensor and sequence parallelism cut into equal parts."""
    model, size = config.model, config.parallel.tensor_model_parallel_size
    divided = {
        "--num-attention-heads": model.num_attention_heads,
        "--num-query-groups": model.num_query_groups,
        "--ffn-hidden-size": model.ffn_hidden_size,
        "the padded vocabulary (--make-vocab-size-divisible-by)": padded_vocab_size(model),
    }
    for name, value in divided.items():
        if value % size:
            yield f"{name} {value}: not a multiple of --tensor-model-parallel-size {size}."
    yield from _sequence_shards(config)
    yield from _layer_split(config)
    yield from _recomputation(config)


def backend_problems(config: ResolvedConfig) -> Iterator[str]:
    """Backends that do not go with each other or with the rest of the run."""
    backend, parallel = config.backend, config.parallel
    has_fp8 = backend.fp8_format is not None
    if config.training.recompute_granularity == "selective" and (
        has_fp8 or backend.transformer_impl == "transformer_engine"
    ):
        yield (
            "--recompute-granularity selective: TransformerEngine's layers "
            f"({'--fp8-format' if has_fp8 else '--transformer-impl'}) keep their inputs by "
            "themselves. Use full, pass, or --transformer-impl local."
        )
    if backend.loss_chunk_tokens is not None and not backend.cross_entropy_loss_fusion:
        yield "--loss-chunk-tokens needs --cross-entropy-loss-fusion."
    if parallel.context_parallel_size > 1:
        given = (backend.attention_backend, parallel.context_parallel_attention)
        if given in (
            ("te", "gather"),
            ("sdpa", "transformer_engine"),
            ("flash", "transformer_engine"),
        ):
            yield (
                f"--attention-backend {given[0]} with --context-parallel-attention {given[1]}: "
                "over shared sequences te is transformer_engine, and sdpa and flash are gather."
            )
    if backend.fp8_format is not None:
        yield from _fp8_problems(config)


def _fp8_problems(config: ResolvedConfig) -> Iterator[str]:
    """Products in fp8 are TransformerEngine's, and take widths of 16 and rows of 8."""
    model, backend, parallel = config.model, config.backend, config.parallel
    flag = f"--fp8-format {backend.fp8_format}"
    if not config.training.bf16:
        yield f"{flag} needs --bf16."
    if backend.transformer_impl == "local":
        yield f"{flag} needs --transformer-impl transformer_engine (or auto)."
    size = parallel.tensor_model_parallel_size
    attention_width = model.num_attention_heads * model.kv_channels
    widths = {
        "--hidden-size": model.hidden_size,
        "the queries' width over tensor-parallel ranks": attention_width // size,
        "the keys' width over tensor-parallel ranks": (
            model.num_query_groups * model.kv_channels // size
        ),
        "--ffn-hidden-size over tensor-parallel ranks": model.ffn_hidden_size // size,
    }
    for name, width in widths.items():
        if width % 16:
            yield f"{flag}: {name} is {width}, not a multiple of 16."
    rows = config.data.seq_length // parallel.context_parallel_size
    rows *= config.training.micro_batch_size
    if rows % 8:
        yield f"{flag}: {rows} tokens of a micro-batch on a rank are not a multiple of 8."


def _sequence_shards(config: ResolvedConfig) -> Iterator[str]:
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


def layers_of_pipeline_ranks(config: ResolvedConfig) -> list[int]:
    """Layers on each pipeline rank, first to last; empty if they cannot be shared so.

    The ends have what --decoder-first/last-pipeline-num-layers give them, the others equal shares.
    """
    parallel, num_ranks = config.parallel, config.parallel.pipeline_model_parallel_size
    by_rank: list[int | None] = [None] * num_ranks
    by_rank[0] = parallel.decoder_first_pipeline_num_layers
    if num_ranks > 1:
        by_rank[-1] = parallel.decoder_last_pipeline_num_layers
    given = [layers for layers in by_rank if layers is not None]
    left, num_left = config.model.num_layers - sum(given), num_ranks - len(given)
    if left < num_left or (left % num_left if num_left else left):
        return []
    return [left // num_left if layers is None else layers for layers in by_rank]


def _layer_split(config: ResolvedConfig) -> Iterator[str]:
    """Layers over pipeline ranks and their virtual stages."""
    parallel, num_layers = config.parallel, config.model.num_layers
    num_ranks = parallel.pipeline_model_parallel_size
    num_chunks = parallel.num_virtual_stages_per_pipeline_rank
    by_rank = layers_of_pipeline_ranks(config)
    if not by_rank:
        ends = (
            parallel.decoder_first_pipeline_num_layers,
            parallel.decoder_last_pipeline_num_layers,
        )
        uneven = "" if ends == (None, None) else "of which the ends take what they are given, "
        works = max(p for p in range(1, num_ranks + 1) if num_layers % p == 0)
        yield (
            f"--num-layers {num_layers}: {uneven}cannot be shared equally by the pipeline ranks "
            f"({num_ranks}). --pipeline-model-parallel-size {works} works without uneven ends; or "
            "give --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers so "
            "that the rest is a multiple."
        )
    elif any(layers % num_chunks for layers in by_rank):
        yield (
            f"--num-virtual-stages-per-pipeline-rank {num_chunks}: does not divide the layers of "
            f"every pipeline rank ({', '.join(map(str, by_rank))})."
        )


def _recomputation(config: ResolvedConfig) -> Iterator[str]:
    """Settings of one granularity, and units of layers that are recomputed together."""
    training, parallel = config.training, config.parallel
    if training.recompute_num_passes is not None and training.recompute_granularity != "pass":
        yield "--recompute-num-passes needs --recompute-granularity pass."
    if training.recompute_granularity != "full" or training.recompute_method != "uniform":
        return
    num_chunks = parallel.num_virtual_stages_per_pipeline_rank
    by_chunk = {layers // num_chunks for layers in layers_of_pipeline_ranks(config)}
    unit = training.recompute_num_layers
    if any(layers % unit for layers in by_chunk):
        works = max(n for n in range(1, unit + 1) if not any(layers % n for layers in by_chunk))
        yield (
            f"--recompute-num-layers {unit}: does not divide the layers that a rank computes in a "
            f"row ({', '.join(map(str, sorted(by_chunk)))}). The nearest that works is {works}."
        )


def batch_problems(config: ResolvedConfig, world_size: int) -> Iterator[str]:
    """The global batch over ranks and micro-batches."""
    micro, whole = config.training.micro_batch_size, config.training.global_batch_size
    replicas = data_parallel_size(config, world_size)
    if whole % (micro * replicas):
        yield (
            f"--global-batch-size {whole}: not a multiple of --micro-batch-size {micro} x "
            f"{replicas} data-parallel ranks."
        )
        return
    num_microbatches = whole // (micro * replicas)
    num_pipeline_stages = config.parallel.pipeline_model_parallel_size
    if num_microbatches % num_pipeline_stages:
        nearest = (
            math.ceil(num_microbatches / num_pipeline_stages)
            * num_pipeline_stages
            * micro
            * replicas
        )
        yield (
            f"--global-batch-size {whole}: gives each pipeline {num_microbatches} micro-batches, "
            "which must be a multiple of --pipeline-model-parallel-size "
            f"{num_pipeline_stages}. The next that works is {nearest}."
        )


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")
