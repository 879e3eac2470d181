"""Loading a checkpoint: all of it to go on, or the weights only.

A checkpoint of another layout is resharded by megatron-core. What does not fit is refused before a
tensor is read, with the settings that differ.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ponder.checkpoint import storage
from megatron_ponder.checkpoint.common_state import load_common_state, load_sharded
from megatron_ponder.checkpoint.comparison import (
    REPEATED_SAMPLES,
    data_differences,
    other_differences,
    shape_differences,
)
from megatron_ponder.checkpoint.optimizer_state import load_optimizer, optimizer_request
from megatron_ponder.checkpoint.progress import Progress
from megatron_ponder.checkpoint.rng import reseed, restore_random_state
from megatron_ponder.checkpoint.state import (
    WEIGHTS_ONLY,
    load_chunks,
    model_state,
    parallel_sizes,
    random_state_object,
)
from megatron_ponder.checkpoint.stored_config import read_config
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import CheckpointConfig
from megatron_ponder.data.manifest import describe_tokenizer
from megatron_ponder.data.tokenizers import Tokenizer
from megatron_ponder.errors import CheckpointError
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
from megatron_ponder.runtime.distributed import ranks

logger = logging.getLogger(__name__)


def find_checkpoint(config: CheckpointConfig) -> Path | None:
    """The checkpoint that a run is to start from; None for a fresh start.

    A run that resumes (--load is also --save) takes its newest checkpoint with complete files, and
    logs what is wrong with newer ones. Without --save, or with --ckpt-step, only the checkpoint
    that was asked for is taken.

    Raises:
        CheckpointError: --load names a folder without the wanted checkpoint, unless it is also
            --save and still empty; or no checkpoint is complete; or it is a Hugging Face folder.
    """
    if config.load is None:
        return None
    folder = Path(config.load)
    is_own = config.save is not None and Path(config.save).resolve() == folder.resolve()
    if config.ckpt_step is not None or not is_own:
        return locate(folder, config.ckpt_step)
    if not storage.stored_iterations(folder) and not (folder / storage.LATEST_FILE).is_file():
        storage.refuse_huggingface(folder)
        return None
    checkpoint, problems = storage.newest_complete(folder)
    if problems:
        logger.warning("resuming from %s. %s", checkpoint, " ".join(problems))
    return checkpoint


def locate(folder: Path, ckpt_step: int | None = None) -> Path:
    """A checkpoint in `folder`, the newest unless `ckpt_step` says otherwise, with files complete.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    checkpoint = storage.iteration_folder(folder, storage.choose_iteration(folder, ckpt_step))
    storage.check_files(checkpoint)
    return checkpoint


def load_checkpoint(
    config: ResolvedConfig,
    checkpoint: Path,
    *,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    data: dict[str, Any] | None = None,
) -> Progress:
    """Put model, optimizer, schedule and random generators where `checkpoint` left them.

    With --finetune only the weights are loaded, and of a checkpoint that was imported there is
    nothing else. Settings of this run beat those of the checkpoint;
    the ones that differ are logged.

    Args:
        config: resolved.
        checkpoint: from `find_checkpoint`.
        chunks: changed in place, like the two below.
        optimizer: of the chunks.
        scheduler: of the optimizer.
        data: fingerprint of this run's training data; None: do not compare it.

    Returns:
        How far the run has come; all zero with --finetune.

    Raises:
        CheckpointError: the checkpoint does not fit or cannot be read.
    """
    stored = read_config(checkpoint)
    modules = [chunk.module for chunk in chunks]
    plain = {} if config.checkpoint.finetune else _read_plain(checkpoint)
    if config.checkpoint.finetune or plain.get(WEIGHTS_ONLY):
        load_weights(checkpoint, modules, config)
        optimizer.reload_model_params()
        logger.info("loaded weights of %s; everything else starts afresh", checkpoint)
        return Progress(data=data or {})
    _check_shape(checkpoint, stored, config)
    for difference in other_differences(stored, config):
        logger.info("setting changed since the checkpoint: %s", difference)
    progress = Progress(**plain["progress"])
    if data is not None and progress.iteration < config.training.train_iters:
        _check_data(checkpoint, progress.data, data, config.checkpoint.override_data)
        progress.data = data
    here = ranks()
    is_same_layout = plain["layout"] == parallel_sizes(here)

    request: ShardedStateDict = {"model": model_state(modules)}
    if is_same_layout:
        request["rng_state"] = random_state_object(here, None)
    loaded = _read(request, checkpoint)
    load_chunks(modules, loaded["model"])
    check_finite(checkpoint, modules)
    # Separately: an fp32 checkpoint serves as weights and as fp32 copy of the weights, and one
    # request must not name a tensor twice. A request is used up by loading.
    request = {
        "optimizer": optimizer_request(optimizer, model_state(modules), stored=stored, ours=config)
    }
    load_optimizer(optimizer, _read(request, checkpoint)["optimizer"], progress.updates)
    scheduler.load_state_dict(plain["opt_param_scheduler"])
    if is_same_layout:
        restore_random_state(loaded["rng_state"])
    else:
        reseed(config.training.seed, progress.iteration)
        logger.info("random generators seeded anew: the checkpoint has layout %s", plain["layout"])
    logger.info("loaded checkpoint %s", checkpoint)
    return progress


def load_weights(checkpoint: Path, chunks: list[PonderGPTModel], config: ResolvedConfig) -> None:
    """Load the weights of a checkpoint into the unwrapped model of any layout.

    Args:
        checkpoint: from `locate`.
        chunks: this rank's, built from `config`.
        config: resolved.

    Raises:
        CheckpointError: the checkpoint does not fit or cannot be read.
    """
    _check_shape(checkpoint, read_config(checkpoint), config)
    loaded = _read({"model": model_state(chunks)}, checkpoint)
    load_chunks(chunks, loaded["model"])
    check_finite(checkpoint, chunks)


def check_finite(checkpoint: Path, chunks: Sequence[torch.nn.Module]) -> None:
    """Refuse weights that are NaN or infinite; every number they give would be, too.

    Raises:
        CheckpointError: a weight of this rank is not finite.
    """
    weights = [named for chunk in chunks for named in chunk.named_parameters()]
    is_finite = torch.stack([weight.detach().isfinite().all() for _, weight in weights]).tolist()
    bad = [name for (name, _), fine in zip(weights, is_finite, strict=True) if not fine]
    if bad:
        raise CheckpointError(
            f"{checkpoint}: {len(bad)} of {len(weights)} weights hold NaN or infinity, the first "
            f"is {bad[0]}. The training diverged before it was saved, or a file is damaged. Give "
            "an earlier checkpoint with --ckpt-step."
        )


def check_trained_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """Refuse another tokenizer than that of the data that a checkpoint was trained on.

    An import, which does not know it, takes any.

    Raises:
        CheckpointError: it is another one, or the checkpoint cannot be read.
    """
    data = _read_plain(checkpoint).get("progress", {}).get("data", {})
    ours = {"tokenizer": dict(tokenizer.unique_identifiers)}
    stored = {"tokenizer": data["tokenizer"]} if data.get("tokenizer") else {}
    if data_differences(stored, ours):
        raise CheckpointError(
            f"{checkpoint} was trained with another tokenizer: with "
            f"{describe_tokenizer(data['tokenizer'])}; the one given is "
            f"{describe_tokenizer(ours['tokenizer'])}. Give its own with --tokenizer-model."
        )


def _check_shape(checkpoint: Path, stored: ResolvedConfig, config: ResolvedConfig) -> None:
    """Refuse weights that have no place in this run's model."""
    differences = shape_differences(stored, config)
    if differences:
        raise CheckpointError(
            f"{checkpoint} holds a model of another shape: {'; '.join(differences)}. Use the "
            "checkpoint's settings, or start without --load."
        )


def _check_data(
    checkpoint: Path, stored: dict[str, Any], ours: dict[str, Any], is_overridden: bool
) -> None:
    """Refuse to go on at a position in other data, unless told to."""
    samples = stored.get(REPEATED_SAMPLES), ours.get(REPEATED_SAMPLES)
    if stored and samples[0] != samples[1]:
        logger.warning(
            "the data is repeated, and its order depends on the number of samples in the run (%s "
            "in the checkpoint, %s now): from here on it is another order",
            *samples,
        )
    differences = "; ".join(data_differences(stored, ours))
    if not differences:
        return
    if not is_overridden:
        raise CheckpointError(
            f"{checkpoint} was trained on other data, or in another order: {differences}. Its "
            "position there means nothing here. Give the run's data and settings again, "
            "--override-data to go on at the same number of samples anyway, or --finetune to start "
            "afresh from its weights."
        )
    logger.warning("--override-data: the data is not the checkpoint's: %s", differences)


def _read_plain(checkpoint: Path) -> dict[str, Any]:
    """The part of a checkpoint that is not sharded."""
    try:
        return load_common_state(checkpoint)
    except CheckpointingException as error:
        raise _unreadable(checkpoint, error) from error


def _read(request: ShardedStateDict, checkpoint: Path) -> dict[str, Any]:
    """Fill a request."""
    try:
        return load_sharded(request, checkpoint)
    except (CheckpointingException, CheckpointException) as error:
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: Path, error: BaseException) -> CheckpointError:
    """megatron-core's failure in this package's terms."""
    return CheckpointError(
        f"{checkpoint} cannot be read: {error}. It may have been written by a newer "
        "megatron-core than 0.19, or its files may be damaged."
    )
