"""Every setting of a run, typed, with its meaning and unit. Imports no torch.

One field is one flag and one YAML key: `num_layers` is `--num-layers`. Names follow Megatron-LM and
megatron-core where they have the concept, the PonderLM-2 paper otherwise. The string under a field
is its help text. `None` means "derived" or "off", and the help text says which. `config.resolve`
fills in what is derived and holds the checks across fields; the result has the types of
resolved.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

TokenizerType = Literal[
    "SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer", "NullTokenizer"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the transformer. A preset (--preset) sets these; a flag overrides the preset."""

    architecture: Literal["llama", "gpt_neox", "gpt2", "mistral", "qwen2", "qwen3"] = "llama"
    """Model family in Hugging Face terms: decides the weight names, config.json and model class of
    an export. What is computed depends only on the settings below."""
    num_layers: int = 12
    """Number of transformer layers."""
    hidden_size: int = 768
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Width of the MLP. None: 4 x hidden_size."""
    num_attention_heads: int = 12
    """Number of attention (query) heads."""
    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention). None: num_attention_heads."""
    kv_channels: int | None = None
    """Width of each head. None: hidden_size / num_attention_heads."""
    max_position_embeddings: int | None = None
    """Longest sequence in tokens, and the size of the table of learned positions. None:
    seq_length."""
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    """Rotary positions, or one learned vector per token position (GPT-2)."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_percent: float = 1.0
    """Fraction of each head's channels that is rotated (Pythia: 0.25)."""
    rotary_seq_len_interpolation_factor: float | None = None
    """Divide rotary positions by this (linear scaling to longer sequences). None: no scaling."""
    use_rope_scaling: bool = False
    """Scale rotary frequencies as Llama 3.1 does, with the four rope_scaling settings."""
    rope_scaling_factor: float = 8.0
    """Llama 3.1 scaling: divisor of the low frequencies."""
    rope_scaling_low_freq_factor: float = 1.0
    """Llama 3.1 scaling: a frequency is low if its wavelength exceeds the original context divided
    by this."""
    rope_scaling_high_freq_factor: float = 4.0
    """Llama 3.1 scaling: a frequency stays unchanged if its wavelength is below the original
    context divided by this. Between the two bounds it is interpolated."""
    rope_scaling_original_max_position_embeddings: int = 8192
    """Llama 3.1 scaling: the original context in tokens."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Type of all norms."""
    norm_epsilon: float = 1e-5
    """Epsilon of all norms."""
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """MLP activation: gated SiLU (Llama), exact GELU (GPT-NeoX) or its tanh approximation
    (GPT-2)."""
    add_bias_linear: bool = False
    """Biases in all linear layers of the transformer blocks."""
    add_qkv_bias: bool = False
    """Biases in the query/key/value projection (Qwen2), even without --add-bias-linear."""
    add_attention_bias: bool = False
    """Biases in both projections of the attention, even without --add-bias-linear (attention_bias
    of Llama and Qwen3)."""
    qk_layernorm: bool = False
    """Normalise queries and keys per head (Qwen3), with the type of norm from --normalization."""
    parallel_residual: bool = False
    """Attention and MLP both read the block's input: x + attn(norm1(x)) + mlp(norm2(x))."""
    untie_embeddings_and_output_weights: bool = True
    """Use separate weights for the input embedding and the output layer."""
    hidden_dropout: float = 0.0
    """Dropout probability on embeddings and block outputs."""
    attention_dropout: float = 0.0
    """Dropout probability on attention weights."""
    vocab_size: int | None = None
    """Rows of the vocabulary before padding. None: the size of the tokenizer's vocabulary."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this. Padding rows never contribute to the loss."""
    init_method: Literal["normal", "small"] | None = None
    """normal: N(0, init_method_std). small: truncated normal with std sqrt(2 / (5 hidden_size)),
    output projections divided by the square root of the depth. None: the method's default (vanilla:
    normal; docs/methods.md lists the others)."""
    init_method_std: float = 0.02
    """Standard deviation for --init-method normal."""
    small_init_depth_counts_thoughts: bool = False
    """Depth in the small initialisation is 2 x num_layers x (K+1) instead of 2 x num_layers (as the
    reference has it for GPT-NeoX only)."""
    generation_defaults: str | None = None
    """Special ids and defaults of generation that the export writes for transformers, as an import
    stored them (JSON). None: the tokenizer's end of document begins, ends and pads texts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What is computed for each token: docs/methods.md."""

    method: str = "ponderlm2"
    """Training method: ponderlm2, ponderlm, loop, pause, vanilla, or the dotted name of a module
    that defines one."""
    num_latent_thoughts: int = 1
    """K: latent thoughts per token (ponderlm2), extra passes (ponderlm, loop), or pause tokens
    behind each token (pause). 0: a plain language model."""
    num_jacobi_iterations: int = 3
    """R: Jacobi passes, each of which refreshes all thoughts in parallel. Used in evaluation, and
    in training unless R is random."""
    random_jacobi_iterations: bool = False
    """Draw R for each training iteration, uniformly from the range below. R is a pure function of
    seed and iteration: the same on every rank and after a resume."""
    min_jacobi_iterations: int = 2
    """Smallest R to draw."""
    max_jacobi_iterations: int = 3
    """Largest R to draw (the reference: 3 for Llama, 4 for GPT-NeoX)."""
    scale_embeds: bool = True
    """Multiply token embeddings by sqrt(2.5 x hidden_size), or by sqrt(hidden_size) for ponderlm,
    pause and --interpolation. Hidden states that are fed back are not scaled, nor is the output
    layer. vanilla never scales, loop always does."""
    interpolation: bool = False
    """ponderlm2: feed back the mixture of embeddings weighted by the predicted probabilities
    instead of the hidden state. ponderlm always does."""
    interpolation_use_topk: bool = False
    """Mix only the most likely embeddings of each slot, with their probabilities renormalised."""
    interpolation_topk: int = 100
    """Number of embeddings to mix with --interpolation-use-topk."""
    residual_interpolated_embeds: bool = False
    """ponderlm: add each mixture to the previous pass's input instead of to the token embeddings
    (as in the paper; the flag's name comes from the authors' code)."""
    ponderlm_feedback: Literal["mixture", "hidden"] = "mixture"
    """ponderlm: what is added between passes. mixture: of embeddings. hidden: the normed hidden
    state, added to the previous pass's input without any scaling, as in the authors' GPT-NeoX
    file."""
    pause_token_id: int | None = None
    """pause: vocabulary row of the pause token. None: 50288 if the vocabulary has that row and the
    tokenizer does not use it, otherwise a new row at the end of the vocabulary."""
    pause_always_scales: bool = True
    """pause: scale embeddings even with --no-scale-embeds (the reference: Llama yes, GPT-NeoX
    no)."""
    pause_init_method: Literal["normal", "small"] = "small"
    """pause: initialisation if --init-method is not given (the reference: Llama small, GPT-NeoX
    normal)."""
    jacobi_grad_passes: int | None = None
    """Backpropagate through the last n passes only and treat their input carry as a constant. This
    saves memory and time but changes the gradient. None: backpropagate through all passes, as in
    the paper."""

    @property
    def uses_pause_token(self) -> bool:
        """Whether the vocabulary must have a row for the pause token."""
        return self.method == "pause"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How model and batch are spread over ranks. Data parallelism uses the remaining ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's weights."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages: ranks that share the layers. Each pass is a chunk of the interleaved
    schedule."""
    num_virtual_stages_per_pipeline_rank: int = 1
    """Layer chunks per pipeline rank. More chunks shrink the pipeline bubble but communicate
    more."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers on the first pipeline rank, for an uneven split. None: an equal share."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers on the last pipeline rank, which also has the output layer. None: an equal share."""
    context_parallel_size: int = 1
    """Ranks that share each sequence. Each rank holds two pieces, one from the front and one from
    the back."""
    context_parallel_attention: Literal["auto", "gather", "transformer_engine"] = "auto"
    """Attention across context-parallel ranks. gather: gather all keys and values.
    transformer_engine: TransformerEngine's ring. auto: the ring on CUDA in bf16 if
    TransformerEngine is installed, else gather."""
    sequence_parallel: bool = False
    """Shard norms, dropout and residuals along the sequence over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state (and the fp32 master weights of bf16 training) over the data-parallel
    ranks."""
    overlap_grad_reduce: bool = False
    """Overlap the reduction of gradients over data-parallel ranks with the backward."""
    overlap_param_gather: bool = False
    """Overlap the gathering of updated weights with the next forward. Needs
    --use-distributed-optimizer and --overlap-grad-reduce."""
    overlap_p2p_communication: bool = False
    """Overlap computation with the transfer of activations and gradients between pipeline
    stages."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication library. auto: nccl on CUDA, otherwise gloo."""
    distributed_timeout_minutes: int = 10
    """Time limit of a collective; exceeding it ends the run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer, and what it does around and inside a text. Part of the identity of data."""

    tokenizer_type: TokenizerType = "SentencePieceTokenizer"
    """Type of --tokenizer-model: a SentencePiece .model file, a Hugging Face tokenizer.json (or its
    folder), or the JSON description of a tiktoken vocabulary. NullTokenizer: no tokenizer, the data
    has ids only; needs --vocab-size, whose last id ends documents."""
    tokenizer_model: str | None = None
    """Path of the tokenizer."""
    add_bos: bool = False
    """Begin every document and every prompt with the tokenizer's begin token (BOS)."""
    tokenizer_hf_include_special_tokens: bool = False
    """HuggingFaceTokenizer: begin every document and every prompt with what the file's own
    post-processor puts there, as Megatron-LM does with this flag."""
    parse_special_tokens: bool = False
    """Turn text that spells a special token (<|endoftext|>) into that token, as Megatron-LM does
    for Hugging Face tokenizers and tiktoken. By default it is text like any other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(TokenizerConfig):
    """Training data: indexed datasets written by tools/preprocess_data.py."""

    data_path: tuple[str, ...] = ()
    """Dataset prefixes, or weight prefix weight prefix ...; divided into train, valid and test by
    --split."""
    split: str = "969,30,1"
    """Proportions of train, valid and test in --data-path."""
    train_data_path: tuple[str, ...] = ()
    """Like --data-path, for training only; --split is then ignored."""
    valid_data_path: tuple[str, ...] = ()
    """Like --data-path, for validation only."""
    test_data_path: tuple[str, ...] = ()
    """Like --data-path, for the evaluation on test data after training only."""
    data_cache_path: str | None = None
    """Folder for sample and shuffle indexes. None: a folder 'cache' next to the first dataset."""
    eod_mask_loss: bool = False
    """Exclude the prediction that follows an end-of-document token from the loss, as in
    Megatron-LM."""
    eod_as_target: bool = True
    """Train on predicting the end-of-document token. The paper's code does not:
    --no-eod-as-target."""
    reset_position_ids: bool = False
    """Not supported: positions count through the whole sequence of packed documents."""
    reset_attention_mask: bool = False
    """Not supported: attention covers the whole sequence, including earlier documents."""
    instruction_data: bool = False
    """The datasets were written with --instruction-data: conversations are packed whole, and only
    responses contribute to the loss."""
    multiple_validation_sets: bool = False
    """Evaluate on each dataset of --valid-data-path separately instead of on their blend."""
    seq_length: int = 2048
    """Tokens per training sequence. With ponderlm2 and pause the model runs on K+1 times as many
    slots."""
    num_workers: int = 2
    """Data-loading processes per rank. 0: load in the training process."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch and precision of the run."""

    train_iters: int = 1000
    """Number of training iterations (optimizer steps)."""
    micro_batch_size: int = 1
    """Sequences per forward on each data-parallel rank."""
    global_batch_size: int | None = None
    """Sequences per iteration over all ranks. None: micro_batch_size x data-parallel size."""
    bf16: bool = False
    """Compute in bf16 with fp32 master weights and gradients. Default: fp32."""
    recompute_granularity: Literal["selective", "full", "pass"] | None = None
    """Activations to drop in the forward and recompute in the backward. selective: those that need
    no matmul (outputs of norms and of the MLP activation, the copy of the attention output for its
    projection). full: of each layer, keeping its input. pass: of each pass but the last, keeping
    its input. None: recompute nothing."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """full: recompute all layers in groups of recompute_num_layers (uniform), or only the first
    recompute_num_layers layers of each rank (block)."""
    recompute_num_layers: int = 1
    """full: layers per group (uniform), or number of layers to recompute (block)."""
    recompute_num_passes: int | None = None
    """pass: number of passes to recompute, starting with the first that has a gradient. None: all
    but the last."""
    seed: int = 1234
    """Seed of initial weights, data order, dropout and random R."""
    eval_interval: int = 1000
    """Iterations between evaluations on validation data. 0: never evaluate."""
    eval_iters: int = 10
    """Global batches per evaluation. 0: never evaluate."""
    exit_interval: int | None = None
    """Save a checkpoint and stop at the next iteration that is a multiple of this."""
    exit_duration_in_mins: float | None = None
    """Save a checkpoint and stop after this many minutes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """Which implementation computes what. Results agree up to rounding, except in fp8."""

    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Operations for which torch has no fused form. torch: composed of torch operations (the
    reference). triton: fused Triton kernels. auto: triton on CUDA if installed, otherwise torch."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Linear layers and norms. local: megatron-core's on torch. transformer_engine:
    TransformerEngine's. auto: transformer_engine with --fp8-format, otherwise local."""
    attention_backend: Literal["auto", "sdpa", "flash", "te"] = "auto"
    """Attention. sdpa: torch's, with cuDNN's kernel on Hopper where it works. flash: flash-attn.
    te: TransformerEngine's. auto: te with TransformerEngine's layers or ring, otherwise sdpa."""
    fp8_format: Literal["hybrid", "e4m3"] | None = None
    """Run matmuls in fp8 with per-tensor current scaling (TransformerEngine). hybrid: e4m3 forward,
    e5m2 gradients. e4m3: both e4m3. None: matmuls in the run's precision."""
    gradient_accumulation_fusion: bool = False
    """Accumulate weight gradients into their fp32 buffers within the matmul that computes them,
    with apex if installed, otherwise with torch."""
    cross_entropy_loss_fusion: bool = False
    """Fuse the output layer with the loss, in chunks of tokens. The full logits are never
    materialised; the backward recomputes the head matmul."""
    loss_chunk_tokens: int | None = None
    """--cross-entropy-loss-fusion: tokens of a micro-batch per chunk. None: as many as give 256 MiB
    of logits per rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its LR schedule."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the decay. None: lr / 10."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay after warm-up."""
    lr_decay_iters: int | None = None
    """Iterations until the learning rate reaches min_lr. None: train_iters."""
    lr_warmup_iters: int | None = None
    """Iterations of linear warm-up. None: lr_warmup_fraction x lr_decay_iters."""
    lr_warmup_fraction: float = 0.01
    """Fraction of lr_decay_iters used for warm-up, unless lr_warmup_iters is given."""
    lr_wsd_decay_iters: int | None = None
    """WSD: iterations of the final decay. None: lr_decay_iters / 10."""
    weight_decay: float = 0.1
    """Decoupled weight decay, applied to all weights except biases and norms."""
    adam_beta1: float = 0.9
    """Decay rate of Adam's first moment."""
    adam_beta2: float = 0.95
    """Decay rate of Adam's second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Clip the gradient norm to this. 0: no clipping."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving, loading and resuming."""

    save: str | None = None
    """Folder for checkpoints and metrics.jsonl. None: save nothing."""
    load: str | None = None
    """Folder of checkpoints to load from. Without a checkpoint in it the run fails, unless the
    folder is also --save: then training starts from scratch."""
    save_interval: int | None = None
    """Iterations between checkpoints. None: save only at the end."""
    ckpt_step: int | None = None
    """Iteration to load. None: the latest."""
    keep_checkpoints: int | None = None
    """Number of checkpoints to keep; older ones are deleted. None: keep all."""
    override_data: bool = False
    """Resume even if data, blend, order, tokenizer or sequence length differ from those of the
    checkpoint; and train on data that was made with another tokenizer than the run's."""
    finetune: bool = False
    """Load only the weights: iteration, optimizer, LR scheduler, random states and data position
    start afresh."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is reported, and where."""

    log_interval: int = 10
    """Iterations between log lines and between records in metrics.jsonl."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard event files."""
    wandb_project: str | None = None
    """Weights & Biases project; needs `pip install wandb`."""
    wandb_exp_name: str | None = None
    """Name of the run in Weights & Biases. None: chosen by Weights & Biases."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run, as given."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    method: MethodConfig = dataclasses.field(default_factory=MethodConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    backend: BackendConfig = dataclasses.field(default_factory=BackendConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)

    def to_flat_dict(self) -> dict[str, Any]:
        """Every setting under its flag's name (with underscores), as stored in checkpoints."""
        groups = (getattr(self, group.name) for group in dataclasses.fields(RunConfig))
        return {
            field.name: getattr(group, field.name)
            for group in groups
            for field in dataclasses.fields(group)
        }

    @classmethod
    def from_flat_dict(cls, values: Mapping[str, Any], **others: Any) -> Self:
        """The inverse of `to_flat_dict`.

        Args:
            values: every setting of the groups under its flat name.
            others: fields of a subclass that are no groups of settings.
        """
        groups = {}
        for field in dataclasses.fields(cls):
            if field.name not in others:
                group: Any = field.type
                names = (setting.name for setting in dataclasses.fields(group))
                groups[field.name] = group(**{name: values[name] for name in names})
        return cls(**groups, **others)

    def replaced(self, **changes: Any) -> "RunConfig":
        """A copy with some settings changed, named flat: `config.replaced(num_layers=4)`.

        Raises:
            KeyError: a name that is no setting.
        """
        values = self.to_flat_dict()
        if unknown := changes.keys() - values.keys():
            raise KeyError(f"not a setting: {', '.join(sorted(unknown))}")
        return RunConfig.from_flat_dict(values | changes)
