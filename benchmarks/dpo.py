"""Preference training with LoRA: this suite's step and TRL's DPOTrainer with PEFT, same weights, same pairs.

    python benchmarks/dpo.py --out benchmarks/results/dpo_cpu.json

A pair has an image, a question of 20 to 60 tokens and two answers, each of 20 to 200: descriptions as HA-DPO's, and
short answers. A third side is ours with two whole sequences a pair, which shows what the shared prompt saves. Each side
has a process of its own, and rounds take turns, so that all see the same load of the machine; the first round warms up,
then medians are taken. All compute in float32 with the reference from the model
whose adapter is switched off, without recomputation, and end a step with clipping to norm 1 and AdamW. Memory is the
peak during the steps above what the process had when its libraries were loaded. The losses of all steps are compared.
On a machine that others use, processor seconds of a single thread say more than seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import random
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from llava_shapes import IMAGE_SIZE, IMAGE_TOKENS, SHAPES, model_json, save_model, transformers_config
from report import machine, write
from training_sides import Side, reset_peak, resident

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.sample import Encoded
from mindspeed_mm.models.media import Media

FIRST_WORD = 10
LEARNING_RATE = 1e-4
LOSS_TOLERANCE = 1e-4
LORA = {"r": 16, "alpha": 32, "target_modules": "all-linear"}
NAMES = ("trl", "ours", "separate")


class PairJob(NamedTuple):
    """What both sides train."""

    size: str
    batch: int
    """Pairs of an optimizer step."""
    steps: int
    """Of a round."""
    threads: int
    folder: str
    """Holds the weights and the adapter."""


def make_pairs(job: PairJob) -> list[list[Encoded]]:
    """The pairs of each step of a round."""
    draw = random.Random("pairs")
    samples = [_pair(number, job.size, draw) for number in range(job.batch * job.steps)]
    return [samples[start : start + job.batch] for start in range(0, len(samples), job.batch)]


def _pair(number: int, size: str, draw: random.Random) -> Encoded:
    def words(low: int, high: int) -> list[int]:
        return [draw.randrange(FIRST_WORD, SHAPES[size].image_token_id) for _ in range(draw.randint(low, high))]

    prompt = [1, *[IMAGE_TOKEN_INDEX] * IMAGE_TOKENS, *words(20, 60)]
    answers = [words(20, 200) for _ in range(2)]
    ids, labels = prompt[:-1], [IGNORE_INDEX] * (len(prompt) - 1)
    for answer in answers:
        ids, labels = [*ids, prompt[-1], *answer], [*labels, IGNORE_INDEX, *answer]
    image = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(number))
    branches = (len(prompt) - 1, 1 + len(answers[0]), 1 + len(answers[1]))
    return Encoded(f"pair-{number}", ids, labels, (Media.of_images(image),), branches=branches)


class OurPairs:
    """The driver's training step with the objective dpo."""

    @staticmethod
    def load_libraries() -> None:
        """Import what the side needs, so that memory can be counted from there on."""
        from mindspeed_mm.platform import get_platform

        get_platform("cpu")
        from megatron.driver import loop, setup  # noqa: F401
        from mindspeed_mm.models import build  # noqa: F401
        from mindspeed_mm.objectives import dpo  # noqa: F401
        from mindspeed_mm.trainer import reference  # noqa: F401

    def __init__(self, job: PairJob) -> None:
        from mindspeed_mm.platform import get_platform

        platform = get_platform("cpu")
        from megatron.driver import arguments, initialize, loop, setup
        from megatron.driver.state import Hooks
        from mindspeed_mm.models.build import build_vlm
        from mindspeed_mm.models.runtime import Runtime
        from mindspeed_mm.models.spec import load_model_spec
        from mindspeed_mm.objectives.dpo import OBJECTIVE
        from mindspeed_mm.trainer.reference import ReferenceModel

        parser = argparse.ArgumentParser()
        arguments.add_arguments(parser)
        flags = "--micro-batch-size 1 --global-batch-size 1 --seq-length 4096 --train-iters 1000000"
        flags += f" --lr {LEARNING_RATE} --lr-decay-style constant --weight-decay 0 --clip-grad 1 --log-interval 100000"
        args = arguments.from_namespace(parser.parse_args(flags.split()), world_size=1)
        model = model_json(job.size, ("text_decoder",), job.folder)
        model["text_decoder"]["lora"] = LORA | {"load": f"{job.folder}/adapter"}
        spec, runtime = load_model_spec(model), Runtime()
        initialize.initialize(args, platform)
        inputs = SimpleNamespace(objective=OBJECTIVE, args=args, runtime=runtime, platform=platform, spec=spec)
        hooks = Hooks(prepare=ReferenceModel(inputs).prepare, loss_name=OBJECTIVE.loss_name, metrics=OBJECTIVE.metrics)
        state = setup.setup(args, lambda *_: build_vlm(spec, runtime, platform.device())[0], platform, hooks)
        collate = Collator(0)

        def step(samples: list[Encoded]) -> float:
            once = dataclasses.replace(args, train_iters=state.iteration + 1)
            return loop.train(state, once, OBJECTIVE.forward_step, iter([collate(samples)]), hooks).loss

        self.step = step


class OurSeparatePairs(OurPairs):
    """The same with nothing shared: prompt and image once for each answer."""

    def __init__(self, job: PairJob) -> None:
        super().__init__(job)
        shared = self.step
        self.step = lambda samples: shared([separate(sample) for sample in samples])


def separate(sample: Encoded) -> Encoded:
    """A pair whose answers each have the prompt and the image before them."""
    shared, first, second = sample.branches
    end = shared + first
    whole = {
        key: getattr(sample, key)[:end] + getattr(sample, key)[:shared] + getattr(sample, key)[end:]
        for key in ("input_ids", "labels")
    }
    return dataclasses.replace(sample, **whole, media=sample.media * 2, branches=(0, end, shared + second))


class TheirPairs:
    """DPOTrainer's loss, as its Trainer runs it in a step."""

    @staticmethod
    def load_libraries() -> None:
        """Import what the side needs, so that memory can be counted from there on."""
        import peft  # noqa: F401
        import trl  # noqa: F401
        from transformers import LlavaForConditionalGeneration  # noqa: F401

        trl.DPOTrainer  # noqa: B018 - the library loads it when it is named

    def __init__(self, job: PairJob) -> None:
        import datasets
        import peft
        import transformers
        import trl

        base = transformers.LlavaForConditionalGeneration.from_pretrained(job.folder, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, f"{job.folder}/adapter", is_trainable=True)
        config = trl.DPOConfig(
            output_dir=f"{job.folder}/trl",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            max_length=None,
        )
        rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        self._trainer = trl.DPOTrainer(
            model=model, args=config, train_dataset=rows, processing_class=_word_tokenizer(), data_collator=lambda x: x
        )
        self._model = self._trainer.model.train()
        self._image_id = SHAPES[job.size].image_token_id
        self._trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(self, samples: list[Encoded]) -> float:
        """One optimizer step; the loss."""
        loss = self._trainer.compute_loss(self._model, collated(samples, self._image_id))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()


def _word_tokenizer():
    """A tokenizer that the trainer asks for and whose ids are not used."""
    import transformers
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


def collated(samples: list[Encoded], image_id: int) -> dict[str, torch.Tensor]:
    """A batch as TRL's collator for images makes it: chosen conversations, then rejected ones, padded to one length."""
    rows = []
    for side in (0, 1):
        for sample in samples:
            shared, first, _ = sample.branches
            end = slice(shared + first, None) if side else slice(shared, shared + first)
            rows.append((sample.input_ids[:shared] + sample.input_ids[end], len(sample.input_ids[end]) - 1))
    longest = max(len(ids) for ids, _ in rows)
    batch = {name: torch.zeros(len(rows), longest, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    batch["completion_mask"] = torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, (ids, answer) in enumerate(rows):
        batch["input_ids"][number, : len(ids)] = torch.tensor([image_id if x == IMAGE_TOKEN_INDEX else x for x in ids])
        batch["attention_mask"][number, : len(ids)] = 1
        batch["completion_mask"][number, len(ids) - answer : len(ids)] = 1
    pixels = [item.pixels for sample in samples for item in sample.media]
    return batch | {"pixel_values": torch.cat(pixels * 2)}


SIDES = {"ours": OurPairs, "trl": TheirPairs, "separate": OurSeparatePairs}


def _serve(pipe: Connection, name: str, job: PairJob) -> None:
    """Answer "round" with [(seconds, loss, processor seconds)] of each step, and "memory" with the peak in MiB over
    what a bare process has."""
    torch.set_num_threads(job.threads)
    work = make_pairs(job)
    SIDES[name].load_libraries()
    gc.collect()
    base = resident()[0]
    side = SIDES[name](job)
    reset_peak()
    pipe.send("ready")
    for order in iter(pipe.recv, "end"):
        if order == "memory":
            pipe.send({"peak_mib": resident()[1] - base, "libraries_mib": base})
            continue
        steps = []
        for samples in work:
            start, busy = time.perf_counter(), time.process_time()
            loss = side.step(samples)
            steps.append((time.perf_counter() - start, loss, time.process_time() - busy))
        pipe.send(steps)


def save_adapter(job: PairJob) -> None:
    """The fresh adapter that both sides begin with."""
    import peft
    import transformers

    torch.manual_seed(3)
    base = transformers.LlavaForConditionalGeneration(transformers_config(job.size))
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    config = peft.LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=rf".*language_model.*({names})")
    peft.get_peft_model(base, config).save_pretrained(Path(job.folder) / "adapter")


def measure(job: PairJob, repeats: int) -> dict[str, Any]:
    """Medians of all sides and their ratios."""
    sides = {name: Side(name, job, _serve) for name in NAMES}
    rounds: dict[str, list] = {name: [] for name in NAMES}
    for _ in range(repeats + 1):
        for name, side in sides.items():
            rounds[name].append(side.ask("round"))
    losses = [[loss for steps in rounds[name] for _, loss, _ in steps] for name in NAMES]
    difference = max(max(step) - min(step) for step in zip(*losses, strict=True))
    if difference > LOSS_TOLERANCE:
        raise ValueError(f"the losses differ by {difference:.1e}: the sides do not do the same work")
    work = [sample for samples in make_pairs(job) for sample in samples]
    result: dict[str, Any] = {
        "pairs": len(work),
        "positions": {
            "ours": sum(len(sample.input_ids) for sample in work),
            "trl": sum(collated(samples, 0)["input_ids"].numel() for samples in make_pairs(job)),
            "separate": sum(len(separate(sample).input_ids) for sample in work),
        },
        "loss_difference": difference,
        "losses": losses[1],
    }
    seconds = {name: [sum(step[0] for step in steps) for steps in kept[1:]] for name, kept in rounds.items()}
    busy = {name: [sum(step[2] for step in steps) for steps in kept[1:]] for name, kept in rounds.items()}
    for name, side in sides.items():
        typical = statistics.median(seconds[name])
        result[name] = {"pairs_per_s": len(work) / typical, "seconds": seconds[name], **side.ask("memory")}
        result[name]["processor_seconds"] = busy[name]
        side.end()
    ratios = [theirs / ours for theirs, ours in zip(seconds["trl"], seconds["ours"], strict=True)]
    result["speedup"] = statistics.median(seconds["trl"]) / statistics.median(seconds["ours"])
    result["speedup_range"] = [min(ratios), max(ratios)]
    result["processor_speedup"] = statistics.median(busy["trl"]) / statistics.median(busy["ours"])
    result["memory_ratio"] = result["ours"]["peak_mib"] / result["trl"]["peak_mib"]
    result["shared_prompt"] = {
        "speedup": statistics.median(seconds["separate"]) / statistics.median(seconds["ours"]),
        "processor_speedup": statistics.median(busy["separate"]) / statistics.median(busy["ours"]),
        "memory_ratio": result["ours"]["peak_mib"] / result["separate"]["peak_mib"],
    }
    return result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[size for size in SHAPES if size != "7b"], default="small")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--repeats", type=int, default=4, help="rounds after the first")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", metavar="JSON", help="default: stdout")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    results: dict[str, Any] = {"settings": vars(args) | machine()}
    with tempfile.TemporaryDirectory() as folder:
        job = PairJob(args.size, args.batch, args.steps, args.threads, folder)
        save_model(args.size, folder)
        save_adapter(job)
        found = results["dpo"] = measure(job, args.repeats)
    sys.stderr.write(
        f"{found['ours']['pairs_per_s']:.2f} pairs/s, TRL {found['trl']['pairs_per_s']:.2f}: {found['speedup']:.2f}x; "
        f"peak {found['ours']['peak_mib']:.0f} MiB, {found['trl']['peak_mib']:.0f}: {found['memory_ratio']:.2f}x\n"
        f"shared prompt against two sequences: {found['shared_prompt']['speedup']:.2f}x, peak "
        f"{found['shared_prompt']['memory_ratio']:.2f}x\n"
    )
    write(results, args.out)


if __name__ == "__main__":
    main()
