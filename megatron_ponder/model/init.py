"""Initial weights, drawn by parameter name.

A parameter's values depend on the seed and its name only. Each rank draws the whole tensor and
keeps its shard, so that every layout starts from the same weights. Two schemes:

normal: N(0, init_method_std) for linear layers, embeddings and learned positions.
small:  the same parameters from a normal truncated at 3 sigma, sigma = sqrt(2 / (5 h)); the two
        projections that write to the residual stream divided by sqrt(2 x layers), or by
        sqrt(2 x layers x (K+1)) with `small_init_depth_counts_thoughts`.

Norm weights are 1 and biases 0 in both.
"""

import hashlib
import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.model.embedding_copy import COPY, ORIGINAL
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel

RESIDUAL_PROJECTIONS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


@torch.no_grad()
def initialize_weights(model: PonderGPTModel, config: ResolvedConfig) -> None:
    """Draw this rank's shards of all weights of `model`, in place."""
    scheme = config.model.init_method or model.method.default_init_method
    for name, parameter in model.named_parameters():
        # Norm modules, or norms inside TransformerEngine's linear layers (layer_norm_weight).
        module, kind = name.rsplit(".", 2)[-2:]
        if kind.endswith("bias"):
            parameter.zero_()
        elif "norm" in module or kind == "layer_norm_weight":
            parameter.fill_(1.0)
        else:
            name = name_in_whole_model(name, model)
            _draw(parameter, name, scheme, config, model.pg_collection.tp)


def _draw(
    parameter: Tensor, name: str, scheme: str, config: ResolvedConfig, tp_group: ProcessGroup
) -> None:
    """Fill a weight with its shard of the tensor determined by seed and name."""
    is_sharded = getattr(parameter, "tensor_model_parallel", False)
    shape = list(parameter.shape)
    if is_sharded:
        shape[parameter.partition_dim] *= tp_group.size()  # type: ignore[attr-defined]
    digest = hashlib.blake2b(f"{config.training.seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    whole = torch.empty(shape, dtype=torch.float32)
    if scheme == "normal":
        whole.normal_(0.0, config.model.init_method_std, generator=generator)
    else:
        std = _small_init_std(name, config)
        torch.nn.init.trunc_normal_(whole, 0.0, std, -3 * std, 3 * std, generator=generator)
    if is_sharded:
        whole = _shard(whole, parameter, tp_group)
    parameter.copy_(whole)


def _small_init_std(name: str, config: ResolvedConfig) -> float:
    """Sigma of the small initialisation for one weight."""
    std = math.sqrt(2 / (5 * config.model.hidden_size))
    if not name.endswith(RESIDUAL_PROJECTIONS):
        return std
    slots_per_token = config.method.num_latent_thoughts + 1
    depth = 2 * config.model.num_layers
    if config.model.small_init_depth_counts_thoughts:
        depth *= slots_per_token
    return std / math.sqrt(depth)


def _shard(whole: Tensor, parameter: Tensor, tp_group: ProcessGroup) -> Tensor:
    """This rank's rows or columns. Stride 2: gate and up projections are sharded separately."""
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    chunks = whole.chunk(tp_group.size() * stride, dim=dim)
    return torch.cat(chunks[tp_group.rank() :: tp_group.size()], dim=dim)


def name_in_whole_model(name: str, model: PonderGPTModel) -> str:
    """The parameter's name in a model without pipeline parallelism.

    A pipeline stage counts its layers from 0, and the last stage may have a copy of the embedding.
    """
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return ORIGINAL
    if name == COPY:
        return ORIGINAL
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
    return ".".join(parts)
