"""Inspects an indexed dataset: statistics, a histogram, a document as text, and verification.

Not covered: repairs.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy

from megatron_ponder import log
from megatron_ponder.config.schema import TokenizerConfig
from megatron_ponder.data.indexed import (
    IndexFile,
    check_indexed_dataset,
    data_file,
    index_file,
    map_ids,
    open_index,
)
from megatron_ponder.data.manifest import check_tokenizer, find_manifest, hash_file
from megatron_ponder.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ponder.errors import DataError

PERCENTILES = (5, 25, 50, 75, 95)
SCAN_IDS = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig(TokenizerConfig):
    """Flags of tools/inspect_data.py."""

    data_path: str
    """Prefix of the dataset, without .bin or .idx."""
    verify: bool = False
    """Read the whole dataset and check that index and data agree, that all ids are within the
    vocabulary, and that both files have the SHA-256 in the manifest."""
    document: int | None = None
    """Print the text of this document (the first is 0). Needs the tokenizer. A tokenizer that is
    given must be that of the manifest."""
    histogram: str | None = None
    """Write a histogram of document lengths to this PNG file."""
    json: bool = False
    """Print one JSON object instead of text."""
    vocab_size: int | None = None
    """With --verify all ids must be below this. None: the vocabulary of the tokenizer, or else of
    the manifest."""


def inspect_dataset(config: InspectConfig) -> dict[str, Any]:
    """Statistics of the dataset, and whatever else the flags ask for.

    Returns:
        Plain data for printing.

    Raises:
        DataError: the dataset is missing or damaged, or --verify finds a fault.
    """
    prefix = config.data_path
    size = check_indexed_dataset(prefix)
    index = open_index(index_file(prefix))
    lengths = document_lengths(index)
    result: dict[str, Any] = {
        "data_path": prefix,
        "documents": size.num_documents,
        "sequences": len(index.lengths),
        "tokens": size.num_tokens,
        "dtype": numpy.dtype(index.dtype).name,
        "bin_bytes": data_file(prefix).stat().st_size,
        "tokens_per_document": {
            "mean": float(lengths.mean()),
            "least": int(lengths.min()),
            **{f"p{p}": float(numpy.percentile(lengths, p)) for p in PERCENTILES},
            "most": int(lengths.max()),
        },
    }
    found = find_manifest(prefix)
    result["manifest"] = str(found[0]) if found else None
    tokenizer = _tokenizer(config)
    if config.verify:
        result["verified"] = _verify(config, index, tokenizer, found[1] if found else None)
    if config.document is not None:
        result["document"] = _document(config, index, tokenizer)
    if config.histogram is not None:
        _draw(lengths, Path(config.histogram))
    return result


def document_lengths(index: IndexFile) -> numpy.ndarray:
    """Tokens of each document, int64 [documents]; a document may have several sequences."""
    if len(index.boundaries) == len(index.lengths) + 1:
        return index.lengths.astype(numpy.int64)
    ends = numpy.concatenate(([0], numpy.cumsum(index.lengths, dtype=numpy.int64)))
    return numpy.diff(ends[index.boundaries])


def _tokenizer(config: InspectConfig) -> Tokenizer | None:
    """The tokenizer, if one was given."""
    is_null = config.tokenizer_type == "NullTokenizer" and config.vocab_size is not None
    if config.tokenizer_model is None and not is_null:
        if config.document is not None:
            raise DataError("--document needs --tokenizer-model to turn ids into text.")
        return None
    tokenizer = build_tokenizer(config, config.vocab_size)
    check_tokenizer(config.data_path, tokenizer)
    return tokenizer


def _verify(
    config: InspectConfig,
    index: IndexFile,
    tokenizer: Tokenizer | None,
    manifest: dict[str, Any] | None,
) -> dict[str, Any]:
    """Read the whole dataset; return what was checked."""
    prefix = config.data_path
    told = (manifest or {}).get("tokenizer") or {}
    vocab_size = config.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    vocab_size = vocab_size or told.get("vocab_size")
    least, most = _range(map_ids(prefix, index.dtype))
    if least < 0 or (vocab_size is not None and most >= vocab_size):
        raise DataError(
            f"{prefix}: ids from {least} to {most}, but the vocabulary ends at "
            f"{(vocab_size or 0) - 1}. The dataset was made with another tokenizer, or is damaged; "
            "give its tokenizer, or preprocess the corpus again."
        )
    checked = {"index": True, "largest_id": most, "vocab_size": vocab_size, "manifest": False}
    if manifest is not None:
        entry = manifest["datasets"][Path(prefix).name]
        for name, file in (("bin", data_file(prefix)), ("idx", index_file(prefix))):
            if hash_file(file) != entry.get(f"{name}_sha256"):
                raise DataError(
                    f"{file}: is not the file described by the manifest (SHA-256 differs). It was "
                    "changed, or belongs to another run; preprocess the corpus again."
                )
        checked["manifest"] = True
    return checked


def _range(ids: numpy.ndarray) -> tuple[int, int]:
    """Smallest and largest id."""
    least, most = int(ids[0]), int(ids[0])
    with log.progress(len(ids), "verifying", " ids", unit_scale=True) as bar:
        for start in range(0, len(ids), SCAN_IDS):
            piece = ids[start : start + SCAN_IDS]
            least, most = min(least, int(piece.min())), max(most, int(piece.max()))
            bar.update(len(piece))
    return least, most


def _document(
    config: InspectConfig, index: IndexFile, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """One document as ids and text."""
    number, count = config.document, len(index.boundaries) - 1
    assert number is not None and tokenizer is not None
    if not 0 <= number < count:
        raise DataError(f"--document {number}: the dataset has documents 0 to {count - 1}.")
    first, last = map(int, index.boundaries[number : number + 2])
    begin = int(index.lengths[:first].sum(dtype=numpy.int64))
    end = begin + int(index.lengths[first:last].sum(dtype=numpy.int64))
    ids = map_ids(config.data_path, index.dtype)[begin:end].tolist()
    is_ended = ids[-1:] == [tokenizer.eod]
    if beyond := set(ids).difference(tokenizer.token_ids()):
        raise DataError(
            f"--document {number}: has id {min(beyond)}, which no token of the tokenizer has. The "
            "data was made with another tokenizer; give that one."
        )
    text = tokenizer.detokenize(ids[:-1] if is_ended else ids)
    return {"number": number, "tokens": len(ids), "is_ended": is_ended, "text": text}


def _draw(lengths: numpy.ndarray, path: Path) -> None:
    """Draw a histogram of documents and of tokens by document length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    most = max(int(lengths.max()), 2)
    edges = numpy.unique(numpy.geomspace(1, most + 1, 60).astype(numpy.int64)).tolist()
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.hist(lengths, bins=edges, alpha=0.6, label="documents", density=False)
    shares = axes.twinx()
    shares.hist(
        lengths, bins=edges, weights=lengths, histtype="step", color="tab:orange", label="tokens"
    )
    axes.set(xscale="log", xlabel="tokens per document", ylabel="documents")
    shares.set_ylabel("tokens")
    figure.legend(loc="upper left", bbox_to_anchor=(0.12, 0.88))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    figure.savefig(unfinished, format="png", dpi=120)
    unfinished.replace(path)
    pyplot.close(figure)
