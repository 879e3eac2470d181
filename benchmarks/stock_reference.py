"""The same method in plain PyTorch on stock transformers layers: what the speed is compared with.

It is the model that an export gives (`convert/remote_code`: transformers' own layers with torch's
fused attention, and the method's passes around them; for vanilla the stock class itself), trained
as one would train it: fp32 weights under autocast, fused AdamW, clipped gradients. Left out: what
stock layers do not compute, and dropout, whose masks would differ.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from megatron_ponder.config.resolved import ResolvedConfig, ResolvedModelConfig
from megatron_ponder.convert.config_mapping import build_stock_config
from megatron_ponder.convert.exported_code import class_name
from megatron_ponder.convert.family import find_family
from megatron_ponder.convert.method_mapping import build_method_keys
from megatron_ponder.convert.remote_code import modeling_ponder
from megatron_ponder.convert.remote_code.configuration_ponder import CHOICES
from megatron_ponder.errors import ConfigError


class StockReference(nn.Module):
    """Tokens in, loss out.

    Args:
        config: resolved.

    Raises:
        ConfigError: settings that the reference does not have.
        ConversionError: the same, about the model's shape.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__()
        check_settings(config)
        keys = build_stock_config(config) | build_method_keys(config)
        self.takes_rounds = "method" in keys
        model_class = (
            getattr(modeling_ponder, class_name(config.model.architecture))
            if self.takes_rounds
            else getattr(transformers, keys["architectures"][0])
        )
        del keys["model_type"]
        stock_config = model_class.config_class(**keys | {"use_cache": False})
        self.model = model_class._from_config(stock_config, attn_implementation="sdpa")
        if config.training.recompute_granularity == "full":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, tokens: Tensor, labels: Tensor, num_jacobi_iterations: int) -> Tensor:
        """Mean cross entropy.

        Args:
            tokens: int64 [b, s].
            labels: int64 [b, s], the token after each.
            num_jacobi_iterations: R.
        """
        rounds: dict[str, Any] = {}
        if self.takes_rounds:
            rounds["num_jacobi_iterations"] = num_jacobi_iterations
        loss: Tensor = self.model(tokens, labels=labels, shift_labels=labels, **rounds).loss
        return loss

    def stock_weights(self, shape: ResolvedModelConfig) -> dict[str, Tensor]:
        """Its weights under the names that checkpoints have.

        transformers 5 calls every output layer `lm_head` and renames it on the way to a file.
        """
        names = {"lm_head.weight": find_family(shape.architecture).head}
        return {names.get(name, name): p for name, p in self.model.named_parameters()}


def check_settings(config: ResolvedConfig) -> None:
    """Refuse settings that change the numbers and that the reference does not have.

    Raises:
        ConfigError: there are some.
    """
    method = config.method
    needed: dict[str, object] = {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "jacobi_grad_passes": None,
    }
    given = config.to_flat_dict()
    problems = [
        f"--{name.replace('_', '-')} {given[name]}: the reference has {value} only."
        for name, value in needed.items()
        if given[name] != value
    ]
    if method.method not in CHOICES["method"]:
        known = ", ".join(CHOICES["method"])
        problems.append(f"--method {method.method}: the reference has {known} only.")
    if problems:
        raise ConfigError("\n".join([*problems, "Without a reference: --baseline none."]))


def build_stock_reference(config: ResolvedConfig) -> StockReference:
    """The reference on the CPU, with transformers' initial weights, drawn from the run's seed."""
    torch.manual_seed(config.training.seed)
    with torch.device("cpu"):
        return StockReference(config)
