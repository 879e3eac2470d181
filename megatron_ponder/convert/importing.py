"""From a Hugging Face folder to a checkpoint; tools/convert_checkpoint.py import.

The checkpoint is iteration 0 of a run that has not begun: weights, the settings that give the model
its shape and its method, and nothing of an optimizer. Its run_config.yaml serves as --config of
training. Code that comes with the folder is not run unless asked.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ponder import log
from megatron_ponder.checkpoint import storage
from megatron_ponder.checkpoint.progress import Progress
from megatron_ponder.checkpoint.state import WEIGHTS_ONLY
from megatron_ponder.checkpoint.stored_config import write_configs
from megatron_ponder.config.resolve import reopen, resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.convert import verification
from megatron_ponder.convert.config_mapping import read_model_settings
from megatron_ponder.convert.exported_code import architecture_of, auto_map
from megatron_ponder.convert.exporting import build_huggingface_config
from megatron_ponder.convert.family import find_family
from megatron_ponder.convert.folders import check_space, new_folder
from megatron_ponder.convert.generation_defaults import read_generation_defaults
from megatron_ponder.convert.huggingface_weights import WeightFiles
from megatron_ponder.convert.json_values import read_object
from megatron_ponder.convert.method_mapping import MethodOfSource, read_method
from megatron_ponder.convert.options import ImportOptions
from megatron_ponder.convert.stored_parameters import StoredParameters, write_parameters
from megatron_ponder.convert.tokenizer_files import find_tokenizer
from megatron_ponder.convert.weight_names import rules_of
from megatron_ponder.errors import ConversionError
from megatron_ponder.model.size import count_parameters
from megatron_ponder.runtime.distributed import running

logger = logging.getLogger(__name__)

DEFAULT_SEQ_LENGTH = 2048
MAX_PASSES_COMPARED = 8
"""K and R of the comparison are at most this: more passes tell nothing more of the weights."""


def import_checkpoint(options: ImportOptions) -> None:
    """Do what the command line asks for.

    Raises:
        PonderError: the folder cannot be converted, the target cannot be used, or the result does
            not compute what the folder does.
    """
    folder = Path(options.hf_path)
    stored = read_config_json(folder)
    settings = read_model_settings(stored, options.ignore_config_keys)
    method = read_method(stored, _asked_method(options))
    _check_code(stored, options)
    architecture = settings["architecture"]
    family = find_family(architecture)
    files = WeightFiles(folder, family.base_prefix, family.head)
    config = _build_config(options, stored, settings, method, files)
    _check_size(config, files)
    logger.info("%s, method %s (%s)", architecture, method.source["method"], method.remark)
    if options.verify:
        verification.check_memory(config)
    target = Path(options.save)
    with (
        new_folder(
            target,
            "--save",
            overwrite=options.overwrite,
            keep_out=folder,
            first=storage.LATEST_FILE,
        ) as unfinished,
        running(config.parallel, config.training.seed),
    ):
        parameters = StoredParameters(config)
        weights = _Weights(files, config, parameters, settings["vocab_size"])
        weights.check()
        checkpoint = _write(unfinished, config, parameters, weights, verify=options.verify)
        if options.verify:
            _verify(checkpoint, config, method, stored, options)
        else:
            logger.warning("--no-verify: the result was not compared with the folder")
    logger.info(
        "imported %s to %s. To train it: --config %s --load %s",
        folder, target, storage.iteration_folder(target, 0) / storage.CONFIG_FILE, target,
    )  # fmt: skip


def read_config_json(folder: Path) -> dict[str, Any]:
    """What config.json holds, with the architecture as `model_type`.

    Raises:
        ConversionError: it is not there, or no JSON object.
    """
    try:
        content = read_object(folder / "config.json")
    except FileNotFoundError:
        raise ConversionError(
            f"--hf-path {folder}: there is no config.json. Give the folder of a model as "
            "transformers saves it."
        ) from None
    if "model_type" in content:
        content["model_type"] = architecture_of(content["model_type"])
    return content


def _asked_method(options: ImportOptions) -> dict[str, Any]:
    """What the user wants of the method."""
    names = (
        "method",
        "num_latent_thoughts",
        "num_jacobi_iterations",
        "scale_embeds",
        "interpolation",
        "pause_token_id",
    )
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _check_code(stored: Mapping[str, Any], options: ImportOptions) -> None:
    """Code that comes with a folder may compute anything: its weights alone say nothing.

    Raises:
        ConversionError: there is such code, not ours, and it was not asked for.
    """
    asked_for = stored.get("auto_map")
    if not asked_for or asked_for == auto_map(str(stored.get("model_type"))):
        return
    if options.verify and not options.trust_remote_code:
        raise ConversionError(
            f"{options.hf_path}: comes with code of its own ({asked_for}), which is not run. Give "
            "--trust-remote-code to run it for the comparison, after reading it; or --no-verify to "
            f"take the weights for those of a stock {stored['model_type']}."
        )


def _build_config(
    options: ImportOptions,
    stored: Mapping[str, Any],
    settings: Mapping[str, Any],
    method: MethodOfSource,
    files: WeightFiles,
) -> ResolvedConfig:
    """A run that has not begun, resolved for one process."""
    found = find_tokenizer(
        Path(options.hf_path),
        settings["vocab_size"],
        options.tokenizer_model,
        options.tokenizer_type,
    )
    tokenizer: dict[str, Any] = {}
    if found is not None:
        tokenizer = found.settings
    dtypes = {tensor.dtype for tensor in files.tensors.values()}
    if len(dtypes) > 1 or dtypes - {torch.float32, torch.bfloat16}:
        logger.info("weights stored as fp32, which holds every %s", " and ".join(map(str, dtypes)))
    if torch.float64 in dtypes:
        raise ConversionError(
            f"{options.hf_path}: has fp64 weights, which would lose digits. Write fp32 ones."
        )
    given = RunConfig().replaced(
        **settings,
        **method.result,
        **tokenizer,
        generation_defaults=read_generation_defaults(Path(options.hf_path), stored),
        make_vocab_size_divisible_by=options.make_vocab_size_divisible_by,
        bf16=dtypes == {torch.bfloat16},
        seq_length=min(DEFAULT_SEQ_LENGTH, settings["max_position_embeddings"]),
    )
    vocab_size = found.tokenizer.vocab_size if found is not None else None
    return resolve(given, world_size=1, tokenizer_vocab_size=vocab_size)


def _check_size(config: ResolvedConfig, files: WeightFiles) -> None:
    """Refuse a shape that the files cannot hold before building anything of that shape.

    Raises:
        ConversionError: config.json describes at least twice as many parameters as are there.
    """
    described = count_parameters(config.model).total
    stored = sum(math.prod(tensor.shape) for tensor in files.tensors.values())
    if described >= 2 * stored:
        raise ConversionError(
            f"{files.folder}: config.json and the weights do not fit: it describes a model of "
            f"{described:,} parameters, the files hold {stored:,}."
        )


class _Weights:
    """A folder's weights as our parameters, one at a time.

    Args:
        files: the folder's.
        config: of the checkpoint.
        parameters: of its model.
        num_rows: the folder's vocabulary. A pause token may be one row more; it starts as the mean
            of the others.
    """

    def __init__(
        self,
        files: WeightFiles,
        config: ResolvedConfig,
        parameters: StoredParameters,
        num_rows: int,
    ) -> None:
        self._files = files
        self._model = config.model
        self._shapes = parameters.shapes
        self._dtype = parameters.dtype
        self._rules = {rule.ours: rule for rule in rules_of(config.model)}
        self._num_new_rows = config.model.vocab_size - num_rows
        self.num_bytes = sum(
            torch.Size(shape).numel() * self._dtype.itemsize for shape in self._shapes.values()
        )

    def check(self) -> None:
        """Compare all names and shapes with those of the model.

        Raises:
            ConversionError: a tensor is missing, superfluous or has another shape.
        """
        problems, unused = [], dict(self._files.tensors)
        for rule in self._rules.values():
            meta = torch.empty(self._shapes[rule.ours], device="meta")
            for name, part in zip(rule.theirs, rule.split(meta, self._model), strict=True):
                shape = list(part.shape)
                if self._is_vocabulary(rule.ours):
                    shape[0] -= self._num_new_rows
                stored = unused.pop(name, None)
                if stored is None:
                    problems.append(f"{name} is missing")
                elif list(stored.shape) != shape:
                    problems.append(f"{name} has shape {list(stored.shape)}, must have {shape}")
        repeated = unused.pop(find_family(self._model.architecture).head, None)
        problems += [f"{name} has no place in the model" for name in unused]
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise ConversionError(
                f"{self._files.folder}: config.json and the weights do not fit: "
                f"{'; '.join(problems[:5])}{more}."
            )
        if repeated is not None:
            self._check_repeated_head(repeated.name)

    def _check_repeated_head(self, head: str) -> None:
        """A head that is stored although it is tied must be the embedding."""
        (embedding,) = self._rules["embedding.word_embeddings.weight"].theirs
        if not torch.equal(self._files.read(head), self._files.read(embedding)):
            raise ConversionError(
                f"{self._files.folder}: {head} is not {embedding}, and config.json says that they "
                "are one (tie_word_embeddings). Say false there if both are meant."
            )

    def fetch(self, name: str) -> Tensor:
        """A parameter by name, in the dtype of the checkpoint."""
        rule = self._rules[name]
        parts = [self._files.read(theirs) for theirs in rule.theirs]
        if self._num_new_rows and self._is_vocabulary(name):
            mean = parts[0].float().mean(dim=0, keepdim=True).to(parts[0].dtype)
            parts = [torch.cat((parts[0], mean))]
        return rule.join(parts, self._model).to(self._dtype)

    def sources(self, name: str) -> tuple[str, ...]:
        """Names in the folder of what makes up a parameter."""
        return self._rules[name].theirs

    def _is_vocabulary(self, name: str) -> bool:
        return name in ("embedding.word_embeddings.weight", "output_layer.weight")


def _write(
    folder: Path,
    config: ResolvedConfig,
    parameters: StoredParameters,
    weights: _Weights,
    *,
    verify: bool,
) -> Path:
    """The whole checkpoint; returns the folder of its iteration."""
    check_space(folder, weights.num_bytes)
    unfinished = storage.unfinished_folder(folder, 0)
    unfinished.mkdir()
    common = {"progress": Progress().to_dict(), WEIGHTS_ONLY: True}
    with log.progress(weights.num_bytes, "writing weights", "B", unit_scale=True) as bar:

        def fetch(name: str) -> Tensor:
            tensor = weights.fetch(name)
            if verify:
                verification.check_finite(" and ".join(weights.sources(name)), tensor)
            bar.update(tensor.nbytes)
            return tensor

        write_parameters(unfinished, parameters, fetch, common)
    # The weights state the whole shape, so it counts as given; only the run to come is left open.
    write_configs(unfinished, dataclasses.replace(config, given=reopen(config)))
    return storage.publish(folder, 0)


def _verify(
    checkpoint: Path,
    config: ResolvedConfig,
    method: MethodOfSource,
    stored: Mapping[str, Any],
    options: ImportOptions,
) -> None:
    """Compare the checkpoint with the folder, both by the folder's method."""
    num_rows, max_tokens = int(stored["vocab_size"]), config.model.max_position_embeddings
    ids = verification.draw_ids(num_rows, max_tokens)
    as_source = config.replaced(**method.source)
    counts = ("num_latent_thoughts", "num_jacobi_iterations")
    few = {name: min(getattr(as_source.method, name), MAX_PASSES_COMPARED) for name in counts}
    as_source = as_source.replaced(**few)
    is_stock = as_source.method.method == "vanilla"
    source = verification.source_logits(
        Path(options.hf_path),
        ids,
        architecture=config.model.architecture,
        config=None if is_stock else build_huggingface_config(as_source),
        trust_remote_code=options.trust_remote_code,
    )
    verification.forget_model()
    result = verification.native_logits(checkpoint, as_source, ids)
    verification.compare(source, result)
