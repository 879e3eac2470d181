"""Flags of tools/convert_checkpoint.py. Imports no torch: `--help` is instant."""

import dataclasses
import re
from typing import Literal

from megatron_ponder.config.schema import TokenizerType
from megatron_ponder.errors import ConfigError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """A Hugging Face folder becomes a checkpoint that training, evaluation and export load."""

    hf_path: str
    """Folder with config.json and safetensors files (one, or several with an index)."""
    save: str
    """Checkpoint folder to make, for --load of training: its iteration 0, weights only."""
    method: str | None = None
    """Method of the checkpoint to make. None: the folder's own, vanilla for a stock model."""
    num_latent_thoughts: int | None = None
    """K. None: the folder's, or 1."""
    num_jacobi_iterations: int | None = None
    """R. None: the folder's, or 3."""
    scale_embeds: bool | None = None
    """Scale token embeddings. None: as the folder says; thoughts on a stock model: no, because its
    layers know unscaled ones."""
    interpolation: bool | None = None
    """Feed back mixtures of embeddings (ponderlm2). None: as the folder says, or no."""
    pause_token_id: int | None = None
    """Vocabulary row of the pause token. None: the folder's; a stock model gets one row more."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this, as further training is to have it."""
    tokenizer_model: str | None = None
    """Tokenizer of further training. None: the folder's tokenizer.json or tokenizer.model."""
    tokenizer_type: TokenizerType | None = None
    """Kind of it. None: by its name; NullTokenizer: leave the folder's out."""
    ignore_config_keys: tuple[str, ...] = ()
    """Keys of config.json that this converter does not know and that have no effect on numbers."""
    verify: bool = True
    """Before the checkpoint takes its name, load it and the folder, and compare their logits."""
    trust_remote_code: bool = False
    """Let the comparison run the code that comes with the folder. Ours never needs it."""
    overwrite: bool = False
    """If --save holds an earlier import, replace it once the new one is complete. Other files
    stay."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """A checkpoint becomes a folder that transformers loads without this package."""

    load: str
    """Checkpoint folder, as --save of a training run of any layout. Trusted, as in training."""
    hf_path: str
    """Folder to make."""
    ckpt_step: int | None = None
    """Export this iteration instead of the latest."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Of the written weights. None: as the run computes."""
    max_shard_size: str = "5GB"
    """Weights beyond this go to a further file: a number and KB, MB, GB or KiB, MiB, GiB."""
    tokenizer_model: str | None = None
    """Path of the tokenizer. None: where it was during training."""
    without_tokenizer: bool = False
    """Write no tokenizer."""
    verify: bool = True
    """Before the folder takes its name, load it and the checkpoint, and compare their logits."""
    overwrite: bool = False
    """If --hf-path holds an earlier export, replace it once the new one is complete. Other files
    stay."""

    def __post_init__(self) -> None:
        """Refuse a size that is none.

        Raises:
            ConfigError: --max-shard-size or --ckpt-step mean nothing.
        """
        self.max_shard_bytes  # noqa: B018
        if self.ckpt_step is not None and self.ckpt_step < 0:
            raise ConfigError(f"--ckpt-step {self.ckpt_step}: must be at least 0.")

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", self.max_shard_size.strip())
        if match is None or match.group(2).upper() not in _UNITS or not float(match.group(1)) > 0:
            raise ConfigError(
                f"--max-shard-size {self.max_shard_size}: must be a number and a unit, e.g. 5GB or "
                "500MiB."
            )
        return int(float(match.group(1)) * _UNITS[match.group(2).upper()])
