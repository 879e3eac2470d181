"""Speed of preprocessing beside a plain loop over the same tokenizer, in one run.

The plain loop is what one would write first: a line, json.loads, the tokenizer, megatron-core's
dataset builder. Each side reads the same JSON Lines file and must write the same bytes. They take
turns, so that a slowdown of the machine hits all of them. CPU time is given besides wall time:
other processes disturb it less. Left out: compressed input.
"""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import platform
import resource
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from benchmarks import report
from benchmarks.commands import PreprocessOptions
from megatron_ponder import log
from megatron_ponder.config.schema import DataConfig, RunConfig
from megatron_ponder.data.preprocess import PreprocessConfig, preprocess
from megatron_ponder.data.readers import read_documents
from megatron_ponder.data.sentencepiece_training import (
    TokenizerTrainingConfig,
    train_sentencepiece,
)
from megatron_ponder.data.sources import find_inputs
from megatron_ponder.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ponder.errors import ConfigError

QUICKSTART_CORPUS = Path(__file__).resolve().parents[1] / "examples/quickstart/corpus.py"
TRAINING_BYTES = 3_000_000

Side = Callable[[Path], None]
"""Writes <folder>/out_text_document.bin and .idx."""


def measure(options: PreprocessOptions, config: RunConfig) -> dict[str, Any]:
    """Measure both sides.

    Args:
        options: which text and tokenizer, how often.
        config: not used.

    Returns:
        A row per side, and the machine.

    Raises:
        PonderError: input or tokenizer cannot be used.
    """
    logging.getLogger(log.PACKAGE_LOGGER).setLevel(logging.WARNING)  # no line per run
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        text_bytes = _write_corpus(options, corpus)
        settings = _tokenizer_settings(options, corpus, folder)
        sides: dict[str, tuple[int, Side]] = {"plain loop": (1, _plain_loop(corpus, settings))}
        for word_cache in (False, True)[: 1 + options.word_cache]:
            for workers in options.workers:
                title = f"{workers} worker{'s' if workers > 1 else ''}"
                title += ", word cache" if word_cache else ""
                sides[title] = workers, _ours(corpus, settings, workers, word_cache)
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        contents: set[bytes] = set()
        for number in range(options.rounds):
            for side_name, (_, side) in sides.items():
                target = folder / f"{number} {side_name}"
                target.mkdir()
                measured[side_name].append(_timed(side, target))
                contents.add((target / "out_text_document.bin").read_bytes())
                shutil.rmtree(target)
        if len(contents) != 1:
            raise ConfigError("the sides wrote different files; this is a bug, please report it.")
        num_tokens = len(contents.pop()) // settings["token_bytes"]
    rows = {
        side_name: _row(measured[side_name], workers, text_bytes, num_tokens)
        for side_name, (workers, _) in sides.items()
    }
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {
            "python": platform.python_version(),
            **{n: importlib.metadata.version(n) for n in ("sentencepiece", "tokenizers")},
        },
        "input": list(options.input) or "standard library",
        "tokenizer": settings["tokenizer"],
        "text_bytes": text_bytes,
        "tokens": num_tokens,
        "rounds": options.rounds,
        "outputs_are_equal": True,
        "sides": rows,
        "ratios": _ratios(rows),
    }


def as_text(result: dict[str, Any]) -> str:
    """A result as a table."""
    rates = ("mb_per_s", "tokens_per_s")
    keys = (*rates, *(f"{rate}_per_core" for rate in rates), "mb_per_cpu_s")
    rows = [(name, *(row[key] for key in keys)) for name, row in result["sides"].items()]
    header = ("", "MB/s", "tokens/s", "MB/s per core", "tokens/s per core", "MB per CPU s")
    ratios = "\n".join(f"{name}: {value:.2f}" for name, value in result["ratios"].items())
    return (
        f"{result['machine']}, Python {result['versions']['python']}, {result['date']}; "
        f"{result['text_bytes'] / 1e6:.1f} MB of text, {result['tokens']:,} tokens\n\n"
        f"{report.table(header, rows)}\n\n{ratios}"
    )


def _write_corpus(options: PreprocessOptions, corpus: Path) -> int:
    """Write the text to measure on as JSON Lines; the bytes of its texts."""
    source = find_inputs(options.input)
    if not source:
        source = [corpus.with_name("library.jsonl")]
        library = Path(sysconfig.get_path("stdlib"))
        _quickstart_corpus().write_corpus(source[0], corpus.with_name("held_out.jsonl"), library)
    num_bytes = 0
    with corpus.open("w", encoding="utf-8") as file:
        for document in read_documents(source):
            (text,) = document.texts(["text"])
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            num_bytes += len(text.encode())
            if num_bytes >= options.max_bytes:
                break
    return num_bytes


def _quickstart_corpus() -> Any:
    """The quickstart's corpus maker, a script of the examples."""
    spec = importlib.util.spec_from_file_location("quickstart_corpus", QUICKSTART_CORPUS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tokenizer_settings(options: PreprocessOptions, corpus: Path, folder: Path) -> dict[str, Any]:
    """The tokenizer that was named, or one that is trained on the corpus."""
    model = options.tokenizer_model
    name = str(model)
    if model is None:
        model = str(folder / "tokenizer.model")
        name = f"SentencePiece BPE, {options.vocab_size} pieces"
        train_sentencepiece(
            TokenizerTrainingConfig(
                input=(str(corpus),),
                output=model,
                vocab_size=options.vocab_size,
                max_train_bytes=TRAINING_BYTES,
            )
        )
    data = DataConfig(tokenizer_type=options.tokenizer_type, tokenizer_model=model)
    tokenizer = build_tokenizer(data)
    return {
        "data": data,
        "tokenizer": name,
        "token_bytes": numpy.dtype(DType.optimal_dtype(tokenizer.vocab_size)).itemsize,
    }


def _plain_loop(corpus: Path, settings: dict[str, Any]) -> Side:
    """One process, document by document."""

    def run(folder: Path) -> None:
        tokenizer: Tokenizer = build_tokenizer(settings["data"])
        prefix = folder / "out_text_document"
        dtype = DType.optimal_dtype(tokenizer.vocab_size)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        with corpus.open(encoding="utf-8") as lines:
            for line in lines:
                ids = [*tokenizer.tokenize(json.loads(line)["text"]), tokenizer.eod]
                builder.add_document(torch.tensor(ids), [len(ids)])
        builder.finalize(f"{prefix}.idx")

    return run


def _ours(corpus: Path, settings: dict[str, Any], workers: int, word_cache: bool) -> Side:
    """`preprocess`, with the start of its workers."""

    def run(folder: Path) -> None:
        data: DataConfig = settings["data"]
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            preprocess(
                PreprocessConfig(
                    input=(str(corpus),),
                    output_prefix=str(folder / "out"),
                    tokenizer_type=data.tokenizer_type,
                    tokenizer_model=data.tokenizer_model,
                    append_eod=True,
                    workers=workers,
                    word_cache=word_cache,
                )
            )

    return run


def _timed(side: Side, folder: Path) -> dict[str, float]:
    """Seconds of wall time and of CPU time."""
    cpu_s, start_s = _cpu_s(), time.perf_counter()
    side(folder)
    return {"wall_s": time.perf_counter() - start_s, "cpu_s": _cpu_s() - cpu_s}


def _cpu_s() -> float:
    """CPU time of this process and of its finished workers."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _row(
    measured: list[dict[str, float]], workers: int, text_bytes: int, num_tokens: int
) -> dict[str, Any]:
    """Figures of one side: medians over rounds."""
    wall_s = statistics.median(each["wall_s"] for each in measured)
    cpu_s = statistics.median(each["cpu_s"] for each in measured)
    mb = text_bytes / 1e6
    return {
        "workers": workers,
        "wall_s": [each["wall_s"] for each in measured],
        "cpu_s": [each["cpu_s"] for each in measured],
        "mb_per_s": mb / wall_s,
        "tokens_per_s": num_tokens / wall_s,
        "mb_per_s_per_core": mb / wall_s / workers,
        "tokens_per_s_per_core": num_tokens / wall_s / workers,
        "mb_per_cpu_s": mb / cpu_s,
    }


def _ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Speed over the plain loop's, and over that of the first number of workers."""
    plain = next(iter(rows.values()))
    ours = [row for name, row in list(rows.items())[1:] if "cache" not in name]
    ratios = {
        f"{name} / plain loop": row["mb_per_s"] / plain["mb_per_s"]
        for name, row in list(rows.items())[1:]
    }
    for row in ours[1:]:
        name = f"scaling from {ours[0]['workers']} to {row['workers']} workers"
        ratios[name] = row["mb_per_s"] / ours[0]["mb_per_s"]
    return ratios
