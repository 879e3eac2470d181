"""Files of a checkpoint folder, and how they come and go without a moment of being half there.

    <folder>/latest_checkpointed_iteration.txt    the newest iteration, as text
    <folder>/iter_0000100/                        one checkpoint:
        *.distcp, .metadata, metadata.json, ...       megatron-core's torch_dist format
        run_config.yaml                               the settings of the run as given
        resolved_config.yaml                          the same with all derived values
        files.json                                    size of each of the files above

A checkpoint is written into a hidden folder and renamed when it is complete; the text file is
replaced after that, and old checkpoints are removed last. `files.json` tells a truncated copy from
a good one before any rank starts to load. Imports no torch.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_ponder.errors import CheckpointError
from megatron_ponder.files import write_text

LATEST_FILE = "latest_checkpointed_iteration.txt"
CONFIG_FILE = "run_config.yaml"
RESOLVED_CONFIG_FILE = "resolved_config.yaml"
SIZES_FILE = "files.json"
_ITERATION_FOLDER = re.compile(r"iter_(\d{7,})")


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return folder / f"iter_{iteration:07d}"


def unfinished_folder(folder: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration is written before it is complete."""
    return folder / f".iter_{iteration:07d}.unfinished"


def stored_iterations(folder: Path) -> list[int]:
    """Iterations with a complete checkpoint, in order; none if the folder does not exist."""
    if not folder.is_dir():
        return []
    names = (_ITERATION_FOLDER.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match.group(1)) for match in names if match)


def latest_iteration(folder: Path) -> int | None:
    """The newest checkpoint's iteration; None where there is none.

    Raises:
        CheckpointError: the text file does not hold a number.
    """
    path = folder / LATEST_FILE
    if not path.is_file():
        return None
    content = path.read_bytes()[:40].strip()
    if not content.isdigit():
        raise CheckpointError(
            f"{path} holds {content!r}, not an iteration. Write the iteration to load into it, "
            "or give --ckpt-step."
        )
    return int(content)


def choose_iteration(folder: Path, ckpt_step: int | None) -> int:
    """The iteration to load: `ckpt_step`, else the newest.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    stored = stored_iterations(folder)
    wanted = ckpt_step if ckpt_step is not None else latest_iteration(folder)
    if wanted is None:
        refuse_huggingface(folder)
        raise CheckpointError(_no_checkpoint(folder))
    if wanted not in stored:
        source = "--ckpt-step asks" if ckpt_step is not None else f"{LATEST_FILE} asks"
        have = ", ".join(map(str, stored)) or "none"
        raise CheckpointError(
            f"{folder}: {source} for iteration {wanted}, which is not there. "
            f"Stored iterations: {have}."
        )
    return wanted


def newest_complete(folder: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint of a run whose files are complete.

    Iterations after the one in the text file are left from before the run was resumed at an earlier
    one; they count only if the text file does not help.

    Returns:
        The checkpoint's folder, and what is wrong with the text file and with newer checkpoints.

    Raises:
        CheckpointError: none is complete.
    """
    problems = []
    stored = stored_iterations(folder)
    try:
        newest = latest_iteration(folder)
        if newest is None:
            problems.append(f"{folder / LATEST_FILE} is missing.")
        elif newest not in stored:
            problems.append(f"{iteration_folder(folder, newest)} is missing.")
    except CheckpointError as error:
        newest = None
        problems.append(str(error))
    for iteration in reversed(stored):
        if newest is not None and iteration > newest:
            continue
        checkpoint = iteration_folder(folder, iteration)
        try:
            check_files(checkpoint)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        return checkpoint, problems
    raise CheckpointError(f"--load {folder}: no checkpoint is complete. {' '.join(problems)}")


def refuse_huggingface(folder: Path) -> None:
    """Refuse a folder that holds a Hugging Face model, where checkpoints are expected.

    Raises:
        CheckpointError: it does; the message names the command that converts it.
    """
    if (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: is a Hugging Face folder, not a checkpoint of this package. Convert it:\n"
            f"  python tools/convert_checkpoint.py import --hf-path {folder} --save NEW\n"
            "Then give NEW as --load."
        )


def _no_checkpoint(folder: Path) -> str:
    """Why a folder cannot be loaded from."""
    if not folder.is_dir():
        return f"--load {folder}: there is no such folder."
    if _ITERATION_FOLDER.fullmatch(folder.name):
        return f"--load {folder}: give the folder above, with --ckpt-step for its iteration."
    return (
        f"--load {folder}: holds no checkpoint, there is no {LATEST_FILE} in it. Give a folder "
        "that was --save of a run."
    )


def publish(folder: Path, iteration: int) -> Path:
    """Make an unfinished checkpoint the newest one; called by one rank.

    Returns:
        The folder of the checkpoint.
    """
    unfinished, final = unfinished_folder(folder, iteration), iteration_folder(folder, iteration)
    sizes = {str(path.relative_to(unfinished)): path.stat().st_size for path in _files(unfinished)}
    write_text(unfinished / SIZES_FILE, json.dumps(sizes, indent=1, sort_keys=True) + "\n")
    replaced = folder / f".iter_{iteration:07d}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        final.rename(replaced)
    unfinished.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    write_text(folder / LATEST_FILE, f"{iteration}\n")
    return final


def prune(folder: Path, newest: int, keep: int | None) -> list[int]:
    """Remove checkpoints older than `newest` beyond the `keep - 1` last of them.

    Called by one rank. Later iterations, left from a run that was taken up again at an earlier
    one, stay.

    Returns:
        The iterations that were removed.
    """
    if keep is None:
        return []
    older = [iteration for iteration in stored_iterations(folder) if iteration < newest]
    removed = older[: max(len(older) - (keep - 1), 0)]
    for iteration in removed:
        shutil.rmtree(iteration_folder(folder, iteration))
    return removed


def check_files(checkpoint: Path) -> None:
    """Compare a checkpoint's files with the sizes they were written with.

    Raises:
        CheckpointError: a file is missing or has another size.
    """
    sizes_path = checkpoint / SIZES_FILE
    if not sizes_path.is_file() and not (checkpoint / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{checkpoint} was not written by this package: {SIZES_FILE} and {CONFIG_FILE} are "
            "missing. Checkpoints of Megatron-LM cannot be loaded; convert the model to Hugging "
            "Face's format with its own tools, then with tools/convert_checkpoint.py import."
        )
    if not sizes_path.is_file():
        raise CheckpointError(
            f"{checkpoint} is incomplete: {SIZES_FILE} is missing. Copy the checkpoint again, or "
            "load another iteration with --ckpt-step."
        )
    damaged = list(_damage(checkpoint, _read_sizes(sizes_path)))
    if damaged:
        raise CheckpointError(
            f"{checkpoint} is damaged: {'; '.join(damaged)}. Copy the checkpoint again, or load "
            "another iteration with --ckpt-step."
        )


def _read_sizes(path: Path) -> dict[str, int]:
    try:
        sizes = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        sizes = None
    if not isinstance(sizes, dict) or any(type(size) is not int for size in sizes.values()):
        raise CheckpointError(
            f"{path} is damaged. Copy the checkpoint again, or load another iteration with "
            "--ckpt-step."
        )
    return sizes


def _damage(checkpoint: Path, sizes: dict[str, int]) -> Iterator[str]:
    """What is wrong with each damaged file."""
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size} bytes, was written with {size}"


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
