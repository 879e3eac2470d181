"""What a benchmark's processes import, once, before they are forked; quietly."""

import os
import sys

from megatron_ponder import log

# torch's profiler reports every start and stop, and memory that it has not seen allocated.
os.environ.update(KINETO_LOG_LEVEL="99", TORCH_CPP_LOG_LEVEL="ERROR")
log.configure(sys.stderr)

import benchmarks.steps  # noqa: E402, F401
