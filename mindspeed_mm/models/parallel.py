"""How a model's layers and heads are shared between ranks, and which layouts a model cannot have.

Letters: T tensor-, P pipeline-, C context-parallel size.
"""

from __future__ import annotations

from mindspeed_mm.models.part import StageLayers, flat_layers
from mindspeed_mm.models.runtime import Runtime
from mindspeed_mm.models.spec import ModelSpec


def stage_layers(spec, stages: int) -> list[int]:
    """Layers of the text decoder on each of `stages` pipeline stages: `pipeline_num_layers`, else equal shares.

    With virtual stages, `stages` counts all of them, and they come in the order in which a batch passes them.
    """
    return flat_layers(spec.pipeline_num_layers or [spec.num_layers // stages] * stages)


def layout_problems(spec: ModelSpec, runtime: Runtime) -> list[str]:
    """One sentence for each reason why `spec` cannot be spread as `runtime` says; empty where it can."""
    problems = [*_head_problems(spec, runtime), *_stage_problems(spec, runtime)]
    problems += [] if problems else _recompute_problems(spec, runtime)
    size = runtime.tensor_model_parallel_size
    for kind, part in spec.part_specs().items():
        if part.ffn_hidden_size % size:
            problems.append(
                f"{kind}.ffn_hidden_size {part.ffn_hidden_size} cannot be split over --tensor-model-parallel-size "
                f"{size}: use a divisor"
            )
    return [*problems, *_interaction_problems(spec, runtime)]


def _interaction_problems(spec: ModelSpec, runtime: Runtime) -> list[str]:
    """An interaction stands on the last stage. Features travel there, their gradients would not come back."""
    own = spec.interaction
    if own is None or not own.cross_attention or runtime.pipeline_model_parallel_size == 1:
        return []
    makers = ("vision_encoder", "vision_projector")[: 2 if own.features == "vision_projector" else 1]
    return [
        f"image_encoder.{kind} is trained, and an interaction looks at its features over "
        f"--pipeline-model-parallel-size {runtime.pipeline_model_parallel_size}, which takes no gradient back: freeze "
        "it, or use 1 stage"
        for kind in makers
        if spec.part(kind).trains
    ]


def _head_problems(spec: ModelSpec, runtime: Runtime) -> list[str]:
    problems = []
    size, slices = runtime.tensor_model_parallel_size, runtime.context_parallel_size
    for kind, part in spec.part_specs().items():
        if getattr(part, "num_query_groups", None) is None:
            continue  # a projector without attention
        if part.num_attention_heads % size:
            problems.append(
                f"{kind}.num_attention_heads {part.num_attention_heads} cannot be split over "
                f"--tensor-model-parallel-size {size}: use a divisor"
            )
        elif part.num_query_groups % size:
            problems.append(
                f"{kind}.num_query_groups {part.num_query_groups} cannot be split over --tensor-model-parallel-size "
                f"{size}: use a divisor of the query groups"
            )
    readers = {"text_decoder": spec.text_decoder}
    if spec.interaction is not None and spec.interaction.self_attention:
        readers["interaction"] = spec.interaction
    for kind, part in readers.items():
        heads = part.num_attention_heads
        if slices > 1 and heads % size == 0 and heads % (size * slices):
            problems.append(
                f"{kind}.num_attention_heads {heads} cannot be split over --tensor-model-parallel-size {size} x "
                f"--context-parallel-size {slices} = {size * slices}: context parallelism exchanges heads for "
                "sequence, so that each rank attends with its share of the heads; lower one of them"
            )
    cross = getattr(spec.text_decoder, "cross_attention", None)
    if cross is not None and cross.num_attention_heads % size:
        problems.append(
            f"text_decoder.cross_attention.num_attention_heads {cross.num_attention_heads} cannot be split over "
            f"--tensor-model-parallel-size {size}: use a divisor"
        )
    return problems


def _recompute_problems(spec: ModelSpec, runtime: Runtime) -> list[str]:
    """megatron.core's rules for recompute_*, and layers that its uniform method cannot group."""
    problems = []
    decoder_layers = set(stage_layers(spec.text_decoder, runtime.stages)) - {0}
    for kind, layers in (("text_decoder", decoder_layers), ("vision_encoder", {spec.vision_encoder.num_built_layers})):
        part = spec.part(kind)
        granularity, method, number = part.recompute_granularity, part.recompute_method, part.recompute_num_layers
        if granularity == "full" and (method is None or number is None):
            problems.append(f'{kind}.recompute_granularity "full" needs recompute_method and recompute_num_layers')
        elif granularity != "full" and (method is not None or number is not None):
            problems.append(
                f"{kind}.recompute_method and recompute_num_layers belong to recompute_granularity "
                f'"full", found {granularity!r}: remove them or set it'
            )
        elif method == "uniform" and any(count % number for count in layers):
            problems.append(
                f"{kind}.recompute_num_layers {number} does not divide the {sorted(layers)} layers of a stage: "
                'use a divisor, or recompute_method "block"'
            )
    return problems


def _stage_problems(spec: ModelSpec, runtime: Runtime) -> list[str]:
    given, layers, stages = spec.text_decoder.pipeline_num_layers, spec.text_decoder.num_layers, runtime.stages
    problems = _form_problems("text_decoder", given, runtime)
    if spec.family.beside_text and runtime.virtual_pipeline_model_parallel_size is not None:
        problems.append(
            "virtual pipeline stages want messages of one length, and the features of images, which go with the hidden "
            f"states of model_id {spec.model_id}, have another one in each micro-batch: leave "
            "--num-layers-per-virtual-pipeline-stage out"
        )
    problems += _form_problems("vision_encoder", spec.vision_encoder.pipeline_num_layers, runtime)
    if given is None and layers % stages:
        shares = [layers // stages + (number < layers % stages) for number in reversed(range(stages))]
        sizes = f"--pipeline-model-parallel-size {runtime.pipeline_model_parallel_size}"
        if runtime.virtual_pipeline_model_parallel_size:
            sizes += f" x {runtime.virtual_pipeline_model_parallel_size} virtual stages = {stages}"
        if layers < stages - 1:
            cure = "use fewer stages"
        else:
            example = _by_virtual_stage(shares, runtime)
            cure = f"use a divisor, or share them unevenly with text_decoder.pipeline_num_layers, for example {example}"
        problems.append(f"text_decoder.num_layers {layers} cannot be divided by {sizes}: {cure}")
    return problems


def _by_virtual_stage(chunks: list[int], runtime: Runtime) -> StageLayers:
    """Layers of all chunks in the form of `pipeline_num_layers`."""
    stages = runtime.pipeline_model_parallel_size
    if runtime.virtual_pipeline_model_parallel_size is None:
        return chunks
    return [chunks[start : start + stages] for start in range(0, len(chunks), stages)]


def _form_problems(kind: str, given: StageLayers | None, runtime: Runtime) -> list[str]:
    """Whether a `pipeline_num_layers` has an entry for each (virtual) stage."""
    if given is None:
        return []
    stages, virtual = runtime.pipeline_model_parallel_size, runtime.virtual_pipeline_model_parallel_size
    if virtual is None:
        if not any(isinstance(entry, list) for entry in given) and len(given) == stages:
            return []
        expected = f"a list of {stages} number(s), one for each stage of --pipeline-model-parallel-size {stages}"
    else:
        if [len(entry) if isinstance(entry, list) else None for entry in given] == [stages] * virtual:
            return []
        expected = (
            f"{virtual} lists of {stages} numbers, one list for each virtual stage with the layers of each stage of "
            f"--pipeline-model-parallel-size {stages}"
        )
    return [f"{kind}.pipeline_num_layers {given} does not fit: expected {expected}; or leave it out"]
