"""Conversations: what is learned is what the model is to say, and its end; nothing is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ponder.data.conversations import conversation_parts
from megatron_ponder.data.documents import DocumentError, RawDocument
from megatron_ponder.data.indexed import check_indexed_dataset
from megatron_ponder.data.instruction_dataset import (
    InstructionDataset,
    check_instruction_dataset,
    check_kind,
    mask_prefix,
)
from megatron_ponder.errors import DataError
from tests.unit.data import corpora
from tests.unit.data.corpora import run_preprocess

CONVERSATIONS = [
    {"prompt": "bak dom", "response": "gel bak"},
    {
        "messages": [
            {"role": "system", "content": "dim"},
            {"role": "user", "content": "bak"},
            {"role": "assistant", "content": "dom dom"},
            {"role": "user", "content": "gel"},
            {"role": "assistant", "content": "fin"},
        ]
    },
]


def write(folder: Path, tokenizer_model: str, records: list[Any], **settings: Any) -> str:
    corpus = corpora.write_json_lines(folder / "c.jsonl", records)
    settings = {"tokenizer_model": tokenizer_model, "instruction_data": True, **settings}
    run_preprocess(corpus, folder / "chat", **settings)
    return f"{folder}/chat_instruction_document"


@pytest.mark.parametrize("workers", [0, 2])
def test_ids_and_mask(workers: int, tmp_path: Path, tokenizer_model: str) -> None:
    prefix = write(tmp_path, tokenizer_model, CONVERSATIONS, workers=workers)
    mask_prefix = f"{tmp_path}/chat_instruction_loss_mask"
    check_instruction_dataset(prefix)
    parts = [
        [("### Instruction:\nbak dom\n\n", 0), ("### Response:\n", 0), ("gel bak", 1)],
        [
            ("dim\n\n", 0),
            ("### Instruction:\nbak\n\n", 0),
            ("### Response:\n", 0),
            ("dom dom", 1),
            ("### Instruction:\ngel\n\n", 0),
            ("### Response:\n", 0),
            ("fin", 1),
        ],
    ]
    for ids, mask, expected in zip(
        corpora.read_documents(prefix), corpora.read_documents(mask_prefix), parts, strict=True
    ):
        wanted_ids, wanted_mask = [], []
        for text, learned in expected:
            mine = corpora.encode(tokenizer_model, text) + [2] * learned
            wanted_ids += mine
            wanted_mask += [learned] * len(mine)
        assert ids == wanted_ids and mask == wanted_mask


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"prompt": "a"}, "missing_text"),
        ({"prompt": 1, "response": "b"}, "not_a_string"),
        ({"prompt": "a", "response": ""}, "empty"),
        ({"prompt": "\ud800", "response": "b"}, "lone_surrogate"),
        ({"messages": []}, "no_response"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no_response"),
        ({"messages": "a"}, "bad_conversation"),
        ({"messages": ["a"]}, "bad_conversation"),
        ({"messages": [{"content": "a"}]}, "bad_conversation"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "bad_conversation"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "bad_conversation"),
        ({"messages": [{"role": "assistant", "content": None}]}, "missing_text"),
        ([], "not_an_object"),
    ],
    ids=str,
)
def test_what_is_no_conversation(record: Any, kind: str) -> None:
    document = RawDocument(json.dumps(record).encode(), True, "c.jsonl", 3)
    with pytest.raises(DocumentError, match="^c.jsonl:3: ") as error:
        conversation_parts(document)
    assert error.value.kind == kind


def test_rejected_conversations_are_counted(tmp_path: Path, tokenizer_model: str) -> None:
    records = [*CONVERSATIONS, {"prompt": "x"}, {"messages": 1}]
    with pytest.raises(DataError, match="1 bad_conversation, 1 missing_text"):
        write(tmp_path, tokenizer_model, records)
    prefix = write(tmp_path, tokenizer_model, records, max_rejected=2)
    assert check_indexed_dataset(prefix).num_documents == 2


def dataset(prefix: str, num_conversations: int, **settings: Any) -> InstructionDataset:
    options = {"num_samples": 1, "seq_length": 40, "seed": 1, "pad": 2}
    return InstructionDataset(prefix, documents=range(num_conversations), **{**options, **settings})


def test_every_conversation_is_whole_in_a_sequence_and_padding_is_not_learned(
    tmp_path: Path, tokenizer_model: str
) -> None:
    records = [{"prompt": f"bak {i}", "response": "dom " * (i % 4 + 1)} for i in range(30)]
    prefix = write(tmp_path, tokenizer_model, records)
    documents = corpora.read_documents(prefix)
    masks = corpora.read_documents(f"{tmp_path}/chat_instruction_loss_mask")
    longest = max(map(len, documents))
    packed = dataset(prefix, 30, seq_length=3 * longest)
    found: list[int] = []
    for index in range(len(packed)):
        sample = packed[index]
        assert [len(v) for v in sample.values()] == [3 * longest] * 3
        ids = [*sample["tokens"].tolist(), int(sample["labels"][-1])]
        assert sample["labels"].tolist() == ids[1:]
        wanted: list[float] = []
        while len(wanted) < len(ids):
            rest = ids[len(wanted) :]
            match = [n for n, d in enumerate(documents) if rest[: len(d)] == d]
            if not match:
                assert set(rest) == {2}
                wanted += [0.0] * len(rest)
            else:
                found.append(match[0])
                wanted += masks[match[0]]
        assert sample["loss_mask"].tolist() == wanted[1:]
        assert sample["loss_mask"].dtype == torch.float32
    assert sorted(found) == list(range(30)) and found != sorted(found)


def test_repetitions_are_shuffled_anew_and_the_order_is_the_seeds(
    tmp_path: Path, tokenizer_model: str
) -> None:
    records = [{"prompt": f"bak {i}", "response": "dom"} for i in range(12)]
    prefix = write(tmp_path, tokenizer_model, records)
    once = dataset(prefix, 12)
    more = dataset(prefix, 12, num_samples=2 * len(once))
    assert not once.is_repeated and more.is_repeated and len(more) >= 2 * len(once)

    def read(packed: InstructionDataset) -> list[list[int]]:
        return [packed[i]["tokens"].tolist() for i in range(len(packed))]

    assert read(more)[: len(once)] == read(once) != read(more)[len(once) : 2 * len(once)]
    assert read(dataset(prefix, 12)) == read(once) != read(dataset(prefix, 12, seed=2))


def test_a_conversation_longer_than_a_sequence_is_truncated_with_a_warning(
    tmp_path: Path, tokenizer_model: str, caplog: pytest.LogCaptureFixture
) -> None:
    prefix = write(tmp_path, tokenizer_model, [{"prompt": "bak", "response": "dom " * 50}])
    (document,) = corpora.read_documents(prefix)
    packed = dataset(prefix, 1, seq_length=20)
    assert "1 of 1 conversations are longer than --seq-length" in caplog.text
    assert packed[0]["tokens"].tolist() == document[:20]
    assert packed[0]["labels"].tolist() == document[1:21]


def test_conversations_that_fit_exactly(
    tmp_path: Path, tokenizer_model: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A sequence and its last label take seq_length + 1 ids: one conversation, or two of half."""
    prefix = write(tmp_path, tokenizer_model, [{"prompt": "bak", "response": "dom gel"}] * 2)
    document, same = corpora.read_documents(prefix)
    assert document == same
    for copies in (1, 2):
        ids = document * copies
        packed = dataset(prefix, 2, seq_length=len(ids) - 1)
        assert len(packed) == 2 // copies
        for index in range(len(packed)):
            sample = packed[index]
            assert [*sample["tokens"].tolist(), int(sample["labels"][-1])] == ids
    assert "lose their end" not in caplog.text


def test_a_mask_of_other_conversations_is_refused(tmp_path: Path, tokenizer_model: str) -> None:
    for name, records in (("a", CONVERSATIONS), ("b", CONVERSATIONS[:1])):
        (tmp_path / name).mkdir()
        write(tmp_path / name, tokenizer_model, records)
    for suffix in ("bin", "idx"):
        name = f"chat_instruction_loss_mask.{suffix}"
        (tmp_path / "b" / name).rename(tmp_path / "a" / name)
    with pytest.raises(DataError, match="belongs to other conversations"):
        check_instruction_dataset(f"{tmp_path}/a/chat_instruction_document")
    with pytest.raises(DataError, match="ends in instruction_document"):
        check_instruction_dataset(corpora.write_ids(tmp_path / "ids", [[1, 2]]))


@pytest.mark.parametrize("has_manifest", [True, False])
def test_conversations_and_documents_are_told_apart(
    has_manifest: bool, tmp_path: Path, tokenizer_model: str
) -> None:
    chat = write(tmp_path, tokenizer_model, CONVERSATIONS)
    corpus = corpora.write_json_lines(tmp_path / "d.jsonl", [{"instruction": "bak"}])
    # The key makes documents look like conversations by name.
    run_preprocess(
        corpus, tmp_path / "d", json_keys=("instruction",), tokenizer_model=tokenizer_model
    )
    documents = f"{tmp_path}/d_instruction_document"
    if not has_manifest:
        for manifest in tmp_path.glob("*.manifest.json"):
            manifest.unlink()
    check_kind(chat, instruction_data=True)
    check_kind(documents, instruction_data=False)
    for prefix in (chat, f"{tmp_path}/chat_instruction_loss_mask"):
        with pytest.raises(DataError, match="holds conversations.*Give --instruction-data"):
            check_kind(prefix, instruction_data=False)
    with pytest.raises(DataError, match="not a dataset of conversations. Leave"):
        check_kind(documents, instruction_data=True)


def test_conversations_begin_with_the_begin_id(tmp_path: Path, tokenizer_model: str) -> None:
    plain = corpora.read_documents(write(tmp_path, tokenizer_model, CONVERSATIONS))
    (tmp_path / "bos").mkdir()
    prefix = write(tmp_path / "bos", tokenizer_model, CONVERSATIONS, add_bos=True)
    assert corpora.read_documents(prefix) == [[1, *ids] for ids in plain]
    masks = corpora.read_documents(mask_prefix(prefix))
    assert all(
        mask[0] == 0 and len(mask) == len(ids) + 1 for mask, ids in zip(masks, plain, strict=True)
    )
