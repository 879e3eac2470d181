"""What a checkpoint says about the run that wrote it, and what that is as --config of another."""

from pathlib import Path

import pytest
import yaml

from megatron_ponder.checkpoint import storage
from megatron_ponder.checkpoint.stored_config import read_config, write_configs
from megatron_ponder.config.parse import dump_yaml, parse_args
from megatron_ponder.config.resolve import reopen, resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.errors import CheckpointError
from tests.fuzz import damaged_value, survive
from tests.unit.checkpoint.small_run import small_config

BOTH = (storage.CONFIG_FILE, storage.RESOLVED_CONFIG_FILE)
GIVEN = ["--preset", "llama-125m", "--lr", "1e-3", "--data-path", "0.5", "a", "0.5", "b"]


def parsed(*argv: str) -> ResolvedConfig:
    """What a command line comes to on two ranks."""
    return resolve(parse_args(argv, prog="test"), world_size=2)


def test_the_round_trip_is_exact(tmp_path: Path) -> None:
    config = parsed(*GIVEN)
    write_configs(tmp_path, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(BOTH)
    back = read_config(tmp_path)
    assert back == config and back.given == config.given == parse_args(GIVEN, prog="test")
    (tmp_path / "again").mkdir()
    write_configs(tmp_path / "again", back)
    for name in BOTH:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_what_was_left_open_stays_open(tmp_path: Path) -> None:
    """As --config the stored file gives what the command line gave, whatever is added to it."""
    write_configs(tmp_path, parsed(*GIVEN, "--train-iters", "100"))
    stored = ["--config", str(tmp_path / storage.CONFIG_FILE)]
    assert parsed(*stored) == parsed(*GIVEN, "--train-iters", "100")
    for more in (["--train-iters", "300"], ["--lr", "2e-3"], ["--micro-batch-size", "3"]):
        train_iters = [] if more[0] == "--train-iters" else ["--train-iters", "100"]
        assert parsed(*stored, *more) == parsed(*GIVEN, *train_iters, *more)
    longer = parsed(*stored, "--train-iters", "300").optimizer
    assert (longer.lr_decay_iters, longer.lr_warmup_iters, longer.min_lr) == (300, 3, 1e-4)


def test_what_was_given_stays_given(tmp_path: Path) -> None:
    write_configs(tmp_path, parsed(*GIVEN, "--lr-decay-iters", "50", "--global-batch-size", "8"))
    stored = ["--config", str(tmp_path / storage.CONFIG_FILE), "--train-iters", "300"]
    assert parsed(*stored).optimizer.lr_decay_iters == 50
    assert parsed(*stored).training.global_batch_size == 8


def test_a_preset_is_stored_as_its_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version's preset of the same name changes no stored run."""
    config = parsed(*GIVEN)
    write_configs(tmp_path, config)
    monkeypatch.setattr("megatron_ponder.config.parse.PRESETS", {})
    assert parsed("--config", str(tmp_path / storage.CONFIG_FILE)) == config


def test_checkpoints_of_earlier_versions(tmp_path: Path) -> None:
    """run_config.yaml alone: resolved after training, open where it depends on the run if imported.

    An import was resolved for one rank.
    """
    config = small_config(global_batch_size=4, lr=3e-3)
    (tmp_path / storage.CONFIG_FILE).write_text(dump_yaml(config))
    back = read_config(tmp_path)
    assert back == config and back.given.to_flat_dict() == config.to_flat_dict()
    imported = small_config(global_batch_size=None)
    (tmp_path / storage.CONFIG_FILE).write_text(dump_yaml(reopen(imported)))
    back = read_config(tmp_path)
    assert back.model == imported.model and back.given == reopen(imported)
    assert back.training.global_batch_size == 1


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("setting_of_the_future: 1\n", r"setting_of_the_future.*another version"),
        ("- num_layers\n", "must be a mapping"),
        ("num_layers: [1\n", "not valid YAML"),
        (
            "num_layers: 1.5\nlr: x\n",
            "num_layers: 1.5 does not fit int.*lr: 'x' does not fit float",
        ),
        (
            "data_path: [1]\nbf16: 1\n",
            "data_path: .* does not fit tuple.*bf16: 1 does not fit bool",
        ),
        ("normalization: 7\n", "normalization: 7 does not fit Literal"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    write_configs(tmp_path, small_config())
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"(?s){name}.*{message}"):
        read_config(tmp_path)


@pytest.mark.parametrize("setting", ["tensor_model_parallel_size: 0", "lr_warmup_fraction: .nan"])
def test_a_value_out_of_its_range_is_refused(setting: str, tmp_path: Path) -> None:
    write_configs(tmp_path, small_config())
    (tmp_path / storage.RESOLVED_CONFIG_FILE).write_text(f"vocab_size: 9\n{setting}\n")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: .*\n.*must be"):
        read_config(tmp_path)


@pytest.mark.slow
def test_damaged_configs_are_read_or_refused(tmp_path: Path) -> None:
    write_configs(tmp_path, small_config())
    path = tmp_path / storage.RESOLVED_CONFIG_FILE
    settings = yaml.safe_load(path.read_text())

    def read(damaged: dict[str, object]) -> None:
        text = yaml.safe_dump(damaged, sort_keys=False)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        read_config(tmp_path)

    found = survive(read, lambda draw: damaged_value(settings, draw), seed=7)
    assert found["refused"] > 100


def test_a_resolved_config_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    write_configs(tmp_path, small_config())
    path = tmp_path / storage.RESOLVED_CONFIG_FILE
    path.write_text(path.read_text().replace("\nvocab_size: 61\n", "\nvocab_size: null\n"))
    with pytest.raises(CheckpointError, match="--vocab-size must be given"):
        read_config(tmp_path)
