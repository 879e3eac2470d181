"""The interface of a training method. None of its functions communicates.

A method defines the passes of a forward (`plan`), the input of a pass from the token embeddings and
the carry (`build_input`), the carry that a pass hands on (`build_carry`), and the scale of the
token embeddings (`embedding_scale`). Under pipeline parallelism `build_input` runs on the first
stage and `build_carry` on the last, so a method keeps no state between them. Everything that
`build_input` needs must be in the token embeddings or in the carry. The plan determines the slots
that the loss uses. For generation a method also defines the passes of a new token
(`decoding_plan`, `build_decoding_input`); the defaults here are correct for every method.
docs/adding-a-method.md is a tutorial.

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
"""Maps normed hidden states to softmax(output layer) times the scaled embedding table, slot by
slot: [slots, b, h] -> [slots, b, h]. The model implements it, including its communication. Only a
pass with `mixes_embeddings` may call it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """A training method with its settings. Frozen; holds no tensors."""

    config: MethodConfig

    @property
    def default_init_method(self) -> Literal["normal", "small"]:
        """Default initialisation of a model trained with this method; a run can override it."""
        return "small"

    @property
    def extra_token_ids(self) -> tuple[int, ...]:
        """Vocabulary ids whose embeddings follow that of every token, for `build_input`."""
        return ()

    @abc.abstractmethod
    def plan(self, num_jacobi_iterations: int) -> PassPlan:
        """The passes of one forward with R = `num_jacobi_iterations` >= 0."""

    @abc.abstractmethod
    def embedding_scale(self, hidden_size: int) -> float | None:
        """Factor on token embeddings, before it is rounded to their dtype; None: not scaled."""

    @abc.abstractmethod
    def build_input(self, pass_: Pass, token_embeddings: Tensor, carry: Tensor | None) -> Tensor:
        """Build the input of a pass, without learned positions.

        Args:
            pass_: the pass that is about to run.
            token_embeddings: scaled, [s, b, h] (a local shard under sequence parallelism). With m
                `extra_token_ids`: [s * (m+1), b, h], each token followed by its extra embeddings.
            carry: the carry of the previous pass, [s * m, b, h]; None in the first pass.

        Returns:
            [s * pass_.slots_per_token, b, h].
        """

    def build_carry(
        self, pass_: Pass, outputs: Tensor, mix: Mix, pass_input: Tensor | None
    ) -> Tensor:
        """Build the carry that this pass hands on to the next.

        Args:
            pass_: the pass that has just run; never the last.
            outputs: its output at `pass_.output_slots`, normed if `pass_.final_norm`:
                [s * pass_.outputs_per_token, b, h].
            mix: see `Mix`.
            pass_input: the result of `build_input` for this pass,
                [s * pass_.slots_per_token, b, h]; None unless `pass_.carries_input`.

        Returns:
            The carry, with the shape of `outputs`. By default `outputs` itself.
        """
        return outputs

    def decoding_plan(self, plan: PassPlan) -> DecodingPlan:
        """The passes of a new token in generation.

        By default these are the passes of the prompt, each with its own cache. The result equals
        that of running them over the whole text, because no slot depends on later slots.

        Args:
            plan: the passes of the prompt.
        """
        return DecodingPlan(plan=plan)

    def build_decoding_input(
        self, pass_: Pass, token_embeddings: Tensor, carry: Tensor | None
    ) -> Tensor:
        """Like `build_input`, for a pass of `decoding_plan`; s is 1."""
        return self.build_input(pass_, token_embeddings, carry)


def load_method(config: MethodConfig) -> Method:
    """Load the method named by `config.method`: a module in `ponder/methods`, or a dotted name.

    The module must define exactly one subclass of `Method`.

    Raises:
        ConfigError: no such method, not exactly one subclass, or settings that the method refuses.
    """
    name = config.method
    module_name = name if "." in name else f"{METHODS_PACKAGE}.{name}"
    package = importlib.import_module(METHODS_PACKAGE)
    available = sorted(m.name for m in pkgutil.iter_modules(package.__path__))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the module exists, but one of its own imports fails
        raise ConfigError(
            f"--method {name}: no such method. Give one of {', '.join(available)}, or the dotted "
            "name of an importable module that defines a method."
        ) from None
    classes = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Method) and c.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise ConfigError(
            f"--method {name}: module {module_name} defines {len(classes)} subclasses of Method. "
            "It must define exactly one."
        )
    return classes[0](config=config)
