"""What each lever in the training step is worth: our step with one of them taken back at a time, against all of them.

    python benchmarks/levers.py --out benchmarks/results/levers_cpu.json

One process a kind, all variants in turn, round after round; the first round warms up, then medians are taken. `one row`
is taken back where rows are not packed, `attention by sequence` where they are. Memory is the highest resident memory
during a variant's steps above what the process had before the model was built; the allocator keeps memory between
variants, so that one which needs less than those before it shows too much: `--only` runs it alone beside all levers.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from llava_shapes import save_model
from report import machine, write
from training_sides import OurTraining, TrainedJob, reset_peak, resident
from training_work import KINDS, make_work

ALL = "all levers"


def _plain_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _plain_swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _plain_rotation(qkv, cos, sin, groups: int, head_size: int | None = None) -> torch.Tensor:
    if head_size not in (None, 2 * cos.shape[-1]):
        raise ValueError("a part of each head is rotated; the models of these benchmarks rotate whole heads")
    heads = qkv.view(*qkv.shape[:2], groups, -1, 2 * cos.shape[-1])
    first, second = heads[..., :-1, :].chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned, heads[..., -1:, :]), dim=3).flatten(2)


def _masked_attention(platform, query, key, value, segments, *, scale: float, dropout: float, **others) -> torch.Tensor:
    """Attention over the whole row under a dense mask."""
    if others.pop("causal") is not True or any(option is not None for option in others.values()):
        raise ValueError(f"the models of these benchmarks have plain causal attention, found {others}")
    lengths = segments.offsets.diff()
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    mask = (numbers[:, None] == numbers) & torch.ones(len(numbers), len(numbers), dtype=torch.bool).tril()
    rows = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    output = platform.attention(*rows, mask=mask[None, None], causal=False, scale=scale, dropout=dropout)
    return output.squeeze(0).transpose(0, 1)


@contextlib.contextmanager
def _slow_adamw(side: OurTraining) -> Iterator[None]:
    groups = side.state.optimizer.optimizer.param_groups
    for group in groups:
        group["fused"] = False
    yield
    for group in groups:
        group["fused"] = True


@contextlib.contextmanager
def _returned_memory() -> Iterator[None]:
    """glibc as it is by itself once large blocks were freed: 32 MiB and more go back at once, so does the heap's end
    from 64 MiB on. Training switches back to keeping them."""
    from mindspeed_mm.platform import host_memory

    host_memory.return_freed()
    with mock.patch.object(host_memory, "keep_freed", lambda: False):
        yield


def arithmetic() -> dict[str, Callable[[], contextlib.AbstractContextManager]]:
    """Name of each lever that computes otherwise than plain torch -> a context without it, models at hand included."""
    from mindspeed_mm.platform import fused, host_products

    def plain(name: str, operation: Callable) -> Callable[[], contextlib.AbstractContextManager]:
        return lambda: mock.patch.object(fused, name, SimpleNamespace(apply=operation))

    return {
        "chosen products": lambda: mock.patch.multiple(
            host_products, choose=lambda *_: host_products.PLAIN, choose_attention=lambda *_: host_products.PLAIN
        ),
        "fused RMSNorm": plain("FusedRMSNorm", _plain_rms_norm),
        "fused SwiGLU": plain("SwiGLU", _plain_swiglu),
        "fused rotation": plain("RotateQK", _plain_rotation),
    }


def variants(side: OurTraining, kind: str) -> dict[str, Callable[[], contextlib.AbstractContextManager]]:
    """Name of the lever that is taken back -> a context without it."""
    from mindspeed_mm.models import loss
    from mindspeed_mm.models.vlm import VLM
    from mindspeed_mm.objectives import sft

    platform = type(side.platform)
    taken_back: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
        ALL: contextlib.nullcontext,
        **arithmetic(),
        "fused AdamW": lambda: _slow_adamw(side),
        "freed memory kept": _returned_memory,
        "head in chunks": lambda: mock.patch.object(loss, "CHUNK", 10**9),
        "last MLP where asked": lambda: mock.patch.object(VLM, "_places", lambda *_: None),
    }
    if kind == "mixed":
        taken_back["attention by sequence"] = lambda: mock.patch.object(
            platform, "segment_attention", _masked_attention
        )
    else:
        taken_back["one row"] = lambda: mock.patch.object(sft, "pack_rows", lambda batch, _config: (batch, None))
    return taken_back


def measure(kind: str, args: argparse.Namespace, weights: str) -> dict[str, Any]:
    """Of each variant the median seconds of a step, its ratio to all levers in the same round, and peak memory."""
    batch = 8 if kind == "mixed" else 4
    batches = make_work(kind, args.size, batch, 1).ours
    OurTraining.load_libraries("cpu")
    base = resident()[0]
    torch.set_num_threads(args.threads)
    side = OurTraining(TrainedJob(kind, args.size, "cpu", False, batch, 1, args.threads, weights, False))
    contexts = variants(side, kind)
    names = [ALL, *([args.only] if args.only != ALL else [])] if args.only else list(contexts)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks = {}
    for _ in range(args.repeats + 1):
        for name in names:
            with contexts[name]():
                reset_peak()
                start = time.perf_counter()
                side.step(batches[0])
                seconds[name].append(time.perf_counter() - start)
                peaks[name] = resident()[1] - base
    found = {}
    for name in names:
        ratios = [one / best for one, best in zip(seconds[name][1:], seconds[ALL][1:], strict=True)]
        typical = statistics.median(seconds[name][1:])
        found[name] = {
            "seconds": typical,
            "slower": statistics.median(ratios),
            "slower_range": [min(ratios), max(ratios)],
        }
        found[name] |= {"peak_mib": peaks[name], "all_seconds": seconds[name][1:]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "small"), default="small")
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=["equal"])
    parser.add_argument("--only", metavar="LEVER", help="take back this one alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", metavar="JSON", help="default: stdout")
    args = parser.parse_args()
    results: dict[str, Any] = {"settings": vars(args) | {"device": "cpu"} | machine()}
    with tempfile.TemporaryDirectory() as folder:
        save_model(args.size, folder)
        for kind in args.kind:
            # A process of its own each: megatron-core's process groups are made once in a process.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                results[kind] = process.submit(measure, kind, args, folder).result()
            for name, found in results[kind].items():
                sys.stderr.write(
                    f"{kind}, without {name}: {found['seconds']:.2f} s, {found['slower']:.2f}x "
                    f"({found['slower_range'][0]:.2f} to {found['slower_range'][1]:.2f})\n"
                )
    write(results, args.out)


if __name__ == "__main__":
    main()
