"""Flamingo against open_flamingo's logits, whole and split over ranks; its public files; what is refused."""

import argparse
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

import mindspeed_mm as mm
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.describe import describe_model, describe_part
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import find_family
from tests.helpers.tensor_ranks import start_rank
from tests.helpers.tiny_flamingo import CASES, MEDIA, golden_case, golden_folder, meta_of, trained_folder, words
from tests.helpers.tiny_llava import close

SPREADS = {"TP2": (2, 1, False), "TP2 SP": (2, 1, True), "PP2": (1, 2, False)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flamingo")
    return {case: golden_folder(case, root / case) for case in CASES}


def vlm_of(path, tensor=1, pipeline=1, sequence_parallel=False):
    """Our model of a folder, or this rank's share of it."""
    start_rank(tensor, pipeline)
    from megatron.core import parallel_state

    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime

    source = open_source(path)
    runtime = Runtime(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=sequence_parallel,
    )
    vlm, _ = build_vlm(
        describe_model(source),
        runtime,
        torch.device("cpu"),
        sources=dict.fromkeys(source.parts, source),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    return vlm.eval()


def features_of(values: torch.Tensor):
    """Features of images, [I, P, W]."""
    from mindspeed_mm.models.media import Features, Media

    counts = (values.shape[1],) * values.shape[0]
    return Features(values.flatten(0, 1), counts, Media.of_images(torch.empty(len(counts), 0)))


def logits(path, case: str, spread=(1, 1, False), *, zero_gates: bool = False, rows=slice(None), length=None):
    """Logits [B, S, V] of a case on the last stage."""
    vlm = vlm_of(path, *spread)
    from megatron.core import parallel_state

    given = golden_case(case)
    ids = given["ids"][rows, :length]
    media = given["features"].view(2, 3, *given["features"].shape[1:])[rows]
    counts = (ids == -200).sum(dim=1).tolist()
    features = torch.cat([own[:count] for own, count in zip(media, counts, strict=True)])
    if case == "llama_every2_all":  # it fits to 1.5e-6 with frequencies rounded to bfloat16, and to 2.2e-4 without
        frequencies = vlm.text_decoder.rotary._frequencies
        frequencies.copy_(frequencies.bfloat16().float())
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if zero_gates and name.endswith("_gate"):
                parameter.zero_()
        if not vlm.pre_process:
            size = torch.empty(3, dtype=torch.int64)
            before = parallel_state.get_pipeline_model_parallel_prev_rank()
            torch.distributed.recv(size, before)
            received = torch.empty(*size.tolist())
            torch.distributed.recv(received, before)
            vlm.set_input_tensor(received)
        found = vlm(
            ids, torch.arange(ids.shape[1])[None], image_features=features_of(features) if len(features) else None
        )
        if vlm.post_process:
            return found
        after = parallel_state.get_pipeline_model_parallel_next_rank()
        torch.distributed.send(torch.tensor(found.shape), after)
        torch.distributed.send(found.contiguous(), after)
    return None


def compare(case: str, found: torch.Tensor) -> None:
    """With open_flamingo's logits; of `all` those of the row that begins with a medium.

    open_flamingo lets text before the first medium attend to all media alike where a token sees all media up to itself:
    it masks every score with one number. Here such text sees none.
    """
    rows = slice(0, 1) if case.endswith("all") else slice(None)
    close(found[rows], golden_case(case)["logits"][rows])


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_open_flamingo(case, folders):
    compare(case, logits(folders[case], case))


def all_logits(folders: dict, spread) -> dict:
    """Logits of every case, or None on stages before the last."""
    return {case: logits(path, case, spread) for case, path in folders.items()}


@pytest.mark.parametrize("spread", SPREADS)
def test_ranks_give_the_same_logits(ranks, spread, folders):
    found = ranks(2).run(all_logits, folders, SPREADS[spread])
    for case in CASES:
        whole = [own[case] for own in found if own[case] is not None]
        assert whole
        for each in whole:
            compare(case, each)


def plain_decoder(case: str, folders, target):
    """(transformers' decoder of a case without cross-attention, ours, built without any)."""
    import transformers

    from mindspeed_mm.models.part import part_of
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.weights.loading import load_part

    state = torch.load(folders[case] / "checkpoint.pt", weights_only=True)
    plain = {
        re.sub(r"decoder_layer\.", "", name.removeprefix("lang_encoder.")): tensor.float()
        for name, tensor in state.items()
        if re.match(r"lang_encoder\.(model|transformer|lm_head)\b", name) and "gated_cross" not in name
    }
    kind = transformers.LlamaForCausalLM if case.startswith("llama") else transformers.MptForCausalLM
    meta = meta_of(case)["lm"]
    theirs = kind(transformers.AutoConfig.for_model(**meta)).eval()
    theirs.load_state_dict(plain)
    theirs.save_pretrained(target)
    (target / "config.json").write_text(json.dumps(meta))
    source = open_source(target)
    spec = describe_part(source.part("text_decoder"))
    assert spec.cross_attention is None
    start_rank()
    ours = part_of("text_decoder", spec).build(spec, Runtime()).eval()
    load_part(ours, part_of("text_decoder", spec), spec, source)
    return theirs, ours


@pytest.mark.parametrize("case", ["llama_every1_latest", "mpt_every2_all"])
def test_zero_gates_are_the_decoder_alone(case, folders, tmp_path):
    """Exactly, whatever a token sees: text before the first medium, behind it, and text alone."""
    found = logits(folders[case], case, zero_gates=True)
    text = logits(folders[case], case, zero_gates=True, rows=slice(1, 2), length=2)
    theirs, ours = plain_decoder(case, folders, tmp_path)
    given = golden_case(case)["ids"]
    assert (given[1, :2] != -200).all() and (given[0] == -200).any()
    ids = given.masked_fill(given == -200, MEDIA)

    def alone(ids):
        hidden = ours(ours.embed(ids), torch.arange(ids.shape[1])[None])
        return ours.logits(hidden)[..., : ours.vocab_size].transpose(0, 1).float()

    with torch.no_grad():
        assert torch.equal(found, alone(ids)) and torch.equal(text, alone(ids[1:, :2]))
        close(found, theirs(ids).logits)


def test_text_before_the_first_image_sees_none(folders):
    case = "mpt_every1_latest"
    whole = logits(folders[case], case, rows=slice(1, 2))
    ids = golden_case(case)["ids"][1]
    first = (ids == -200).nonzero()[0, 0]
    alone = logits(folders[case], case, rows=slice(1, 2), length=int(first))
    close(whole[:, :first], alone, 1e-5)
    one = logits(folders[case], case, rows=slice(1, 2), length=int(first) + 3)
    close(whole[:, : first + 3], one, 1e-5)


def test_what_tokens_see():
    from mindspeed_mm.models.memory import MediaPlaces
    from mindspeed_mm.platform.segments import Segments

    ids = torch.tensor([[5, -200, 5, -200, 5]])
    places, cpu = MediaPlaces.of(ids), torch.device("cpu")
    latest = places.mask(1, latest=True, device=cpu)[0, 0].int().tolist()
    assert latest == [[0, 0], [1, 0], [1, 0], [0, 1], [0, 1]]
    everything = places.mask(1, latest=False, device=cpu)[0, 0].int().tolist()
    assert everything == [[0, 0], [1, 0], [1, 0], [1, 1], [1, 1]]
    apart = MediaPlaces.of(ids, Segments.of_lengths([3, 2], cpu))
    assert apart.mask(1, latest=False, device=cpu)[0, 0].int().tolist() == [[0, 0], [1, 0], [1, 0], [0, 1], [0, 1]]
    apart = MediaPlaces.of(ids, Segments.of_lengths([2, 1, 2], cpu))
    assert apart.mask(1, latest=True, device=cpu)[0, 0, 2].int().tolist() == [0, 0]


# --- Files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "wrapper"),
    [("mpt_every1_latest", None), ("mpt_every1_latest", "model"), ("llama_every2_all", "model_state_dict")],
)
def test_a_checkpoint_over_its_decoder(case, wrapper, tmp_path):
    compare(case, logits(trained_folder(case, tmp_path / "model", wrapper), case))


@pytest.mark.parametrize("case", ["llama_every2_all", "mpt_every1_latest"])
def test_otter_and_back(case, folders, tmp_path):
    """OpenFlamingo -> Otter -> ours -> OpenFlamingo's names: the values stay as they are."""
    mm.convert(folders[case], tmp_path / "otter", to="otter")
    names = open_source(tmp_path / "otter").part("text_decoder").names
    assert any("feed_forward.1.weight" in name for name in names)
    config = json.loads((tmp_path / "otter/config.json").read_text())
    assert config["media_token_id"] == MEDIA and config["model_type"] == "otter"
    compare(case, logits(tmp_path / "otter", case))
    mm.convert(tmp_path / "otter", tmp_path / "ours", to="mindspeed-mm")
    mm.convert(tmp_path / "ours", tmp_path / "again", to="flamingo")
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["model_type"] == "flamingo" and "architectures" not in config
    source = open_source(tmp_path / "again")
    again = {name: source.part(slot).get(name) for slot in source.parts for name in source.part(slot).names}
    first = open_source(folders[case])
    for slot in ("text_decoder", "vision_projector"):
        for name in first.part(slot).names:
            if not name.startswith(("old_decoder_blocks.", "gated_cross_attn_layers.")) and name != "lm_head.weight":
                assert torch.equal(again[name], first.part(slot).get(name)), name
    found, wanted = describe_model(source).part_specs(), describe_model(first).part_specs()
    for slot, spec in found.items():
        assert spec.model_dump(exclude={"params_dtype"}) == wanted[slot].model_dump(exclude={"params_dtype"})


@pytest.mark.parametrize("case", ["llama_every2_all", "mpt_every1_latest"])
def test_a_checkpoint_goes_out_as_it_came(case, folders, tmp_path):
    """From the decoder and the trained names above it, from OpenFlamingo's whole state dict, and from Otter's."""
    folder, files = trained_folder(case, tmp_path / "model", "model_state_dict"), {}
    mm.convert(folders[case], tmp_path / "otter", to="otter")
    for kind, source in {"trained": folder, "whole": folders[case], "otter": tmp_path / "otter"}.items():
        assert mm.convert(source, tmp_path / f"{kind}.pt", to="flamingo-trained") == [tmp_path / f"{kind}.pt"]
        files[kind] = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
    wanted = torch.load(folder / "checkpoint.pt", weights_only=True)["model_state_dict"]
    assert files["trained"].keys() == wanted.keys()
    head = {"lang_encoder.lm_head.weight"} if case.startswith("llama") else set()  # of its own: it may be trained
    assert files["whole"].keys() == files["otter"].keys() == wanted.keys() | head
    for found in files.values():
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    shutil.copy(tmp_path / "otter.pt", folder / "checkpoint.pt")
    compare(case, logits(folder, case))


def test_what_has_no_checkpoint_of_that_form(golden, folders, tmp_path):
    with pytest.raises(WeightError, match="found weights of model_id llava; expected a flamingo"):
        mm.convert(golden / "models/llava_hf", tmp_path / "c.pt", to="flamingo-trained")
    (tmp_path / "c.pt").write_bytes(b"mine")
    with pytest.raises(WeightError, match="exists; expected a new folder or file"):
        mm.convert(folders["mpt_every1_latest"], tmp_path / "c.pt", to="flamingo-trained")
    with pytest.raises(WeightError, match="flamingo-trained: found tokenizer; expected"):
        mm.convert(folders["mpt_every1_latest"], tmp_path / "d.pt", to="flamingo-trained", tokenizer="a")


def test_new_words_have_rows(tmp_path):
    """Otter's code adds <answer> to an OpenFlamingo's tokenizer: a row for it, and for it alone, is new."""
    case = "llama_every2_all"
    folder = trained_folder(case, tmp_path / "model")
    tokenizer = words()
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]}, False) == 1
    tokenizer.save_pretrained(folder)
    part = open_source(folder).part("text_decoder")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    old = state["lang_encoder.model.embed_tokens.weight"]
    new = part.get("model.embed_tokens.weight")
    assert part.shape("lm_head.weight") == tuple(new.shape) == (100, 48) and torch.equal(new[:99], old)
    close(new[99].float(), old.float().mean(dim=0), 1e-2)
    assert torch.equal(part.get_slice("model.embed_tokens.weight", 0, 98, 100), new[98:])
    compare(case, logits(folder, case)[..., :99])


def otter_files(state: dict, kind: str, folder):
    """A state dict as the weights of a folder, in one of the forms that people have."""
    if kind == "shards":
        names = list(state)
        parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, own in parts.items():
            torch.save({name: state[name] for name in own}, folder / file)
        places = {name: file for file, own in parts.items() for name in own}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    elif kind == "wrapped":
        torch.save({"model": state, "step": 3}, folder / "pytorch_model.bin")
    else:
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("kind", ["shards", "wrapped", "module."])
def test_folders_with_pickles(kind, folders, tmp_path):
    """Otter's older folders; both names of a layer, the latter by their conversion."""
    case = "mpt_every2_all"
    mm.convert(folders[case], tmp_path / "otter", to="otter")
    first, files = open_source(shutil.copytree(tmp_path / "otter", tmp_path / "first")), {}
    for path in (tmp_path / "otter").glob("*.safetensors*"):
        files |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    otter_files(files, kind, tmp_path / "otter")
    source = open_source(tmp_path / "otter")
    assert source.layout == "otter" and describe_model(source).model_id == "flamingo"
    for slot, count in (("text_decoder", 30), ("vision_projector", 20), ("vision_encoder", 20)):
        names = source.part(slot).names
        assert len(names) > count
        for name in names:
            assert torch.equal(source.part(slot).get(name), first.part(slot).get(name)), name


def test_a_pickle_that_holds_more_than_tensors(folders, tmp_path):
    shutil.copytree(folders["mpt_every1_latest"], tmp_path / "model")
    state = torch.load(tmp_path / "model/checkpoint.pt", weights_only=True)
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, tmp_path / "model/checkpoint.pt")
    with pytest.raises(WeightError, match="argparse.Namespace"):
        open_source(tmp_path / "model")


def test_a_vision_encoder_of_openai(golden, folders, tmp_path):
    """Its archive has no config: which layer the perceiver looks at is the family's."""
    shutil.copytree(folders["mpt_every1_latest"], tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["vision_encoder_path"] = str(golden / "models/clip_openai.pt")
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    source = open_source(tmp_path / "model")
    stated = find_family("flamingo").stated(source)["vision_encoder"]
    spec = describe_part(source.part("vision_encoder"), **stated)
    assert spec.select_layer == -1 and spec.num_built_layers == spec.num_layers
