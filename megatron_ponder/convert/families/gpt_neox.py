"""GPT-NeoX (Pythia). It keeps each head's query, key and value together, as megatron-core does."""

from megatron_ponder.convert.family import LAYER_NORM_SETTINGS, SHAPE_KEYS, Family
from megatron_ponder.convert.weight_rules import OUR_LAYER, OUTPUT_LAYER, both, vocabulary

LAYER = "gpt_neox.layers.{i}"

FAMILY = Family(
    class_name="GPTNeoXForCausalLM",
    exported_prefix="PonderGPTNeoX",
    settings=LAYER_NORM_SETTINGS | {"position_embedding_type": "rope"},
    keys=SHAPE_KEYS
    | {"norm_epsilon": "layer_norm_eps", "parallel_residual": "use_parallel_residual"},
    defaults={
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "rotary_pct": 0.25,
    },
    activations={"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
    dropout_keys={"hidden_dropout": "hidden_dropout", "attention_dropout": "attention_dropout"},
    rotary_base_key="rotary_emb_base",
    rotary_percent_key="rotary_pct",
    must_be={"attention_bias": (True,), "is_decoder": (False, True)},
    authors_settings={"ponderlm_feedback": "hidden", "pause_always_scales": False},
    base_prefix="gpt_neox.",
    rules=(
        vocabulary("embedding.word_embeddings.weight", "gpt_neox.embed_in.weight"),
        *both(f"{OUR_LAYER}.input_layernorm", f"{LAYER}.input_layernorm"),
        *both(f"{OUR_LAYER}.self_attention.linear_qkv", f"{LAYER}.attention.query_key_value"),
        *both(f"{OUR_LAYER}.self_attention.linear_proj", f"{LAYER}.attention.dense"),
        *both(f"{OUR_LAYER}.pre_mlp_layernorm", f"{LAYER}.post_attention_layernorm"),
        *both(f"{OUR_LAYER}.mlp.linear_fc1", f"{LAYER}.mlp.dense_h_to_4h"),
        *both(f"{OUR_LAYER}.mlp.linear_fc2", f"{LAYER}.mlp.dense_4h_to_h"),
        *both("final_norm", "gpt_neox.final_layer_norm"),
        vocabulary(OUTPUT_LAYER, "embed_out.weight"),
    ),
)
