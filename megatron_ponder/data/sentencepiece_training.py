"""Trains a SentencePiece tokenizer that loses nothing: decode(encode(text)) == text.

No normalisation, no white space removed or added, bytes for what the vocabulary lacks. Python code,
tables and any language survive.
"""

import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import sentencepiece
from tqdm import tqdm

from megatron_ponder.data.readers import InputFormat, read_documents
from megatron_ponder.data.sources import find_inputs
from megatron_ponder.errors import DataError

MAX_PIECE_BYTES = 4096
"""SentencePiece trains on short texts; documents are cut at line ends into pieces up to this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig:
    """What to train on, and what to train."""

    input: tuple[str, ...]
    """Files, folders or globs: JSON Lines or plain text."""
    output: str
    """The .model file to write."""
    vocab_size: int = 32000
    """Number of pieces, bytes and control pieces included."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """Kind of segmentation."""
    json_key: str = "text"
    """Key of the text in each JSON object."""
    input_format: InputFormat = "auto"
    """auto: by suffix (.jsonl .json .ndjson, or .txt .text .md .rst)."""
    max_train_bytes: int = 200_000_000
    """Stop reading after this much text; the trainer keeps all of it in memory."""
    character_coverage: float = 0.9995
    """Share of characters that get pieces of their own; the rest are spelt in bytes."""
    num_threads: int = os.cpu_count() or 1
    """Threads of the trainer."""
    seed: int = 1234
    """Of the trainer's random choices (unigram)."""
    overwrite: bool = False
    """Replace output that exists."""


def train_sentencepiece(config: TokenizerTrainingConfig) -> None:
    """Train and write the model.

    Raises:
        DataError: the input cannot be read or is too little for the vocabulary; the output exists.
    """
    output = Path(config.output)
    if output.exists() and not config.overwrite:
        raise DataError(f"{output} exists already; give --overwrite to replace it.")
    files = find_inputs(config.input)
    sentencepiece.set_random_generator_seed(config.seed)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_pieces(config, files),
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
            bos_id=1,
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


def _pieces(config: TokenizerTrainingConfig, files: list[Path]) -> Iterator[str]:
    """Texts for the trainer, up to the budget, with progress while it reads."""
    total = min(sum(file.stat().st_size for file in files), config.max_train_bytes)
    num_bytes = 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading") as bar:
        for document in read_documents(files, config.input_format):
            (text,) = document.texts([config.json_key])
            yield from _cut(text)
            size = len(document.content)
            bar.update(min(size, total - num_bytes))
            num_bytes += size
            if num_bytes >= config.max_train_bytes:
                break
    tqdm.write(f"training {config.vocab_size} {config.model_type} pieces ...")


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
