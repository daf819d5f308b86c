"""Every decoder against transformers' class of it: logits, gradients, text and export, at every parallel layout."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import mindspeed_mm as mm
from mindspeed_mm.errors import ContextError
from tests.helpers.decoder_ranks import (
    RECOMPUTED,
    DecoderStep,
    RankShard,
    Spread,
    check_recomputation,
    joined,
    joined_losses,
    labels_of,
    take_step,
)
from tests.helpers.pool import RankError
from tests.helpers.tiny_decoders import FAMILIES, VARIANTS, greedy, make, rows, save
from tests.parallel.comparison import names


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
    prompts.append([*prompts[2][:15], 9, 8])  # begins as another one does: its keys are copied
    wanted = [greedy(theirs, prompt, 9) for prompt in prompts]
    assert ours.generate(input_ids=prompts[1], max_new_tokens=9, eos_token_id=-1) == wanted[1:2]
    assert ours.generate(input_ids=prompts, max_new_tokens=9, eos_token_id=-1) == wanted


LENGTHS = (21, 3, 16)
"""Sequences of a packed row; two are longer than the window."""


LEAN = {"llama", "mistral", "qwen2", "phi3", "internlm2"}
"""Decoders whose single tokens take the short way through the layers."""


def test_which_decoders_take_the_short_way(pair, request):
    from mindspeed_mm.generation.single_token import SingleTokenStep

    name = VARIANTS[request.node.callspec.params["pair"]][0]
    assert SingleTokenStep.fits(pair[1].model.text_decoder) == (name in LEAN)


def test_generation_stays_within_the_original_length_of_longrope(tmp_path):
    name, changes = VARIANTS["phi3 longrope"]
    vlm = mm.load(save(make(name, **changes), name, tmp_path), device="cpu")
    with pytest.raises(ContextError, match="exceed 32 tokens, the original_max_position_embeddings of its rope_scal"):
        vlm.generate(input_ids=rows(1, 30)[0].tolist(), max_new_tokens=3, eos_token_id=-1)


def test_one_query_group_is_not_shared_by_two_ranks(ranks, tmp_path):
    path = save(make("gemma", num_key_value_heads=1), "gemma", tmp_path)
    with pytest.raises(RankError, match="1 query groups cannot be split over tensor-parallel size 2"):
        ranks(2).run(generated, str(path), 2, 1, [[5, 6]])


def test_packed_rows_equal_rows_of_their_own(pair):
    """The family's row of one sequence after the other, against each sequence alone."""
    from mindspeed_mm.platform.segments import Segments

    ours = pair[1]
    ids = rows(1, sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    with torch.inference_mode():
        packed = ours.model(ids, positions, segments=Segments.of_lengths(LENGTHS, ids.device))
    alone = torch.cat([ours.logits(row) for row in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=2e-6, rtol=1e-6)


def test_export_is_read_by_transformers(pair, request, tmp_path):
    import transformers

    theirs, ours = pair
    name = VARIANTS[request.node.callspec.params["pair"]][0]
    source = ours.spec.text_decoder.ckpt_path
    mm.convert(source, tmp_path / "again", to="hf")
    if name == "internlm2":  # no class reads it: it must be what we read
        saved, wanted = (
            load_file(path) for path in (tmp_path / "again/model.safetensors", f"{source}/model.safetensors")
        )
        assert saved.keys() == wanted.keys() and all(torch.equal(saved[key], wanted[key]) for key in wanted)
        return
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert type(again) is type(theirs) and not report["missing_keys"] and not report["unexpected_keys"]
    ids = rows(length=40)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=0, rtol=0)


# --- Any geometry --------------------------------------------------------------------------------------------------

GEOMETRIES = st.fixed_dictionaries(
    {
        "groups": st.sampled_from([1, 2, 3]),
        "per_group": st.integers(1, 3),
        "head": st.sampled_from([4, 6, 10]),
        "num_hidden_layers": st.integers(1, 3),
        "vocab_size": st.integers(131, 140),
        "intermediate_size": st.integers(5, 40),
        "seed": st.integers(0, 99),
    }
)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(geometry=GEOMETRIES)
def test_logits_of_any_geometry(name, tmp_path_factory, geometry):
    drawn = dict(geometry)
    groups, per_group, head = (drawn.pop(key) for key in ("groups", "per_group", "head"))
    sizes = {"num_key_value_heads": groups, "num_attention_heads": groups * per_group}
    sizes |= {"hidden_size": groups * per_group * head}
    if name == "phi3":
        sizes["partial_rotary_factor"] = 0.5 if head % 4 == 0 else 1.0
    own_heads = {"head_dim": head + 2} if "head_dim" in FAMILIES[name].keys else {}
    theirs = make(name, **drawn, **sizes, **own_heads)
    ours = mm.load(save(theirs, name, tmp_path_factory.mktemp(name)), device="cpu")
    with torch.no_grad():
        close(ours.logits(rows()), theirs(input_ids=rows()).logits)


# --- Training ------------------------------------------------------------------------------------------------------

SPREADS = {
    "one process": Spread(),
    "TP2": Spread(tensor=2),
    "TP2 SP": Spread(tensor=2, sequence_parallel=True),
    "PP2": Spread(pipeline=2),
    "CP2": Spread(context=2),
}


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


def spread_step(ranks, path, spread: Spread, step: DecoderStep) -> list[RankShard]:
    if spread.ranks == 1:
        return [take_step(str(path), spread, step)]
    return ranks(spread.ranks).run(take_step, str(path), spread, step)


@pytest.mark.parametrize("layout", names(SPREADS, slow=("TP2",)))
def test_losses_and_gradients(ranks, trained, layout):
    from mindspeed_mm.models.part import find_part
    from mindspeed_mm.models.spec import load_model_spec
    from mindspeed_mm.models.text_decoder.llama import PART as LLAMA

    name, path, losses, wanted = trained
    spread, ids = SPREADS[layout], rows(length=24)
    labels = labels_of(ids)
    if spread.pipeline > 1:
        path = uneven_stages(path)
    shards = spread_step(ranks, path, spread, DecoderStep(ids, labels))
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
    model = json.loads(path.read_text())
    model["text_decoder"]["pipeline_num_layers"] = [1, 2]
    other = path.with_name("stages.json")
    other.write_text(json.dumps(model))
    return other


@pytest.fixture(scope="module")
def alone(trained):
    """(losses, gradients) of the sequences of a packed row, each by itself in one process."""
    from mindspeed_mm.models.part import find_part
    from mindspeed_mm.models.spec import load_model_spec

    name, path, _, _ = trained
    ids = rows(1, sum(LENGTHS))
    labels = labels_of(ids)
    spec, part = load_model_spec(path).text_decoder, find_part("text_decoder", name)
    losses, gradients, count = [], {}, int((labels != -100).sum())
    for piece, own in zip(ids.split(LENGTHS, dim=1), labels.split(LENGTHS, dim=1), strict=True):
        shard = take_step(str(path), Spread(), DecoderStep(piece, own))
        losses.append(shard.losses)
        share = int((own != -100).sum()) / count
        for key, gradient in joined([shard], part, spec).items():
            gradients[key] = gradients.get(key, 0) + share * gradient
    return torch.cat(losses), gradients


@pytest.mark.parametrize("layout", names(["one process", "CP2", "TP2 SP", "PP2"], slow=("TP2 SP", "PP2")))
def test_packed_rows_train_alike(ranks, trained, alone, layout):
    """Losses and gradients of a packed row, at every layout, against those of one process without packing."""
    from mindspeed_mm.models.part import find_part
    from mindspeed_mm.models.spec import load_model_spec

    name, path, _, _ = trained
    ids, spread = rows(1, sum(LENGTHS)), SPREADS[layout]
    labels = labels_of(ids)
    spec, part = load_model_spec(path).text_decoder, find_part("text_decoder", name)
    if spread.pipeline > 1:
        path = uneven_stages(path)
    shards = spread_step(ranks, path, spread, DecoderStep(ids, labels, LENGTHS))
    losses, wanted = alone
    torch.testing.assert_close(joined_losses(shards), losses, atol=2e-6, rtol=1e-6)
    found = joined(shards, part, spec)
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() <= 1e-5 * gradient.norm(), key


@pytest.mark.parametrize("kind", RECOMPUTED)
def test_recomputation_changes_nothing(trained, kind):
    check_recomputation(trained[1], kind, DecoderStep(rows(length=24), labels_of(rows(length=24))))


def generated(path: str, tensor: int, pipeline: int, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy text on this rank."""
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    return mm.load(path, device="cpu", **sizes).generate(input_ids=prompts, max_new_tokens=9, eos_token_id=-1)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_ranks_write_the_same_text(ranks, trained, tensor, pipeline):
    path = uneven_stages(trained[1]) if pipeline > 1 else trained[1]
    prompts = [row[:length].tolist() for row, length in zip(rows(3), (5, 17, 18), strict=True)]
    wanted = generated(str(trained[1]), 1, 1, prompts)
    assert ranks(2).run(generated, str(path), tensor, pipeline, prompts) == [wanted, wanted]
