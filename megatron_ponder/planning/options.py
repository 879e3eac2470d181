"""Flags of tools/plan.py. Imports no torch: `--help` is instant."""

import dataclasses
from typing import Annotated

import tyro

from megatron_ponder.config.layout import flag_of
from megatron_ponder.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How many ranks, and what to report."""

    world_size: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(required)")
    ] = None
    """Number of ranks (devices). They need not exist."""
    device_memory_gib: float | None = None
    """Memory that the run may use on each device. The report then says whether the run fits and,
    if not, which changes would help. Leave about 1 GiB for CUDA, its libraries and
    fragmentation. None: no comparison."""
    assumed_tflops: float = 100.0
    """Speed of a device in TFLOP/s, by which counted FLOPs become seconds. Scales the reported
    seconds; the bubble does not depend on it."""
    timeline: str | None = None
    """PNG file for the timeline of one step, with a row for each pipeline stage."""
    json: bool = False
    """Print one JSON object instead of text."""

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            ConfigError: a number that is missing or too small.
        """
        if self.world_size is None:
            raise ConfigError(
                "--world-size is missing: the number of ranks (devices) of the run, which need not "
                "exist here; for example --world-size 8."
            )
        _check_at_least_one(self, "world_size")
        _check_above_zero(self, "device_memory_gib", "assumed_tflops")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    r"""Searches the best layout of a run for each of several numbers of devices.

        python tools/plan.py scaling --preset pythia-12b --bf16 --global-batch-size 1024 \
            --num-jacobi-iterations 3 --world-sizes 8 64 512 4096 --picture scaling.png

    Takes the flags below and every setting of megatron_ponder.pretrain (its --help lists them).
    --global-batch-size must be given; settings of layout, micro-batch and recompute are replaced.
    All results are predictions. docs/parallelism.md explains how they are made.
    """

    world_sizes: tuple[int, ...] = (8, 64, 512, 4096)
    """Numbers of devices; the best layout is searched for each."""
    picture: str | None = None
    """PNG file for plots of all results."""
    json: bool = False
    """Print one JSON object instead of tables."""
    device_memory_gib: float = 72.0
    """Memory that the run may use on each device. The default leaves about a tenth of an 80 GB
    device to CUDA, its libraries, their buffers and fragmentation."""
    assumed_tflops: float = 400.0
    """Speed of a device in TFLOP/s, by which counted FLOPs become seconds, whatever the shapes. The
    default is 40% of an H100's dense bf16 peak: an assumption, not a measurement."""
    devices_per_node: int = 8
    """Devices connected by NVLink; tensor parallelism stays within them."""
    nvlink_gb_per_s: float = 450.0
    """Rate at which a device sends within a node, in 10^9 bytes/s (H100: NVLink 4, 900 in both
    directions together)."""
    network_gb_per_s: float = 50.0
    """Rate at which a device sends to other nodes, in 10^9 bytes/s (InfiniBand NDR: a port of
    400 Gbit/s for each device)."""
    link_efficiency: float = 0.8
    """Share of these rates that communication reaches."""
    message_latency_us: float = 10.0
    """Fixed time of every collective and every message, in microseconds."""
    largest_micro_batch_size: int = 8
    """Micro-batches of 1, 2, 4, ... sequences are tried, up to this size."""

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            ConfigError: a number that is too small or too large.
        """
        if not self.world_sizes or min(self.world_sizes) < 1:
            raise ConfigError("--world-sizes: give at least one number, each at least 1.")
        _check_at_least_one(self, "devices_per_node", "largest_micro_batch_size")
        _check_above_zero(
            self,
            *("device_memory_gib", "assumed_tflops"),
            *("nvlink_gb_per_s", "network_gb_per_s", "link_efficiency"),
        )
        if self.link_efficiency > 1:
            raise ConfigError(f"--link-efficiency {self.link_efficiency}: must be at most 1.")
        if not 0 <= self.message_latency_us < float("inf"):
            raise ConfigError(
                f"--message-latency-us {self.message_latency_us}: must be at least 0."
            )


def _check_at_least_one(options: object, *names: str) -> None:
    for name in names:
        if getattr(options, name) < 1:
            raise ConfigError(f"{flag_of(name)} {getattr(options, name)}: must be at least 1.")


def _check_above_zero(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{flag_of(name)} {value}: must be above 0.")
