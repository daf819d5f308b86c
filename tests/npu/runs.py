"""What the tests of this folder run on ranks of the stand-in and of the CPU alike."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.helpers.golden_training import GoldenLayout, full_tensors, records, train_golden


def trained(golden: Path, layout: GoldenLayout, save: str, flags: str = "", steps: int = 3) -> dict:
    """A golden run: its records and, from rank 0, its final tensors; which operators were called."""
    train_golden(golden, layout, save, flags, steps)
    torch.distributed.barrier()
    first = torch.distributed.get_rank() == 0
    return {
        "records": records(Path(save)) if first else [],
        "weights": full_tensors(Path(save)) if first else {},
        "calls": calls(),
    }


def calls() -> dict[str, int]:
    """Operators of the stand-in that were called since the last time; none on the CPU."""
    import sys

    stand_in = sys.modules.get("torch_npu")
    if stand_in is None:
        return {}
    found = dict(stand_in.CALLS)
    stand_in.CALLS.clear()
    return found


def compared(folder: str, dtypes: tuple[str, ...]) -> tuple[dict, dict, dict]:
    """(values, errors, calls) of every case of `doctor --parity`."""
    from megatron.driver.initialize import shutdown
    from mindspeed_mm.doctor.parity import worker
    from mindspeed_mm.platform import current_platform

    torch.distributed.destroy_process_group()
    try:
        found = worker.collect(current_platform(), Path(folder), dtypes)
    finally:
        shutdown()
    return found.values, found.errors, calls()
