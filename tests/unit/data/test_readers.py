"""Documents from files: which, in what order, and a place for every fault."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ponder.data.documents import DocumentError
from megatron_ponder.data.readers import ReadOptions, read_documents, read_segments
from megatron_ponder.data.sources import Source, find_inputs
from megatron_ponder.errors import DataError


def read(*files: Path, keys: tuple[str, ...] = ("text",), **options: object) -> list[list[str]]:
    documents = read_documents(files, options.pop("input_format", "auto"), keys=keys, **options)  # type: ignore[arg-type]
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


def test_hidden_copies_are_no_documents_unless_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "b/.c.txt", ".d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    with caplog.at_level("INFO"):
        assert find_inputs([str(tmp_path)]) == [tmp_path / "a.txt"]
    assert f"1 files: {tmp_path / 'a.txt'}; 3 hidden left out" in caplog.text
    assert find_inputs([str(tmp_path / ".d.txt")]) == [tmp_path / ".d.txt"]
    with pytest.raises(DataError, match="except 1 hidden"):
        find_inputs([str(tmp_path / "b")])


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    file, link = tmp_path / "a.txt", tmp_path / "b.txt"
    file.write_text("a")
    link.symlink_to(file)
    for patterns in (
        [file, file],
        [file, tmp_path],
        [tmp_path / "*.txt"],
        [f"{tmp_path}/./a.txt", file],
    ):
        with pytest.raises(DataError, match=r"a.txt is given twice|b.txt is given twice, also as"):
            find_inputs([str(pattern) for pattern in patterns])


def test_inputs_that_are_not_there_or_of_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file, and nothing matches"):
        find_inputs([str(tmp_path / "*.txt")])
    file = tmp_path / "a.bin"
    file.write_text("some text")
    with pytest.raises(DataError, match="cannot tell its format"):
        read(file)
    assert read(file, input_format="text") == [["some text"]]


LIMIT = 20


def places(file: Path, **options: Any) -> list[tuple[int, Any]]:
    """Line and content of each document, or the kind of fault."""
    found = []
    for segment in read_segments(Source(file), ReadOptions(max_document_bytes=LIMIT, **options)):
        for document in segment.documents(LIMIT):
            is_fault = isinstance(document, DocumentError)
            found.append((document.line, document.kind if is_fault else document.content))
    return found


@pytest.mark.parametrize("piece_bytes", [1, 3, 7, 64, 1 << 20])
def test_long_lines_are_told_and_not_kept(
    piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ponder.data.sources.PIECE_BYTES", piece_bytes)
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"one\n" + b"x" * 21 + b"\n\n" + b"y" * 20 + b"\n" + b"z" * 99 + b"\nend")
    kinds = [(1, b"one"), (2, "too_long"), (4, b"y" * 20), (5, "too_long"), (6, b"end")]
    assert places(file) == kinds
    file.write_bytes(b"one\n" + b"x" * 50)
    assert places(file) == [(1, b"one"), (2, "too_long")]


@pytest.mark.parametrize("piece_bytes", [1, 5, 1 << 20])
def test_long_paragraphs_and_texts_are_told(
    piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ponder.data.sources.PIECE_BYTES", piece_bytes)
    file = tmp_path / "a.txt"
    file.write_bytes(b"\none\ntwo\n\n" + b"nine chars\n" * 3 + b"\nc\r\r\nd\n" + b"e" * 40)
    assert places(file, split_paragraphs=True) == [
        (2, b"one\ntwo\n"),
        (5, "too_long"),
        (9, "too_long"),
    ]
    assert places(file) == [(1, "too_long")]
    file.write_bytes(b"a" * 20)
    assert places(file) == [(1, b"a" * 20)]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt"):
        file = tmp_path / name
        text = b"one" if name == "a.txt" else b'{"text": "one"}'
        file.write_bytes(b"\xef\xbb\xbf" + text)
        assert read(file) == [["one"]]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", gzip.compress(b'{"text": "x"}'), "gz data; give its name the suffix .gz"),
        ("a.txt", lzma.compress(b"x"), "xz data"),
        ("a.txt", bz2.compress(b""), "bz2 data"),
        ("a.jsonl", pyarrow.compress(b"x", "zstd", asbytes=True), "zst data"),
        ("a.txt", "h\u00e9llo there".encode("utf-16"), "UTF-16; convert it: iconv"),
        ("a.txt", "hello there".encode("utf-16-be"), "UTF-16"),
        ("a.jsonl", '{"text": 1}'.encode("utf-16-le"), "UTF-16"),
        ("a.txt", "hello".encode("utf-32"), "UTF-32"),
        ("a.json", b'\xef\xbb\xbf [{"text": "x"}]', "a JSON array; write one object per line: jq"),
        ("a.json", b'{\n "text": "x"\n}', "JSON over several lines"),
        ("a.txt", b"PK\x03\x04", "a zip archive"),
        ("a.jsonl", b"PAR1\x15\x04", "a Parquet table"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_a_file_of_another_kind_is_recognised(
    name: str, content: bytes, what: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}: its content is {what}")


def test_text_that_begins_like_other_kinds_is_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for text in ("[x]", "{\n", "BZh91", "PAR1 and PAR2", "\0\0\0\0\0", "a\0b\0", ""):
        file.write_text(text)
        assert read(file) == [[text]]


def test_what_python_reads_as_json_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a", "score": NaN}\n{"text": "b", "text": "c"}\n{"text": "\\u0000"}')
    assert read(file) == [["a"], ["c"], ["\0"]]


def table(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=50)
    return path


def test_tables(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(200)]
    file = table(
        tmp_path / "a.parquet",
        {
            "id": list(range(200)),
            "text": texts,
            "kind": pyarrow.array(["x", "y"] * 100).dictionary_encode(),
            "raw": [text.encode() for text in texts],
        },
    )
    assert read(file, keys=("text",)) == [[text] for text in texts]
    both = read(file, keys=("raw", "kind"))
    assert both[1] == ["text 1", "y"] and len(both) == 200


def test_every_type_of_text_column_is_read(tmp_path: Path) -> None:
    texts = ["caf\u00e9", None, "x" * 40]
    column = pyarrow.array(texts)
    types = (pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary(), pyarrow.binary_view())
    columns = [column.cast(kind) for kind in types]
    columns += [column.dictionary_encode(), columns[0].dictionary_encode()]
    columns += [pyarrow.ExtensionArray.from_storage(pyarrow.json_(), column)]
    for number, each in enumerate(columns):
        file = table(tmp_path / f"{number}.parquet", {"text": each})
        documents = list(read_documents([file]))
        assert [documents[0].texts(["text"]), documents[2].texts(["text"])] == [
            texts[:1],
            texts[2:],
        ]
        with pytest.raises(DocumentError, match="2: key 'text' is null"):
            documents[1].texts(["text"])


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    column = pyarrow.array(["a"])
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match="has 2 columns named text"):
        read(tmp_path / "a.parquet")


def test_faults_of_tables_have_their_row(tmp_path: Path) -> None:
    raw = pyarrow.array([b"fine", b"\xff", None, b"x" * 21])
    file = table(tmp_path / "a.parquet", {"text": raw, "number": [1, 2, 3, 4]})

    def kinds(key: str) -> list[str]:
        found = []
        options = ReadOptions(keys=(key,), max_document_bytes=LIMIT)
        for segment in read_segments(Source(file), options):
            for document in segment.documents(LIMIT):
                try:
                    if isinstance(document, DocumentError):
                        raise document
                    found.append(document.texts([key])[0])
                except DocumentError as error:
                    found.append(f"{error.line} {error.kind}")
        return found

    assert kinds("text") == ["fine", "2 invalid_utf8", "3 missing_text", "4 too_long"]
    assert kinds("number") == [f"{row} not_a_string" for row in (1, 2, 3, 4)]
    assert kinds("other") == [f"{row} missing_text" for row in (1, 2, 3, 4)]


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    content = table(tmp_path / "a.parquet", {"text": ["some text"] * 500}).read_bytes()
    file = tmp_path / "b.parquet"
    for size in (0, 3, 100, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(DataError, match="not a Parquet file"):
            read(file)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_table_never_ends_in_anything_but_an_error(
    tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(table(tmp_path / "a.parquet", {"text": ["some text"] * 9}).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "b.parquet"
    file.write_bytes(content)
    try:
        read(file)
    except DataError:
        pass


def is_other_kind(file: Path) -> bool:
    """Whether the file as a whole is refused by its first bytes."""
    try:
        list(read_segments(Source(file), ReadOptions()))
    except DataError as error:
        assert "its content is" in str(error)
        return True
    return False


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=300), piece_bytes=st.integers(1, 40))
def test_no_bytes_lose_a_line_or_end_in_a_traceback(
    content: bytes, piece_bytes: int, tmp_path: Path
) -> None:
    """Every line that is not blank is a document or a fault, at its place, whatever is in it."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if is_other_kind(file):
        return
    expected = [
        (number, "too_long" if len(line) > LIMIT else line)
        for number, line in enumerate(lines, 1)
        if len(line) > LIMIT or line.strip()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_ponder.data.sources.PIECE_BYTES", max(piece_bytes, 3))
        assert places(file) == expected
    for segment in read_segments(Source(file), ReadOptions()):
        for document in segment.documents(1000):
            try:
                document.texts(["text"])  # type: ignore[union-attr]
            except DocumentError as error:
                assert error.file == str(file) and error.reason


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(records=st.lists(JSON | st.fixed_dictionaries({"text": JSON}), max_size=8))
def test_any_json_is_read_as_python_reads_it(records: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    if is_other_kind(file):
        assert isinstance(records[0], list)
        return
    documents = list(read_documents([file]))
    assert len(documents) == len(records)
    for document, record in zip(documents, records, strict=True):
        text = record.get("text") if isinstance(record, dict) else None
        is_text = isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text)
        try:
            assert document.texts(["text"]) == [text] and is_text
        except DocumentError:
            assert not is_text
