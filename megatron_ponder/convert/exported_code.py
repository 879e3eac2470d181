"""The modelling files that an exported model carries along, and how its config.json names them."""

import shutil
from pathlib import Path

from megatron_ponder.errors import ConversionError

CLASS_PREFIXES = {
    "llama": "PonderLlama",
    "gpt_neox": "PonderGPTNeoX",
    "gpt2": "PonderGPT2",
    "mistral": "PonderMistral",
    "qwen2": "PonderQwen2",
    "qwen3": "PonderQwen3",
}
"""By architecture, as transformers spells it in `model_type`."""

_FOLDER = Path(__file__).parent / "remote_code"


def class_name(architecture: str) -> str:
    """The model's class, for `architectures` in config.json.

    Raises:
        ConversionError: no exported model has this architecture.
    """
    return f"{_prefix(architecture)}ForCausalLM"


def auto_map(architecture: str) -> dict[str, str]:
    """Where transformers finds the classes, for `auto_map` in config.json.

    Raises:
        ConversionError: no exported model has this architecture.
    """
    return {
        "AutoConfig": f"configuration_ponder.{_prefix(architecture)}Config",
        "AutoModelForCausalLM": f"modeling_ponder.{class_name(architecture)}",
    }


def copy_remote_code(folder: Path) -> None:
    """Copy the files into an exported folder, as they are."""
    for source in sorted(_FOLDER.glob("*.py")):
        if source.name != "__init__.py":
            shutil.copyfile(source, folder / source.name)


def _prefix(architecture: str) -> str:
    if architecture not in CLASS_PREFIXES:
        raise ConversionError(
            f"No exported model has the architecture {architecture}: "
            f"{', '.join(CLASS_PREFIXES)} have."
        )
    return CLASS_PREFIXES[architecture]
