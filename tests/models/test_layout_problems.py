"""Parallel layouts that a model cannot have, and uneven splits of layers."""

import pytest

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.spec import load_model_spec
from mindspeed_mm.platform import get_platform

get_platform("cpu")

from mindspeed_mm.models.parallel import layout_problems, stage_layers  # noqa: E402
from mindspeed_mm.models.runtime import Runtime  # noqa: E402

TEXT = {
    "num_layers": 6,
    "hidden_size": 96,
    "num_attention_heads": 12,
    "num_query_groups": 4,
    "ffn_hidden_size": 192,
    "language_vocab_size": 100,
    "fresh": True,
}
VISION_ENCODER = {"num_layers": 4, "hidden_size": 128, "patch_size": 14, "image_size": 56, "num_attention_heads": 4}


def spec(text=None, vision_encoder=None):
    return load_model_spec(
        {
            "text_decoder": TEXT | (text or {}),
            "image_encoder": {
                "vision_encoder": VISION_ENCODER | {"fresh": True} | (vision_encoder or {}),
                "vision_projector": {"input_size": 128, "hidden_size": 96},
            },
        }
    )


def problems(text=None, vision_encoder=None, tp=1, pp=1, cp=1, virtual=None):
    runtime = Runtime(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=cp,
    )
    return "\n".join(layout_problems(spec(text, vision_encoder), runtime))


FULL = {"recompute_granularity": "full"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tp": 8}, "text_decoder.num_attention_heads 12 cannot be split over --tensor-model-parallel-size 8"),
        (
            {"tp": 6},
            "num_query_groups 4 cannot be split over --tensor-model-parallel-size 6: use a divisor of the query",
        ),
        ({"tp": 6}, "vision_encoder.num_attention_heads 4 cannot be split over --tensor-model-parallel-size 6"),
        ({"tp": 4, "text": {"ffn_hidden_size": 190}}, "text_decoder.ffn_hidden_size 190 cannot be split"),
        (
            {"tp": 2, "cp": 4},
            "heads 12 cannot be split over --tensor-model-parallel-size 2 x --context-parallel-size 4 = 8",
        ),
        ({"pp": 4}, r"num_layers 6 cannot be divided by --pipeline-model-parallel-size 4.*\[1, 1, 2, 2\]"),
        ({"pp": 8}, r"num_layers 6 cannot be divided by --pipeline-model-parallel-size 8: use fewer stages"),
        (
            {"pp": 2, "virtual": 2},
            r"num_layers 6 .*-size 2 x 2 virtual stages = 4: use a divisor, .* example \[\[1, 1\], \[2, 2\]\]",
        ),
        (
            {"pp": 2, "text": {"pipeline_num_layers": [2, 2, 2]}},
            r"text_decoder.pipeline_num_layers \[2, 2, 2\] does not fit: expected a list of 2 number\(s\), one for",
        ),
        (
            {"pp": 2, "text": {"pipeline_num_layers": [[2, 1], [2, 1]]}},
            r"\[\[2, 1\], \[2, 1\]\] does not fit: expected a list of 2 number",
        ),
        (
            {"pp": 2, "virtual": 2, "text": {"pipeline_num_layers": [3, 3]}},
            r"\[3, 3\] does not fit: expected 2 lists of 2 numbers, one list for each virtual stage",
        ),
        (
            {"pp": 2, "vision_encoder": {"pipeline_num_layers": [4, 0, 0]}},
            r"vision_encoder.pipeline_num_layers \[4, 0, 0\] does not fit: expected a list of 2",
        ),
        (
            {"pp": 2, "virtual": 3, "text": FULL | {"recompute_method": "uniform", "recompute_num_layers": 2}},
            r"recompute_num_layers 2 does not divide the \[1\] layers of a stage",
        ),
        ({"text": FULL}, 'text_decoder.recompute_granularity "full" needs recompute_method'),
        (
            {"vision_encoder": {"recompute_num_layers": 1}},
            'vision_encoder.recompute_method .* belong to recompute_granularity "full"',
        ),
        (
            {"pp": 2, "text": FULL | {"recompute_method": "uniform", "recompute_num_layers": 2}},
            r"recompute_num_layers 2 does not divide the \[3\] layers of a stage",
        ),
    ],
)
def test_refused_with_the_reason(given, message):
    import re

    assert re.search(message, problems(**given)), problems(**given)


@pytest.mark.parametrize(
    "given", [{}, {"tp": 4}, {"pp": 3}, {"tp": 2, "cp": 3}, {"tp": 4, "pp": 2, "cp": 3}, {"pp": 2, "virtual": 3}]
)
def test_accepted(given):
    assert problems(**given) == ""


def test_layers_of_the_stages():
    assert stage_layers(spec().text_decoder, 3) == [2, 2, 2]
    assert stage_layers(spec({"pipeline_num_layers": [0, 2, 4]}).text_decoder, 3) == [0, 2, 4]
    assert stage_layers(spec({"pipeline_num_layers": [[0, 1], [2, 3]]}).text_decoder, 4) == [0, 1, 2, 3]


def test_the_vision_encoder_may_be_named_on_the_first_stage():
    assert problems(vision_encoder={"pipeline_num_layers": [4, 0]}, pp=2) == ""
    layers = {"pipeline_num_layers": [[0, 1], [2, 3]]}
    assert problems(layers, {"pipeline_num_layers": [[4, 0], [0, 0]]}, pp=2, virtual=2) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": {"pipeline_num_layers": [2, 2]}}, r"pipeline_num_layers \[2, 2\] does not share out num_layers 6"),
        ({"text": {"pipeline_num_layers": [6, 0]}}, "only the first stage may have 0"),
        ({"text": {"pipeline_num_layers": [[3, 0], [1, 2]]}}, "only the first stage may have 0"),
        ({"text": {"pipeline_num_layers": [3, -1, 4]}}, r"found \[3, -1, 4\], expected the number of layers of each"),
        ({"text": {"pipeline_num_layers": [[3], [1, 2]]}}, r"found \[\[3\], \[1, 2\]\], .* all of one length"),
        ({"text": {"pipeline_num_layers": [[3, 3], 0]}}, r"found \[\[3, 3\], 0\], expected"),
        ({"vision_encoder": {"pipeline_num_layers": []}}, r"found \[\], expected the number of layers"),
        ({"text": {"pipeline_num_layers": "3,3"}}, "pipeline_num_layers: found .*valid array"),
        (
            {"vision_encoder": {"pipeline_num_layers": [2, 2]}},
            r"spreads the vision encoder, which .* as a whole.* expected \[4, 0\]",
        ),
    ],
)
def test_splits_that_contradict_the_spec(changes, message):
    with pytest.raises(ConfigError, match=message):
        spec(**changes)
