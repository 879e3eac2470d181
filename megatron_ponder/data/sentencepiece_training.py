"""Trains a lossless SentencePiece tokenizer: decode(encode(text)) == text.

No normalisation, no white space removed or added, byte fallback for characters outside the
vocabulary. So source code, tables and text in any language are preserved. The one exception is
U+2581, SentencePiece's own symbol for a space, which comes back as a space.
"""

import dataclasses
import hashlib
import heapq
import io
import logging
import os
from collections.abc import Iterator, Sequence
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
from megatron_ponder.data.tokenizers import BLANK
from megatron_ponder.errors import DataError
from megatron_ponder.files import published

logger = logging.getLogger(__name__)

SKIPPED = "\u2585"
"""SentencePiece leaves texts with this character out of its training."""
PAUSE_ID = 1
"""Id of the pause piece, if one is reserved: that of the unused begin-of-sequence piece."""

MAX_PIECE_BYTES = 4096
"""SentencePiece trains on short texts: documents are cut at line ends into pieces of this size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig:
    """Flags of tools/train_tokenizer.py."""

    input: tuple[str, ...]
    """Files, folders, globs, or - for standard input. JSON Lines, plain text or Parquet; plain or
    compressed (.gz .zst .bz2 .xz)."""
    output: str
    """The .model file to write."""
    vocab_size: int = 32000
    """Number of pieces, including byte and control pieces."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """Segmentation algorithm."""
    json_key: str = "text"
    """Key of the text in each JSON object (column, in Parquet)."""
    input_format: InputFormat = "auto"
    """auto: by suffix (.jsonl .json .ndjson, .txt .text .md .rst, .parquet)."""
    max_train_bytes: int = 200_000_000
    """Size in bytes of the training text: an even sample of the whole input, which the trainer
    holds in memory."""
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES
    """Reject longer documents, in bytes."""
    max_rejected: int = 0
    """Stop if more documents than this are invalid. Each is logged and left out."""
    hf_output: str | None = None
    """Also export the tokenizer for Hugging Face (tokenizer.json and its config) to this folder."""
    character_coverage: float = 0.9995
    """Fraction of characters that get their own pieces; the rest are spelt as bytes."""
    num_threads: int = os.cpu_count() or 1
    """Threads of the trainer; by default one per core."""
    pause_piece: str | None = None
    """Reserve a piece of this name for the method pause; no text is tokenized into it. It replaces
    the unused begin-of-sequence piece (id 1); no other id changes."""
    seed: int = 1234
    """Seed of the sample."""
    overwrite: bool = False
    """Replace existing output."""


def train_sentencepiece(config: TokenizerTrainingConfig) -> None:
    """Train and write the model.

    Raises:
        DataError: the input cannot be read or is too small for the vocabulary; the output exists.
    """
    output = Path(config.output)
    exported = Path(config.hf_output) / "tokenizer.json" if config.hf_output else None
    for file in (output, exported):
        if file is not None and file.exists() and not config.overwrite:
            raise DataError(f"{file}: exists already; give --overwrite to replace it.")
    texts = sample_texts(config)
    _say_losses(texts)
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
    with published(output) as unfinished:
        unfinished.write_bytes(model.getvalue())
    if exported is not None:
        export_tokenizer(output, exported.parent, texts)


def _say_losses(texts: Sequence[str]) -> None:
    """Warn of characters that SentencePiece uses itself."""
    num_skipped = sum(SKIPPED in text for text in texts)
    if num_skipped:
        logger.warning(
            "SentencePiece does not train on texts with U+2585, which it reserves: %d of %d texts "
            "are left out. Tokenizing such texts loses nothing",
            num_skipped,
            len(texts),
        )
    num_blanks = sum(text.count(BLANK) for text in texts)
    if num_blanks:
        logger.warning(
            "the text has U+2581, SentencePiece's symbol for a space, %d times: the tokenizer "
            "reads it as a space",
            num_blanks,
        )


def sample_texts(config: TokenizerTrainingConfig) -> list[str]:
    """Short texts of all documents, or an even sample of at most `max_train_bytes`.

    Each text gets a hash of the seed and its index, and those with the smallest hashes are kept. So
    the sample is the same in every run. Texts keep the order of the input.

    Raises:
        DataError: the input cannot be read, or too many documents are invalid.
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
        logger.info(
            "training on a sample of %d of %d texts, %d bytes", len(kept), number, num_bytes
        )
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
        DocumentError: the document is invalid or has no text.
    """
    if isinstance(document, DocumentError):
        raise document
    return document.texts([key])[0]


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most MAX_PIECE_BYTES, cut at line ends where possible."""
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
