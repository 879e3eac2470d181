"""From a checkpoint to a folder that transformers loads; tools/convert_checkpoint.py export."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ponder import log
from megatron_ponder.checkpoint.common_state import load_common_state
from megatron_ponder.checkpoint.reader import check_trained_tokenizer, locate
from megatron_ponder.checkpoint.stored_config import read_config
from megatron_ponder.config.resolve import resolve_for_inference
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.convert import exported_code, verification
from megatron_ponder.convert.config_mapping import build_stock_config
from megatron_ponder.convert.folders import check_space, new_folder
from megatron_ponder.convert.generation_defaults import (
    GENERATION_CONFIG,
    build_generation_files,
)
from megatron_ponder.convert.huggingface_weights import (
    TensorToWrite,
    shard_names,
    write_index,
    write_safetensors,
)
from megatron_ponder.convert.method_mapping import build_method_keys
from megatron_ponder.convert.model_card import write_model_card
from megatron_ponder.convert.options import ExportOptions
from megatron_ponder.convert.stored_parameters import ParameterReader, StoredParameters
from megatron_ponder.convert.tokenizer_files import load_run_tokenizer, write_tokenizer
from megatron_ponder.convert.weight_names import rules_of
from megatron_ponder.convert.weight_rules import Rule
from megatron_ponder.runtime.distributed import running

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STORED_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def export_checkpoint(options: ExportOptions) -> None:
    """Do what the command line asks for.

    Raises:
        PonderError: the checkpoint, the tokenizer or the target cannot be used, or the result does
            not compute what the checkpoint does.
    """
    checkpoint = locate(Path(options.load), options.ckpt_step)
    config = resolve_for_inference(read_config(checkpoint), num_ranks=1)
    if options.tokenizer_model is not None:
        config = config.replaced(tokenizer_model=options.tokenizer_model)
    dtype = DTYPES[options.dtype or ("bf16" if config.training.bf16 else "fp32")]
    tokenizer = None
    if not options.without_tokenizer:
        tokenizer = load_run_tokenizer(config.data, config.model.vocab_size)
    if tokenizer is not None:
        check_trained_tokenizer(checkpoint, tokenizer)
    keys, generation = build_generation_files(config.model.generation_defaults, tokenizer)
    stock = build_huggingface_config(config) | {"torch_dtype": STORED_NAMES[dtype]} | keys
    if options.verify:
        verification.check_memory(config)
    target = Path(options.hf_path)
    with (
        new_folder(
            target,
            "--hf-path",
            overwrite=options.overwrite,
            keep_out=checkpoint,
            first="config.json",
        ) as folder,
        running(config.parallel, config.training.seed),
    ):
        _write_weights(folder, checkpoint, config, dtype, options.max_shard_bytes)
        _write_json(folder / "config.json", stock)
        if generation is not None:
            _write_json(folder / GENERATION_CONFIG, generation)
        if tokenizer is not None:
            write_tokenizer(config.data, tokenizer, folder)
        if config.method.method != "vanilla":
            exported_code.copy_remote_code(folder)
            if "." in target.name:
                logger.warning(
                    "--hf-path %s: transformers 4.56 cannot load code from a folder with a dot in "
                    "its name; newer versions can",
                    target,
                )
        _write_card(folder, checkpoint, config)
        if options.verify:
            _verify(folder, checkpoint, config, dtype)
        else:
            logger.warning("--no-verify: the result was not compared with the checkpoint")
    logger.info("exported %s to %s", checkpoint, target)


def build_huggingface_config(config: ResolvedConfig) -> dict[str, Any]:
    """config.json of a run's model; without dtype and token ids.

    Raises:
        ConversionError: transformers has no class for it.
    """
    stock = build_stock_config(config)
    method = build_method_keys(config)
    if not method:
        return stock
    architecture = config.model.architecture
    classes = {
        "model_type": exported_code.model_type(architecture),
        "architectures": [exported_code.class_name(architecture)],
        "auto_map": exported_code.auto_map(architecture),
    }
    return stock | classes | method


def _write_weights(
    folder: Path, checkpoint: Path, config: ResolvedConfig, dtype: torch.dtype, max_bytes: int
) -> None:
    """All weight files and their index."""
    parameters = StoredParameters(config)
    reader = ParameterReader(checkpoint, parameters)
    shards = plan_shards(config, parameters, max_bytes // dtype.itemsize)
    described = [[tensor for _, tensors in shard for tensor in tensors] for shard in shards]
    total = sum(tensor.numel for shard in described for tensor in shard) * dtype.itemsize
    check_space(folder, total)
    with log.progress(total, "writing weights", "B", unit_scale=True) as bar:
        for name, shard, tensors in zip(shard_names(len(shards)), shards, described, strict=True):
            rules = [rule for rule, _ in shard]
            parts = _convert(rules, reader, config, dtype, bar)
            write_safetensors(folder / name, tensors, parts, dtype)
    write_index(folder, described, dtype.itemsize)


def plan_shards(
    config: ResolvedConfig, parameters: StoredParameters, max_numel: int
) -> list[list[tuple[Rule, list[TensorToWrite]]]]:
    """Which weights go to which file, in the order of the layers.

    What is one parameter here stays in one file.
    """
    shards: list[list[tuple[Rule, list[TensorToWrite]]]] = [[]]
    filled = 0
    for rule in rules_of(config.model):
        tensors = [
            TensorToWrite(name, tuple(part.shape))
            for name, part in zip(rule.theirs, _on_meta(rule, parameters, config), strict=True)
        ]
        numel = sum(tensor.numel for tensor in tensors)
        if filled and filled + numel > max_numel:
            shards.append([])
            filled = 0
        shards[-1].append((rule, tensors))
        filled += numel
    return shards


def _on_meta(rule: Rule, parameters: StoredParameters, config: ResolvedConfig) -> list[Tensor]:
    """The shapes that a rule gives, without the tensors."""
    return rule.split(torch.empty(parameters.shapes[rule.ours], device="meta"), config.model)


def _convert(
    rules: list[Rule],
    reader: ParameterReader,
    config: ResolvedConfig,
    dtype: torch.dtype,
    bar: "tqdm[Any]",
) -> Iterator[Tensor]:
    """The tensors of a file, one parameter at a time."""
    for rule in rules:
        for part in rule.split(reader.read(rule.ours), config.model):
            yield part
            bar.update(part.numel() * dtype.itemsize)


def _write_card(folder: Path, checkpoint: Path, config: ResolvedConfig) -> None:
    """README.md with what the checkpoint says of its training."""
    progress = load_common_state(checkpoint)["progress"]
    write_model_card(
        folder,
        config,
        iteration=progress["iteration"],
        consumed_tokens=progress["consumed_tokens"],
        run_folder=checkpoint.parent,
    )


def _verify(folder: Path, checkpoint: Path, config: ResolvedConfig, dtype: torch.dtype) -> None:
    """Compare what was written with what is in the checkpoint."""
    model = config.model
    ids = verification.draw_ids(model.vocab_size, model.max_position_embeddings)
    ours = None if config.method.method == "vanilla" else model.architecture
    source = verification.native_logits(checkpoint, config, ids, rounded_to=dtype)
    verification.forget_model()
    result = verification.folder_logits(folder, ids, ours=ours, trust_remote_code=False)
    verification.compare(source, result)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
