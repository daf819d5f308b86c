"""Muon beside AdamW: torch's optimizers on the same gradients, every layout, and what is refused."""

import pytest
import torch
from torch.nn import Parameter

from mindspeed_mm.errors import CheckpointError, ConfigError
from mindspeed_mm.platform import get_platform
from tests.helpers import tiny_training as tiny
from tests.helpers.golden_training import GoldenLayout, full_tensors, records, train_golden
from tests.helpers.tiny_training import whole_run as run
from tests.parallel.comparison import names

get_platform("cpu")
from megatron.driver.muon import MuonAdamW  # noqa: E402
from mindspeed_mm.models.hidden_matrices import AdapterMatrix  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
OPTIONS = {"lr": 2e-2, "weight_decay": 0.1}
MUON = "--optimizer muon --lr 1e-2 --weight-decay 0.1 --adam-eps 1e-3"


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_the_steps_are_those_of_torch(adjust):
    """Matrices as torch.optim.Muon moves them, vectors and an embedding as AdamW does."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(6, 10), (12, 5), (7,), (20, 6)]
    first = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([Parameter(tensor.clone()) for tensor in first] for _ in range(2))
    matrices = dict.fromkeys(ours[:2], AdapterMatrix(None))
    options = {"momentum": 0.9, "steps": 4, "adjust_lr": adjust}
    optimizer = MuonAdamW([{"params": ours}], matrices, **options, **OPTIONS)
    muon = torch.optim.Muon(theirs[:2], momentum=0.9, ns_steps=4, adjust_lr_fn=adjust, **OPTIONS)
    adam = torch.optim.AdamW(theirs[2:], **OPTIONS)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        optimizer.step()
        muon.step()
        adam.step()
        assert all(one.grad is not None for one in ours)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert set(optimizer.state[ours[0]]) == {"step", "momentum_buffer"}


BOTH = ("text_decoder.", "image_encoder.")
LAYOUTS = {
    "TP2 SP": GoldenLayout(tensor=2, flags="--sequence-parallel"),
    "PP2": GoldenLayout(pipeline=2),
    "DP2": GoldenLayout(data=2),
}


@pytest.fixture(scope="module")
def single(ranks, golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("muon")
    ranks(1).run(train_golden, golden, GoldenLayout(), str(folder), MUON, 3)
    return folder


@pytest.mark.parametrize("name", names(LAYOUTS, slow=("DP2",)))
def test_every_layout_moves_alike(ranks, golden, single, tmp_path, name):
    """Newton-Schulz steps compute in bfloat16, so a sum in another order may round to the neighbour."""
    layout = LAYOUTS[name]
    ranks(layout.ranks).run(train_golden, golden, layout, str(tmp_path), MUON, 3)
    found, wanted = ([row["loss"] for row in records(folder)] for folder in (tmp_path, single))
    assert found == pytest.approx(wanted, rel=2e-4)
    tensors = full_tensors(tmp_path)
    for key, tensor in full_tensors(single).items():
        rows = min(len(tensor), len(tensors[key]))
        error = (tensors[key][:rows] - tensor[:rows]).norm() / tensor.norm()
        assert error < 2e-3, (key, float(error))


def test_q_k_and_v_are_matrices_of_their_own(golden, ranks, single, tmp_path):
    """The first step without momentum and decay moves Hugging Face's matrices by orthogonal ones."""
    flags = "--optimizer muon --muon-adjust-lr original --muon-momentum 0 --lr 1e-2 --weight-decay 0"
    ranks(1).run(train_golden, golden, GoldenLayout(), str(tmp_path / "start"), "--lr 1e-30 --no-save-optim", 1)
    ranks(1).run(train_golden, golden, GoldenLayout(), str(tmp_path / "one"), flags, 1)
    before, after = full_tensors(tmp_path / "start"), full_tensors(tmp_path / "one")
    from mindspeed_mm.models.part import find_part
    from mindspeed_mm.models.spec import load_model_spec
    from tests.helpers.golden_model import model_json

    spec = load_model_spec(model_json(golden, trained=("text_decoder",))).text_decoder
    part, prefix = find_part("text_decoder", spec.model_id), "text_decoder."
    seen = 0
    for step in part.rules["hf"].steps(spec.geometry):
        if "linear_" not in step.target:
            continue
        change = (after[prefix + step.target] - before[prefix + step.target]) / 1e-2
        for matrix in step.rule.to_theirs(change, spec.geometry):
            matrix = matrix / max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
            values = torch.linalg.svdvals(matrix)
            assert values.max() < 1.3 and values.median() > 0.5, step.target  # one matrix would have halves below
            seen += 1
    assert seen == spec.num_layers * 7
    name = "text_decoder.embedding.word_embeddings.weight"
    assert (after[name] - before[name]).abs().max() == pytest.approx(1e-2, rel=1e-2)  # AdamW's first step


def test_a_run_goes_on_at_another_layout(ranks, golden, single, tmp_path):
    flags = f"{MUON} --save-interval 100"
    layout = LAYOUTS["TP2 SP"]
    ranks(2).run(train_golden, golden, layout, str(tmp_path), f"{flags} --exit-interval 2", 3)
    ranks(1).run(train_golden, golden, GoldenLayout(), str(tmp_path), f"{flags} --load {tmp_path}", 3)
    found, wanted = ([row["loss"] for row in records(folder)] for folder in (tmp_path, single))
    assert found == pytest.approx(wanted, rel=2e-4)


# --- What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer", "muon", "--use-distributed-optimizer"], "gives each rank a flat piece of the parameters"),
        (["--muon-momentum", "0.9"], "--muon-momentum is given without --optimizer muon"),
        (["--optimizer", "muon", "--muon-momentum", "1"], "--muon-momentum is 1.0: expected at least 0 and below 1"),
        (["--optimizer", "muon", "--muon-num-ns-steps", "100"], "--muon-num-ns-steps is 100: expected 1 to 99"),
    ],
)
def test_flags_that_cannot_be(flags, message):
    with pytest.raises(ConfigError, match=message):
        tiny.arguments(*flags)


@pytest.mark.usefixtures("single_process")
def test_no_matrix_and_no_muon(monkeypatch):
    with pytest.raises(ConfigError, match="found no matrix of a linear among the trained parameters"):
        run("--optimizer", "muon", train_iters=1)  # the driver's own model names none
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match="has no Muon; expected 2.9 or newer"):
        run("--optimizer", "muon", train_iters=1)


@pytest.mark.usefixtures("single_process")
def test_the_state_of_the_other_optimizer(tmp_path):
    run("--save", tmp_path, train_iters=1)

    def with_matrices(*stage):
        model = tiny.tiny_model()(*stage)
        for name, parameter in model.named_parameters():
            parameter.matrices = AdapterMatrix(None) if "linear_fc2" in name else None
        return model

    args = tiny.arguments("--optimizer", "muon", "--load", str(tmp_path), "--save", str(tmp_path), train_iters=2)
    with pytest.raises(CheckpointError, match="was saved with --optimizer adam, this run has muon: use the same"):
        tiny.run(args, with_matrices)
