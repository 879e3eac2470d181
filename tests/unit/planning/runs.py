"""Small resolved runs of three architectures and three methods."""

from typing import Any

from megatron_ponder.config.parse import parse_args
from megatron_ponder.planning.run import PlannedRun

SIZES = (
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 192 --num-attention-heads 4 --seq-length 64 "
    "--vocab-size 500 --micro-batch-size 2"
).split()
ARCHITECTURES = {
    "llama": ["--num-query-groups", "2"],
    "gpt_neox": ["--preset", "pythia-70m"],
    "gpt2": ["--preset", "gpt2"],
}
QWEN3: dict[str, Any] = {
    "qk_layernorm": True,
    "kv_channels": 24,
    "add_attention_bias": True,
}
"""Changes to Llama's: norms of heads, heads of their own width; and biases, as one may have."""
METHODS = {
    "vanilla": ["--method", "vanilla"],
    "K1": ["--num-latent-thoughts", "1", "--num-jacobi-iterations", "2"],
    "K2": ["--num-latent-thoughts", "2", "--num-jacobi-iterations", "1"],
    "ponderlm": ["--method", "ponderlm", "--num-latent-thoughts", "2"],
    "accumulating": [
        *("--method", "ponderlm", "--num-latent-thoughts", "2"),
        "--residual-interpolated-embeds",
    ],
    "loop": ["--method", "loop", "--num-latent-thoughts", "2"],
    "pause": ["--method", "pause", "--num-latent-thoughts", "2"],
}


def small_run(architecture: str, method: str, world_size: int = 1, **settings: Any) -> PlannedRun:
    """A run.

    Args:
        architecture: a key of ARCHITECTURES.
        method: a key of METHODS, or a method's name.
        world_size: ranks.
        settings: changes, by setting.
    """
    flags = [*ARCHITECTURES[architecture], *SIZES, *METHODS.get(method, ["--method", method])]
    config = parse_args(flags, prog="test").replaced(distributed_backend="gloo", **settings)
    return PlannedRun.resolved(config, world_size)
