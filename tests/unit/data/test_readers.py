"""Documents from files: which, in what order, and a place for every fault."""

from pathlib import Path

import pytest

from megatron_ponder.data.readers import find_inputs, read_documents
from megatron_ponder.errors import DataError


def read(*files: Path, keys: tuple[str, ...] = ("text",), **options: object) -> list[list[str]]:
    documents = read_documents(files, options.pop("input_format", "auto"), **options)  # type: ignore[arg-type]
    return [document.texts(keys) for document in documents]


def test_json_lines_with_several_keys_blank_lines_and_no_last_newline(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one", "title": "1"}\n\n  \n{"title": "2", "text": "two\\n"}')
    assert read(file, keys=("text", "title")) == [["one", "1"], ["two\n", "2"]]


def test_plain_text_is_one_document_or_one_per_block(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\n\nfirst\nblock\r\n  \n\nsecond")
    assert read(file) == [["\n\nfirst\nblock\r\n  \n\nsecond"]]
    assert read(file, split_paragraphs=True) == [["first\nblock\r\n"], ["second"]]


def test_folders_and_globs_are_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a/z.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [[name] for name in ("a/z.txt", "b/10.txt", "b/2.txt")] == read(
        *find_inputs([str(tmp_path)])
    )
    assert find_inputs([str(tmp_path / "b" / "*.txt")]) == [
        tmp_path / "b" / "10.txt",
        tmp_path / "b" / "2.txt",
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "not valid UTF-8"),
        (b'{"text": ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'["text"]', "not a JSON object"),
        (b'{"body": "x"}', "key 'text' is missing"),
        (b'{"text": 3}', "key 'text' is not a string"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_is_told_with_file_line_and_reason(
    line: bytes, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        read(file)
    assert f"{file}:3: " in str(error.value) and reason in str(error.value)


def test_inputs_that_are_not_there_or_of_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file, and nothing matches"):
        find_inputs([str(tmp_path / "*.txt")])
    file = tmp_path / "a.bin"
    file.write_text("some text")
    with pytest.raises(DataError, match="cannot tell its format"):
        read(file)
    assert read(file, input_format="text") == [["some text"]]
