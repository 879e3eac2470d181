"""A corpus becomes an indexed dataset: read, tokenize in several processes, write in order.

One process reads, workers decode and tokenize batches of documents, and this process writes results
in the order of the input, so that the files are the same for any number of workers: the bytes that
Megatron-LM's own tool writes. Files get their names only when they are complete.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tqdm import tqdm

from megatron_ponder.config.schema import DataConfig
from megatron_ponder.data.readers import InputFormat, RawDocument, find_inputs, read_documents
from megatron_ponder.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ponder.errors import DataError

BATCH_BYTES = 1 << 19
"""Text that a worker gets at once: enough to hide the cost of passing it on."""
BATCHES_AHEAD = 4
"""Batches in flight per worker; bounds memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to preprocess, with what, into what."""

    input: tuple[str, ...]
    """Files, folders or globs: JSON Lines (an object with text per line) or plain text."""
    output_prefix: str
    """Files are written as PREFIX_KEY_document.bin and .idx."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys of the text in each JSON object; a dataset is written for each."""
    tokenizer_type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer"] = (
        "SentencePieceTokenizer"
    )
    """As in training."""
    tokenizer_model: str | None = None
    """As in training."""
    vocab_size: int | None = None
    """NullTokenizer only."""
    append_eod: bool = False
    """End every document with the tokenizer's end id. Training wants it."""
    workers: int = max(1, (os.cpu_count() or 2) - 1)
    """Tokenizing processes."""
    input_format: InputFormat = "auto"
    """auto: by suffix (.jsonl .json .ndjson, or .txt .text .md .rst)."""
    split_paragraphs: bool = False
    """Plain text: a document per block between blank lines instead of per file."""
    overwrite: bool = False
    """Replace output that exists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessSummary:
    """What became of the documents. read = written + empty."""

    num_read: int
    num_written: int
    num_empty: int
    """Documents without a single token; they are left out."""
    num_tokens: dict[str, int]
    """By key, end ids included."""
    num_input_bytes: int


TokenizedBatch = tuple[int, list[list[numpy.ndarray]]]
"""Input bytes, and for each document the ids under each key."""


def preprocess(config: PreprocessConfig) -> PreprocessSummary:
    """Write the datasets.

    Raises:
        DataError: input, tokenizer or output cannot be used; a worker died.
    """
    if config.workers < 1:
        raise DataError(f"--workers {config.workers}: must be at least 1.")
    files = find_inputs(config.input)
    tokenizer = _build_tokenizer(config)
    outputs = {key: Path(f"{config.output_prefix}_{key}_document") for key in config.json_keys}
    _check_outputs(outputs.values(), config.overwrite)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    temporary = {
        key: path.with_name(f".{path.name}.{os.getpid()}") for key, path in outputs.items()
    }
    try:
        builders = {
            key: IndexedDatasetBuilder(f"{path}.bin", dtype=dtype)
            for key, path in temporary.items()
        }
        summary = _write(config, files, builders)
        for key, builder in builders.items():
            builder.finalize(f"{temporary[key]}.idx")
        if summary.num_written == 0:
            raise DataError(f"--input {' '.join(config.input)}: no document with any text.")
        for key, path in outputs.items():
            # The index last: a dataset without one is not mistaken for a complete one.
            for suffix in (".bin", ".idx"):
                os.replace(f"{temporary[key]}{suffix}", f"{path}{suffix}")
    finally:
        for path in temporary.values():
            for suffix in (".bin", ".idx"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
    return summary


def _write(
    config: PreprocessConfig, files: Sequence[Path], builders: dict[str, IndexedDatasetBuilder]
) -> PreprocessSummary:
    """Feed every document to the builders, with progress."""
    num_bytes = sum(file.stat().st_size for file in files)
    num_read = num_empty = 0
    num_tokens = dict.fromkeys(config.json_keys, 0)
    documents = read_documents(files, config.input_format, config.split_paragraphs)
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="tokenizing") as bar:
        for batch_bytes, batch in _tokenize(config, _batches(documents)):
            for ids_by_key in batch:
                num_read += 1
                if not all(len(ids) for ids in ids_by_key):
                    num_empty += 1
                    continue
                for key, ids in zip(config.json_keys, ids_by_key, strict=True):
                    builders[key].add_document(torch.from_numpy(ids), [len(ids)])
                    num_tokens[key] += len(ids)
            bar.update(batch_bytes)
            elapsed_s = max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(
                f"{num_read / elapsed_s:.0f} documents/s, "
                f"{sum(num_tokens.values()) / elapsed_s / 1e3:.0f}k tokens/s"
            )
    return PreprocessSummary(
        num_read=num_read,
        num_written=num_read - num_empty,
        num_empty=num_empty,
        num_tokens=num_tokens,
        num_input_bytes=num_bytes,
    )


def _batches(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    """Documents in groups of about BATCH_BYTES."""
    batch: list[RawDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.content)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenize(
    config: PreprocessConfig, batches: Iterator[list[RawDocument]]
) -> Iterator[TokenizedBatch]:
    """Results in the order of the input, computed by the workers."""
    with concurrent.futures.ProcessPoolExecutor(
        config.workers, initializer=_start_worker, initargs=(config,)
    ) as pool:
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for batch in itertools.islice(batches, BATCHES_AHEAD * config.workers):
                pending.append(pool.submit(_tokenize_batch, batch))
            while pending:
                result = pending.popleft().result()
                for batch in itertools.islice(batches, 1):
                    pending.append(pool.submit(_tokenize_batch, batch))
                yield result
        except concurrent.futures.process.BrokenProcessPool:
            raise DataError(
                "a tokenizing process died (out of memory?). Try fewer --workers."
            ) from None
        finally:
            for future in pending:
                future.cancel()


_worker: tuple[PreprocessConfig, Tokenizer]


def _start_worker(config: PreprocessConfig) -> None:
    """Each process loads the tokenizer once."""
    global _worker
    _worker = config, _build_tokenizer(config)


def _tokenize_batch(batch: list[RawDocument]) -> TokenizedBatch:
    """Decode and tokenize, inside a worker."""
    config, tokenizer = _worker
    texts = [document.texts(config.json_keys) for document in batch]
    flat = tokenizer.tokenize_batch([text for document in texts for text in document])
    end = [tokenizer.eod] if config.append_eod else []
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    # A document without tokens stays empty: an end id alone is no document.
    arrays = [numpy.array(ids + end if ids else [], dtype=dtype) for ids in flat]
    num_keys = len(config.json_keys)
    return (
        sum(len(document.content) for document in batch),
        [arrays[i : i + num_keys] for i in range(0, len(arrays), num_keys)],
    )


def _build_tokenizer(config: PreprocessConfig) -> Tokenizer:
    """The tokenizer, by the same rules as in training."""
    data = DataConfig(tokenizer_type=config.tokenizer_type, tokenizer_model=config.tokenizer_model)
    return build_tokenizer(data, config.vocab_size)


def _check_outputs(prefixes: Iterable[Path], overwrite: bool) -> None:
    """Make the folder; refuse to replace a dataset unless told to."""
    for prefix in prefixes:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        existing = [f"{prefix}{s}" for s in (".bin", ".idx") if os.path.exists(f"{prefix}{s}")]
        if existing and not overwrite:
            raise DataError(f"{existing[0]} exists already; give --overwrite to replace it.")
