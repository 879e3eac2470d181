"""What `tools/benchmark.py` can measure: the flags of each command, and the module behind it.

Imports no torch: `--help` is instant.
"""

import dataclasses
import importlib
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_ponder.config.schema import RunConfig, TokenizerType
from megatron_ponder.errors import ConfigError
from megatron_ponder.files import write_json

Variable = Literal[
    "thoughts",
    "jacobi-iterations",
    "seq-length",
    "width",
    "depth",
    "micro-batch",
    "method",
    "recomputation",
    "data-parallel",
    "pipeline",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Flags of every command."""

    json: bool = False
    """Print one JSON object instead of tables."""
    record: str | None = None
    """File to write that JSON object to."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: a count below 1.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                flag = field.name.replace("_", "-")
                raise ConfigError(f"--{flag} {value}: must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(BenchmarkOptions):
    """How long to measure, and what besides our own step."""

    steps: int = 3
    """Optimizer steps per round."""
    warmup_steps: int = 2
    """Untimed steps of each side before the first round."""
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
    """Also compare each pass of our forward with the least time that its FLOPs and bytes allow."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: a number is too small, or --plot has nothing to draw.
        """
        super().__post_init__()
        if any(r < 0 for r in self.r_values):
            raise ConfigError("--r-values: every R must be at least 0.")
        if self.plot and not self.r_values:
            raise ConfigError("--plot needs --r-values.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvesOptions(BenchmarkOptions):
    """Which curves, through which points, measured how often."""

    variables: tuple[Variable, ...] = get_args(Variable)
    """Settings to vary, one at a time; all others stay as in the base."""
    k_values: tuple[int, ...] = (0, 1, 2, 3)
    """thoughts: each K."""
    r_values: tuple[int, ...] = (0, 1, 2, 3, 4)
    """jacobi-iterations: each R."""
    factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """seq-length, width, depth, micro-batch: multiples of the base's. The global batch grows with
    the micro-batch; the width of a head stays."""
    ranks: tuple[int, ...] = (1, 2)
    """data-parallel, pipeline: numbers of ranks, each with a core (one thread) or a GPU of its own.
    The global batch stays."""
    rounds: int = 5
    """Rounds in which base and point take turns."""
    steps: int = 1
    """Optimizer steps of each in a round."""
    warmup_steps: int = 1
    """Untimed steps of each before the first round."""
    plot: str | None = None
    """PNG to draw into, a panel for each variable."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: a number is too small, or there is nothing to measure.
        """
        super().__post_init__()
        if not self.variables:
            raise ConfigError("--variables: give at least one.")
        if min((*self.k_values, *self.r_values), default=0) < 0:
            raise ConfigError("--k-values and --r-values: every number must be at least 0.")
        if min(self.factors, default=1) <= 0 or min(self.ranks, default=1) < 1:
            raise ConfigError("--factors must be above 0, --ranks at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsOptions(BenchmarkOptions):
    """Which kernels to time."""

    only: tuple[str, ...] = ()
    """Names of kernels, as the table has them. None: all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions(BenchmarkOptions):
    """How often to save, and where."""

    saves: int = 3
    """Checkpoints to write; the median is reported."""
    folder: str | None = None
    """Folder on the file system to measure. None: the system's folder for temporary files. The
    checkpoints are deleted."""

    def __post_init__(self) -> None:
        """Check number and folder.

        Raises:
            ConfigError: no save, or no such folder.
        """
        super().__post_init__()
        if self.folder is not None and not Path(self.folder).is_dir():
            raise ConfigError(f"--folder {self.folder}: no such folder; create it first.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessOptions(BenchmarkOptions):
    """Which text, which tokenizer, how often."""

    input: tuple[str, ...] = ()
    """Files, folders or globs as tools/preprocess_data.py takes them. None: the text of the running
    Python's standard library."""
    max_bytes: int = 50_000_000
    """Approximate limit of the text to use."""
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
    """Runs of each side, in turns; medians are reported."""

    def __post_init__(self) -> None:
        """Check numbers and tokenizer.

        Raises:
            ConfigError: a number is too small, or a tokenizer has no model.
        """
        super().__post_init__()
        if not self.workers or any(number < 1 for number in self.workers):
            raise ConfigError("--workers: every number must be at least 1.")
        if self.tokenizer_type != "SentencePieceTokenizer" and self.tokenizer_model is None:
            raise ConfigError(f"--tokenizer-type {self.tokenizer_type} needs --tokenizer-model.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(BenchmarkOptions):
    """How much text to generate, how often."""

    batch_size: int = 1
    """Texts to continue together."""
    prompt_tokens: int = 512
    """Tokens of each prompt."""
    new_tokens: int = 64
    """Tokens to generate for each prompt with the cache."""
    recomputed_tokens: int = 4
    """How many of them to generate without the cache too; each takes as long as a prompt."""
    rounds: int = 3
    """Runs of each side, in turns; medians are reported."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: a number is too small, or more tokens are recomputed than generated.
        """
        super().__post_init__()
        if self.recomputed_tokens > self.new_tokens:
            raise ConfigError(
                f"--recomputed-tokens {self.recomputed_tokens}: must be at most --new-tokens "
                f"{self.new_tokens}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One command of `tools/benchmark.py`."""

    options: type[BenchmarkOptions]
    """Its flags."""
    takes_settings: bool = True
    """Whether it takes the settings of pretraining too."""


COMMANDS = {
    "train": Command(options=TrainOptions),
    "curves": Command(options=CurvesOptions),
    "kernels": Command(options=KernelsOptions),
    "checkpoint": Command(options=CheckpointOptions),
    "generate": Command(options=GenerateOptions),
    "preprocess": Command(options=PreprocessOptions, takes_settings=False),
}


def run_command(
    name: str, options: BenchmarkOptions, config: RunConfig
) -> tuple[dict[str, Any], str]:
    """Run `benchmarks/<name>.py` and write the files that the flags ask for.

    Args:
        name: of the command.
        options: its flags.
        config: settings of pretraining, as given.

    Returns:
        The result, and its text.

    Raises:
        PonderError: the settings cannot work.
    """
    module = importlib.import_module(f"benchmarks.{name}")
    result = module.measure(options, config)
    if options.record:
        write_json(Path(options.record), result)
    if isinstance(options, TrainOptions | CurvesOptions) and options.plot:
        module.draw(result, Path(options.plot))
    return result, module.as_text(result)
