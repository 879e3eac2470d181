"""What megatron-core's own schedules do on one stage, written down while they run.

The schedules run for real, in one process: forwards and backwards of a tiny function note that they
happened, and a stand-in for the communicator notes sends and receives and makes tensors up.
"""

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ponder.planning.order import Pipeline

Entry = tuple
"""("compute", is_backward, chunk, microbatch), ("send", is_backward) or ("wait", is_backward)."""


class Group:
    """Size and rank of a process group."""

    def __init__(self, size: int = 1, rank: int = 0) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


class Handle:
    """A receive that has been posted."""

    def __init__(self, log: list[Entry], is_backward: bool) -> None:
        self.log, self.is_backward = log, is_backward

    def wait(self) -> None:
        self.log.append(("wait", self.is_backward))


class Communicator:
    """megatron-core's P2PCommunicator without a peer."""

    def __init__(self, pipeline: Pipeline, stage: int, config: Any, log: list[Entry]) -> None:
        self.pp_group = Group(pipeline.num_pipeline_stages, stage)
        # What megatron-core 0.19 asks the communicator, and 0.16 the group.
        self.total_stages, self.current_stage = pipeline.num_pipeline_stages, stage
        self.is_pp_first_stage = stage == 0
        self.is_pp_last_stage = stage == pipeline.num_pipeline_stages - 1
        self.virtual_pipeline_model_parallel_size = config.virtual_pipeline_model_parallel_size
        self.config, self.log = config, log

    def _send(self, tensor: Any, is_backward: bool) -> None:
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        if tensor is not None:
            self.log.append(("send", is_backward))

    def _receive(self, wanted: bool, is_backward: bool) -> Tensor | None:
        if not wanted:
            return None
        self.log.append(("wait", is_backward))
        return torch.zeros(1, requires_grad=not is_backward)

    def _post(self, wanted: bool, is_backward: bool, name: str) -> tuple[Any, dict]:
        if not wanted:
            return None, {}
        tensor = torch.zeros(1, requires_grad=not is_backward)
        return tensor, {name: Handle(self.log, is_backward)}

    def recv_forward(self, shape: Any, is_first_stage: bool) -> Any:
        return _shaped(shape, self._receive(not is_first_stage, False))

    def recv_backward(self, shape: Any, is_last_stage: bool) -> Any:
        return _shaped(shape, self._receive(not is_last_stage, True))

    def send_forward(self, output: Any, is_last_stage: bool) -> None:
        if not is_last_stage:
            self._send(output, False)

    def send_backward(self, gradient: Any, is_first_stage: bool) -> None:
        if not is_first_stage:
            self._send(gradient, True)

    def send_forward_recv_backward(self, output: Any, shape: Any, is_last_stage: bool) -> Any:
        self.send_forward(output, is_last_stage)
        return self.recv_backward(shape, is_last_stage)

    def send_backward_recv_forward(self, gradient: Any, shape: Any, is_first_stage: bool) -> Any:
        self.send_backward(gradient, is_first_stage)
        return self.recv_forward(shape, is_first_stage)

    def send_forward_recv_forward(
        self, output: Any, recv_prev: bool, tensor_shape: Any, overlap_p2p_comm: bool = False
    ) -> Any:
        self._send(output, False)
        if overlap_p2p_comm:
            return self._post(recv_prev, False, "recv_prev")
        return self._receive(recv_prev, False)

    def send_backward_recv_backward(
        self, gradient: Any, recv_next: bool, tensor_shape: Any, overlap_p2p_comm: bool = False
    ) -> Any:
        self._send(gradient, True)
        if overlap_p2p_comm:
            return self._post(recv_next, True, "recv_next")
        return self._receive(recv_next, True)

    def send_forward_backward_recv_forward_backward(
        self, output: Any, gradient: Any, recv_prev: bool, recv_next: bool, tensor_shape: Any
    ) -> Any:
        self._send(output, False)
        self._send(gradient, True)
        return self._receive(recv_prev, False), self._receive(recv_next, True)


def _shaped(shape: Any, tensor: Tensor | None) -> Any:
    """A list where the schedule asked for a list of shapes (1F1B), else the tensor."""
    return tensor if isinstance(shape[0], int) else [tensor]


class _Noted(torch.autograd.Function):
    """The identity, which says when its forward and backward run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[Entry], chunk: int, microbatch: int) -> Tensor:
        ctx.noted = log, chunk, microbatch
        log.append(("compute", False, chunk, microbatch))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        log, chunk, microbatch = ctx.noted
        log.append(("compute", True, chunk, microbatch))
        return gradients[0], None, None, None


class _Chunk(torch.nn.Module):
    """A model chunk: a place for the config and the input."""

    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        self.config, self.number = config, number
        self.model_type = ModelType.encoder_or_decoder
        self.input: Tensor | None = None

    def set_input_tensor(self, tensors: Any) -> None:
        self.input = tensors[0] if isinstance(tensors, list) else tensors


def recorded_schedule(pipeline: Pipeline, stage: int) -> list[Entry]:
    """Run megatron-core's schedule of one stage and return what it did, in order."""
    is_overlapped = pipeline.overlap
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    config.virtual_pipeline_model_parallel_size = (
        pipeline.num_chunks if pipeline.is_interleaved else None
    )
    config.microbatch_group_size_per_vp_stage = pipeline.num_pipeline_stages
    config.overlap_p2p_comm = is_overlapped
    config.batch_p2p_comm = not is_overlapped
    config.calculate_per_token_loss = True
    log: list[Entry] = []
    groups = ProcessGroupCollection()
    groups.tp, groups.cp, groups.dp_cp = Group(), Group(), Group()
    groups.embd = groups.pos_embd = None
    groups.pp = Group(pipeline.num_pipeline_stages, stage)

    def forward_step(batches: Any, model: _Chunk) -> tuple[Tensor, Any]:
        x = model.input if model.input is not None else torch.zeros(1, requires_grad=True)
        output = _Noted.apply(x, log, model.number, next(batches))
        return output, lambda loss: (loss.sum(), torch.tensor(1, dtype=torch.int), 0.0)

    run = (
        schedules.forward_backward_pipelining_with_interleaving
        if pipeline.is_interleaved
        else schedules.forward_backward_pipelining_without_interleaving
    )
    run(
        forward_step_func=forward_step,
        data_iterator=[iter(range(pipeline.num_microbatches)) for _ in range(pipeline.num_chunks)],
        model=[_Chunk(config, number) for number in range(pipeline.num_chunks)],
        num_microbatches=pipeline.num_microbatches,
        seq_length=8,
        micro_batch_size=1,
        forward_only=pipeline.forward_only,
        p2p_communicator=Communicator(pipeline, stage, config, log),
        pg_collection=groups,
    )
    return log


def communicator_for_counts(pipeline: Pipeline, stage: int) -> Any:
    """What `get_pp_rank_microbatches` asks of a communicator."""
    return SimpleNamespace(
        pp_group=Group(pipeline.num_pipeline_stages, stage),
        virtual_pipeline_model_parallel_size=pipeline.num_chunks
        if pipeline.is_interleaved
        else None,
    )
