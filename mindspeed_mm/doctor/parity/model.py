"""A tiny model with images: its layers, loss and gradients, a trajectory, what is saved and resumed, and generation."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.sample import Batch, Encoded
from mindspeed_mm.doctor.parity.operators import Values, drawn
from mindspeed_mm.models.media import Features, Media
from mindspeed_mm.platform import Platform

VOCABULARY = 160
IMAGE_TOKENS = 4
SIDE = 28
STEPS = 20
RESUME_AT = 3
RESUMED_TO = 5
COARSE = (
    "--lr 0.05 --weight-decay 2 --adam-beta1 0.6 --adam-beta2 0.8 --adam-eps 1e-2 --clip-grad 0.1 --micro-batch-size 1"
)
"""AdamW each of whose numbers shows in the weights at once: with the usual ones a lost weight decay or another eps
moves them less than a trajectory may differ. The samples of a step are micro-batches whose gradients add up."""

COARSE_STEPS = 3
LENGTHS = ((21, 33), (17, 26))
"""Tokens of the samples of a step: rows of different lengths, so that padding and packing take part."""

MODEL = {
    "text_decoder": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 96,
        "language_vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "fresh": True,
        "freeze": False,
    },
    "image_encoder": {
        "vision_encoder": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "ffn_hidden_size": 48,
            "patch_size": 14,
            "image_size": SIDE,
            "fresh": True,
            "freeze": False,
        },
        "vision_projector": {"input_size": 32, "hidden_size": 64, "fresh": True, "freeze": False},
    },
}

PROMPTS = ([1, *[IMAGE_TOKEN_INDEX] * IMAGE_TOKENS, 17, 23, 31], [1, 44, 52, 61, 70, 81, 92, 99, 104, 113, 121])
FORCED = ((5, 9), (33, 41), (77, 12), (90, 3))
"""Tokens that both answers go on with, whatever the model would have chosen."""


def build(platform: Platform, dtype: torch.dtype) -> torch.nn.Module:
    """The model on the CPU, with the same weights everywhere."""
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.models.spec import load_model_spec

    vlm, _ = build_vlm(load_model_spec(MODEL), Runtime(params_dtype=dtype), torch.device("cpu"))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for _, parameter in sorted(vlm.named_parameters()):
            values = drawn(tuple(parameter.shape), generator) * 0.125
            parameter.copy_((values + 1).bfloat16() if parameter.dim() == 1 else values)
    return vlm


def samples(step: int) -> list[Encoded]:
    """The samples of a step, an image in each."""
    found = []
    for number, length in enumerate(LENGTHS[step % len(LENGTHS)]):
        generator = torch.Generator().manual_seed(100 * step + number)
        text = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        ids = [1, *[IMAGE_TOKEN_INDEX] * IMAGE_TOKENS, *text]
        labels = [IGNORE_INDEX] * (IMAGE_TOKENS + 6) + text[5:]
        image = Media.of_images(drawn((1, 3, SIDE, SIDE), generator))
        found.append(Encoded(f"{step}.{number}", ids, labels, (image,)))
    return found


def batches(first: int, together: bool = True) -> Iterator[Batch]:
    """The micro-batches of each step from `first` on: its samples together, or each alone."""
    collate = Collator(0)
    while True:
        found = samples(first)
        yield from [collate(found)] if together else [collate([sample]) for sample in found]
        first += 1


def layers(platform: Platform, dtype: torch.dtype) -> Values:
    """What each layer and part gives, the losses of the tokens, and the gradient of every weight."""
    from mindspeed_mm.objectives.sft import OBJECTIVE

    vlm = build(platform, dtype).to(platform.device()).train()
    found: Values = {}
    decoder, encoder = vlm.text_decoder.decoder, vlm.image_encoder.encoder.decoder
    named = [(f"text_decoder layer {n}", layer) for n, layer in enumerate(decoder.layers)]
    named += [(f"vision_encoder layer {n}", layer) for n, layer in enumerate(encoder.layers)]
    named.append(("vision_projector", vlm.image_encoder.projector))
    hooks = [layer.register_forward_hook(functools.partial(_keep, found, name)) for name, layer in named]
    losses, _ = OBJECTIVE.forward(next(batches(0)), vlm)
    for hook in hooks:
        hook.remove()
    losses.mean().backward()
    found["loss: of each token"] = losses.detach().float().cpu()
    for name, parameter in vlm.named_parameters():
        if parameter.grad is not None:
            found[f"gradient: {name}"] = parameter.grad.float().cpu()
    return found


def _keep(found: Values, name: str, _module: torch.nn.Module, _inputs: Any, output: Any) -> None:
    output = output[0] if isinstance(output, tuple) else output.values if isinstance(output, Features) else output
    found[f"layer: {name}"] = output.detach().float().cpu()


def trajectory(platform: Platform, dtype: torch.dtype) -> Values:
    """Losses and gradient norms of STEPS steps through the driver, and the weights behind them."""
    losses, norms, _, weights = _train(platform, dtype, STEPS)
    found = {"trajectory: losses": losses, "trajectory: gradient norms": norms}
    return found | {f"trajectory: weights: {name}": value for name, value in weights.items()}


def optimized(platform: Platform, dtype: torch.dtype) -> Values:
    """What COARSE_STEPS of the optimizer changed in the weights."""
    _, _, start, weights = _train(platform, dtype, COARSE_STEPS, COARSE)
    return {f"optimizer: change of {name}": value - start[name] for name, value in weights.items()}


def resumed(platform: Platform, dtype: torch.dtype, folder: Path) -> Values:
    """By how much a run that was saved and resumed differs from one that went on: zeros where it does not."""
    whole, _, _, weights = _train(platform, dtype, RESUMED_TO)
    _train(platform, dtype, RESUME_AT, f"--save {folder}")
    rest, _, _, own = _train(platform, dtype, RESUMED_TO, f"--load {folder}")
    found = {"save and resume: losses": rest - whole[RESUME_AT:]}
    for name, value in weights.items():
        found[f"save and resume: weights: {name}"] = (own[name] - value).norm() / value.norm()
    return found


def _train(platform: Platform, dtype: torch.dtype, steps: int, flags: str = "") -> tuple[Any, ...]:
    """(losses [steps], gradient norms [steps], first and last weights by name) of a run; a resumed one's from its start
    on."""
    from megatron.driver import initialize, loop, setup
    from megatron.driver.checkpoint.saver import Saver
    from megatron.driver.state import Hooks
    from mindspeed_mm.objectives.sft import OBJECTIVE

    initialize.shutdown()
    args = _arguments(dtype, steps, flags)
    initialize.initialize(args, platform)
    try:
        state = setup.setup(args, lambda *_: build(platform, torch.float32), platform)
        data = loop.MeteredIterator(batches(state.iteration, args.micro_batch_size > 1), Hooks().describe)
        start = _weights(state.modules[0])
        losses, norms = [], []
        with loop.StopRequest() as stop, Saver(state, args, Hooks()) as saver:
            while state.iteration < steps:
                metrics, _ = loop.train_step(state, args, OBJECTIVE.forward_step, data, stop, saver)
                losses.append(metrics.loss)
                norms.append(metrics.grad_norm)
            if args.save is not None:
                saver.save()
                saver.wait()
        return torch.tensor(losses), torch.tensor(norms), start, _weights(state.modules[0])
    finally:
        initialize.shutdown()


def _weights(module: torch.nn.Module) -> Values:
    """Copies of all weights, by name."""
    return {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in module.named_parameters()}


def _arguments(dtype: torch.dtype, steps: int, flags: str):
    from megatron.driver import arguments

    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    line = (
        f"--lr 1e-3 --lr-decay-style constant --train-iters {steps} --micro-batch-size 2 --global-batch-size 2 "
        f"--seq-length 128 --clip-grad 1.0 --weight-decay 0.1 {flags}"
    )
    words = line.split() + (["--bf16"] if dtype == torch.bfloat16 else [])
    return arguments.from_namespace(parser.parse_args(words), world_size=1)


@torch.inference_mode()
def generation(platform: Platform, dtype: torch.dtype) -> Values:
    """Logits of two prompts of different lengths, and of the tokens that they go on with."""
    from mindspeed_mm.generation.decode import Decoder

    decoder = Decoder(build(platform, dtype).to(platform.device()).eval())
    image = Media.of_images(drawn((1, 3, SIDE, SIDE), torch.Generator().manual_seed(3)))
    lengths = [len(prompt) for prompt in PROMPTS]
    decoder.cache.reserve(len(PROMPTS), max(lengths) + len(FORCED))
    features = [item.projected for item in decoder.image_features([image])]
    logits = [decoder.prefill(PROMPTS, features, 0)]
    for number, tokens in enumerate(FORCED):
        logits.append(decoder.step(list(tokens), [length + number for length in lengths]))
    return {f"generation: logits of token {n}": each.float().cpu() for n, each in enumerate(logits)}
