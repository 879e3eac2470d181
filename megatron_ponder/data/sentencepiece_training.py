"""Trains a SentencePiece tokenizer that loses nothing: decode(encode(text)) == text.

No normalisation, no white space removed or added, bytes for what the vocabulary lacks. Python code,
tables and any language survive.
"""

import dataclasses
import hashlib
import heapq
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import sentencepiece

from megatron_ponder import log
from megatron_ponder.data.documents import DocumentError, RawDocument
from megatron_ponder.data.readers import (
    DEFAULT_MAX_DOCUMENT_BYTES,
    InputFormat,
    ReadOptions,
    read_segments,
)
from megatron_ponder.data.sentencepiece_export import export_tokenizer
from megatron_ponder.data.sources import Source, find_inputs, total_bytes
from megatron_ponder.errors import DataError

logger = logging.getLogger(__name__)

PAUSE_ID = 1
"""Of the piece for the method pause, where one is reserved: the unused begin of sequences."""

MAX_PIECE_BYTES = 4096
"""SentencePiece trains on short texts; documents are cut at line ends into pieces up to this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig:
    """What to train on, and what to train."""

    input: tuple[str, ...]
    """Files, folders or globs, or - for standard input: JSON Lines, plain text or Parquet, plain or
    compressed (.gz .zst .bz2 .xz)."""
    output: str
    """The .model file to write."""
    vocab_size: int = 32000
    """Number of pieces, bytes and control pieces included."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """Kind of segmentation."""
    json_key: str = "text"
    """Key of the text in each JSON object."""
    input_format: InputFormat = "auto"
    """auto: by suffix (.jsonl .json .ndjson, .txt .text .md .rst, .parquet)."""
    max_train_bytes: int = 200_000_000
    """Train on a sample of this much text, drawn evenly from all of the input; the trainer keeps it
    in memory."""
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES
    """Longer documents are rejected."""
    max_rejected: int = 0
    """Go on as long as no more documents than this cannot be read; they are told and left out."""
    hf_output: str | None = None
    """Folder to write the same tokenizer into for Hugging Face: tokenizer.json and its config."""
    character_coverage: float = 0.9995
    """Share of characters that get pieces of their own; the rest are spelt in bytes."""
    num_threads: int = os.cpu_count() or 1
    """Threads of the trainer."""
    pause_piece: str | None = None
    """Reserve a piece of this name, which no text gives, for the method pause. It takes the place
    of the begin-of-sequence piece (id 1), which nothing here uses; no other id changes."""
    seed: int = 1234
    """Of the sample."""
    overwrite: bool = False
    """Replace output that exists."""


def train_sentencepiece(config: TokenizerTrainingConfig) -> None:
    """Train and write the model.

    Raises:
        DataError: the input cannot be read or is too little for the vocabulary; the output exists.
    """
    output = Path(config.output)
    exported = Path(config.hf_output) / "tokenizer.json" if config.hf_output else None
    for file in (output, exported):
        if file is not None and file.exists() and not config.overwrite:
            raise DataError(f"{file} exists already; give --overwrite to replace it.")
    texts = sample_texts(config)
    logger.info("training %d %s pieces ...", config.vocab_size, config.model_type)
    sentencepiece.set_random_generator_seed(config.seed)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=config.vocab_size,
            model_type=config.model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=config.character_coverage,
            max_sentence_length=2 * MAX_PIECE_BYTES,
            num_threads=config.num_threads,
            unk_id=0,
            bos_id=PAUSE_ID,
            bos_piece=config.pause_piece or "<s>",
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"SentencePiece cannot train {config.vocab_size} pieces: {error}. Give more text or a "
            "smaller --vocab-size."
        ) from None
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    temporary.write_bytes(model.getvalue())
    os.replace(temporary, output)
    if exported is not None:
        export_tokenizer(output, exported.parent, texts)


def sample_texts(config: TokenizerTrainingConfig) -> list[str]:
    """Short texts of all documents, or an even sample of them that is within the budget.

    Each text draws a number from the seed and its place, and the smallest ones stay: the sample is
    the same in every run. They keep the order of the input.

    Raises:
        DataError: the input cannot be read, or too many documents.
    """
    kept: list[tuple[int, int, int, str]] = []  # a heap, the largest number first
    num_bytes = number = 0
    for text in _texts(config):
        for piece in _cut(text):
            size = len(piece.encode())
            drawn = hashlib.blake2b(f"{config.seed} {number}".encode(), digest_size=8).digest()
            heapq.heappush(kept, (-int.from_bytes(drawn, "big"), number, size, piece))
            num_bytes += size
            number += 1
            while num_bytes > config.max_train_bytes and len(kept) > 1:
                num_bytes -= heapq.heappop(kept)[2]
    if len(kept) < number:
        logger.info("training on a sample: %d of %d texts, %d bytes", len(kept), number, num_bytes)
    return [piece for _, _, _, piece in sorted(kept, key=lambda entry: entry[1])]


def _texts(config: TokenizerTrainingConfig) -> Iterator[str]:
    """The text of every document, with progress."""
    files = find_inputs(config.input)
    options = ReadOptions(
        input_format=config.input_format,
        keys=(config.json_key,),
        max_document_bytes=config.max_document_bytes,
    )
    num_rejected = 0
    with log.progress(total_bytes(files), "reading", "B", unit_scale=True) as bar:
        for source in map(Source, files):
            num_before = 0
            for segment in read_segments(source, options):
                for document in segment.documents(config.max_document_bytes):
                    try:
                        yield _text(document, config.json_key)
                    except DocumentError as error:
                        num_rejected += 1
                        if num_rejected > config.max_rejected:
                            raise
                        logger.warning("left out: %s", error)
                bar.update(source.num_bytes - num_before)
                num_before = source.num_bytes


def _text(document: RawDocument | DocumentError, key: str) -> str:
    """A document's text.

    Raises:
        DocumentError: it has none.
    """
    if isinstance(document, DocumentError):
        raise document
    return document.texts([key])[0]


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most MAX_PIECE_BYTES, at line ends where there are any."""
    piece = ""
    # A character has at most four bytes.
    limit = MAX_PIECE_BYTES // 4
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), limit):
            part = line[start : start + limit]
            if len(piece) + len(part) > limit:
                yield piece
                piece = ""
            piece += part
    if piece:
        yield piece
