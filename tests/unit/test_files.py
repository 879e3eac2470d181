"""Files appear whole or not at all."""

import os
from pathlib import Path
from unittest import mock

import pytest

from megatron_ponder.files import published, write_json, write_text


def test_a_file_appears_when_it_is_complete_and_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "trace.json.gz"
    with mock.patch.object(os, "fsync", wraps=os.fsync) as flushed, published(path) as unfinished:
        unfinished.write_text("whole")
        assert not path.exists() and unfinished.parent == path.parent
        assert unfinished.name.endswith(path.name)
        assert not flushed.called
    assert flushed.called
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "before")
    with pytest.raises(RuntimeError), published(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    with pytest.raises(TypeError):
        write_json(path, object())
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
