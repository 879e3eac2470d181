"""Flags of tools/benchmark.py. Imports no torch: `--help` is instant."""

import dataclasses
from pathlib import Path
from typing import Literal

from megatron_ponder.config.schema import TokenizerType
from megatron_ponder.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainBenchmarkOptions:
    """How long to measure, and what besides our own step."""

    json: bool = False
    """Print one JSON object instead of a table."""
    steps: int = 3
    """Optimizer steps per round."""
    warmup_steps: int = 2
    """Steps of each side before the first round, not timed."""
    rounds: int = 5
    """Rounds of each side, in turns."""
    r_values: tuple[int, ...] = ()
    """Also measure time and memory of our step at each of these R."""
    plot: str | None = None
    """PNG to draw memory and time over R into; needs --r-values."""
    baseline: Literal["reference", "none"] = "reference"
    """What our step is compared with: the method on stock transformers layers (reference), or
    nothing (none), for settings that the reference does not have."""
    profile: str | None = None
    """JSON file to write a trace of one of our steps into, for Perfetto or chrome://tracing."""
    roofline: bool = False
    """Also set every pass of our forward beside the least time that its FLOPs and bytes allow."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: a number too small, or a plot of nothing.
        """
        for name in ("steps", "warmup_steps", "rounds"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)}: must be at least 1.")
        if any(r < 0 for r in self.r_values):
            raise ConfigError("--r-values: every R must be at least 0.")
        if self.plot and not self.r_values:
            raise ConfigError("--plot needs --r-values.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineBenchmarkOptions:
    """How long to measure a pipeline, and what to draw."""

    json: bool = False
    """Print one JSON object instead of a table."""
    steps: int = 10
    """Training steps that are timed; the fastest, which was disturbed least, is reported."""
    warmup_steps: int = 1
    """Steps before them, not timed."""
    timeline: str | None = None
    """PNG to draw the measured timeline of the fastest step into."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: a number too small.
        """
        for name in ("steps", "warmup_steps"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)}: must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsBenchmarkOptions:
    """Which kernels to time."""

    json: bool = False
    """Print one JSON object instead of a table."""
    only: tuple[str, ...] = ()
    """Names of kernels, as the table has them. None: all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointBenchmarkOptions:
    """How often to save, and where."""

    json: bool = False
    """Print one JSON object instead of sentences."""
    saves: int = 3
    """Checkpoints to write; the median is told."""
    folder: str | None = None
    """Where checkpoints are written; what is measured is this file system. None: the system's
    folder for temporary files. Nothing stays there."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: no save, or no folder.
        """
        if self.saves < 1:
            raise ConfigError(f"--saves {self.saves}: must be at least 1.")
        if self.folder is not None and not Path(self.folder).is_dir():
            raise ConfigError(f"--folder {self.folder}: no such folder; create it first.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessBenchmarkOptions:
    """What is tokenized, with what, how often."""

    json: bool = False
    """Print one JSON object instead of a table."""
    input: tuple[str, ...] = ()
    """Files, folders or globs as tools/preprocess_data.py takes them. None: the text of the running
    Python's standard library."""
    max_bytes: int = 50_000_000
    """Use no more than about this much text."""
    tokenizer_type: TokenizerType = "SentencePieceTokenizer"
    """As in training."""
    tokenizer_model: str | None = None
    """As in training. None: a SentencePiece model that is trained on some of the text."""
    vocab_size: int = 16_000
    """Pieces of the model that is trained."""
    word_cache: bool = False
    """Measure --word-cache too."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of workers to measure."""
    rounds: int = 3
    """Times that each side runs, in turns; medians are told."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: a number too small, or a tokenizer without its model.
        """
        for name in ("max_bytes", "rounds", "vocab_size"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)}: must be at least 1.")
        if not self.workers or any(number < 1 for number in self.workers):
            raise ConfigError("--workers: every number must be at least 1.")
        if self.tokenizer_type != "SentencePieceTokenizer" and self.tokenizer_model is None:
            raise ConfigError(f"--tokenizer-type {self.tokenizer_type} needs --tokenizer-model.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateBenchmarkOptions:
    """How much text is generated, how often."""

    json: bool = False
    """Print one JSON object instead of a table."""
    batch_size: int = 1
    """Texts that are continued together."""
    prompt_tokens: int = 512
    """Tokens of each prompt."""
    new_tokens: int = 64
    """Tokens that are put behind each prompt with keys and values kept."""
    recomputed_tokens: int = 4
    """How many of them are also computed without: each takes as long as a prompt."""
    rounds: int = 3
    """Times that each side runs, in turns; medians are told."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: a number too small, or more tokens recomputed than there are.
        """
        for name in ("batch_size", "prompt_tokens", "new_tokens", "recomputed_tokens", "rounds"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)}: must be at least 1.")
        if self.recomputed_tokens > self.new_tokens:
            raise ConfigError(
                f"--recomputed-tokens {self.recomputed_tokens}: must be at most --new-tokens "
                f"{self.new_tokens}."
            )
