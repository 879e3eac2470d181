"""Source and result of a conversion on the same ids, in fp32, in one process.

One model after the other, so that memory is needed for one (`forget_model` between them). The ids
are few and drawn at random: enough to tell any weight in a wrong place, no measure of quality.
"""

import gc
import json
import logging
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_ponder.checkpoint.reader import load_weights
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.convert.exported_code import class_name
from megatron_ponder.convert.stored_parameters import build_bare_model
from megatron_ponder.errors import ConversionError
from megatron_ponder.model.size import count_parameters
from megatron_ponder.runtime.device import device

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Of the larger of 1 and the largest logit: other kernels add up in another order."""
BATCH_SIZE, MAX_TOKENS = 2, 16
MEMORY_FACTOR = 1.3
"""Memory over that of fp32 weights: logits, activations, buffers of loading."""


def check_memory(config: ResolvedConfig) -> None:
    """Refuse to begin what would not fit.

    Raises:
        ConversionError: the model in fp32 is larger than the memory that is free.
    """
    needed = MEMORY_FACTOR * 4 * count_parameters(config.model).total
    free = psutil.virtual_memory().available
    if needed > free:
        raise ConversionError(
            f"Comparing logits needs about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} "
            "are free. Convert where there is more, or without comparing: --no-verify."
        )


def forget_model() -> None:
    """Free what a model that nobody holds any more left in cycles of references."""
    gc.collect()


def draw_ids(vocab_size: int, max_tokens: int) -> Tensor:
    """Token ids, int64 [b, s]."""
    generator = torch.Generator().manual_seed(0)
    size = (BATCH_SIZE, min(MAX_TOKENS, max_tokens))
    return torch.randint(vocab_size, size, generator=generator)


@torch.no_grad()
def native_logits(
    checkpoint: Path, config: ResolvedConfig, ids: Tensor, rounded_to: torch.dtype | None = None
) -> Tensor:
    """Logits of a checkpoint, fp32 [b, s, v]. Needs the process groups of one process.

    Args:
        checkpoint: the folder of an iteration.
        config: the run's for one process; computed is in fp32.
        ids: int64 [b, s].
        rounded_to: round the weights to this dtype first, as the result has them.
    """
    model = build_bare_model(config.replaced(bf16=False))
    load_weights(checkpoint, [model], config)
    if rounded_to is not None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(rounded_to))
    model.eval()
    plan = model.method.plan(config.method.num_jacobi_iterations)
    logits: Tensor = (
        model(ids.to(device()), None, plan)[..., : config.model.vocab_size].float().cpu()
    )
    return logits


@torch.no_grad()
def folder_logits(
    folder: Path, ids: Tensor, *, ours: str | None, trust_remote_code: bool
) -> Tensor:
    """Logits of a Hugging Face folder, fp32 [b, s, v].

    Args:
        folder: to load.
        ids: int64 [b, s].
        ours: the architecture, if the model is one of our exported classes: then this package's
            copy of their code is run, never the folder's. None: transformers decides.
        trust_remote_code: whether transformers may run code from the folder.

    Raises:
        ConversionError: transformers cannot load it.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loader: Any = transformers.AutoModelForCausalLM
    if ours is not None:
        module = import_module("megatron_ponder.convert.remote_code.modeling_ponder")
        loader = getattr(module, class_name(ours))
    more: dict[str, Any] = {} if ours is not None else {"trust_remote_code": trust_remote_code}
    try:
        model = loader.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, **more
        )
        logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits.float()
    except Exception as error:  # transformers raises anything, by what is odd in a folder
        raise ConversionError(
            f"{folder}: transformers cannot run it, so that there is nothing to compare with: "
            f"{error!r:.500}. --no-verify converts without comparing."
        ) from error
    return logits


def source_logits(
    folder: Path,
    ids: Tensor,
    *,
    architecture: str,
    config: Mapping[str, Any] | None,
    trust_remote_code: bool,
) -> Tensor:
    """Logits of a folder to import, fp32 [b, s, v].

    Args:
        folder: with config and weights.
        ids: int64 [b, s].
        architecture: the folder's.
        config: for a model with a method, config.json as our exported class reads it: the folder's
            weights are loaded with that, because its own may have the authors' keys only.
        trust_remote_code: run the folder's code instead.
    """
    if config is None or trust_remote_code:
        return folder_logits(folder, ids, ours=None, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory() as made:
        for path in folder.iterdir():
            if path.is_file() and path.name != "config.json" and path.suffix != ".py":
                (Path(made) / path.name).symlink_to(path.resolve())
        (Path(made) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder_logits(Path(made), ids, ours=architecture, trust_remote_code=False)


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a weight with which no logits could be compared.

    Raises:
        ConversionError: it holds NaN or infinity.
    """
    num_bad = tensor.numel() - int(tensor.isfinite().sum())
    if num_bad:
        raise ConversionError(
            f"{name}: {num_bad} of {tensor.numel()} values are NaN or infinite, so that the model "
            "computes nothing. Take the weights from before its training diverged; --no-verify "
            "converts them as they are."
        )


def compare(source: Tensor, result: Tensor) -> None:
    """Report the largest difference of logits.

    Args:
        source: [b, s, v].
        result: [b, s, v or more]; columns that the source does not have are left out.

    Raises:
        ConversionError: it is too large.
    """
    if not source.isfinite().all():
        raise ConversionError(
            "The source's own logits are not finite numbers, so that the result cannot be compared "
            "with them: its weights overflow fp32. --no-verify converts all the same."
        )
    difference = (result[..., : source.size(-1)] - source).abs()
    largest = float(torch.nan_to_num(difference, nan=float("inf")).max())
    allowed = TOLERANCE * max(1.0, float(source.abs().max()))
    logger.info("largest difference of logits: %.2e (allowed: %.2e)", largest, allowed)
    if not largest <= allowed:
        raise ConversionError(
            f"Source and result differ: their logits by up to {largest:.2e}, allowed are "
            f"{allowed:.2e}. Nothing was written. Please report the model; --no-verify converts "
            "all the same."
        )
