"""Exported models: stock causal language models around whose layers a method runs its passes.

`forward` with several tokens is the training path (ponderlm2: growth and R Jacobi rounds); with a
cache and one token it is a decoding step. Layers, attention implementations, checkpointing, loss
and `generate` are transformers'. passes.py says what each method computes, thought_cache.py what is
kept between calls.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_ponder import (
    PonderGPT2Config,
    PonderGPTNeoXConfig,
    PonderLlamaConfig,
    PonderMistralConfig,
    PonderQwen2Config,
    PonderQwen3Config,
)
from .mixture import mix_embeddings
from .padding import check_prompts, last_tokens
from .passes import METHODS, Output, Passes
from .stock_model import CACHE_NAME, StockModel, share_weight_names
from .thought_cache import ThoughtCache, as_thought_cache

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
OF_THE_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")
WITHOUT_EFFECT = ("cache_position", "token_type_ids")
"""`generate` of transformers 4 gives the first, its tokenizers may give the second."""


class PonderCausalLM:
    """A method's passes around a stock model; mixed into its class with a language model head."""

    final_norm_name = "norm"
    attention_name = "self_attn"
    positions_name: str | None = None

    config: Any
    training: bool
    base_model: Any
    generation_config: Any
    get_input_embeddings: Any
    get_output_embeddings: Any
    loss_function: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        config.check_settings()
        layer_types = getattr(config, "layer_types", None)  # not all architectures have the key
        is_sliding = getattr(config, "sliding_window", None) is not None
        if "sliding_attention" in layer_types if layer_types is not None else is_sliding:
            raise ValueError(
                "Sliding attention windows count positions, of which a token with thoughts takes "
                "several: set sliding_window to null in config.json."
            )
        self._stock_model().add_hooks(self.attention_name)

    def _stock_model(self) -> StockModel:
        base = self.base_model
        positions = None if self.positions_name is None else getattr(base, self.positions_name)
        return StockModel(
            base=base, final_norm=getattr(base, self.final_norm_name), positions=positions
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        num_jacobi_iterations: int | None = None,
        jacobi_tolerance: float | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of all tokens, and their loss if labels are given.

        Args:
            input_ids: new tokens, [b, s].
            attention_mask: which tokens are padding, as zeros: [b, tokens in the cache + s].
            position_ids: of the tokens, [b, s]. None: they follow from the mask.
            past_key_values: a ThoughtCache, or an empty stock cache, which becomes one.
            inputs_embeds: embeddings of the new tokens as the table has them, not scaled.
            labels: [b, s]; shifted by one token here, -100 is left out.
            use_cache: None: in evaluation without labels, if the configuration says so.
            logits_to_keep: of how many tokens, from the end, or of which; 0: all.
            cache: another name for `past_key_values`.
            num_jacobi_iterations: R. None: the configuration's; in training mode drawn, if it says
                `random_jacobi_iterations`.
            jacobi_tolerance: end the rounds early, once the largest change of a thought, as a share
                of its norm, is not above this.
            output_hidden_states: those of the last pass, slot by slot.
            output_attentions: those of the last pass, slot by slot.
            return_dict: whether the output has names.
            **kwargs: for the loss.

        Returns:
            The stock output; its attribute `jacobi_iterations` says how many rounds ran (None in
            training mode, or if there was nothing to refresh).

        Raises:
            ValueError: the arguments contradict one another, or ask for packed sequences.
            TypeError: an argument is not known here.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        loss_kwargs = _checked_loss_kwargs(kwargs)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if self.training and self.base_model.gradient_checkpointing:
            use_cache = False  # stock layers that are computed again keep nothing
        wanted = {"output_hidden_states": output_hidden_states}
        wanted |= {"output_attentions": output_attentions}
        passes = self._passes(
            self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds,
            attention_mask,
            position_ids,
            cache=past_key_values if cache is None else cache,
            keeps=use_cache,
            num_jacobi_iterations=self._num_rounds(num_jacobi_iterations),
            jacobi_tolerance=jacobi_tolerance,
            wanted={name: value for name, value in wanted.items() if value is not None},
        )
        output = METHODS[self.config.effective_method](passes)
        columns = None
        if attention_mask is not None and labels is None and not self.training:
            columns = last_tokens(passes.mask[:, passes.num_seen :])
        if passes.keeps and passes.cache is not None:
            passes.cache.add(passes.tokens.size(1), output.num_rounds)
        result = self._result(passes, output, columns, labels, logits_to_keep, loss_kwargs)
        if return_dict is None:
            return_dict = self.config.return_dict
        return result if return_dict else result.to_tuple()

    def _result(
        self,
        passes: Passes,
        output: Output,
        columns: Tensor | None,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        loss_kwargs: dict[str, Any],
    ) -> CausalLMOutputWithPast:
        """Logits and loss of what the method computed; `columns` are the ones to read, [b, s]."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = output.hidden
        if columns is None:
            hidden = hidden[:, kept]
        else:
            read = columns[:, kept].to(hidden.device)
            hidden = hidden.gather(1, read[..., None].expand(-1, -1, hidden.size(-1)))
        logits = self.get_output_embeddings()(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.last_pass.hidden_states,
            attentions=output.last_pass.attentions,
            **{CACHE_NAME: passes.cache if passes.keeps else None},
        )
        # No field: whoever splits, gathers or traces outputs expects tensors there.
        setattr(result, "jacobi_iterations", None if self.training else output.num_rounds)
        return result

    def _passes(
        self,
        embeddings: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        *,
        cache: Any,
        keeps: bool,
        **settings: Any,
    ) -> Passes:
        """The inputs of all passes, from those of the forward."""
        if cache is not None:
            cache = as_thought_cache(cache, self.config)
        elif keeps:
            cache = ThoughtCache(self.config)
        num_seen = 0 if cache is None else cache.num_tokens
        mask = _checked_mask(attention_mask, embeddings, num_seen)
        if position_ids is None:
            position_ids = _positions(mask)[:, num_seen:]
        elif attention_mask is None and cache is None:
            _refuse_packed(position_ids)
        return Passes(
            config=self.config,
            model=self._stock_model(),
            tokens=self._scale(embeddings),
            mask=mask,
            position_ids=position_ids.expand(embeddings.size(0), -1),
            embed=lambda ids: self._scale(self.get_input_embeddings()(ids)),
            mix=self._mix,
            cache=cache,
            keeps=keeps,
            **settings,
        )

    def _scale(self, embeddings: Tensor) -> Tensor:
        """Token embeddings times the method's factor, rounded to their dtype."""
        scale = self.config.embedding_scale
        return embeddings if scale is None else embeddings * embeddings.new_tensor(scale)

    def _mix(self, hidden: Tensor) -> Tensor:
        """softmax(head) times the scaled embeddings, [..., h] -> [..., h]."""
        top_k = self.config.interpolation_topk if self.config.interpolation_use_topk else None
        logits = self.get_output_embeddings()(hidden)
        embed = self.get_input_embeddings()
        table = embed.weight
        if table.device.type == "meta":  # accelerate keeps it elsewhere and fetches it for a call
            table = embed(torch.arange(embed.num_embeddings, device=hidden.device))
        return self._scale(mix_embeddings(logits, table, top_k))

    def _num_rounds(self, asked: int | None) -> int:
        """R of this forward."""
        config = self.config
        if asked is None and self.training and config.random_jacobi_iterations:
            first, last = config.min_jacobi_iterations, config.max_jacobi_iterations
            return int(torch.randint(first, last + 1, ()))
        rounds = config.num_jacobi_iterations if asked is None else asked
        if rounds < 0:
            raise ValueError(f"num_jacobi_iterations = {rounds} is negative.")
        return rounds

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the stock function; settings of `forward` are passed on to it.

        Raises:
            ValueError: the strategy reads hidden states, of which a token has several here.
        """
        stored = self.generation_config if generation_config is None else generation_config
        for name in ("penalty_alpha", "dola_layers"):  # contrastive search, DoLa
            if kwargs.get(name, getattr(stored, name, None)):
                raise ValueError(
                    f"{name}: this strategy reads one hidden state for each token and layer, and "
                    "here a token has several. Choose another one."
                )
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock function; the cache knows how many slots a token has from the start."""
        result = super()._prepare_cache_for_generation(*args, **kwargs)  # type: ignore[misc]
        generation_config = (
            kwargs["generation_config"] if "generation_config" in kwargs else args[0]
        )
        model_kwargs = kwargs["model_kwargs"] if "model_kwargs" in kwargs else args[1]
        if (cache := model_kwargs.get(CACHE_NAME)) is not None:
            cache = as_thought_cache(cache, self.config)
        mask = model_kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            chunk_size = getattr(generation_config, "prefill_chunk_size", None)
            check_prompts(mask, 0 if cache is None else cache.num_tokens, chunk_size)
        return result

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the stock function, which would count new tokens from 0 after padding."""
        positions: Tensor = super()._prepare_position_ids_for_generation(*args, **kwargs)  # type: ignore[misc]
        return positions.cummax(dim=-1).values

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse it here: in a thread of its own it would fail, and the caller wait.

        Raises:
            ValueError: always.
        """
        raise ValueError("Continuous batching packs sequences, which is not supported: generate().")

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the stock function; the row of the pause token has to stay.

        Raises:
            ValueError: it would not.
        """
        row = self.config.pause_token_id
        is_lost = new_num_tokens is not None and row is not None and new_num_tokens <= row
        if is_lost and self.config.effective_method == "pause":
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}) would remove row {row}, the pause "
                f"token (pause_token_id) of this model. Keep at least {row + 1} rows."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)  # type: ignore[misc]


def _checked_loss_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What is left of the keywords of a forward: the loss's.

    Stock models ignore what they do not know, a misspelt setting for example.

    Raises:
        ValueError: sequences are packed.
        TypeError: there is an argument that is not known here.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    if any(name in given for name in PACKED):
        raise ValueError("Packed sequences are not supported: pad them into rows of a batch.")
    unknown = given.keys() - {*OF_THE_LOSS, *WITHOUT_EFFECT}
    if unknown:
        raise TypeError(f"This model's forward has no argument {', '.join(sorted(unknown))}.")
    return {name: given[name] for name in OF_THE_LOSS if name in given}


def _checked_mask(attention_mask: Tensor | None, tokens: Tensor, num_seen: int) -> Tensor:
    """[b, tokens in the cache + s], ones where there is no padding."""
    shape = (tokens.size(0), num_seen + tokens.size(1))
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.long, device=tokens.device)
    if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != shape:
        given = getattr(attention_mask, "shape", type(attention_mask).__name__)
        raise ValueError(
            f"attention_mask: {given} given, needed is {shape}: ones for tokens and zeros for "
            "padding, of those in the cache first."
        )
    return attention_mask


def _positions(mask: Tensor) -> Tensor:
    """The number of tokens before each, [b, tokens]; 0 in padding."""
    return (mask.long().cumsum(dim=1) - 1).masked_fill(mask == 0, 0)


def _refuse_packed(position_ids: Tensor) -> None:
    """Stock models take positions that start again for packed sequences."""
    if bool((position_ids.diff(dim=-1) < 0).any()):
        raise ValueError(
            "position_ids that start again mean packed sequences, which are not supported: pad "
            "them into rows of a batch, with an attention_mask."
        )


class PonderLlamaForCausalLM(PonderCausalLM, LlamaForCausalLM):
    """Llama."""

    config_class = PonderLlamaConfig


class PonderMistralForCausalLM(PonderCausalLM, MistralForCausalLM):
    """Mistral, dense."""

    config_class = PonderMistralConfig


class PonderQwen2ForCausalLM(PonderCausalLM, Qwen2ForCausalLM):
    """Qwen2, dense."""

    config_class = PonderQwen2Config


class PonderQwen3ForCausalLM(PonderCausalLM, Qwen3ForCausalLM):
    """Qwen3, dense."""

    config_class = PonderQwen3Config


class PonderGPTNeoXForCausalLM(PonderCausalLM, GPTNeoXForCausalLM):
    """GPT-NeoX (Pythia)."""

    config_class = PonderGPTNeoXConfig
    final_norm_name = "final_layer_norm"
    attention_name = "attention"


share_weight_names(PonderGPTNeoXForCausalLM.__name__, GPTNeoXForCausalLM.__name__)


class PonderGPT2ForCausalLM(PonderCausalLM, GPT2LMHeadModel):
    """GPT-2."""

    config_class = PonderGPT2Config
    final_norm_name = "ln_f"
    attention_name = "attn"
    positions_name = "wpe"
