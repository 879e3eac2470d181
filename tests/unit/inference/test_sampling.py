"""The choice of a token, and where prompts come from."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ponder.errors import ConfigError, DataError
from megatron_ponder.inference.generation import read_prompts
from megatron_ponder.inference.options import CheckpointOptions, GenerateOptions, SamplingOptions
from megatron_ponder.inference.sampling import choose

LOGITS = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()
DRAWS = 4000


def shares(logits: torch.Tensor = LOGITS, **settings: Any) -> list[float]:
    """How often each token is drawn."""
    options = SamplingOptions(**settings)
    generator = torch.Generator().manual_seed(0)
    drawn = [choose(logits[None], options, [generator])[0] for _ in range(DRAWS)]
    return [drawn.count(token) / DRAWS for token in range(len(logits))]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({}, [0.5, 0.1, 0.3, 0.1]),
        ({"temperature": 0.5}, [25 / 36, 1 / 36, 9 / 36, 1 / 36]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [5 / 8, 0, 3 / 8, 0]),
        ({"top_k": 9}, [0.5, 0.1, 0.3, 0.1]),
        ({"top_p": 0.4}, [1, 0, 0, 0]),
        ({"top_p": 0.7}, [5 / 8, 0, 3 / 8, 0]),
        # Of the two that are left the first has 5/8 of the mass.
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(settings: dict, expected: list[float]) -> None:
    assert shares(**settings) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.9}])
def test_rows_without_a_token_are_never_drawn(settings: dict) -> None:
    options, generator = SamplingOptions(**settings), torch.Generator().manual_seed(0)
    unused = torch.tensor([True, False, False, True])
    drawn = {choose(LOGITS[None], options, [generator], unused)[0] for _ in range(200)}
    assert drawn <= {1, 2} and (settings or drawn == {1, 2})


def test_a_draw_does_not_depend_on_the_other_texts() -> None:
    options = SamplingOptions()

    def draw(rows: list[int]) -> list[int]:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return choose(torch.randn(9, 50, generator=torch.Generator())[rows], options, generators)

    together = draw(list(range(9)))
    assert together == [draw([row])[0] for row in range(9)] and len(set(together)) > 1


def test_prompts_of_files(tmp_path: Path) -> None:
    lines = tmp_path / "a.txt"
    lines.write_bytes("one\r\n\n two \u4f60\n".encode())
    assert read_prompts(lines) == ["one", " two \u4f60"]
    records = tmp_path / "a.jsonl"
    records.write_text('{"prompt": "a\\nb", "text": "c"}\n\n{"text": ""}\n')
    assert read_prompts(records) == ["a\nb", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "no text in it"),
        ("a.txt", b"\xff\n", "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2: not JSON"),
        ("a.jsonl", b'{"body": "a"}', "line 1: must be an object"),
        ("a.jsonl", b'["text"]', "line 1: must be an object"),
        ("a.jsonl", b'{"text": 1}', "line 1: must be an object"),
    ],
)
def test_prompt_files_that_are_none(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / name)
    with pytest.raises(DataError, match="No such file"):
        read_prompts(tmp_path / "none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either --prompt"),
        ({"prompt": ("a",), "prompt_file": "b"}, "either --prompt"),
        ({"prompt": ("a",), "micro_batch_size": 0}, "--micro-batch-size 0"),
        ({"prompt": ("a",), "num_jacobi_iterations": -1}, "--num-jacobi-iterations -1"),
    ],
)
def test_options_that_do_not_fit(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerateOptions(checkpoint=CheckpointOptions(load="x"), **settings)
