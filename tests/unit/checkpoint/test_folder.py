"""What lies in a checkpoint folder, and what is said when it is not what it should be."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ponder.checkpoint import storage
from megatron_ponder.checkpoint.reader import find_checkpoint
from megatron_ponder.checkpoint.stored_config import write_configs
from megatron_ponder.checkpoint.writer import prepare_folder
from megatron_ponder.config.schema import CheckpointConfig
from megatron_ponder.errors import CheckpointError
from tests.unit.checkpoint.small_run import small_config


def _publish(folder: Path, *iterations: int) -> None:
    """Checkpoints with a config and one data file."""
    for iteration in iterations:
        unfinished = storage.unfinished_folder(folder, iteration)
        unfinished.mkdir(parents=True)
        (unfinished / "__0_0.distcp").write_bytes(b"x" * 100)
        write_configs(unfinished, small_config())
        storage.publish(folder, iteration)


def test_publishing_leaves_only_finished_files(tmp_path: Path) -> None:
    _publish(tmp_path, 5, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000005",
        "iter_0000010",
        storage.LATEST_FILE,
    ]
    assert (tmp_path / storage.LATEST_FILE).read_text() == "10\n"
    storage.check_files(tmp_path / "iter_0000010")


def test_publishing_again_replaces(tmp_path: Path) -> None:
    _publish(tmp_path, 5)
    (tmp_path / "iter_0000005" / "stray").write_text("from the run before")
    _publish(tmp_path, 5)
    assert not (tmp_path / "iter_0000005" / "stray").exists()
    storage.check_files(tmp_path / "iter_0000005")


def test_an_unfinished_checkpoint_is_not_there(tmp_path: Path) -> None:
    _publish(tmp_path, 5)
    storage.unfinished_folder(tmp_path, 10).mkdir()
    assert storage.stored_iterations(tmp_path) == [5]
    assert storage.choose_iteration(tmp_path, None) == 5


@pytest.mark.parametrize(
    ("keep", "newest", "left"),
    [
        (None, 20, [5, 10, 15, 20, 25]),
        (1, 20, [20, 25]),
        (2, 20, [15, 20, 25]),
        (9, 20, [5, 10, 15, 20, 25]),
    ],
)
def test_pruning_keeps_the_newest_and_later_ones(
    keep: int | None, newest: int, left: list[int], tmp_path: Path
) -> None:
    _publish(tmp_path, 5, 10, 15, 20, 25)
    storage.prune(tmp_path, newest, keep)
    assert storage.stored_iterations(tmp_path) == left


def test_a_truncated_or_missing_file_is_named(tmp_path: Path) -> None:
    _publish(tmp_path, 5)
    data = tmp_path / "iter_0000005" / "__0_0.distcp"
    data.write_bytes(b"x" * 60)
    config = CheckpointConfig(load=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has 60 bytes, was written with 100"):
        find_checkpoint(config)
    data.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing"):
        find_checkpoint(config)


def test_where_a_run_starts(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    assert find_checkpoint(CheckpointConfig()) is None
    assert find_checkpoint(CheckpointConfig(save=folder, load=folder)) is None
    with pytest.raises(CheckpointError, match="there is no such folder"):
        find_checkpoint(CheckpointConfig(load=folder))
    _publish(Path(folder), 5, 10)
    found = find_checkpoint(CheckpointConfig(save=folder, load=folder))
    assert found is not None and found.name == "iter_0000010"
    found = find_checkpoint(CheckpointConfig(load=folder, ckpt_step=5))
    assert found is not None and found.name == "iter_0000005"
    with pytest.raises(CheckpointError, match=r"iteration 7.*Stored iterations: 5, 10"):
        find_checkpoint(CheckpointConfig(load=folder, ckpt_step=7))
    Path(folder, storage.LATEST_FILE).write_text("ten")
    with pytest.raises(CheckpointError, match="'ten'"):
        find_checkpoint(CheckpointConfig(load=folder))


def _lose_tracker(folder: Path) -> None:
    (folder / storage.LATEST_FILE).unlink()


def _garble_tracker(folder: Path) -> None:
    (folder / storage.LATEST_FILE).write_bytes(b"\xff\xfe1")


def _lose_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder / "iter_0000010")


def _cut_data(folder: Path) -> None:
    (folder / "iter_0000010" / "__0_0.distcp").write_bytes(b"x")


def _garble_sizes(folder: Path) -> None:
    (folder / "iter_0000010" / storage.SIZES_FILE).write_text('{"a"')


@pytest.mark.parametrize(
    ("damage", "taken", "named"),
    [
        (_lose_tracker, 10, "latest_checkpointed_iteration.txt is missing"),
        (_garble_tracker, 10, "not an iteration"),
        (_lose_checkpoint, 5, "iter_0000010 is missing"),
        (_cut_data, 5, "has 1 bytes, was written with 100"),
        (_garble_sizes, 5, "files.json is damaged"),
    ],
)
def test_a_run_resumes_from_its_newest_complete_checkpoint(
    damage: Callable[[Path], None],
    taken: int,
    named: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It never starts over beside its checkpoints; without --save it gets what it asked for."""
    _publish(tmp_path, 5, 10)
    own = CheckpointConfig(save=str(tmp_path), load=str(tmp_path))
    found = find_checkpoint(own)
    assert found is not None and found.name == "iter_0000010" and not caplog.text
    damage(tmp_path)
    with caplog.at_level("WARNING", logger="megatron_ponder"):
        found = find_checkpoint(own)
    assert found is not None and found.name == f"iter_{taken:07d}"
    assert "resuming from" in caplog.text and named in caplog.text
    with pytest.raises(CheckpointError):
        find_checkpoint(CheckpointConfig(load=str(tmp_path)))


def test_later_iterations_count_only_without_the_text_file(tmp_path: Path) -> None:
    _publish(tmp_path, 5, 10)
    (tmp_path / storage.LATEST_FILE).write_text("5\n")
    found, problems = storage.newest_complete(tmp_path)
    assert found.name == "iter_0000005" and not problems
    for iteration in (5, 10):
        (tmp_path / f"iter_{iteration:07d}" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is complete.*iter_0000005 is dam"):
        storage.newest_complete(tmp_path)


def test_a_run_does_not_overwrite_another(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    fresh = small_config(save=folder)
    prepare_folder(fresh)
    _publish(Path(folder), 5)
    with pytest.raises(CheckpointError, match="add --load"):
        prepare_folder(fresh)
    prepare_folder(small_config(save=folder, load=folder))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot create"):
        prepare_folder(small_config(save=str(tmp_path / "file" / "run")))


@pytest.mark.parametrize("save", [None, "model"])
def test_a_hugging_face_folder_names_the_command_that_converts_it(
    save: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run would start from scratch in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"import --hf-path model --save NEW"):
        find_checkpoint(CheckpointConfig(load="model", save=save))


def test_other_folders_say_what_they_are(tmp_path: Path) -> None:
    _publish(tmp_path, 5)
    checkpoint = tmp_path / "iter_0000005"
    with pytest.raises(CheckpointError, match="give the folder above, with --ckpt-step"):
        find_checkpoint(CheckpointConfig(load=str(checkpoint)))
    with pytest.raises(CheckpointError, match="there is no such folder"):
        find_checkpoint(CheckpointConfig(load=str(tmp_path / "none")))
    for name in (storage.SIZES_FILE, storage.CONFIG_FILE):
        (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match="not written by this package.*Megatron-LM"):
        find_checkpoint(CheckpointConfig(load=str(tmp_path)))
