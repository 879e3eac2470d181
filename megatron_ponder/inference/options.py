"""Flags of tools/evaluate.py and tools/generate.py. Imports no torch: `--help` is instant."""

import dataclasses

import tyro

from megatron_ponder.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Which model, and how it is run. Its shape, method and precision come from the checkpoint."""

    load: str
    """Checkpoint folder, as --save of a training run. Written by any number of ranks; read by one
    process, or under torchrun by as many as share each layer's weights."""
    ckpt_step: int | None = None
    """Load this iteration instead of the latest."""
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
    num_jacobi_iterations: tuple[int, ...] = ()
    """R of the forward; several give figures for each, in little more time than the largest alone.
    None: the checkpoint's (not the random one of its training)."""
    seq_length: int | None = None
    """Tokens per window. None: as in training."""
    stride: int | None = None
    """Tokens between the beginnings of two windows, of which only the last so many tokens are
    scored: all but the first have at least seq_length - stride tokens before them. None: windows
    do not overlap."""
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
        for name in ("seq_length", "stride", "micro_batch_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1.")
        _check_iterations(*self.num_jacobi_iterations)
        if self.dump_logits and len(self.num_jacobi_iterations) > 1:
            raise ConfigError("--dump-logits writes the logits of one --num-jacobi-iterations.")


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
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; again for more texts. Empty: a new document."""
    prompt_file: str | None = None
    """Texts to continue, instead of --prompt: one per line; or, in a .jsonl file, an object with a
    "prompt" (or "text") per line. Empty lines are left out."""
    num_jacobi_iterations: int | None = None
    """R of the prompt's thoughts (without a cache: of all). None: the checkpoint's."""
    use_cache: bool = True
    """Keep keys and values, thoughts included. Otherwise every new token computes the training
    forward over the whole text: slow, and for ponderlm2 not quite the same."""
    micro_batch_size: int = 8
    """Texts that are continued together; changes speed and memory only."""
    json: bool = False
    """Print one JSON object at the end instead of texts as they come."""

    def __post_init__(self) -> None:
        """Refuse what does not go together.

        Raises:
            ConfigError: no text, or two sources; a value out of its range.
        """
        if bool(self.prompt) == (self.prompt_file is not None):
            raise ConfigError("give either --prompt (as often as you like) or --prompt-file.")
        if self.micro_batch_size < 1:
            raise ConfigError(f"--micro-batch-size {self.micro_batch_size}: must be at least 1.")
        if self.num_jacobi_iterations is not None:
            _check_iterations(self.num_jacobi_iterations)


def _check_iterations(*numbers: int) -> None:
    """Refuse a negative R."""
    for number in numbers:
        if number < 0:
            raise ConfigError(f"--num-jacobi-iterations {number}: must be at least 0.")
