"""Checkpoints of every layout, with optimizer state or without, export to the same folder."""

from pathlib import Path

import pytest
import torch

from megatron_ponder.checkpoint.progress import Progress
from megatron_ponder.checkpoint.writer import save_checkpoint
from megatron_ponder.config.parse import dump_yaml
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.convert.config_mapping import read_model_settings
from megatron_ponder.convert.weight_names import to_megatron
from megatron_ponder.model.build import build_model_chunks
from megatron_ponder.model.init import name_in_whole_model
from megatron_ponder.optim.adamw import build_optimizer
from megatron_ponder.parallel.parallel_model import ParallelModel, wrap_data_parallel
from megatron_ponder.runtime import distributed
from megatron_ponder.train.step import TrainingState
from tests.parity.tolerances import LOGITS_ABSOLUTE, largest_difference
from tests.ranks import run_ranks
from tests.unit.checkpoint.small_run import build_training_state, run_iterations, small_config
from tests.unit.convert.conversion import alone, config_of, convert_well, export, stored_weights
from tests.unit.convert.stock_models import MODELS, stock_config, write_stock_model
from tests.unit.convert.test_round_trip import assert_same_weights, checkpoint_logits

pytestmark = pytest.mark.thorough

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "TP1": (1, {}),
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "TP2 x PP2": (4, TP2 | PP2),
}
"""Where the weights are put before they are saved."""


def save_layout(models: list[str], settings: dict, world_size: int, folder: str) -> None:
    """Put each model's weights on a layout and save them, optimizer and all (inside a rank)."""
    for name in models:
        source, target = Path(folder, name), Path(folder, "checkpoints", name)
        config = RunConfig().replaced(
            **read_model_settings(config_of(source)),
            **settings,
            method="vanilla",
            seq_length=16,
            global_batch_size=2,
            make_vocab_size_divisible_by=8,
            save=str(target),
            tokenizer_type="NullTokenizer",
        )
        config = resolve(config, world_size=world_size)
        distributed.initialize(config.parallel, seed=1)
        model = wrap_data_parallel(build_model_chunks(config), config)
        put_weights(model, to_megatron(stored_weights(source), config.model))
        optimizer, scheduler = build_optimizer(config, model.chunks)
        save_checkpoint(
            config,
            chunks=model.chunks,
            optimizer=optimizer,
            scheduler=scheduler,
            progress=Progress(iteration=3),
        )


@torch.no_grad()
def put_weights(model: ParallelModel, whole: dict[str, torch.Tensor]) -> None:
    """This rank's parts of whole parameters."""
    group = distributed.tensor_parallel_group()
    for module in model.modules:
        for name, parameter in module.named_parameters():
            tensor = whole[name_in_whole_model(name, module)]
            if getattr(parameter, "tensor_model_parallel", False):
                dim, stride = parameter.partition_dim, parameter.partition_stride
                parts = tensor.chunk(group.size() * stride, dim=dim)
                tensor = torch.cat(parts[group.rank() :: group.size()], dim=dim)
            parameter.copy_(tensor)


def export_all(models: list[str], folder: str) -> None:
    for name in models:
        source, result = Path(folder, name), Path(folder, "exported", name)
        export(Path(folder, "checkpoints", name), result, "--no-verify")
        assert_same_weights(source, result)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per stock model."""
    folder = tmp_path_factory.mktemp("sources")
    for name in MODELS:
        write_stock_model(name, folder / name)
    return folder


@pytest.mark.parametrize(
    "layout",
    [
        "TP1",
        pytest.param("TP2", marks=pytest.mark.slow),
        pytest.param("PP2", marks=pytest.mark.slow),
        "TP2 x PP2",
    ],
)
def test_weights_of_every_layout(layout: str, sources: Path, tmp_path: Path) -> None:
    """Every stock model, bit by bit."""
    world_size, settings = LAYOUTS[layout]
    for name in MODELS:
        (tmp_path / name).symlink_to(sources / name)
    run_ranks(save_layout, world_size, list(MODELS), settings, world_size, str(tmp_path))
    alone(export_all, list(MODELS), str(tmp_path))


def train_and_save(folder: str) -> None:
    """Two steps of a small model with thoughts on TP2 x PP2, a distributed optimizer (4 ranks)."""
    config = small_config(
        world_size=4,
        **TP2,
        **PP2,
        use_distributed_optimizer=True,
        save=folder,
        architecture="llama",
    )
    training_state, progress = build_training_state(config), Progress()
    run_iterations(config, training_state, progress, last=2)
    save(config, training_state, progress)


def save(config: RunConfig, training_state: TrainingState, progress: Progress) -> None:
    save_checkpoint(
        config,
        chunks=training_state.model.chunks,
        optimizer=training_state.optimizer,
        scheduler=training_state.scheduler,
        progress=progress,
    )


def come_back(folder: Path) -> float:
    """Export, import, and the largest difference between the logits of both checkpoints."""
    export(folder / "trained", folder / "exported")
    card = (folder / "exported" / "README.md").read_text()
    assert "| K (`num_latent_thoughts`) | 1 |" in card and "2 iterations, 128 tokens" in card
    arguments = ("--hf-path", str(folder / "exported"), "--save", str(folder / "imported"))
    convert_well("import", *arguments, "--make-vocab-size-divisible-by", "8")
    ids = torch.randint(61, (2, 12))
    before = checkpoint_logits(folder / "trained", ids)
    return largest_difference(checkpoint_logits(folder / "imported", ids), before)


def train_imported(folder: str, world_size: int, **settings: object) -> list[float]:
    """Losses of two steps from the imported checkpoint, loaded as a run loads (inside a rank)."""
    from megatron_ponder.checkpoint.reader import load_checkpoint, locate

    config = small_config(world_size=world_size, **settings, load=folder)
    training_state = build_training_state(config)
    progress = load_checkpoint(
        config,
        locate(Path(folder)),
        chunks=training_state.model.chunks,
        optimizer=training_state.optimizer,
        scheduler=training_state.scheduler,
        data={},
    )
    assert progress == Progress()
    steps = run_iterations(config, training_state, progress, last=2)
    return [step.loss for step in steps]


def test_from_four_ranks_and_back_to_training(tmp_path: Path) -> None:
    """Save at TP2 x PP2, export, import: equal logits; then train on, alone and at TP2 and PP2."""
    run_ranks(train_and_save, 4, str(tmp_path / "trained"))
    assert alone(come_back, tmp_path) <= LOGITS_ABSOLUTE
    imported = str(tmp_path / "imported")
    (truth,) = run_ranks(train_imported, 1, imported, 1)
    assert truth[0] < 3.5  # the weights have seen this batch; an untrained model has 4.1
    for settings in (TP2, PP2):
        for losses in run_ranks(_train_on, 2, imported, settings):
            assert losses == pytest.approx(truth, abs=1e-5)


def _train_on(folder: str, settings: dict) -> list[float]:
    return train_imported(folder, 2, **settings)


def test_the_stored_settings_start_a_run(tmp_path: Path) -> None:
    """run_config.yaml of an import is a --config that leaves ranks and length open."""
    from megatron_ponder.config.parse import parse_args

    write_stock_model("llama", tmp_path / "source")
    flags = ("--hf-path", str(tmp_path / "source"), "--save", str(tmp_path / "checkpoint"))
    alone(convert_well, "import", *flags, "--no-verify")
    path = tmp_path / "checkpoint" / "iter_0000000" / "run_config.yaml"
    more = ["--global-batch-size", "16", "--lr", "1e-5", "--train-iters", "7"]
    config = resolve(parse_args(["--config", str(path), *more], prog="test"), world_size=8)
    assert config.optimizer.min_lr == 1e-5 / 10 and config.optimizer.lr_decay_iters == 7
    assert config.model.num_query_groups == stock_config("llama").num_key_value_heads
    assert "min_lr: null" in dump_yaml(parse_args(["--config", str(path)], prog="test"))
