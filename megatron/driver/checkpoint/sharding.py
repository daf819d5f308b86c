"""The model as megatron.core's sharded tensors: what changes in training, what is frozen, and how both are written."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.transformer.module import MegatronModule
from torch.distributed import ProcessGroup

from megatron.driver.collectives import agree, gather
from mindspeed_mm.errors import CheckpointError

EXTRA_STATE = "_extra_state"
COMMON_FILE = "common.pt"
AVERAGES = "ema"
"""Of the moving averages in what is written and read."""

# Layers are numbered in their names (decoder.layers.3.), not stacked: any part can be read by itself.
# The distributed optimizer's state meets on the first data-parallel rank, in its host memory, and nowhere else.
RESHARDABLE, FLAT = "fully_reshardable", "fully_sharded_model_space"
"""Layouts of the distributed optimizer's state: whole tensors, and the only one of megatron-core 0.12."""

METADATA = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": RESHARDABLE,
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


def metadata() -> dict:
    """How names and optimizer state are laid out; a fresh copy, since megatron.core adds to it."""
    return dict(METADATA)


class Content(NamedTuple):
    """What one folder of a checkpoint will hold."""

    tensors: dict[str, Any]
    """This rank's share of the sharded tensors, as torch.distributed.checkpoint takes them."""
    common: bytes
    """Everything else, the bytes of common.pt."""


def collect(content: ShardedStateDict, *, copy: bool) -> Content:
    """Make sharded tensors ready to be written. Collective.

    Args:
        copy: take them to host memory, so that what is written does not change with the model.
    """
    # Rank 0's common part counts. It may well differ from that of a rank that trains nothing, and is not compared.
    sharded, common = save_preprocess(content, True, lambda _: {})
    packed = io.BytesIO()
    torch.save(common, packed)
    tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    for item in nested_values(tensors) if copy else ():
        item.data = item.data.detach().to("cpu", copy=True)
    return Content(mcore_to_pyt_state_dict(tensors, is_loading=False), packed.getvalue())


def write_tensors(content: Content, folder: Path, group: ProcessGroup | None = None) -> None:
    """Write tensors as torch_dist and the rest as common.pt. Collective; fails on all ranks.

    megatron.core's own saving starts a manager process, which imports the main program again, and forks a writer for
    every save; and what fails on rank 0 alone leaves the other ranks waiting.
    """

    def write_common() -> None:
        (folder / COMMON_FILE).write_bytes(content.common)
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))

    agree(write_common, group)
    dcp.save(
        content.tensors,
        storage_writer=dcp.FileSystemWriter(folder, thread_count=1, sync_files=True),
        planner=MCoreSavePlanner(flatten_state_dict=False),
        process_group=group,
    )


def chunk_name(chunk: int, name: str) -> str:
    """A name in one of the chunks of this rank, which all count their layers from 0 (virtual pipeline stages)."""
    return f"chunk{chunk}.{name}" if chunk else name


def model_tensors(modules: list[MegatronModule]) -> ShardedStateDict:
    """Sharded parameters and buffers of all chunks of this rank, by name in the module (see `chunk_name`).

    Raises:
        CheckpointError: a module keeps state that is no tensor, which would have to be pickled.
    """
    tensors: ShardedStateDict = {}
    for chunk, module in enumerate(modules):
        for name, item in module.sharded_state_dict(metadata=metadata()).items():
            if isinstance(item, ShardedObject):
                # megatron.core's layers declare an empty extra state; Transformer Engine fills it for FP8 only.
                if not name.endswith(EXTRA_STATE):
                    raise CheckpointError(f"{name} is {type(item.data).__name__}: only tensors can be saved")
                continue
            tensors[chunk_name(chunk, name)] = item
    return tensors


def split_frozen(tensors: ShardedStateDict) -> tuple[ShardedStateDict, ShardedStateDict]:
    """(what training can change, what is frozen). Buffers count as changing."""
    frozen = {
        name: item
        for name, item in tensors.items()
        if isinstance(item.data, torch.nn.Parameter) and not item.data.requires_grad
    }
    return {name: item for name, item in tensors.items() if name not in frozen}, frozen


def built(tensors: ShardedStateDict) -> list[ShardedTensor]:
    """The sharded tensors behind a state dict, factories applied; `tensors` stays as it is."""
    applied = dict_list_map_outplace(
        lambda item: item.build() if isinstance(item, ShardedTensorFactory) else item, tensors
    )
    return [item for item in nested_values(applied) if isinstance(item, ShardedTensor)]


def content_hash(tensors: ShardedStateDict) -> str:
    """Hash over names, places, types and values of the whole model's `tensors`. Collective; "" where there are none.

    Every rank hashes the shards that it would write, so the hash holds for one tensor- and pipeline-parallel layout.
    """
    lines = []
    for item in built(tensors):
        if is_main_replica(item.replica_id):
            digest = hashlib.sha256(_bytes(item.data)).hexdigest()
            lines.append(f"{item.key} {item.global_offset} {item.dtype} {digest}")
    everything = sorted(line for rank in gather(lines) for line in rank)
    return hashlib.sha256("\n".join(everything).encode()).hexdigest()[:32] if everything else ""


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
