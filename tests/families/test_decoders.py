"""Every decoder against transformers' class of it: logits, gradients, text and export, at every parallel layout."""

import pytest
import torch
import torch.nn.functional as F

import mindspeed_mm as mm
from tests.helpers.decoder_ranks import Shard, Spread, Step, joined, joined_losses, labels_of, take_step
from tests.helpers.tiny_decoders import FAMILIES, VARIANTS, greedy, make, rows, save


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours) of a variant."""
    name, changes = VARIANTS[request.param]
    theirs = make(name, **changes)
    path = save(theirs, name, tmp_path_factory.mktemp(name))
    return theirs, mm.load(path, device="cpu")


def close(found, wanted, tolerance=2e-4):
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


def test_logits(pair):
    theirs, ours = pair
    ids = rows(length=40)
    with torch.no_grad():
        close(ours.logits(ids), theirs(input_ids=ids).logits)


def test_padding_on_the_left(pair):
    theirs, ours = pair
    ids, mask = rows(), torch.ones(2, 23, dtype=torch.int64)
    mask[0, :5] = 0
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=mask, position_ids=torch.arange(23)[None]).logits
    close(ours.logits(ids, mask)[mask.bool()], wanted[mask.bool()])


def test_greedy_text(pair):
    theirs, ours = pair
    prompts = [row[:length].tolist() for row, length in zip(rows(4), (5, 17, 18, 2), strict=True)]
    wanted = [greedy(theirs, prompt, 9) for prompt in prompts]
    assert ours.generate(input_ids=prompts[1], max_new_tokens=9, eos_token_id=-1) == wanted[1:2]
    assert ours.generate(input_ids=prompts, max_new_tokens=9, eos_token_id=-1) == wanted


# --- Training ------------------------------------------------------------------------------------------------------

SPREADS = {
    "one process": Spread(),
    "TP2": Spread(tensor=2),
    "TP2 SP": Spread(tensor=2, sequence_parallel=True),
    "PP2": Spread(pipeline=2),
    "CP2": Spread(context=2),
}
LENGTHS = (21, 3, 16)
"""Sequences of a packed row; two are longer than the window."""


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
    """(name, model.json, losses and gradients of transformers for two rows)."""
    name = request.param
    theirs = make(name)
    path = save(theirs, name, tmp_path_factory.mktemp(name), pipeline_num_layers=None)
    ids = rows(length=24)
    labels = labels_of(ids)
    logits = theirs(input_ids=ids).logits
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    losses[labels != -100].mean().backward()
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    return name, path, losses.detach(), gradients


def spread_step(ranks, path, spread: Spread, step: Step) -> list[Shard]:
    if spread.ranks == 1:
        return [take_step(str(path), spread, step)]
    return ranks(spread.ranks).run(take_step, str(path), spread, step)


@pytest.mark.parametrize("layout", SPREADS)
def test_losses_and_gradients(ranks, trained, layout):
    from mindspeed_mm.models.spec import find_part, load_model_spec
    from mindspeed_mm.models.text_decoder.llama import PART as LLAMA

    name, path, losses, wanted = trained
    spread, ids = SPREADS[layout], rows(length=24)
    labels = labels_of(ids)
    if spread.pipeline > 1:
        path = uneven_stages(path)
    shards = spread_step(ranks, path, spread, Step(ids, labels))
    # Losses come column by column.
    close(joined_losses(shards), losses.t()[labels.t() != -100])
    part, spec = find_part("text_decoder", name), load_model_spec(path).text_decoder
    rules = LLAMA.rules["hf"] if name == "internlm2" else None  # whose gradients are known under Llama's names
    found = joined(shards, part, spec, rules)
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm(), key


def uneven_stages(path):
    """A copy of model.json that puts one of the three layers on the first stage."""
    import json

    model = json.loads(path.read_text())
    model["text_decoder"]["pipeline_num_layers"] = [1, 2]
    other = path.with_name("stages.json")
    other.write_text(json.dumps(model))
    return other
