"""Windows over a text: every token once, with enough before it. And figures per token and byte."""

import io
import math
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ponder.errors import CheckpointError, ConfigError
from megatron_ponder.inference.evaluation import figures, read_ids, score, windows
from megatron_ponder.inference.generation import read_prompts
from megatron_ponder.inference.options import CheckpointOptions, EvaluateOptions
from megatron_ponder.inference.stream import Stream
from megatron_ponder.train.evaluation import Evaluation
from tests.fuzz import damaged_file, survive

CHECKPOINT = CheckpointOptions(load="x")


@settings(max_examples=300, deadline=None)
@given(
    num_tokens=st.integers(1, 60),
    seq_length=st.integers(1, 20),
    stride=st.none() | st.integers(1, 20),
    micro_batch_size=st.integers(1, 5),
)
def test_every_token_is_scored_once_behind_enough_others(
    num_tokens: int, seq_length: int, stride: int | None, micro_batch_size: int
) -> None:
    stride = None if stride is None else min(stride, seq_length)
    ids = torch.arange(100, 101 + num_tokens)
    scored: list[int] = []
    for tokens, labels in windows(ids, seq_length, micro_batch_size, stride):
        assert len(tokens) == len(labels) <= micro_batch_size and tokens.size(1) <= seq_length
        for row, predicted in zip(tokens.tolist(), labels.tolist(), strict=True):
            assert row == list(range(row[0], row[0] + len(row)))
            assert row[-1] + 1 == predicted[-1] and len(predicted) <= len(row)
            num_before = len(row) - len(predicted) + 1
            assert row[0] == 100 or num_before > seq_length - (stride or seq_length)
            scored += predicted
    assert scored == ids[1:].tolist()


def test_windows_are_batched() -> None:
    ids = torch.arange(65)
    shapes = [tuple(tokens.shape) for tokens, _ in windows(ids, 16, 3)]
    assert shapes == [(3, 16), (1, 16)]
    batches = list(windows(ids, 16, 3, 8))
    assert [tuple(tokens.shape) for tokens, _ in batches] == [(1, 16), (3, 16), (3, 16)]
    assert [tuple(labels.shape) for _, labels in batches] == [(1, 16), (3, 8), (3, 8)]


def test_figures_per_token_and_per_byte() -> None:
    """Ten tokens of 40 bytes, each with probability 1/8: 30 bits."""
    found = figures(10 * math.log(8), num_tokens=10, num_bytes=40)
    assert found == pytest.approx(
        {
            "loss": math.log(8),
            "perplexity": 8.0,
            "bits_per_byte": 0.75,
            "byte_perplexity": 2**0.75,
        }
    )
    assert figures(1.0, num_tokens=1, num_bytes=None)["bits_per_byte"] is None
    assert figures(1e6, num_tokens=1, num_bytes=None)["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of"),
        ({"data_path": "a", "text_file": ("b",)}, "exactly one of"),
        ({"token_ids": "a"}, "go together"),
        ({"data_path": "a", "stride": 0}, "--stride 0: must be at least 1"),
        ({"data_path": "a", "num_jacobi_iterations": (1, -1)}, "--num-jacobi-iterations -1"),
        (
            {"token_ids": "a", "dump_logits": "b", "num_jacobi_iterations": (1, 2)},
            "logits of one --num-jacobi-iterations",
        ),
    ],
)
def test_options_that_do_not_fit(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateOptions(checkpoint=CHECKPOINT, **settings)


def test_a_loss_that_is_not_finite_is_no_result() -> None:
    class Loaded:
        checkpoint, max_tokens = "runs/x/iter_0000001", None

        def token_losses(self, tokens, labels, plans):
            return [torch.full(labels.shape, torch.nan)]

    options = EvaluateOptions(checkpoint=CHECKPOINT, data_path="a", seq_length=4)
    stream = Stream(ids=torch.arange(9), num_bytes=9)
    with pytest.raises(CheckpointError, match="the loss is not a finite number"):
        score(Loaded(), stream, [None], options)  # type: ignore[arg-type, list-item]
    assert math.isnan(Evaluation(loss=math.nan, num_tokens=1, num_jacobi_iterations=0).perplexity)


@pytest.mark.slow
def test_damaged_ids_and_prompts_are_read_or_refused(tmp_path: Path) -> None:
    array = io.BytesIO()
    numpy.save(array, numpy.arange(60).reshape(4, 15))
    ids, prompts = tmp_path / "ids.npy", tmp_path / "prompts.jsonl"
    text = b'{"prompt": "one"}\n{"text": "caf\xc3\xa9"}\n'
    found = survive(
        lambda path: read_ids(str(path)),
        lambda draw: damaged_file(array.getvalue(), ids, draw),
        seed=8,
    )
    assert found["refused"] > 100
    found = survive(read_prompts, lambda draw: damaged_file(text, prompts, draw), seed=9)
    assert found["refused"] > 100
