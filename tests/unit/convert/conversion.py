"""Conversions inside a process of their own, and what folders hold."""

import contextlib
import importlib.util
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from tests.ranks import run_ranks
from tests.rules.sources import ROOT


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process that is no rank of anything, as the converter's is."""
    return run_ranks(_without_group, 1, function, arguments)[0]


def _without_group(function: Callable[..., Any], arguments: tuple) -> Any:
    dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name)
    return function(*arguments)


def convert(*arguments: str) -> tuple[int, str]:
    """The command line, in this process; exit code and what it printed on stderr."""
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools/convert_checkpoint.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = tool.main(list(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, err.getvalue() + out.getvalue()


def convert_well(*arguments: str) -> str:
    """The same, for what must work."""
    code, printed = convert(*arguments)
    assert code == 0, printed
    return printed


def round_trip(source: Path, folder: Path, *more: str, verify: bool = True) -> Path:
    """Import, with further flags, and export; the exported folder.

    Without `verify` neither compares logits: the caller does.
    """
    checkpoint, result = folder / "checkpoint", folder / "exported"
    verifying = ["--verify" if verify else "--no-verify"]
    convert_well("import", "--hf-path", str(source), "--save", str(checkpoint), *more, *verifying)
    export(checkpoint, result, *verifying)
    return result


def export(checkpoint: Path, result: Path, *more: str) -> str:
    return convert_well(
        "export", "--load", str(checkpoint), "--hf-path", str(result), "--without-tokenizer", *more
    )


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
