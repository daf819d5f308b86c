"""The last layer's MLP on supervised positions alone: nothing that comes out of the model changes."""

import pytest
import torch

from mindspeed_mm.constants import IGNORE_INDEX
from tests.helpers.golden_model import collate, training_samples


@pytest.fixture
def loaded(golden):
    import mindspeed_mm as mm

    model = mm.load(golden / "models" / "llava_original", device="cpu").model
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model, collate(training_samples(golden)[0])


def rows_of_mlps(model) -> list[int]:
    """Grows by the number of rows of each layer's MLP."""
    rows: list[int] = []
    for layer in model.text_decoder.decoder.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0] * inputs[0].shape[1]))
    return rows


def losses_and_gradients(model, batch, labels):
    losses = model(batch.input_ids, batch.position_ids, labels=labels, media=batch.media)
    model.zero_grad()
    (losses * torch.linspace(0.1, 1, len(losses))).mean().backward()
    return losses.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_only_the_last_mlp_leaves_positions_out(loaded):
    model, batch = loaded
    rows, everything = rows_of_mlps(model), batch.input_ids.numel()
    losses = model(batch.input_ids, batch.position_ids, labels=batch.labels, media=batch.media)
    assert 0 < len(losses) < everything
    assert rows == [everything] * (len(rows) - 1) + [len(losses)]
    rows.clear()
    model(batch.input_ids, batch.position_ids, media=batch.media)
    assert set(rows) == {everything}


@pytest.mark.parametrize("recomputed", [False, True])
def test_losses_and_gradients_of_all_positions(loaded, recomputed):
    model, batch = loaded
    if recomputed:
        config = model.text_decoder.decoder.config
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    model.train(recomputed)
    found = losses_and_gradients(model, batch, batch.labels)
    model.text_decoder.takes_places = False
    wanted = losses_and_gradients(model, batch, batch.labels)
    torch.testing.assert_close(found, wanted)


def test_without_labels_every_parameter_still_has_its_gradient(loaded):
    model, batch = loaded
    losses = model(batch.input_ids, batch.position_ids, torch.full_like(batch.labels, IGNORE_INDEX), batch.media)
    losses.sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert not len(losses)
    assert all(grad is not None and not grad.any() for grad in grads.values())
