"""What a Hugging Face folder says of generation: special ids, and defaults of `generate`.

An import stores it with the run (`generation_defaults` in the model's settings), as JSON with two
entries: the keys of config.json, and generation_config.json or null. The export writes both again,
so that absent and null keys, lists of end ids, and sampling parameters are what they were. A run
that began here gets ids from its tokenizer. Imports no torch.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ponder.convert.family import GENERATION_KEYS
from megatron_ponder.convert.json_values import read_object, shown
from megatron_ponder.data.tokenizers import Tokenizer
from megatron_ponder.errors import ConversionError

logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"


def read_generation_defaults(folder: Path, config: Mapping[str, Any]) -> str:
    """The defaults of a folder, as stored.

    Args:
        folder: that may have a generation_config.json.
        config: the content of config.json.

    Raises:
        ConversionError: a file cannot be read, or an end token is no id.
    """
    keys = {key: config[key] for key in GENERATION_KEYS if key in config}
    try:
        file = read_object(folder / GENERATION_CONFIG)
    except FileNotFoundError:
        file = None
    for name, content in (("config.json", keys), (GENERATION_CONFIG, file or {})):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = content.get(key)
            if not all(type(each) is int for each in _listed(ids)):
                raise ConversionError(f"{folder / name}: {key} {shown(ids)}: must be an id.")
    return json.dumps({"config": keys, "file": file})


def _listed(ids: Any) -> list[Any]:
    """One id, several, or none, as a list."""
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def build_generation_files(
    defaults: str | None, tokenizer: Tokenizer | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Keys for config.json, and the content of generation_config.json (None: no such file).

    Args:
        defaults: from `read_generation_defaults`; None for a run that did not begin with an import.
        tokenizer: of the export; None without one.

    Raises:
        ConversionError: `defaults` was not made here.
    """
    end = None if tokenizer is None else tokenizer.eod
    if defaults is None:
        # No padding in config.json: stock classes never train the embedding of that token.
        begin = tokenizer.begin[-1] if tokenizer is not None and tokenizer.begin else end
        keys = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": None}
        return keys, {"_from_model_config": True, **keys, "pad_token_id": end}
    try:
        stored = json.loads(defaults)
        keys, file = stored["config"], stored["file"]
    except (ValueError, KeyError, TypeError):
        raise ConversionError(
            f"--generation-defaults {shown(defaults)}: not as an import stores it. Leave it out."
        ) from None
    ends = _listed((file or keys).get("eos_token_id", keys.get("eos_token_id")))
    if end is not None and ends and end not in ends:
        logger.warning(
            "generation will end at id %s, as in the folder that was imported; the tokenizer ends "
            "documents with %d",
            " or ".join(map(str, ends)), end,
        )  # fmt: skip
    pad = keys.get("pad_token_id")
    if pad is not None and pad in _listed(keys.get("eos_token_id")):
        logger.warning(
            "pad_token_id %d also ends texts, as in the folder that was imported: most stock "
            "classes never train the embedding of pad_token_id",
            pad,
        )
    return keys, file
