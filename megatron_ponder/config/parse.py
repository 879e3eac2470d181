"""Parses command lines, and combines flags, YAML and presets into one `RunConfig`.

A preset and a YAML file are sets of flags that are put before those of the command line; the last
value of a flag wins. One parser (tyro, from the types and docstrings of the schema) therefore reads
all three. Nothing here knows what the settings mean. Every command of this package is parsed here.
"""

import contextlib
import dataclasses
import io
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
import yaml

from megatron_ponder.config.flags import check_flags, did_you_mean
from megatron_ponder.config.help_texts import HELP
from megatron_ponder.config.presets import AUTHORS, PRESETS
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import ConfigError

DESCRIPTION = f"""Pretrain a language model with latent thoughts.

  torchrun --nproc-per-node 8 -m megatron_ponder.pretrain --config run.yaml --bf16

Settings come from four places, the later ones winning: defaults, a preset (the shape of a known
model), a YAML file (keys are flags with underscores, e.g. "num_layers: 12"; "preset: llama-410m"
names a preset), and flags. The resolved config is printed at the start of a run; checkpoints store
both the given and the resolved config. docs/train.md explains the flags by task.

Presets: {", ".join(PRESETS)}."""


Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CommandLine:
    """The arguments of a run."""

    config: str | None = None
    """YAML file with settings, for example run_config.yaml of a checkpoint."""
    preset: str | None = None
    """Shape of a known model, from the list above."""
    reproduce_authors: bool = False
    """Set what the authors' files have otherwise than our defaults. llama: --norm-epsilon
    0.1 --no-eod-as-target. gpt_neox: --no-eod-as-target --ponderlm-feedback hidden. Overrides
    preset and YAML file; flags override it."""
    run: RunConfig = dataclasses.field(default_factory=RunConfig)


def parse_args(argv: Sequence[str], prog: str, description: str = DESCRIPTION) -> RunConfig:
    """Parse the arguments of a command line.

    `--help` ends the process with exit code 0, an invalid argument with exit code 2.

    Args:
        argv: arguments without the program's name.
        prog: name of the program in messages.
        description: opening paragraph of `--help`.

    Raises:
        ConfigError: a flag is unknown; the YAML file or the preset is invalid.
    """
    check_flags(argv, [_CommandLine], prog)
    config_path, preset = _sources(argv)
    from_yaml = read_yaml(config_path, f"--config {config_path}") if config_path else {}
    stated_preset = from_yaml.pop("preset", None)
    reproduces = from_yaml.pop("reproduce_authors", False)
    preset = stated_preset if preset is None else preset
    tokens = [] if preset is None else _preset_tokens(preset)
    if config_path:
        tokens += _checked_tokens(from_yaml, config_path)
    if not isinstance(reproduces, bool):
        raise ConfigError(
            f"{config_path}: reproduce_authors: {reproduces!r} is neither true nor false."
        )
    tokens += _tokens("reproduce_authors", reproduces)
    parsed = _parse(_CommandLine, [*tokens, *argv], prog, description)
    if parsed.reproduce_authors:
        tokens += _authors_tokens(parsed.run.model.architecture)
        parsed = _parse(_CommandLine, [*tokens, *argv], prog, description)
    return parsed.run


def parse_options(
    kind: type[Options], argv: Sequence[str] | None, *, prog: str, description: str | None
) -> Options:
    """Parse the command line of a tool that takes no settings of a run.

    `--help` ends the process with exit code 0, an invalid value with exit code 2.

    Args:
        kind: dataclass of the tool's flags.
        argv: arguments without the program's name; None: those of this process.
        prog: name of the program in messages.
        description: opening paragraphs of `--help`.

    Raises:
        ConfigError: a flag is unknown.
    """
    argv = sys.argv[1:] if argv is None else argv
    check_flags(argv, [kind], prog)
    return _parse(kind, argv, prog, description)


def parse_options_and_settings(
    kind: type[Options], argv: Sequence[str] | None, *, prog: str, description: str | None
) -> tuple[Options, RunConfig]:
    """Parse the command line of a tool that also takes every setting of a run.

    Arguments and errors are those of `parse_options` and `parse_args`. `--help` shows the tool's
    own flags only.
    """
    argv = sys.argv[1:] if argv is None else argv
    check_flags(argv, [kind, _CommandLine], prog)
    options, settings = tyro.cli(
        kind,
        prog=prog,
        description=description,
        args=argv,
        return_unknown_args=True,
        registry=HELP,
    )
    return options, parse_args(settings, prog=prog)


def config_from_flat_dict(values: Mapping[str, Any]) -> RunConfig:
    """The inverse of `RunConfig.to_flat_dict`, also after a round trip through YAML or JSON.

    Missing settings take their defaults.

    Raises:
        ConfigError: this version does not have one of the settings, or a value is of another type.
    """
    known = RunConfig().to_flat_dict()
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(
            f"The stored config has settings unknown to this version: {', '.join(unknown)}. "
            "It was written by another version of megatron_ponder."
        )
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    types = _types()
    refused = [key for key, value in given.items() if not _fits(value, types[key])]
    if refused:
        raise ConfigError("\n".join(_misfit(key, values[key], types[key]) for key in refused))
    return RunConfig().replaced(**given)


def dump_yaml(config: RunConfig) -> str:
    """Every setting of a config as YAML that `--config` reads back."""
    flat = {k: list(v) if isinstance(v, tuple) else v for k, v in config.to_flat_dict().items()}
    return yaml.safe_dump(flat, sort_keys=False)


def _parse(kind: type[Options], args: Sequence[str], prog: str, description: str | None) -> Options:
    """Parse flags with tyro. Fields that are dataclasses add no prefix to their flags."""
    return tyro.cli(
        kind,
        prog=prog,
        description=description,
        args=args,
        config=(tyro.conf.OmitArgPrefixes,),
        registry=HELP,
    )


def _sources(argv: Sequence[str]) -> tuple[str | None, str | None]:
    """The last values of --config and --preset; tyro parses everything else."""
    values: dict[str, str | None] = {"--config": None, "--preset": None}
    for position, argument in enumerate(argv):
        name, separator, value = argument.partition("=")
        if name in values:
            following = argv[position + 1] if position + 1 < len(argv) else None
            values[name] = value if separator else following
    return values["--config"], values["--preset"]


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping states twice; YAML's last value would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        keys = [key.replace("-", "_") for key in keys]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is stated twice; keep one of the two", node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, name: str) -> dict[str, Any]:
    """The settings in a YAML file, by name with underscores; each is a value or a list of values.

    Args:
        path: of the file.
        name: its name in messages.

    Raises:
        ConfigError: it cannot be read, or holds anything else.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise ConfigError(f"{name}: not valid YAML: nested too deeply.") from None
    # PyYAML lets errors of int(), float() and date() through, and an AttributeError for !!timestamp
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{name}: must be a mapping from settings to values.")
    for key, value in content.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict | list | set | bytes):
                raise ConfigError(f"{name}: {key}: must be a value or a list of values.")
            if isinstance(each, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in each):
                raise ConfigError(f"{name}: {key}: has a character that no setting takes.")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _preset_tokens(name: object) -> list[str]:
    """The flags that a preset stands for."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(
            f"--preset {name}: no such preset.{did_you_mean(str(name), PRESETS)} "
            f"Known: {', '.join(PRESETS)}."
        )
    return [token for key, value in PRESETS[name].items() for token in _tokens(key, value)]


def _authors_tokens(architecture: str) -> list[str]:
    """The flags that --reproduce-authors stands for."""
    if architecture not in AUTHORS:
        raise ConfigError(
            f"--reproduce-authors: the authors have no files for {architecture}, only for "
            f"{' and '.join(AUTHORS)}."
        )
    return [token for key, value in AUTHORS[architecture].items() for token in _tokens(key, value)]


def _checked_tokens(settings: Mapping[str, Any], source: str) -> list[str]:
    """The flags that a YAML file stands for. Errors name the file and the key."""
    known = RunConfig().to_flat_dict()
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise ConfigError(
            "\n".join(
                f"{source}: {key}: no such setting.{did_you_mean(key, known)}" for key in unknown
            )
        )
    tokens = [token for key, value in settings.items() for token in _tokens(key, value)]
    if not _is_accepted(tokens):
        refused = [k for k, value in settings.items() if not _is_accepted(_tokens(k, value))]
        types = _types()
        raise ConfigError(
            "\n".join(f"{source}: {_misfit(k, settings[k], types[k])}" for k in refused)
        )
    return tokens


def _is_accepted(tokens: Sequence[str]) -> bool:
    """Whether tyro accepts these flags."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            _parse(_CommandLine, tokens, "", "")
        except SystemExit:
            return False
    return True


def _tokens(key: str, value: Any) -> list[str]:
    """One setting as command-line arguments."""
    if isinstance(value, bool):
        return [_flag(key) if value else _flag(f"no_{key}")]
    if isinstance(value, list | tuple):
        return [_flag(key), *map(str, value)]
    return [_flag(key), str(value)]


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _types() -> dict[str, Any]:
    """The type of each setting."""
    groups = dataclasses.fields(RunConfig)
    return {f.name: f.type for group in groups for f in dataclasses.fields(group.type)}  # type: ignore[arg-type]


def _fits(value: object, kind: Any) -> bool:
    """Whether a value is of one of the types that the schema has."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(each, parts[0]) for each in value)
    if parts:  # a union
        return any(_fits(value, part) for part in parts)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _misfit(key: str, value: object, kind: Any) -> str:
    """What is wrong with a value of another type."""
    name = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    return f"{key}: {value!r} does not fit {name}."
