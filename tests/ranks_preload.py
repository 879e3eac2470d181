"""Imported once by the server that ranks are forked from: everything slow."""

from megatron_ponder.runtime import mcore_cpu

mcore_cpu.apply()
