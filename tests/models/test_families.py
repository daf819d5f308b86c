"""What families refuse, and how they find their parts."""

import pytest

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.part import part_for_model_type
from mindspeed_mm.models.spec import find_family, load_model_spec
from tests.helpers.golden_model import model_json

PIPELINE = {"size": {"shortest_edge": 56}, "crop_size": 56}


def test_an_image_processor_of_other_sizes_is_refused(golden):
    spec = load_model_spec(model_json(golden))
    assert spec.family.media_processor(spec, PIPELINE).fixed.count == 16
    with pytest.raises(ConfigError, match="images of different sizes .no centre crop"):
        spec.family.media_processor(spec, {"do_center_crop": False})
    with pytest.raises(ConfigError, match="gives 28 x 28 pixels, the vision encoder takes 56 x 56"):
        spec.family.media_processor(spec, {"size": {"shortest_edge": 28}, "crop_size": 28})


def test_inputs_that_a_family_does_not_take_are_refused(golden):
    import torch

    spec = load_model_spec(model_json(golden))
    with pytest.raises(
        ConfigError, match="model_id llava takes the inputs pixel_values, mm_token_type_ids; found image_grid_thw"
    ):
        spec.family.media_of_inputs(spec, {"image_grid_thw": torch.ones(1, 3)})
    with pytest.raises(ConfigError, match=r"pixel_values have shape \[1, 3, 8, 8\]; expected \[images, 3, 56, 56\]"):
        spec.family.media_of_inputs(spec, {"pixel_values": torch.ones(1, 3, 8, 8)})
    assert spec.family.media_of_inputs(spec, {}) is None


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match='unknown model_id "lava"; did you mean "llava"'):
        find_family("lava")
    with pytest.raises(ConfigError, match='no text_decoder here reads model_type "lama"; the nearest are llama'):
        part_for_model_type("text_decoder", "lama")
