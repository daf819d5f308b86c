"""The two sides of the training benchmarks, each in a process of its own that waits until it is asked.

OurTraining is the step of `mindspeed-mm train`: the driver's loop with its checks and metrics. TheirTraining is what
transformers' Trainer does in a step: forward, backward, clipping to norm 1, fused AdamW. Both end with the loss as a
number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llava_shapes import model_json, transformers_config
from training_work import TRAINED, make_work, transformers_inputs

from mindspeed_mm.data.sample import Batch

LEARNING_RATE = 1e-6
"""So small that all rounds see the same weights and their losses can be compared."""
MIB = 2**20


class TrainedJob(NamedTuple):
    """What a side trains."""

    kind: str
    size: str
    device: str
    bf16: bool
    batch: int
    steps: int
    threads: int
    weights: str | None
    recompute: bool
    mode: str = "full"
    """full; lora: adapters of the decoder's linears and the projector; qlora: the decoder's linears in NF4 besides."""


LORA = {"r": 16, "alpha": 32.0, "target_modules": "all-linear"}
"""The decoder's adapters, on both sides."""


def our_model(job: TrainedJob) -> dict[str, Any]:
    """The model.json of a job."""
    model = model_json(job.size, TRAINED[job.kind], job.weights, job.recompute)
    if job.mode != "full":
        model["text_decoder"]["lora"] = LORA
    if job.mode == "qlora":
        model["text_decoder"] |= {"quantize": "nf4", "double_quant": True}
    return model


class OurTraining:
    """The driver's training step."""

    @staticmethod
    def load_libraries(device: str) -> None:
        """Import what the side needs, so that memory can be counted from there on."""
        from mindspeed_mm.platform import get_platform

        get_platform(device)
        from megatron.driver import loop, setup  # noqa: F401
        from mindspeed_mm.models import build  # noqa: F401

    def __init__(self, job: TrainedJob) -> None:
        import argparse

        from mindspeed_mm.platform import get_platform

        self.platform = get_platform(job.device)
        from megatron.driver import arguments, initialize, loop, setup
        from megatron.driver.state import BatchFacts, Hooks
        from mindspeed_mm.models.build import build_vlm
        from mindspeed_mm.models.runtime import Runtime
        from mindspeed_mm.models.spec import load_model_spec
        from mindspeed_mm.objectives.sft import OBJECTIVE
        from mindspeed_mm.trainer.flops import batch_flops

        parser = argparse.ArgumentParser()
        arguments.add_arguments(parser)
        flags = "--micro-batch-size 1 --global-batch-size 1 --seq-length 4096 --train-iters 1000000"
        flags += f" --lr {LEARNING_RATE} --lr-decay-style constant --weight-decay 0 --clip-grad 1"
        flags += " --bf16" if job.bf16 else ""
        args = arguments.from_namespace(parser.parse_args(flags.split()), world_size=1)
        spec = load_model_spec(our_model(job))
        initialize.initialize(args, self.platform)
        runtime = Runtime(params_dtype=torch.bfloat16 if job.bf16 else torch.float32)

        def provide(pre_process: bool, post_process: bool):
            device = self.platform.device()
            return build_vlm(spec, runtime, device, pre_process=pre_process, post_process=post_process)[0]

        def describe(batch: Batch) -> BatchFacts:
            flops = batch_flops(spec, batch)
            return BatchFacts(batch.sample_ids, batch.tokens, batch.supervised, batch.input_ids.numel(), flops)

        hooks = Hooks(describe)
        self.state = setup.setup(args, provide, self.platform, hooks)

        def step(batch: Batch) -> float:
            once = dataclasses.replace(args, train_iters=self.state.iteration + 1)
            return loop.train(self.state, once, OBJECTIVE.forward_step, iter([batch]), hooks).loss

        self.step = step

    def prepare(self, batch: Batch) -> Batch:
        """The driver moves batches by itself."""
        return batch


class TheirTraining:
    """transformers' LlavaForConditionalGeneration; with bf16 what is trained is float32 and autocast, as in Trainer."""

    @staticmethod
    def load_libraries(_device: str) -> None:
        """Import what the side needs, so that memory can be counted from there on."""
        from transformers import LlavaForConditionalGeneration  # noqa: F401

    def __init__(self, job: TrainedJob) -> None:
        import transformers

        self.job, self.device = job, torch.device(job.device)
        model = self._loaded(transformers.LlavaForConditionalGeneration)
        self.model = (self._adapted(model) if job.mode != "full" else self._opened(model)).train()
        if job.recompute:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def _loaded(self, kind: Any) -> torch.nn.Module:
        if not self.job.weights:
            with self.device:
                return kind(transformers_config(self.job.size))
        if self.job.mode != "qlora":
            return kind.from_pretrained(self.job.weights, dtype=torch.float32).to(self.device)
        from transformers import BitsAndBytesConfig

        compute = torch.bfloat16 if self.job.bf16 else torch.float32
        stored = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
        )
        place = {"": self.device.type}
        return kind.from_pretrained(self.job.weights, dtype=compute, quantization_config=stored, device_map=place)

    def _opened(self, model: torch.nn.Module) -> torch.nn.Module:
        """Train what the job says, whole."""
        names = {"text_decoder": "language_model", "vision_projector": "multi_modal_projector"}
        trained = [names[part] for part in TRAINED[self.job.kind]]
        trained += ["lm_head"] if "text_decoder" in TRAINED[self.job.kind] else []
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in trained))
        return self._narrowed(model)

    def _adapted(self, model: torch.nn.Module) -> torch.nn.Module:
        """PEFT's adapters of the decoder, and the projector."""
        import peft

        targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        config = peft.LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=targets)
        model = peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "multi_modal_projector" in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        return self._narrowed(model)

    def _narrowed(self, model: torch.nn.Module) -> torch.nn.Module:
        """With --bf16 what is frozen is bf16."""
        for parameter in model.parameters():
            if self.job.bf16 and not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
        return model

    def prepare(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Inputs on the host."""
        return transformers_inputs(batch, self.job.size)

    def step(self, inputs: dict[str, torch.Tensor]) -> float:
        """One optimizer step; the loss."""
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        context = torch.autocast(self.device.type, torch.bfloat16) if self.job.bf16 else contextlib.nullcontext()
        with context:
            loss = self.model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


SIDES = {"ours": OurTraining, "transformers": TheirTraining}


def resident() -> tuple[float, float]:
    """(now, highest since `reset_peak`) of this process' memory in MiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    now, peak = (int(re.search(rf"{name}:\s+(\d+) kB", status).group(1)) / 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def reset_peak() -> None:
    """Begin to measure the highest resident memory anew (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _serve(pipe: Connection, name: str, job: TrainedJob) -> None:
    """Answer "round" with [(seconds, loss)] of each step, and "memory" with peak MiB over what a bare process has."""
    torch.set_num_threads(job.threads)
    work = make_work(job.kind, job.size, job.batch, job.steps)
    batches = work.ours if name == "ours" else work.padded
    SIDES[name].load_libraries(job.device)
    gc.collect()
    base = resident()[0]
    side = SIDES[name](job)
    prepared = [side.prepare(batch) for batch in batches]
    reset_peak()
    cuda = job.device == "cuda"
    pipe.send("ready")
    for order in iter(pipe.recv, "end"):
        if order == "memory":
            pipe.send(torch.cuda.max_memory_allocated() / MIB if cuda else resident()[1] - base)
            continue
        steps: list[tuple[float, float]] = []
        for batch in prepared:
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            loss = side.step(batch)
            if cuda:
                torch.cuda.synchronize()
            steps.append((time.perf_counter() - start, loss))
        pipe.send(steps)


class Side:
    """A side in its own process."""

    def __init__(self, name: str, job: Any, serve: Callable[..., None] = _serve) -> None:
        """`serve(pipe, name, job)` runs there: it sends when it is ready, and answers orders until "end"."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        os.environ["OMP_NUM_THREADS"] = str(job.threads)
        self._process = context.Process(target=serve, args=(theirs, name, job), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def ask(self, order: str) -> Any:
        """The answer to "round" or "memory"."""
        self._pipe.send(order)
        return self._pipe.recv()

    def end(self) -> None:
        """Give its memory back."""
        self._pipe.send("end")
        self._process.join()
