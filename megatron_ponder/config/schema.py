"""Every setting of a run, typed, with its meaning and unit. Imports no torch.

One field is one flag and one YAML key: `num_layers` is `--num-layers`. Names follow Megatron-LM and
megatron-core where those have the concept, the PonderLM-2 paper otherwise. The string under a field
is its help text. `None` always means "derived"; `config.resolve` fills such fields in, so that code
behind it never meets a `None` that it has to interpret. Checks across fields live in
`config.resolve` too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

TokenizerType = Literal[
    "SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer", "NullTokenizer"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the transformer. A preset (--preset) fills these in; a flag beats it."""

    architecture: Literal["llama", "gpt_neox", "gpt2", "mistral", "qwen2", "qwen3"] = "llama"
    """Family of the model: decides the weight names on export, and nothing else."""
    num_layers: int = 12
    """Number of transformer layers."""
    hidden_size: int = 768
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Width inside the MLP. None: 4 x hidden_size."""
    num_attention_heads: int = 12
    """Number of attention (query) heads."""
    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention). None: num_attention_heads."""
    kv_channels: int | None = None
    """Width of a head. None: hidden_size / num_attention_heads."""
    max_position_embeddings: int | None = None
    """Longest sequence in tokens; the size of the table of learned positions. None: seq_length."""
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    """Rotary positions, or one learned vector per token position (GPT-2)."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_percent: float = 1.0
    """Share of each head's channels that is rotated (Pythia: 0.25)."""
    rotary_seq_len_interpolation_factor: float | None = None
    """Divide rotary positions by this (linear scaling to longer sequences). None: do not."""
    use_rope_scaling: bool = False
    """Stretch slow rotary frequencies as Llama 3.1 does; the four settings below say how."""
    rope_scaling_factor: float = 8.0
    """Llama-3 scaling: by how much frequencies of long waves are divided."""
    rope_scaling_low_freq_factor: float = 1.0
    """Llama-3 scaling: waves longer than the original context divided by this are long."""
    rope_scaling_high_freq_factor: float = 4.0
    """Llama-3 scaling: waves shorter than the original context divided by this stay as they are."""
    rope_scaling_original_max_position_embeddings: int = 8192
    """Llama-3 scaling: the original context in tokens."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Kind of every norm."""
    norm_epsilon: float = 1e-5
    """Epsilon inside every norm."""
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """MLP activation: gated SiLU (Llama), exact GELU (GPT-NeoX) or its tanh form (GPT-2)."""
    add_bias_linear: bool = False
    """Biases in every linear layer of the transformer block."""
    add_qkv_bias: bool = False
    """Biases in the projection to queries, keys and values (Qwen2), whatever --add-bias-linear."""
    add_attention_bias: bool = False
    """Biases in both projections of the attention, whatever --add-bias-linear (Llama's and Qwen3's
    attention_bias)."""
    qk_layernorm: bool = False
    """Norm each head's queries and keys (Qwen3); of the kind --normalization names."""
    parallel_residual: bool = False
    """Attention and MLP both read the block's input: x + attn(norm1(x)) + mlp(norm2(x))."""
    untie_embeddings_and_output_weights: bool = True
    """Separate weights for the input embedding and the output layer."""
    hidden_dropout: float = 0.0
    """Dropout probability on embeddings and block outputs."""
    attention_dropout: float = 0.0
    """Dropout probability on attention weights."""
    vocab_size: int | None = None
    """Rows of the vocabulary before padding. None: the tokenizer's."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this. Padded rows never take part in the loss."""
    init_method: Literal["normal", "small"] | None = None
    """normal: N(0, init_method_std). small: truncated normal, std sqrt(2/(5 h)), with the output
    projections divided by the root of the depth. None: the method's own (vanilla: normal)."""
    init_method_std: float = 0.02
    """Standard deviation of init_method=normal."""
    small_init_depth_counts_thoughts: bool = False
    """Depth in the small initialisation is 2 x layers x (K+1), not 2 x layers (the reference does
    so for GPT-NeoX only)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What is computed for each token. docs/methods.md explains the methods."""

    method: str = "ponderlm2"
    """Training method: ponderlm2, ponderlm, loop, pause, vanilla, or the dotted name of a module
    that defines one."""
    num_latent_thoughts: int = 1
    """K: latent thoughts emitted before each token (ponderlm2), extra passes (ponderlm, loop), or
    pause tokens behind each token (pause). 0: a plain language model."""
    num_jacobi_iterations: int = 3
    """R: rounds that refine all thoughts in parallel (evaluation; training unless random)."""
    random_jacobi_iterations: bool = False
    """Draw R anew for every training iteration, uniformly from the range below. A pure function of
    seed and iteration: the same on every rank and in every replay."""
    min_jacobi_iterations: int = 2
    """Smallest R that is drawn."""
    max_jacobi_iterations: int = 3
    """Largest R that is drawn (the reference: 3 for Llama, 4 for GPT-NeoX)."""
    scale_embeds: bool = True
    """Multiply token embeddings by sqrt(2.5 x hidden_size), or by sqrt(hidden_size) with
    --interpolation and for ponderlm and pause; hidden states that are fed back and the head are not
    scaled. vanilla ignores it, loop always scales."""
    interpolation: bool = False
    """ponderlm2: feed back the mixture of embeddings by the predicted probabilities instead of the
    hidden state. ponderlm always does."""
    interpolation_use_topk: bool = False
    """Mix only the likeliest embeddings of each slot, their probabilities renormalised."""
    interpolation_topk: int = 100
    """How many those are."""
    residual_interpolated_embeds: bool = False
    """ponderlm: add each mixture to the input of the pass before it, not to the token embeddings
    (the paper's form; the name is the authors' code's)."""
    ponderlm_feedback: Literal["mixture", "hidden"] = "mixture"
    """ponderlm: what is added between passes. hidden: the normed hidden state, to the input of the
    pass before, nothing scaled, as in the authors' GPT-NeoX file."""
    pause_token_id: int | None = None
    """pause: the vocabulary row of the pause token. None: 50288 where the vocabulary has it and the
    tokenizer does not use it, else one row is added behind the vocabulary."""
    pause_always_scales: bool = True
    """pause: scale embeddings whatever --scale-embeds says (the reference: Llama yes, GPT-NeoX
    no)."""
    pause_init_method: Literal["normal", "small"] = "small"
    """pause: initialisation where --init-method says nothing (the reference: Llama small, GPT-NeoX
    normal)."""
    jacobi_grad_passes: int | None = None
    """Backpropagate through the last n passes only; the carry into them counts as a constant. None:
    through all, as the paper does. Less memory and time, another gradient."""

    @property
    def uses_pause_token(self) -> bool:
        """Whether the vocabulary must have a row for the pause token."""
        return self.method == "pause"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the batch are spread over ranks. Data parallelism takes what is left."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's weights."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers (stages). Every pass is a chunk of the interleaved schedule."""
    num_virtual_stages_per_pipeline_rank: int = 1
    """Chunks of layers on each pipeline rank; more make the bubble smaller and communicate more."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers on the first pipeline rank, where the split is uneven. None: an equal share."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers on the last pipeline rank (which has the output layer too). None: an equal share."""
    context_parallel_size: int = 1
    """Ranks that share each sequence, two chunks each: one from its front and one from its back."""
    context_parallel_attention: Literal["auto", "gather", "transformer_engine"] = "auto"
    """Attention over sequences that ranks share: ours, which gathers keys and values, or
    TransformerEngine's ring. auto: the ring on CUDA where TransformerEngine is installed."""
    sequence_parallel: bool = False
    """Shard norms, dropout and residuals along the sequence over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state (and the fp32 copy of bf16 weights) over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward goes on; needs the distributed optimizer and
    --overlap-grad-reduce."""
    overlap_p2p_communication: bool = False
    """Let pipeline stages compute while activations and gradients travel between them."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication library. auto: nccl on CUDA, gloo otherwise."""
    distributed_timeout_minutes: int = 10
    """A collective that takes longer ends the run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens come from: indexed datasets written by tools/preprocess_data.py."""

    data_path: tuple[str, ...] = ()
    """Dataset prefixes, or weight prefix weight prefix ...; cut into train, valid and test by
    --split."""
    split: str = "969,30,1"
    """Shares of train, valid and test in --data-path."""
    train_data_path: tuple[str, ...] = ()
    """Like --data-path, for training only; then --split is not used."""
    valid_data_path: tuple[str, ...] = ()
    """Like --data-path, for validation only."""
    test_data_path: tuple[str, ...] = ()
    """Like --data-path, for the test after training only."""
    data_cache_path: str | None = None
    """Folder for sample and shuffle indexes. None: a folder 'cache' beside the first dataset."""
    tokenizer_type: TokenizerType = "SentencePieceTokenizer"
    """Kind of --tokenizer-model: a SentencePiece .model file, a tokenizers JSON file (or the folder
    that holds one), the JSON description of a tiktoken vocabulary, or none (ids only; needs
    --vocab-size, whose last id ends documents)."""
    tokenizer_model: str | None = None
    """Path of the tokenizer."""
    eod_mask_loss: bool = False
    """Leave the token behind the end of a document out of the loss, as in Megatron-LM."""
    eod_as_target: bool = True
    """Learn to predict the end of a document. The paper's code never does: --no-eod-as-target."""
    reset_position_ids: bool = False
    """Not supported: positions run through a whole sequence of packed documents."""
    reset_attention_mask: bool = False
    """Not supported: attention sees the whole sequence, documents before included."""
    instruction_data: bool = False
    """The datasets were written with --instruction-data: conversations are packed whole, and only
    responses take part in the loss."""
    multiple_validation_sets: bool = False
    """Evaluate on each dataset of --valid-data-path by itself, instead of on their blend."""
    seq_length: int = 2048
    """Tokens per training sequence (slots are K+1 times as many)."""
    num_workers: int = 2
    """Processes that load data on each rank. 0: in the training process."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch and precision of the run."""

    train_iters: int = 1000
    """Number of training iterations (optimizer steps)."""
    micro_batch_size: int = 1
    """Sequences per forward pass on each data-parallel rank."""
    global_batch_size: int | None = None
    """Sequences per iteration over all ranks. None: micro_batch_size x data-parallel size."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights and gradients. Default: fp32."""
    recompute_granularity: Literal["selective", "full", "pass"] | None = None
    """Activations to drop and compute again in the backward. selective: those that cost no product
    (norms, the MLP's activation, attention's output as the projection reads it). full: of each
    layer, keeping its input. pass: of each pass but the last, keeping the input of the pass. None:
    keep all."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """full: in units of recompute_num_layers layers (uniform), or of the first recompute_num_layers
    layers of each rank only (block)."""
    recompute_num_layers: int = 1
    """full: layers in a unit (uniform), or layers to recompute (block)."""
    recompute_num_passes: int | None = None
    """pass: recompute so many passes, the first ones with a gradient. None: all but the last."""
    seed: int = 1234
    """Seed of the weights, the data order, dropout and the random R."""
    eval_interval: int = 1000
    """Iterations between evaluations on the validation data. 0: never."""
    eval_iters: int = 10
    """Batches (of global_batch_size) per evaluation. 0: never."""
    exit_interval: int | None = None
    """Save a checkpoint and stop after the iteration that is a multiple of this."""
    exit_duration_in_mins: float | None = None
    """Save a checkpoint and stop after this many minutes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """By which implementation things are computed; none of it changes what is computed."""

    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Operations that torch has no fused form of: composed (the reference), or Triton's kernels.
    auto: Triton on CUDA where it is installed, else torch."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Linear layers and norms: megatron-core's on torch, or TransformerEngine's. auto:
    TransformerEngine's with --fp8-format, else megatron-core's."""
    attention_backend: Literal["auto", "sdpa", "flash", "te"] = "auto"
    """Attention: torch's (on Hopper cuDNN's kernel where it runs), flash-attn's, or
    TransformerEngine's. auto: TransformerEngine's with its layers, else torch's."""
    fp8_format: Literal["hybrid", "e4m3"] | None = None
    """Multiply in fp8, each tensor scaled by its own largest entry (TransformerEngine's current
    scaling): forward e4m3, gradients e5m2 (hybrid), or e4m3 both. None: in the run's precision."""
    gradient_accumulation_fusion: bool = False
    """Add weight gradients to their fp32 sums within the product that makes them: by apex's module,
    else by torch."""
    cross_entropy_loss_fusion: bool = False
    """Compute output layer and loss together, a part of the tokens at a time: the logits of all
    tokens are never there, and the product that makes them is computed again in the backward."""
    loss_chunk_tokens: int | None = None
    """--cross-entropy-loss-fusion: tokens (of a micro-batch) in each part. None: as many as have
    256 MiB of logits on a rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the decay. None: lr / 10."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay after the warm-up."""
    lr_decay_iters: int | None = None
    """Iterations until min_lr is reached. None: train_iters."""
    lr_warmup_iters: int | None = None
    """Iterations of linear warm-up. None: lr_warmup_fraction of lr_decay_iters."""
    lr_warmup_fraction: float = 0.01
    """Share of lr_decay_iters spent on the warm-up, where lr_warmup_iters is not given."""
    lr_wsd_decay_iters: int | None = None
    """WSD: iterations of the final decay. None: a tenth of lr_decay_iters."""
    weight_decay: float = 0.1
    """Decoupled weight decay of every weight but biases and norms."""
    adam_beta1: float = 0.9
    """Decay of Adam's mean of gradients."""
    adam_beta2: float = 0.95
    """Decay of Adam's mean of squared gradients."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest norm of the gradient; larger ones are scaled down to it. 0: no clipping."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving, and going on from what was saved."""

    save: str | None = None
    """Folder for checkpoints and metrics.jsonl. None: nothing is saved."""
    load: str | None = None
    """Checkpoint folder to go on from. A folder without a checkpoint is an error unless it is also
    --save, where it means a fresh start."""
    save_interval: int | None = None
    """Iterations between checkpoints. None: only at the end."""
    ckpt_step: int | None = None
    """Load this iteration instead of the latest."""
    keep_checkpoints: int | None = None
    """Keep only the newest n checkpoints. None: all."""
    override_data: bool = False
    """Go on although data, blend, order, tokenizer or sequence length are not the checkpoint's."""
    finetune: bool = False
    """Load the weights only: iteration, optimizer, schedule, RNG and data position start afresh."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is reported, and where."""

    log_interval: int = 10
    """Iterations between log lines and lines of metrics.jsonl."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard event files."""
    wandb_project: str | None = None
    """Weights & Biases project; needs `pip install wandb`."""
    wandb_exp_name: str | None = None
    """Name of the run in Weights & Biases."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

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
