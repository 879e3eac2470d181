"""One run through the stock layers, with what the methods need and stock code does not offer.

Stock base models take embeddings, positions and a mask, which is nearly enough. Three things are
done by hooks on their modules:

- the final norm and GPT-2's learned positions can be left out of a run (the loop method);
- attention modules are not told positions: flash attention takes positions that repeat, as those of
  the slots of one token do, for several sequences packed into one.
"""

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel
from transformers.cache_utils import Cache

try:
    import transformers.conversion_mapping as _conversion_mapping
except ImportError:  # transformers 4: modules have the names that checkpoints have
    conversion_mapping: Any = None
else:
    conversion_mapping = _conversion_mapping

_ARGUMENTS = inspect.signature(LlamaModel.forward).parameters
CACHE_NAME = "cache" if "cache" in _ARGUMENTS else "past_key_values"
"""What this transformers calls the cache."""
_TAKES_CACHE_POSITION = "cache_position" in _ARGUMENTS
"""transformers 4 finds a static cache's length by looking for zeros unless it is told."""


def share_weight_names(name: str, stock_name: str) -> None:
    """Let a class read and write the weight names that a stock one reads and writes.

    transformers 5 renames weights of its own classes only (GPT-NeoX's embed_out to lm_head).
    """
    if conversion_mapping is None:
        return
    mapping = conversion_mapping.get_checkpoint_conversion_mapping(stock_name)
    if mapping is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(name, mapping, overwrite=True)


def _drop_position_ids(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name != "position_ids"}


def _return_input_if_off(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return args[0] if module.is_off else output


def _return_zeros_if_off(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output) if module.is_off else output


@dataclasses.dataclass(frozen=True, kw_only=True)
class StockModel:
    """A stock model without its head, and the two modules of it that can be left out."""

    base: nn.Module
    final_norm: nn.Module
    positions: nn.Module | None
    """The table of learned positions; None: they are rotary."""

    def add_hooks(self, attention_name: str) -> None:
        """Prepare the modules, once; `attention_name` is what layers call their attention."""
        for name, module in self.base.named_modules():
            if name.rpartition(".")[2] == attention_name:
                module.register_forward_pre_hook(_drop_position_ids, with_kwargs=True)
        setattr(self.final_norm, "is_off", False)
        self.final_norm.register_forward_hook(_return_input_if_off)
        if self.positions is not None:
            setattr(self.positions, "is_off", False)
            self.positions.register_forward_hook(_return_zeros_if_off)

    def run(
        self,
        slots: Tensor,
        *,
        position_ids: Tensor,
        mask: Tensor,
        cache: Cache | None,
        applies_norm: bool,
        adds_positions: bool,
        **wanted: bool,
    ) -> Any:
        """All layers.

        Args:
            slots: embeddings [b, slots, h].
            position_ids: [b, slots].
            mask: which slots are padding, as zeros: [b, slots in the cache + slots].
            cache: what the slots see and are added to; None: nothing.
            applies_norm: whether the final norm follows.
            adds_positions: whether learned positions are added.
            **wanted: `output_hidden_states`, `output_attentions`.

        Returns:
            The stock output; `last_hidden_state` is [b, slots, h].
        """
        arguments: dict[str, Any] = {CACHE_NAME: cache, "use_cache": cache is not None}
        if _TAKES_CACHE_POSITION:
            end = mask.size(1)
            arguments["cache_position"] = torch.arange(
                end - slots.size(1), end, device=slots.device
            )
        self._switch(is_norm_off=not applies_norm, is_table_off=not adds_positions)
        try:
            return self.base(
                inputs_embeds=slots,
                position_ids=position_ids,
                attention_mask=mask,
                return_dict=True,
                **arguments,
                **wanted,
            )
        finally:
            self._switch(is_norm_off=False, is_table_off=False)

    def _switch(self, *, is_norm_off: bool, is_table_off: bool) -> None:
        setattr(self.final_norm, "is_off", is_norm_off)
        if self.positions is not None:
            setattr(self.positions, "is_off", is_table_off)
