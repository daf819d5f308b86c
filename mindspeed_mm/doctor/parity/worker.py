"""One process of the comparison: computes every case on its device and writes what came out into a folder.

`python -m mindspeed_mm.doctor.parity.worker DEVICE FOLDER`, and with RANK and WORLD_SIZE set the collectives instead.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mindspeed_mm.doctor.parity.operators import Values, compute, drawn, random_state
from mindspeed_mm.doctor.parity.verdict import Collected
from mindspeed_mm.platform import Platform, get_platform

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError, OSError)
"""What a case may end with: it is told in the table, and the next case comes."""


def collect(platform: Platform, folder: Path, dtypes: tuple[str, ...] = tuple(DTYPES)) -> Collected:
    """Every case in every data type.

    Args:
        folder: for checkpoints.
    """
    found = Collected()
    for name in dtypes:
        for case, function in _all_cases(platform, DTYPES[name], folder / name):
            try:
                values = function()
            except FAILURES as error:
                lines = str(error).strip().splitlines()
                found.errors[f"{name}: {case}"] = f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
            else:
                found.values |= {f"{name}: {part}": value for part, value in values.items()}
    return found


def _all_cases(platform: Platform, dtype: torch.dtype, folder: Path) -> Iterator[tuple]:
    from mindspeed_mm.doctor.parity import model, rounding
    from mindspeed_mm.platform.distributed import init_single_process

    yield from compute(platform, dtype)
    yield from rounding.compute(platform, dtype)
    yield "random state", functools.partial(random_state, platform)
    yield "trajectory", functools.partial(model.trajectory, platform, dtype)
    yield "optimizer", functools.partial(model.optimized, platform, dtype)
    yield "save and resume", functools.partial(model.resumed, platform, dtype, folder)
    yield "layer", lambda: init_single_process(platform) or model.layers(platform, dtype)
    yield "generation", functools.partial(model.generation, platform, dtype)


def collectives(platform: Platform, rank: int, ranks: int) -> Values:
    """Differences of what collectives give from what they must give: zeros where they are right. Collective."""
    device = platform.device()
    found: Values = {}
    for name, dtype in DTYPES.items():
        own = [drawn((4096,), torch.Generator().manual_seed(number)).to(dtype) for number in range(ranks)]
        total = functools.reduce(torch.add, own)
        mine = own[rank].to(device, copy=True)
        torch.distributed.all_reduce(mine)
        found[f"{name}: collective: all-reduce"] = (mine.cpu() - total).float()
        gathered = [torch.empty(4096, dtype=dtype, device=device) for _ in range(ranks)]
        torch.distributed.all_gather(gathered, own[rank].to(device))
        found[f"{name}: collective: all-gather"] = (torch.stack(gathered).cpu() - torch.stack(own)).float()
        first = own[rank].to(device, copy=True)
        torch.distributed.broadcast(first, 0)
        found[f"{name}: collective: broadcast"] = (first.cpu() - own[0]).float()
        largest = own[rank].to(device, copy=True)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        found[f"{name}: collective: all-reduce, largest"] = (largest.cpu() - torch.stack(own).amax(0)).float()
        share = torch.empty(4096 // ranks, dtype=dtype, device=device)
        torch.distributed.reduce_scatter_tensor(share, own[rank][: share.numel() * ranks].to(device))
        wanted = total[rank * share.numel() :][: share.numel()]
        found[f"{name}: collective: reduce-scatter"] = (share.cpu() - wanted).float()
        parts = torch.empty_like(share).repeat(ranks)
        torch.distributed.all_to_all_single(parts, own[rank][: parts.numel()].to(device))
        wanted = torch.cat([values[rank * share.numel() :][: share.numel()] for values in own])
        found[f"{name}: collective: all-to-all"] = (parts.cpu() - wanted).float()
        found[f"{name}: collective: send and receive"] = (
            _from_neighbour(own[rank].to(device)).cpu() - own[rank - 1]
        ).float()
    return found


def _from_neighbour(own: torch.Tensor) -> torch.Tensor:
    """The tensor of the rank before, the last one's for the first. Collective."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    theirs = torch.empty_like(own)
    exchange = [
        torch.distributed.P2POp(torch.distributed.isend, own, (rank + 1) % ranks),
        torch.distributed.P2POp(torch.distributed.irecv, theirs, (rank - 1) % ranks),
    ]
    for work in torch.distributed.batch_isend_irecv(exchange):
        work.wait()
    return theirs


def write(found: Collected, folder: Path) -> None:
    """Into FOLDER/values.safetensors and FOLDER/errors.json."""
    folder.mkdir(parents=True, exist_ok=True)
    # Both gradients of a sum may be one tensor, which the file would refuse.
    own = {name: value.clone(memory_format=torch.contiguous_format) for name, value in found.values.items()}
    save_file(own, folder / "values.safetensors")
    (folder / "errors.json").write_text(json.dumps(found.errors), encoding="utf-8")


def read(folder: Path) -> Collected:
    """What `write` wrote."""
    errors = json.loads((folder / "errors.json").read_text(encoding="utf-8"))
    return Collected(load_file(folder / "values.safetensors"), errors)


def main(device: str, folder: str) -> None:
    """See the top of the file."""
    platform = get_platform(device)
    platform.keep_float32_whole()
    if "WORLD_SIZE" not in os.environ:
        write(collect(platform, Path(folder) / "checkpoints"), Path(folder))
        return
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = torch.distributed.FileStore(str(Path(folder) / "store"), ranks)
    torch.distributed.init_process_group(platform.backend, store=store, rank=rank, world_size=ranks)
    found = collectives(platform, rank, ranks)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if rank == 0:
        write(Collected(found), Path(folder) / "ranks")


if __name__ == "__main__":
    main(*sys.argv[1:])
