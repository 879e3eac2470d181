"""Imported once by the server that ranks are forked from: everything slow."""

import megatron_ponder.model.build
import megatron_ponder.parallel.gradients
import megatron_ponder.optim.adamw
import megatron_ponder.parallel.schedule
from megatron_ponder.runtime import mcore_cpu

mcore_cpu.apply()
