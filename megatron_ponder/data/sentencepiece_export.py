"""Exports a SentencePiece model as a Hugging Face tokenizer with the same pieces and ids.

For models as tools/train_tokenizer.py trains them: no normalisation, no dummy prefix, byte
fallback. As in SentencePiece, control pieces are not recognised in text. Not covered: chat
templates.
"""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from megatron_ponder.data.tokenizer_json import NEVER
from megatron_ponder.data.tokenizers import BLANK
from megatron_ponder.errors import DataError
from megatron_ponder.files import write_text

logger = logging.getLogger(__name__)

MAX_TEXTS_COMPARED = 2000


def export_tokenizer(
    model_file: Path, folder: Path, texts: Sequence[str], *, add_bos: bool = False
) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        model_file: the SentencePiece model.
        folder: destination; created if missing.
        texts: texts on which both must give the same ids. With a unigram model two segmentations
            can be equally likely and the libraries may differ; this is logged as a warning.
        add_bos: begin every text with the begin piece, as the data was made.

    Raises:
        DataError: the ids differ.
    """
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    exported = to_tokenizers(model)
    num_ties = 0
    for text in texts[:MAX_TEXTS_COMPARED]:
        ours, theirs = model.encode(text), exported.encode(text, add_special_tokens=False).ids
        if ours == theirs:
            continue
        num_ties += 1
        if model.decode(theirs) != text or not _is_as_likely(model, ours, theirs):
            raise DataError(
                f"{model_file}: cannot be exported: the Hugging Face tokenizer gives other ids, "
                f"for example for {text[:80]!r}. Leave out --hf-output and use the .model file."
            )
    if num_ties:
        logger.warning(
            "%s: in %d of %d texts Hugging Face chooses another, equally likely segmentation",
            folder,
            num_ties,
            min(len(texts), MAX_TEXTS_COMPARED),
        )
    begin = end = model.id_to_piece(model.eos_id())
    if add_bos:
        begin = model.id_to_piece(model.bos_id())
        exported.post_processor = processors.TemplateProcessing(
            single=[begin, "$A"],
            pair=[begin, "$A", "$B"],
            special_tokens=[(begin, model.bos_id())],
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", exported.to_str())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Without a begin token each document follows the end token of the previous one.
        "bos_token": begin,
        "eos_token": end,
        "pad_token": end,
        "unk_token": model.id_to_piece(model.unk_id()),
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")


def to_tokenizers(model: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer:
    """The equivalent tokenizer of the tokenizers library."""
    pieces = [model.id_to_piece(number) for number in range(model.vocab_size())]
    scores = [model.get_score(number) for number in range(model.vocab_size())]
    built: Any
    if _is_unigram(model, scores):
        # SentencePiece recognises only normal pieces in text. The tokenizers library recognises
        # all, so the others get a prohibitively low score.
        vocabulary = [
            (piece, score if _is_normal(model, number) else NEVER)
            for number, (piece, score) in enumerate(zip(pieces, scores, strict=True))
        ]
        built = models.Unigram(vocabulary, unk_id=model.unk_id(), byte_fallback=True)
    else:
        built = models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=list(_merges(model, pieces)),
            unk_token=pieces[model.unk_id()],
            fuse_unk=True,
            byte_fallback=True,
        )
    exported = tokenizers.Tokenizer(built)
    exported.normalizer = normalizers.Replace(" ", BLANK)
    if not any(BLANK in piece.lstrip(BLANK) for piece in pieces):
        # No piece spans a space, so words can be segmented (and cached) one by one.
        exported.pre_tokenizer = pre_tokenizers.Split(
            Regex(f"{BLANK}*[^{BLANK}]+|{BLANK}+"), behavior="isolated"
        )
    exported.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return exported


def _is_as_likely(
    model: sentencepiece.SentencePieceProcessor, ids: Sequence[int], others: Sequence[int]
) -> bool:
    """Whether two segmentations have the same score in a unigram model."""
    scores = [model.get_score(number) for number in range(model.vocab_size())]
    if not _is_unigram(model, scores):
        return False
    sums = [sum(scores[number] for number in each) for each in (ids, others)]
    return math.isclose(*sums, rel_tol=1e-5)


def _is_normal(model: sentencepiece.SentencePieceProcessor, number: int) -> bool:
    """Whether a piece represents text."""
    return not (model.is_control(number) or model.is_byte(number) or model.is_unknown(number))


def _is_unigram(model: sentencepiece.SentencePieceProcessor, scores: Sequence[float]) -> bool:
    """Whether scores are log probabilities (unigram), not negative merge ranks (BPE)."""
    normal = [score for number, score in enumerate(scores) if _is_normal(model, number)]
    return any(score != int(score) for score in normal)


def _merges(
    model: sentencepiece.SentencePieceProcessor, pieces: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Every split of a piece into two others, best pieces first."""
    numbers = {piece: number for number, piece in enumerate(pieces) if _is_normal(model, number)}
    for piece in sorted(numbers, key=lambda p: -model.get_score(numbers[p])):
        splits: Iterable[tuple[str, str]] = (
            (piece[:i], piece[i:])
            for i in range(1, len(piece))
            if piece[:i] in numbers and piece[i:] in numbers
        )
        yield from sorted(splits, key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))
