"""From a resolved config to a model with weights on this rank's device."""

from megatron_ponder.config.schema import RunConfig
from megatron_ponder.model.init import initialize_weights
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
from megatron_ponder.model.specs import layer_spec
from megatron_ponder.model.transformer_config import build_transformer_config
from megatron_ponder.ponder.method import load_method
from megatron_ponder.runtime.distributed import process_groups


def build_model(config: RunConfig) -> PonderGPTModel:
    """The model of a resolved run, with initial weights.

    Raises:
        ConfigError: the method is unknown.
    """
    model = PonderGPTModel(
        build_transformer_config(config),
        shape=config.model,
        method=load_method(config.method),
        layer_spec=layer_spec(config.model),
        pg_collection=process_groups(),
    )
    initialize_weights(model, config)
    return model
