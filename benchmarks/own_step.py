"""Our training step for benchmarks that have no peer: the driver's `train_step` on a random model."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from mindspeed_mm.data.sample import Batch


class OwnStep:
    """A model, its optimizer, and steps over given micro-batches, on this process or on each rank of torchrun."""

    def __init__(self, model: dict[str, Any], flags: str, *, device: str, bf16: bool, ranks: int, **sizes: int) -> None:
        """`model` is a model.json, `flags` further ones of `train`, `sizes` parallel sizes by the names of Runtime."""
        from mindspeed_mm.platform import get_platform

        self.platform = get_platform(device)
        from megatron.driver import arguments, initialize, loop, setup
        from mindspeed_mm.models.build import build_vlm
        from mindspeed_mm.models.runtime import Runtime
        from mindspeed_mm.models.spec import load_model_spec
        from mindspeed_mm.objectives.sft import OBJECTIVE

        parser = argparse.ArgumentParser()
        arguments.add_arguments(parser)
        line = f"--seq-length 4096 --train-iters 1000000 --lr 1e-6 --lr-decay-style constant --clip-grad 1 {flags}"
        line += " --bf16" if bf16 else ""
        line += "".join(f" --{name.replace('_', '-')} {size}" for name, size in sizes.items())
        args = arguments.from_namespace(parser.parse_args(line.split()), world_size=ranks)
        runtime = Runtime(params_dtype=torch.bfloat16 if bf16 else torch.float32, **sizes)
        self.spec = load_model_spec(model)
        initialize.initialize(args, self.platform)

        def provide(pre_process: bool, post_process: bool):
            place = self.platform.device()
            return build_vlm(self.spec, runtime, place, pre_process=pre_process, post_process=post_process)[0]

        self.state = setup.setup(args, provide, self.platform)
        hooks, saver = loop.Hooks(), argparse.Namespace(failed=False)

        def run(batches: list[Batch]) -> float:
            data = loop.MeteredIterator(iter(batches), hooks.describe)
            metrics, _ = loop.train_step(self.state, args, OBJECTIVE.forward_step, data, loop.StopRequest(), saver)
            return metrics.loss

        self._run, self._initialize = run, initialize

    def __call__(self, batches: list[Batch]) -> tuple[float, float]:
        """(seconds, loss) of an optimizer step over this rank's micro-batches."""
        torch.distributed.barrier()
        start = time.perf_counter()
        loss = self._run(batches)
        self.platform.synchronize()
        return time.perf_counter() - start, loss

    def end(self) -> None:
        """Give up the process group, so that another model can follow."""
        self._initialize.shutdown()
