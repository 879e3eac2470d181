"""Flags of `tools/plan.py scaling`. Imports no torch: `--help` is instant."""

import dataclasses

from megatron_ponder.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    """On how many devices, and what is assumed of them and of what connects them."""

    world_sizes: tuple[int, ...] = (8, 64, 512, 4096)
    """Devices; for each number the best layout is looked for."""
    picture: str | None = None
    """PNG to draw everything into."""
    json: bool = False
    """Print one JSON object instead of tables."""
    device_memory_gib: float = 72.0
    """What a run may fill of a device. The default is that of an 80 GB device, less 8% for CUDA,
    its libraries, their buffers and fragmentation."""
    assumed_tflops: float = 400.0
    """Rate at which a device turns counted FLOPs into seconds, in TFLOP/s, whatever the shapes. The
    default is 40% of an H100's dense bf16 peak: an assumption, not a measurement."""
    devices_per_node: int = 8
    """Devices that NVLink connects; tensor parallelism does not go beyond them."""
    nvlink_gb_per_s: float = 450.0
    """What a device sends inside a node in one direction, in 10^9 bytes/s (H100: NVLink 4, 900 both
    ways)."""
    network_gb_per_s: float = 50.0
    """What a device sends to other nodes, in 10^9 bytes/s (InfiniBand NDR, a port of 400 Gbit/s for
    each device)."""
    link_efficiency: float = 0.8
    """Share of those rates that communication reaches."""
    message_latency_us: float = 10.0
    """Time that every collective and every message takes beyond its bytes."""
    largest_micro_batch_size: int = 8
    """Powers of two up to here are tried."""

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            ConfigError: a number that is too small or too large.
        """
        if not self.world_sizes or min(self.world_sizes) < 1:
            raise ConfigError("--world-sizes: give at least one number, each at least 1.")
        if self.devices_per_node < 1 or self.largest_micro_batch_size < 1:
            raise ConfigError(
                "--devices-per-node and --largest-micro-batch-size must be at least 1."
            )
        for name in (
            *("device_memory_gib", "assumed_tflops"),
            *("nvlink_gb_per_s", "network_gb_per_s", "link_efficiency"),
        ):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be above 0.")
        if self.link_efficiency > 1 or not 0 <= self.message_latency_us < float("inf"):
            raise ConfigError(
                "--link-efficiency must not be above 1, --message-latency-us not below 0."
            )
