"""Scores text with a trained model: loss, perplexity and bits per byte; or dumps its logits.

The text is one stream of ids, documents packed and ended as in training, that starts behind the
end of a document. It is cut into windows of `seq_length` tokens; every token is predicted exactly
once, from what stands before it in its window. Windows do not overlap unless a stride says so. The
forward is the training path in evaluation mode, with one R or several. Left out: tasks.
"""

import itertools
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy
import torch
from torch import Tensor

from megatron_ponder import log
from megatron_ponder.errors import CheckpointError, ConfigError, DataError
from megatron_ponder.inference.loading import LoadedModel, loaded_model
from megatron_ponder.inference.options import EvaluateOptions
from megatron_ponder.inference.stream import Stream, read_stream
from megatron_ponder.ponder.plan import PassPlan
from megatron_ponder.runtime.distributed import is_rank_zero


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Do what tools/evaluate.py is asked for.

    Returns:
        What is printed, by name.

    Raises:
        PonderError: the checkpoint, the data or the options cannot be used.
    """
    iterations = tuple(dict.fromkeys(options.num_jacobi_iterations))
    with loaded_model(options.checkpoint, iterations[0] if iterations else None) as loaded:
        config = loaded.config
        result: dict[str, Any] = {
            "checkpoint": str(loaded.checkpoint),
            "method": config.method.method,
            "num_latent_thoughts": config.method.num_latent_thoughts,
            "num_jacobi_iterations": config.method.num_jacobi_iterations,
            "precision": "bf16" if config.training.bf16 else "fp32",
        }
        if options.token_ids is not None:
            return result | _dump_logits(loaded, options)
        is_text = config.data.tokenizer_type != "NullTokenizer"
        stream = read_stream(options, loaded.tokenizer(), is_text=is_text)
        loaded.check_ids(stream.ids, options.data_path or " ".join(options.text_file))
        if len(iterations) <= 1:
            plans = [loaded.plan]
        else:
            plans = [loaded.model.method.plan(r) for r in iterations]
        common, rows = score(loaded, stream, plans, options)
        if len(rows) == 1:
            return result | rows[0] | common
        del result["num_jacobi_iterations"]
        by_r = [{"num_jacobi_iterations": r} | row for r, row in zip(iterations, rows, strict=True)]
        return result | {"by_r": by_r} | common


def windows(
    ids: Tensor, seq_length: int, micro_batch_size: int, stride: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of windows; those of other sizes (the last, or the first of a stride) come alone.

    Args:
        ids: int64 [n + 1].
        seq_length: tokens per window.
        micro_batch_size: windows per batch.
        stride: tokens from the begin of a window to that of the next, at most `seq_length`; None:
            `seq_length`.

    Yields:
        `tokens` int64 [b, s], and the `labels` of their last l tokens, int64 [b, l]; together the
        labels are `ids[1:]`, each once.
    """
    tokens, labels = ids[:-1], ids[1:]

    def sizes(span: tuple[int, int, int]) -> tuple[int, int]:
        begin, first_scored, end = span
        return end - begin, end - first_scored

    spans = _spans(tokens.numel(), seq_length, stride or seq_length)
    for _, alike in itertools.groupby(spans, key=sizes):
        while batch := list(itertools.islice(alike, micro_batch_size)):
            yield (
                torch.stack([tokens[begin:end] for begin, _, end in batch]),
                torch.stack([labels[first_scored:end] for _, first_scored, end in batch]),
            )


def _spans(num_tokens: int, seq_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Begin, first token that is scored, and end of each window."""
    begin = end = 0
    while end < num_tokens:
        first_scored, end = end, min(begin + seq_length, num_tokens)
        yield begin, first_scored, end
        begin += stride


def score(
    loaded: LoadedModel, stream: Stream, plans: Sequence[PassPlan], options: EvaluateOptions
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What holds for all plans, and the figures of each.

    Raises:
        CheckpointError: a loss is not finite.
        ConfigError: the windows do not fit the model.
    """
    seq_length = options.seq_length or loaded.config.data.seq_length
    _check_length(loaded, seq_length, "--seq-length")
    stride = options.stride or seq_length
    if stride > seq_length:
        raise ConfigError(
            f"--stride {stride}: must be at most the {seq_length} tokens of a window, or tokens "
            "would be left out."
        )
    num_tokens = stream.ids.numel() - 1
    loss_sums = [0.0] * len(plans)
    start_s = time.monotonic()
    with log.progress(total=num_tokens, description="evaluating", unit=" tokens") as bar:
        batches = windows(stream.ids, seq_length, options.micro_batch_size, stride)
        for tokens, labels in batches:
            for number, losses in enumerate(loaded.token_losses(tokens, labels, plans)):
                loss_sums[number] += float(losses.double().sum())
            bar.update(labels.numel())
    if not all(map(math.isfinite, loss_sums)):
        raise CheckpointError(
            f"{loaded.checkpoint}: the loss is not a finite number, so this text cannot be scored. "
            "The weights are finite, but what the model computes overflows; give another "
            "checkpoint with --ckpt-step."
        )
    common = {
        "num_tokens": num_tokens,
        "num_bytes": stream.num_bytes,
        "seq_length": seq_length,
        "stride": stride,
        "tokens_per_s": num_tokens / (time.monotonic() - start_s),
    }
    return common, [figures(loss_sum, num_tokens, stream.num_bytes) for loss_sum in loss_sums]


def figures(loss_sum: float, num_tokens: int, num_bytes: int | None) -> dict[str, float | None]:
    """A loss in nats, summed over a text, per token and per byte."""
    loss = loss_sum / num_tokens
    loss_per_byte = loss_sum / num_bytes if num_bytes else None
    return {
        "loss": loss,
        "perplexity": _exponential(loss),
        "bits_per_byte": None if loss_per_byte is None else loss_per_byte / math.log(2),
        "byte_perplexity": None if loss_per_byte is None else _exponential(loss_per_byte),
    }


def _exponential(loss: float) -> float:
    """e^loss, where that is a number."""
    return math.exp(loss) if loss < 700 else math.inf


def _dump_logits(loaded: LoadedModel, options: EvaluateOptions) -> dict[str, Any]:
    """Write the logits of given ids."""
    assert options.token_ids is not None and options.dump_logits is not None
    ids = read_ids(options.token_ids)
    loaded.check_ids(ids, f"--token-ids {options.token_ids}")
    _check_length(loaded, ids.size(1), f"--token-ids {options.token_ids}: rows of")
    with log.progress(total=len(ids), description="logits", unit=" rows") as bar:
        parts = []
        for rows in ids.split(options.micro_batch_size):
            parts.append(loaded.logits(rows).cpu())
            bar.update(len(rows))
    logits = torch.cat(parts).numpy()
    if is_rank_zero():
        _write_array(Path(options.dump_logits), logits)
    return {"logits": options.dump_logits, "shape": list(logits.shape)}


def read_ids(path: str) -> Tensor:
    """The rows of a .npy file, int64 [b, s].

    Raises:
        DataError: it is not such a file.
    """
    try:
        array = numpy.lib.format.open_memmap(path, mode="r")
    # The header is a Python literal, and the errors of parsing one come through.
    except (OSError, ValueError, SyntaxError, TypeError, OverflowError, TokenError) as error:
        raise DataError(f"--token-ids {path}: not a .npy file that can be read: {error}") from None
    is_rows = isinstance(array, numpy.ndarray) and array.ndim == 2 and array.size > 0
    if not is_rows or not numpy.issubdtype(array.dtype, numpy.integer):
        raise DataError(f"--token-ids {path}: must be an array of integers [rows, tokens].")
    return torch.from_numpy(array.astype(numpy.int64))


def _write_array(path: Path, array: numpy.ndarray) -> None:
    """Write a .npy file in one go."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            numpy.save(file, array)
        unfinished.replace(path)
    except OSError as error:
        raise DataError(f"--dump-logits {path}: cannot be written: {error.strerror}.") from None


def _check_length(loaded: LoadedModel, seq_length: int, source: str) -> None:
    """Refuse windows longer than a table of learned positions."""
    if loaded.max_tokens is not None and seq_length > loaded.max_tokens:
        raise ConfigError(
            f"{source} {seq_length}: longer than the model's {loaded.max_tokens} learned positions."
        )
