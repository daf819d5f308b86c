"""Noise on word embeddings: that of transformers, in training alone, by each packed sequence's length."""

import math
from types import SimpleNamespace

import pytest
import torch

import mindspeed_mm as mm
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.neftune import with_noise
from mindspeed_mm.models.spec import load_model_spec
from mindspeed_mm.platform.segments import Segments
from tests.helpers.golden_model import model_json


def test_the_noise_of_transformers():
    from transformers.integrations.neftune import neftune_post_forward_hook

    embeddings = torch.randn(1, 23, 18)
    module = SimpleNamespace(training=True, neftune_noise_alpha=5.0)
    torch.manual_seed(4)
    theirs = neftune_post_forward_hook(module, None, embeddings)
    torch.manual_seed(4)
    ours = with_noise(embeddings.transpose(0, 1), 5.0, None).transpose(0, 1)
    torch.testing.assert_close(ours, theirs)


def test_each_packed_sequence_has_its_own_bound():
    segments = Segments.of_lengths([4, 60], torch.device("cpu"))
    noise = with_noise(torch.zeros(64, 1, 32), 3.0, segments)
    for rows, length in ((noise[:4], 4), (noise[4:], 60)):
        bound = 3.0 / math.sqrt(length * 32)
        assert 0.8 * bound < rows.abs().max() <= bound


def test_in_training_alone(golden):
    made = model_json(golden, trained=("text_decoder",))
    made["text_decoder"]["neftune_noise_alpha"] = 5.0
    vlm = mm.load(golden / "models" / "llava_hf", device="cpu")
    vlm.model.spec = load_model_spec(made)
    ids = torch.tensor([[1, 5, 9, 11]])
    features = torch.zeros(0, vlm.spec.text_decoder.hidden_size)
    plain, again = (vlm.model.embed(ids, features) for _ in range(2))
    assert torch.equal(plain, again)
    noisy = vlm.model.train().embed(ids, features)
    bound = 5.0 / math.sqrt(4 * plain.shape[-1])
    assert 0.5 * bound < (noisy - plain).abs().max() <= bound


def test_not_beside_a_reference(golden):
    from mindspeed_mm.objectives import find_objective

    made = model_json(golden, trained=("text_decoder",))
    made["text_decoder"]["neftune_noise_alpha"] = 5.0
    with pytest.raises(
        ConfigError, match="text_decoder.neftune_noise_alpha is 5, but the objective dpo.*--neftune-noise-alpha"
    ):
        find_objective("dpo").check(load_model_spec(made))
