"""What a training method is: a few answers about a forward, none of which needs communication.

A method says which passes there are (`plan`), how a pass's input is made from the token embeddings
and what the previous pass handed on (`build_input`), what a pass hands on (`build_carry`), and how
token embeddings are scaled (`embedding_scale`). Under pipeline parallelism `build_input` runs on
the first stage and `build_carry` on the last, so a method keeps no state between them: whatever
`build_input` needs must be in the token embeddings or in the carry. What the loss reads is in the
plan. Generation asks besides what a new token runs (`decoding_plan`, `build_decoding_input`); the
answers that are here are right for every method. docs/adding-a-method.md walks through a new one.

One file in `ponder/methods/` is one method; `load_method` finds it by name.
"""

import abc
import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from megatron_ponder.config.schema import MethodConfig
from megatron_ponder.errors import ConfigError
from megatron_ponder.ponder.plan import DecodingPlan, Pass, PassPlan

METHODS_PACKAGE = "megatron_ponder.ponder.methods"

Mix = Callable[[Tensor], Tensor]
"""From normed hidden states to softmax(output layer) times the scaled embedding table, slot by
slot: [slots, b, h] -> [slots, b, h]. The model's; it owns all communication. Only a pass that
`mixes_embeddings` may call it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """A training method with its settings. Frozen and without tensors."""

    config: MethodConfig

    @property
    def default_init_method(self) -> Literal["normal", "small"]:
        """Initialisation of a model trained with this method, unless the run says otherwise."""
        return "small"

    @property
    def extra_token_ids(self) -> tuple[int, ...]:
        """Vocabulary ids that are embedded behind every token, for `build_input`."""
        return ()

    @abc.abstractmethod
    def plan(self, num_jacobi_iterations: int) -> PassPlan:
        """The passes of one forward with R = `num_jacobi_iterations` >= 0."""

    @abc.abstractmethod
    def embedding_scale(self, hidden_size: int) -> float | None:
        """Factor on token embeddings before it is rounded to their dtype; None: not scaled."""

    @abc.abstractmethod
    def build_input(self, pass_: Pass, token_embeddings: Tensor, carry: Tensor | None) -> Tensor:
        """The input of a pass, without learned positions.

        Args:
            pass_: the pass that is about to run.
            token_embeddings: scaled, [s, b, h] (a local shard under sequence parallelism); with m
                `extra_token_ids` [s * (m+1), b, h], each token followed by those.
            carry: what the previous pass handed on, [s * m, b, h]; None before the first.

        Returns:
            [s * pass_.slots_per_token, b, h].
        """

    def build_carry(
        self, pass_: Pass, outputs: Tensor, mix: Mix, pass_input: Tensor | None
    ) -> Tensor:
        """What this pass hands on to the next.

        Args:
            pass_: the pass that has just run, not the last.
            outputs: its output at `pass_.output_slots`, normed if `pass_.final_norm`:
                [s * pass_.outputs_per_token, b, h].
            mix: see `Mix`.
            pass_input: what `build_input` returned for this pass,
                [s * pass_.slots_per_token, b, h]; None unless `pass_.carries_input`.

        Returns:
            The carry, of the shape of `outputs`; `outputs` itself unless a method overrides this.
        """
        return outputs

    def decoding_plan(self, plan: PassPlan) -> DecodingPlan:
        """What a new token runs when it is generated.

        Here: the passes of the prompt, each with a cache. That gives what running them over the
        whole text gives, because no slot depends on later ones.

        Args:
            plan: the prompt's passes.
        """
        return DecodingPlan(plan=plan)

    def build_decoding_input(
        self, pass_: Pass, token_embeddings: Tensor, carry: Tensor | None
    ) -> Tensor:
        """`build_input` for a pass of `decoding_plan`, where s is 1."""
        return self.build_input(pass_, token_embeddings, carry)


def load_method(config: MethodConfig) -> Method:
    """The method named by `config.method`: a module in `ponder/methods`, or a dotted module name.

    The module defines exactly one `Method` subclass of its own.

    Raises:
        ConfigError: no such method, or settings that the method refuses.
    """
    name = config.method
    module_name = name if "." in name else f"{METHODS_PACKAGE}.{name}"
    package = importlib.import_module(METHODS_PACKAGE)
    available = sorted(m.name for m in pkgutil.iter_modules(package.__path__))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the module exists and fails on an import of its own
        raise ConfigError(
            f"--method {name}: no such method. Known: {', '.join(available)}; or give the dotted "
            "name of an importable module that defines one."
        ) from None
    classes = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Method) and c.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise ConfigError(
            f"--method {name}: module {module_name} defines {len(classes)} subclasses of Method, "
            "exactly one is needed."
        )
    return classes[0](config=config)
