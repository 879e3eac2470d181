"""Imported once by the server that ranks and commands are forked from: everything slow."""

import atexit
import gc
import importlib
import pkgutil

import megatron_ponder
from megatron_ponder.runtime import mcore_cpu

LIBRARIES = (
    "matplotlib.pyplot",
    "pyarrow.parquet",
    "sentencepiece",
    "tokenizers",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "transformers.models.llama.modeling_llama",
    "tyro",
)
"""Those that the package imports late."""

mcore_cpu.apply()
for name in LIBRARIES:
    importlib.import_module(name)
for module in pkgutil.walk_packages(megatron_ponder.__path__, "megatron_ponder."):
    importlib.import_module(module.name)

# megatron-core collects garbage when it saves an optimizer. That would take each rank a second and
# a copy of all that was imported. At exit libraries check that their objects are freed.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
