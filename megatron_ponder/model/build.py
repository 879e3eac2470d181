"""From a resolved config to a model with weights on this rank's device."""

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.kernels.dispatch import choose_kernels
from megatron_ponder.model import mcore_weight_gradient
from megatron_ponder.model.init import initialize_weights
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
from megatron_ponder.model.specs import layer_spec
from megatron_ponder.model.transformer_config import build_transformer_config
from megatron_ponder.ponder.method import load_method
from megatron_ponder.runtime.backends import use_backends
from megatron_ponder.runtime.distributed import process_groups, ranks


def build_model(config: ResolvedConfig) -> PonderGPTModel:
    """The whole model of a resolved run without pipeline parallelism, with initial weights.

    Raises:
        ConfigError: the method is unknown.
        BackendError: a requested backend cannot be used here.
    """
    (model,) = build_model_chunks(config)
    return model


def build_model_chunks(config: ResolvedConfig) -> list[PonderGPTModel]:
    """This pipeline rank's layer chunks, usually one, with initial weights.

    Raises:
        ConfigError: the method is unknown, or cannot run on the layout.
        BackendError: a requested backend cannot be used here.
    """
    here, backends = ranks(), use_backends(config)
    choose_kernels(backends.kernels)
    if backends.weight_gradient == "torch":
        mcore_weight_gradient.provide()
    num_chunks = config.parallel.num_virtual_stages_per_pipeline_rank
    chunks = []
    for chunk in range(num_chunks):
        model = PonderGPTModel(
            build_transformer_config(config, backends),
            shape=config.model,
            method=load_method(config.method),
            layer_spec=layer_spec(config, backends),
            pg_collection=process_groups(),
            pre_process=here.pipeline_parallel_rank == 0 and chunk == 0,
            post_process=here.is_last_stage and chunk == num_chunks - 1,
            vp_stage=chunk if num_chunks > 1 else None,
            training_config=config.training,
            loss_chunk_tokens=config.backend.loss_chunk_tokens,
        )
        initialize_weights(model, config)
        chunks.append(model)
    return chunks
