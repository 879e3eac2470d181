"""Preprocesses a corpus into indexed datasets: reads, tokenizes in parallel, and joins in order.

The main process cuts the input into chunks. Worker processes tokenize one chunk at a time and write
it as a shard. Shards are then concatenated without parsing. Documents keep the order of the input,
and the output is the same for any number of workers: the bytes that Megatron-LM's own tool writes.
An interrupted run resumes from its shards; outputs are published when all are complete. Imports no
torch, so workers are small and start quickly.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy

from megatron_ponder import log
from megatron_ponder.config.schema import TokenizerConfig
from megatron_ponder.data import manifest
from megatron_ponder.data.conversations import ConversationEncoder
from megatron_ponder.data.encoding import Encoder, Stream, TextEncoder, describe_losses
from megatron_ponder.data.publishing import publish, refuse_existing, rejected_file, write_dataset
from megatron_ponder.data.readers import (
    DEFAULT_MAX_DOCUMENT_BYTES,
    Chunk,
    InputFormat,
    ReadOptions,
    format_of,
    read_chunks,
)
from megatron_ponder.data.shards import Shard, ShardHeader, read_shard
from megatron_ponder.data.sources import Source, find_inputs, total_bytes
from megatron_ponder.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ponder.data.word_cache import word_cached
from megatron_ponder.data.work_folder import WorkFolder, opened
from megatron_ponder.data.workers import tokenizing
from megatron_ponder.errors import DataError

logger = logging.getLogger(__name__)

MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 1 << 20, 32 << 20
CHUNKS_WANTED = 512
"""Enough that many workers finish at about the same time, without too many files."""
CHUNKS_AHEAD = 2
"""Chunks per worker that are read ahead; bounds memory."""
EXAMPLES_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessConfig(TokenizerConfig):
    """Flags of tools/preprocess_data.py."""

    input: tuple[str, ...]
    """Files, folders, globs, or - for standard input. JSON Lines (one object per line), plain text
    or Parquet; plain or compressed (.gz .zst .bz2 .xz)."""
    output_prefix: str
    """Write PREFIX_KEY_document.bin, PREFIX_KEY_document.idx and PREFIX.manifest.json."""
    json_keys: tuple[str, ...] = ("text",)
    """Keys of the text in each JSON object (in Parquet: columns). Each key becomes a dataset."""
    vocab_size: int | None = None
    """Vocabulary size of NullTokenizer; ignored for others."""
    word_cache: bool = False
    """Cache the ids of words: the same output, up to twice as fast. Only for SentencePiece BPE
    models that tokenize word by word, such as those of tools/train_tokenizer.py."""
    append_eod: bool = False
    """Append the tokenizer's end id to every document. Recommended for pretraining."""
    instruction_data: bool = False
    """The input holds conversations for fine-tuning: objects with messages, or with prompt and
    response. Write PREFIX_instruction_document and its loss mask, PREFIX_instruction_loss_mask."""
    workers: int = max(1, (os.cpu_count() or 2) - 1)
    """Number of tokenizing processes; by default one fewer than cores. 0: tokenize in the main
    process."""
    input_format: InputFormat = "auto"
    """auto: by suffix (.jsonl .json .ndjson, .txt .text .md .rst, .parquet)."""
    split_paragraphs: bool = False
    """Plain text: one document per block between blank lines instead of one per file."""
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES
    """Reject longer documents (lines of JSON), in bytes. Bounds memory."""
    max_rejected: int = 0
    """Stop if more documents than this are rejected. Each is listed with file, line and reason in
    PREFIX.rejected.jsonl."""
    overwrite: bool = False
    """Replace existing output."""

    def read_options(self) -> ReadOptions:
        """The options of the reader."""
        return ReadOptions(
            input_format=self.input_format,
            split_paragraphs=self.split_paragraphs,
            keys=self.json_keys,
            max_document_bytes=self.max_document_bytes,
        )


@dataclasses.dataclass(kw_only=True)
class PreprocessSummary:
    """Counts of a run. read = written + rejected."""

    num_read: int = 0
    num_written: int = 0
    rejected: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Rejected documents, by kind."""
    num_tokens: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Tokens by stream, end ids included."""
    losses: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """What the ids do not give back (Encoder.losses)."""
    num_text_bytes: int = 0
    """Uncompressed bytes of the documents written."""
    text_bytes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """UTF-8 bytes of their texts, by stream."""
    num_repeated_keys: int = 0
    """Documents that state a key twice; the last value was taken."""
    first_repeated_key: str | None = None
    """File and line of the first of them."""
    num_chunks: int = 0
    num_reused: int = 0
    """Chunks reused from an interrupted run."""

    @property
    def num_rejected(self) -> int:
        """Number of rejected documents."""
        return self.rejected.total()

    def add(self, header: ShardHeader, is_reused: bool) -> None:
        """Count a shard."""
        self.num_read += header.num_read
        self.num_written += header.num_written
        self.rejected.update(record["kind"] for record in header.rejected)
        self.num_tokens.update(header.num_tokens)
        self.losses.update(header.losses)
        self.num_text_bytes += header.num_text_bytes
        self.text_bytes.update(header.text_bytes)
        self.num_repeated_keys += header.num_repeated_keys
        self.first_repeated_key = self.first_repeated_key or header.first_repeated_key
        self.num_chunks += 1
        self.num_reused += is_reused


def preprocess(config: PreprocessConfig) -> PreprocessSummary:
    """Write the datasets.

    Raises:
        DataError: input, tokenizer or output is invalid; too many documents are rejected; a
            worker died; or the run was interrupted. Finished chunks are kept for a repeated run.
    """
    _check(config)
    if not config.append_eod and not config.instruction_data:
        logger.warning(
            "without --append-eod nothing marks the end of a document: a model trained on this "
            "data reads each document as part of the one before, and never learns to end a text"
        )
    sources = [Source(path) for path in find_inputs(config.input)]
    for source in sources:
        format_of(source, config.input_format)
    encoder = build_encoder(config)
    prefix = Path(config.output_prefix)
    places = [Path(f"{prefix}_{stream.name}") for stream in encoder.streams]
    plan = _plan(config, sources, encoder.tokenizer)
    with opened(prefix) as work, _resumable_after_interrupt():
        work.take_up(plan)
        refuse_existing(prefix, places, config.overwrite or work.is_publishing)
        summary = _tokenize(config, sources, encoder.streams, plan["chunk_bytes"], work)
        if summary.num_written == 0:
            raise DataError(
                f"--input {' '.join(config.input)}: no document with any text. Give other inputs."
            )
        _join(config, sources, encoder.streams, plan, summary, work)
        work.remove()
    if summary.losses:
        logger.warning("%s", describe_losses(summary.losses))
    if summary.num_repeated_keys:
        logger.warning(
            "%d documents state a key twice in one object, the first at %s; the last value of each "
            "was taken, as Python's json does",
            summary.num_repeated_keys,
            summary.first_repeated_key,
        )
    return summary


@contextlib.contextmanager
def _resumable_after_interrupt() -> Iterator[None]:
    """Turn Ctrl-C, wherever it arrives, into a message."""
    try:
        yield
    except KeyboardInterrupt:
        raise DataError("interrupted. Repeat the same command to resume.") from None


def _check(config: PreprocessConfig) -> None:
    """Refuse invalid settings."""
    for name, least in (("workers", 0), ("max_rejected", 0), ("max_document_bytes", 1)):
        if getattr(config, name) < least:
            flag = name.replace("_", "-")
            raise DataError(f"--{flag} {getattr(config, name)}: must be at least {least}.")
    if not config.json_keys or len(set(config.json_keys)) < len(config.json_keys):
        raise DataError(
            f"--json-keys {' '.join(config.json_keys)}: give at least one key, and each only once."
        )
    if config.instruction_data and config.input_format in ("text", "parquet"):
        raise DataError(
            f"--instruction-data needs JSON Lines; leave out --input-format {config.input_format}."
        )


def _plan(
    config: PreprocessConfig, sources: Sequence[Source], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Everything that determines the shards, except the input's content, which shards hash."""
    total = total_bytes([source.path for source in sources])
    chunk_bytes = MAX_CHUNK_BYTES if total is None else total // CHUNKS_WANTED
    return {
        "format": manifest.FORMAT,
        "inputs": [str(source.path) for source in sources],
        "options": {
            "json_keys": list(config.json_keys),
            "append_eod": config.append_eod,
            "instruction_data": config.instruction_data,
            "input_format": config.input_format,
            "split_paragraphs": config.split_paragraphs,
            "max_document_bytes": config.max_document_bytes,
        },
        "tokenizer": manifest.tokenizer_entry(tokenizer),
        "chunk_bytes": min(max(chunk_bytes, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES),
    }


def _tokenize(
    config: PreprocessConfig,
    sources: Sequence[Source],
    streams: Sequence[Stream],
    chunk_bytes: int,
    work: WorkFolder,
) -> PreprocessSummary:
    """Make a shard for every chunk, with progress; stop if too many documents are rejected."""
    summary = PreprocessSummary()
    examples: list[dict[str, Any]] = []
    chunks = read_chunks(sources, config.read_options(), chunk_bytes)
    total = total_bytes([source.path for source in sources])
    with log.progress(total, "tokenizing", "B", unit_scale=True) as bar:
        for done in _shards(config, chunks, streams, work):
            summary.add(done.header, done.is_reused)
            bar.set_postfix_str(_rates(summary, bar.format_dict["elapsed"]), refresh=False)
            bar.update(done.num_stored_bytes)
            examples += done.header.rejected[: EXAMPLES_SHOWN - len(examples)]
            if summary.num_rejected > config.max_rejected:
                raise DataError(_too_many(config, summary, examples))
    if summary.num_reused:
        logger.info(
            "reused %d of %d chunks of an interrupted run",
            summary.num_reused,
            summary.num_chunks,
        )
    return summary


@dataclasses.dataclass(frozen=True)
class _Done:
    """A chunk whose shard is written."""

    header: ShardHeader
    num_stored_bytes: int
    is_reused: bool


def _shards(
    config: PreprocessConfig, chunks: Iterator[Chunk], streams: Sequence[Stream], work: WorkFolder
) -> Iterator[_Done]:
    """A shard per chunk, in order; shards of unchanged content are reused."""
    make_encoder = functools.partial(build_encoder, config)
    with tokenizing(config.workers, make_encoder, config.max_document_bytes) as submit:

        def start(chunk: Chunk) -> tuple[int, ShardHeader | Future[ShardHeader]]:
            path = work.shard(chunk.index)
            shard = read_shard(path, streams)
            if shard is not None and shard.header.chunk_sha256 == chunk.digest():
                return chunk.num_stored_bytes, shard.header
            return chunk.num_stored_bytes, submit(path, chunk)

        ahead = itertools.islice(chunks, CHUNKS_AHEAD * max(config.workers, 1))
        pending = collections.deque(map(start, ahead))
        while pending:
            num_stored_bytes, result = pending.popleft()
            is_reused = isinstance(result, ShardHeader)
            header = result if isinstance(result, ShardHeader) else result.result()
            pending.extend(map(start, itertools.islice(chunks, 1)))
            yield _Done(header, num_stored_bytes, is_reused)


def _join(
    config: PreprocessConfig,
    sources: Sequence[Source],
    streams: Sequence[Stream],
    plan: dict[str, Any],
    summary: PreprocessSummary,
    work: WorkFolder,
) -> None:
    """Join all shards and publish the outputs."""
    prefix = Path(config.output_prefix)
    shards = []
    for index in range(summary.num_chunks):
        shard = read_shard(work.shard(index), streams)
        if shard is None:
            raise DataError(f"{work.shard(index)}: damaged. Repeat the same command.")
        shards.append(shard)
    staged: dict[Path, Path] = {}
    datasets = {}
    for stream in streams:
        place = Path(f"{prefix}_{stream.name}")
        staged[place] = work.path / place.name
        parts = [_Part(shard, stream) for shard in shards]
        datasets[place.name] = write_dataset(staged[place], stream.dtype, parts)
        if stream.name in summary.text_bytes:
            datasets[place.name]["text_bytes"] = summary.text_bytes[stream.name]
    rejected = work.path / "rejected.jsonl"
    with rejected.open("w", encoding="utf-8") as file:
        for shard in shards:
            file.writelines(json.dumps(record) + "\n" for record in shard.header.rejected)
    content = {
        "format": plan["format"],
        "inputs": [
            {"path": str(s.path), "bytes": s.num_bytes, "sha256": s.digest.hexdigest()}
            for s in sources
        ],
        "tokenizer": plan["tokenizer"],
        "tokenizer_model": config.tokenizer_model,
        "options": plan["options"],
        "documents": {
            "read": summary.num_read,
            "written": summary.num_written,
            "rejected": dict(sorted(summary.rejected.items())),
            "repeated_keys": summary.num_repeated_keys,
        },
        "losses": dict(sorted(summary.losses.items())),
        "text_bytes": summary.num_text_bytes,
        "datasets": datasets,
    }
    work.start_publishing()
    publish(prefix, staged, content, rejected if summary.num_rejected else None)


@dataclasses.dataclass(frozen=True)
class _Part:
    """One stream of a shard as part of a dataset; each document is one sequence."""

    shard: Shard
    stream: Stream

    @property
    def num_sequences(self) -> int:
        return self.shard.num_documents

    @property
    def num_documents(self) -> int:
        return self.shard.num_documents

    def lengths(self) -> numpy.ndarray:
        return self.shard.lengths(self.stream)

    def ends(self) -> numpy.ndarray:
        return numpy.arange(1, self.shard.num_documents + 1)

    def pieces(self) -> Iterator[bytes]:
        return self.shard.pieces(self.stream)


def build_encoder(config: PreprocessConfig) -> Encoder:
    """The encoder that the flags ask for.

    Raises:
        DataError: the tokenizer is invalid.
    """
    tokenizer = build_tokenizer(config, config.vocab_size)
    if config.word_cache:
        tokenizer = word_cached(tokenizer, Path(config.tokenizer_model or ""))
    if config.instruction_data:
        return ConversationEncoder(tokenizer)
    return TextEncoder(tokenizer, config.json_keys, config.append_eod)


def _rates(summary: PreprocessSummary, elapsed_s: float) -> str:
    """Throughput for the progress bar."""
    elapsed_s = max(elapsed_s, 1e-9)
    num_tokens = next(iter(summary.num_tokens.values()), 0)
    return (
        f"text {summary.num_text_bytes / elapsed_s / 1e6:.1f} MB/s, "
        f"{summary.num_read / elapsed_s:.0f} documents/s, "
        f"{num_tokens / elapsed_s / 1e3:.0f}k tokens/s"
    )


def _too_many(
    config: PreprocessConfig, summary: PreprocessSummary, examples: Sequence[dict[str, Any]]
) -> str:
    """The message if too many documents are rejected."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(summary.rejected.items()))
    shown = "".join(f"\n  {e['file']}:{e['line']}: {e['reason']}." for e in examples)
    return (
        f"{summary.num_rejected} of the first {summary.num_read} documents are rejected "
        f"({kinds}); --max-rejected {config.max_rejected} allows no more:{shown}\nCorrect the "
        "input, or raise --max-rejected; rejected documents are then counted and listed in "
        f"{rejected_file(config.output_prefix)}. Finished work is kept for the next run."
    )
