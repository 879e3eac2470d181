"""Flags of tools/evaluate.py and tools/generate.py. Imports no torch: `--help` is instant."""

import dataclasses

from megatron_ponder.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Which model, and how it is run. Its shape, method and precision come from the checkpoint."""

    load: str
    """Checkpoint folder, as --save of a training run. Written by any number of ranks; read by one
    process, or under torchrun by as many as share each layer's weights."""
    ckpt_step: int | None = None
    """Load this iteration instead of the latest."""
    num_jacobi_iterations: int | None = None
    """R of every forward. None: the checkpoint's (not the random one of its training)."""
    tokenizer_model: str | None = None
    """Path of the tokenizer. None: where it was during training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What is scored: one of --data-path, --text-file and --token-ids."""

    checkpoint: CheckpointOptions
    """The model."""
    data_path: str | None = None
    """Prefix of an indexed dataset (tools/preprocess_data.py writes one); all of it is scored."""
    text_file: tuple[str, ...] = ()
    """Text or JSON Lines files, folders or globs; tokenized here, an end id after each document."""
    token_ids: str | None = None
    """A .npy file of integers [B, L]: rows that stand alone. Needs --dump-logits."""
    dump_logits: str | None = None
    """The .npy file to write for --token-ids: logits [B, L, V], fp32, without padded columns."""
    seq_length: int | None = None
    """Tokens per window. None: as in training."""
    micro_batch_size: int = 8
    """Windows per forward; changes speed and memory only."""
    max_tokens: int | None = None
    """Score no more than the first so many tokens. None: all."""

    def __post_init__(self) -> None:
        """Refuse what does not go together.

        Raises:
            ConfigError: none or several inputs, or half of a pair.
        """
        inputs = [self.data_path, self.text_file, self.token_ids]
        if sum(bool(given) for given in inputs) != 1:
            raise ConfigError("give exactly one of --data-path, --text-file and --token-ids.")
        if bool(self.token_ids) != bool(self.dump_logits):
            raise ConfigError("--token-ids and --dump-logits go together: give both or neither.")
        for name in ("seq_length", "micro_batch_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen."""

    max_new_tokens: int = 100
    """Stop after so many tokens, or at the end of the document."""
    temperature: float = 1.0
    """Divides the logits: below 1 safer, above 1 wilder. 0: always the likeliest token (greedy)."""
    top_k: int = 0
    """Only the k likeliest tokens take part. 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability take part. 1: all."""
    seed: int = 1234
    """Of the draws: the same seed gives the same text."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ConfigError: a value is out of its range.
        """
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens {self.max_new_tokens}: must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature}: must be at least 0, and finite.")
        if self.top_k < 0:
            raise ConfigError(f"--top-k {self.top_k}: must be at least 0.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: must be above 0 and at most 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What is continued, and how."""

    checkpoint: CheckpointOptions
    """The model."""
    sampling: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    """The choice of each token."""
    prompt: str
    """Text to continue. Empty: a new document."""
