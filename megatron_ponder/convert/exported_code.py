"""The modelling files in an exported folder, and their names in its config.json."""

import shutil
from pathlib import Path

from megatron_ponder.convert.family import find_family

_FOLDER = Path(__file__).parent / "remote_code"
_PREFIX = "ponder_"


def model_type(architecture: str) -> str:
    """`model_type` in config.json: none of transformers', which refuses it without our code."""
    return _PREFIX + architecture


def architecture_of(model_type: object) -> object:
    """The architecture that a `model_type` stands for: ours, or a stock one as it is."""
    return model_type.removeprefix(_PREFIX) if isinstance(model_type, str) else model_type


def class_name(architecture: str) -> str:
    """The model's class, for `architectures` in config.json.

    Raises:
        ConversionError: there is no family of this name.
    """
    return f"{find_family(architecture).exported_prefix}ForCausalLM"


def auto_map(architecture: str) -> dict[str, str]:
    """Where transformers finds the classes, for `auto_map` in config.json.

    Raises:
        ConversionError: there is no family of this name.
    """
    return {
        "AutoConfig": f"configuration_ponder.{find_family(architecture).exported_prefix}Config",
        "AutoModelForCausalLM": f"modeling_ponder.{class_name(architecture)}",
    }


def copy_remote_code(folder: Path) -> None:
    """Copy the files into an exported folder, as they are."""
    for source in sorted(_FOLDER.glob("*.py")):
        if source.name != "__init__.py":
            shutil.copyfile(source, folder / source.name)
