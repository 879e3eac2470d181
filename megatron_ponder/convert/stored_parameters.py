"""Single parameters in a torch_dist checkpoint, written and read without building the model.

Where a parameter lies in a checkpoint is megatron-core's business: layers are stacked, some keys
are renamed, gated projections are stored in halves, and versions differ. So a model without memory
(torch's fake tensors) is asked. Writing goes through megatron-core's own `save`, with a strategy
that fetches each tensor when its turn comes; reading takes the pieces that make up one parameter,
whatever layout wrote them. Both hold about one parameter at a time.
"""

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    apply_factories,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ponder.checkpoint.optimizer_state import METADATA
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.errors import CheckpointError, PonderError
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
from megatron_ponder.model.specs import layer_spec
from megatron_ponder.model.transformer_config import build_transformer_config
from megatron_ponder.ponder.method import load_method
from megatron_ponder.runtime.backends import REFERENCE
from megatron_ponder.runtime.distributed import process_groups

MAX_FILE_BYTES = 5 * 10**8
"""Further parameters go to a further file; also a bound on what `_GroupingWriter` is there for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a parameter as megatron-core stores it."""

    key: str
    """In the checkpoint."""
    offset: tuple[int, ...]
    """In the stored tensor, the axes that stack layers first."""
    shape: tuple[int, ...]
    """Of the piece, with the same axes."""
    num_stacked: int
    """Axes that stack layers."""
    stored_shape: tuple[int, ...]
    """Of the whole stored tensor."""

    @property
    def region(self) -> tuple[slice, ...]:
        """Where in the parameter it is."""
        within = zip(self.offset[self.num_stacked :], self.shape[self.num_stacked :], strict=True)
        return tuple(slice(start, start + length) for start, length in within)


def build_bare_model(config: ResolvedConfig) -> PonderGPTModel:
    """A run's whole model with weights that are not set. Needs the groups of one process."""
    transformer_config = build_transformer_config(config, REFERENCE)
    # Also because fake tensors and random generators do not go together.
    transformer_config.perform_initialization = False
    return PonderGPTModel(
        transformer_config,
        shape=config.model,
        method=load_method(config.method),
        layer_spec=layer_spec(config, REFERENCE),
        pg_collection=process_groups(),
        training_config=config.training,
    )


class StoredParameters:
    """Where each parameter of a run's model lies. Needs the process groups of one process.

    Args:
        config: resolved for one process.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        with FakeTensorMode():
            model = build_bare_model(config)
            self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
            """Of whole parameters, by name."""
            self.state: ShardedStateDict = model.sharded_state_dict(metadata=METADATA)
            """megatron-core's description of a checkpoint, with fake tensors in it."""
            apply_factories(self.state)
        self.dtype = model.config.params_dtype
        self.pieces = {
            name: [_piece(t) for t in _tensors(self.state[name])] for name in self.shapes
        }
        """By name of the parameter."""


def _tensors(described: Any) -> Iterator[ShardedTensor]:
    """The sharded tensors in a part of a state dict."""
    if isinstance(described, ShardedTensor):
        yield described
    elif isinstance(described, dict | list | tuple):
        for part in described.values() if isinstance(described, dict) else described:
            yield from _tensors(part)


def _piece(tensor: ShardedTensor) -> Piece:
    return Piece(
        key=tensor.key,
        offset=tuple(tensor.global_offset),
        shape=(1,) * tensor.prepend_axis_num + tuple(tensor.local_shape),
        num_stacked=tensor.prepend_axis_num,
        stored_shape=tuple(tensor.global_shape),
    )


class ParameterReader:
    """Reads single parameters of a checkpoint that any layout wrote.

    Args:
        checkpoint: the folder of an iteration.
        parameters: of the run that wrote it.

    Raises:
        CheckpointError: it does not hold them.
    """

    def __init__(self, checkpoint: Path, parameters: StoredParameters) -> None:
        self._checkpoint = checkpoint
        self._pieces = parameters.pieces
        self._shapes = parameters.shapes
        self._reader = dcp.FileSystemReader(str(checkpoint))
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        for pieces in self._pieces.values():
            for piece in pieces:
                self._described(piece)

    def read(self, name: str) -> Tensor:
        """A whole parameter, in the dtype it is stored in.

        Args:
            name: of the parameter in the whole model.
        """
        pieces = self._pieces[name]
        dtype = self._described(pieces[0]).properties.dtype
        whole = torch.empty(self._shapes[name], dtype=dtype)
        targets: dict[str, Tensor] = {}
        items: list[ReadItem] = []
        for number, piece in enumerate(pieces):
            target = f"piece {number}"
            targets[target] = whole[piece.region].view(piece.shape)
            wanted = [ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape))]
            found = create_read_items_for_chunk_list(piece.key, self._described(piece), wanted)
            for item in found:
                index = dataclasses.replace(item.dest_index, fqn=target)
                items.append(dataclasses.replace(item, dest_index=index))
        planner = _PiecesPlanner(targets)
        self._reader.read_data(LoadPlan(items), planner).wait()
        return whole

    def _described(self, piece: Piece) -> TensorStorageMetadata:
        """The checkpoint's description of the tensor that a piece is in."""
        described = self._metadata.state_dict_metadata.get(piece.key)
        if not isinstance(described, TensorStorageMetadata):
            raise CheckpointError(
                f"{self._checkpoint} has no {piece.key}. It was written by another version of "
                "megatron-core, or is no checkpoint of this package."
            )
        if tuple(described.size) != piece.stored_shape:
            raise CheckpointError(
                f"{self._checkpoint}: {piece.key} has shape {tuple(described.size)}, by its "
                f"settings it must have {piece.stored_shape}."
            )
        return described


class _PiecesPlanner(DefaultLoadPlanner):
    """Tells the reader where what it reads goes; the plan is made without it."""

    def __init__(self, targets: dict[str, Tensor]) -> None:
        super().__init__()
        self._targets = targets

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The piece that a part read belongs to."""
        return self._targets[index.fqn]


def write_parameters(
    folder: Path,
    parameters: StoredParameters,
    fetch: Callable[[str], Tensor],
    common: dict[str, Any],
) -> None:
    """Write a checkpoint that any layout loads.

    Args:
        folder: an empty folder.
        parameters: what to write.
        fetch: gives a whole parameter by name, in `parameters.dtype`; asked in the model's order.
        common: what the checkpoint stores besides.

    Raises:
        PonderError: what `fetch` raised.
        OSError: the folder cannot be written.
    """
    strategy = _FetchingStrategy(parameters, fetch)
    try:
        dist_checkpointing.save({"model": parameters.state, **common}, str(folder), strategy)
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if (cause := _users_error(failure)) is not None:
                raise cause from None
        raise


def _users_error(failure: BaseException | None) -> PonderError | OSError | None:
    """What is behind a failure, if a user can do something about it.

    torch's zip writer makes a RuntimeError of its own of a full disk.
    """
    while failure is not None and not isinstance(failure, PonderError | OSError):
        failure = failure.__cause__ or failure.__context__
    return failure


class _FetchingStrategy(TorchDistSaveShardedStrategy):
    """Writes torch_dist, fetching each tensor when it is written."""

    def __init__(self, parameters: StoredParameters, fetch: Callable[[str], Tensor]) -> None:
        super().__init__("torch_dist", 1)
        self._parameters = parameters
        self._fetch = fetch

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """See the base class."""
        objects = list(_objects(sharded_state_dict))
        planner = _FetchingPlanner(self._parameters, self._fetch, objects)
        # Among ranks, even one, torch would pickle exceptions and lose what they come from.
        dcp.save({}, storage_writer=_GroupingWriter(checkpoint_dir), planner=planner, no_dist=True)


def _objects(described: Any) -> Iterator[ShardedObject]:
    """The sharded objects in a state dict."""
    if isinstance(described, ShardedObject):
        yield described
    elif isinstance(described, dict | list | tuple):
        for part in described.values() if isinstance(described, dict) else described:
            yield from _objects(part)


class _FetchingPlanner(SavePlanner):
    """Says what is written, and gets it when it is."""

    def __init__(
        self,
        parameters: StoredParameters,
        fetch: Callable[[str], Tensor],
        objects: list[ShardedObject],
    ) -> None:
        self._parameters = parameters
        self._fetch = fetch
        self._objects = {each.unique_key: each for each in objects}
        self._places: dict[MetadataIndex, tuple[str, Piece]] = {}
        self._last: tuple[str, Tensor] | None = None

    def set_up_planner(self, *arguments: Any, **more: Any) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self._objects
        ]
        for name, pieces in self._parameters.pieces.items():
            for piece in pieces:
                index = MetadataIndex(piece.key, torch.Size(piece.offset))
                self._places[index] = (name, piece)
                items.append(_write_item(index, piece, self._parameters.dtype))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            # megatron-core (0.16.1) stores a list: what all ranks have under one key.
            torch.save([self._objects[write_item.index.fqn].data], stream)
            return stream
        index = dataclasses.replace(write_item.index, index=None)
        name, piece = self._places[index]
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self._fetch(name))
        return self._last[1][piece.region].reshape(piece.shape)


def _write_item(index: MetadataIndex, piece: Piece, dtype: torch.dtype) -> WriteItem:
    """What the metadata says of a piece."""
    return WriteItem(
        index=index,
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape)),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(piece.stored_shape),
        ),
    )


class _GroupingWriter(dcp.FileSystemWriter):
    """Several files, one after the other.

    torch (2.13) holds the last tensor of each key until its file is complete.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, thread_count=1)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """See the base class."""
        groups: list[list[WriteItem]] = []
        size = 0
        for item in plan.items:
            nbytes = _num_bytes(item)
            if not groups or (size > 0 and size + nbytes > MAX_FILE_BYTES):
                groups.append([])
                size = 0
            groups[-1].append(item)
            size += nbytes
        results = []
        for number, group in enumerate(groups):
            prefix = type(plan.storage_data)(f"__{number}_")
            part = dataclasses.replace(plan, items=group, storage_data=prefix)
            written = super().write_data(part, planner)
            written.wait()
            results += written.value()
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result(results)
        return done


def _num_bytes(item: WriteItem) -> int:
    """Of a tensor; objects count nothing."""
    if item.tensor_data is None:
        return 0
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
