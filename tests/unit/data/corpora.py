"""Small corpora, tokenizers and datasets for the data tests."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import sentencepiece
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_ponder.data.preprocess import PreprocessConfig, PreprocessSummary, preprocess
from megatron_ponder.data.sentencepiece_training import (
    TokenizerTrainingConfig,
    train_sentencepiece,
)

VOCAB_SIZE = 320
HARD_TEXTS = (
    "  two blanks first, tab\tand\n\n\nlines  ",
    "caf\u00e9 \u4f60\u597d \U0001f600 zero\u200bwidth",
    "def f(x):\n    return x  # \u00bd\r\n",
    " ",
    "<s></s>",
)


def texts(count: int = 40) -> list[str]:
    """Documents of words, of very different lengths."""
    draw = random.Random(7)
    words = [f"{a}{b}{c}" for a in "bdfg" for b in "aeiou" for c in "klmn"]
    return [" ".join(draw.choices(words, k=draw.randrange(1, 200))) + "\n" for _ in range(count)]


def write_json_lines(path: Path, documents: Sequence[Any]) -> str:
    """Strings become {"text": ...}; anything else is written as it is."""
    records = [{"text": d} if isinstance(d, str) else d for d in documents]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def train_tokenizer(folder: Path) -> str:
    """A SentencePiece model; returns its path."""
    corpus = write_json_lines(folder / "for_tokenizer.jsonl", [*texts(), *HARD_TEXTS])
    output = str(folder / "tokenizer.model")
    train_sentencepiece(
        TokenizerTrainingConfig(input=(corpus,), output=output, vocab_size=VOCAB_SIZE)
    )
    return output


def train_json_tokenizer(folder: Path, end_token: str) -> Path:
    """A tokenizers JSON file; returns its folder."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[end_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts(), trainer)
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    return folder


def write_ids(prefix: Path, documents: Sequence[Sequence[int]], vocab_size: int = 100) -> str:
    """A dataset of given ids; returns the prefix for --data-path."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(map(str, ids)) for ids in documents]
    corpus = write_json_lines(prefix.with_suffix(".jsonl"), lines)
    run_preprocess(corpus, prefix, tokenizer_type="NullTokenizer", vocab_size=vocab_size)
    return f"{prefix}_text_document"


def write_sequences(prefix: Path, documents: Sequence[Sequence[Sequence[int]]]) -> str:
    """A dataset by megatron-core's builder, of documents of sequences of ids; any may be empty."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for document in documents:
        ids = torch.tensor([i for sequence in document for i in sequence], dtype=torch.int64)
        builder.add_document(ids, [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def run_preprocess(corpus: str, prefix: Path, **settings: Any) -> PreprocessSummary:
    """Preprocess with one worker and end ids, unless told otherwise."""
    settings = {"append_eod": True, "workers": 1, **settings}
    return preprocess(PreprocessConfig(input=(corpus,), output_prefix=str(prefix), **settings))


def encode(tokenizer_model: str, text: str) -> list[int]:
    """Ids by SentencePiece itself."""
    return sentencepiece.SentencePieceProcessor(model_file=tokenizer_model).encode(text)


def read_documents(prefix: str) -> list[list[int]]:
    """All documents of a dataset, as megatron-core reads them."""
    dataset = IndexedDataset(prefix)  # owns the memory that its documents lie in
    return [dataset[index].tolist() for index in range(len(dataset))]
