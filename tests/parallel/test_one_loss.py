"""One loss: the golden training run gives the same numbers at every parallel layout."""

import pytest

from tests.helpers.golden_training import GoldenLayout, full_tensors, records, train_golden
from tests.parallel.comparison import compare, compare_with_transformers, names

OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
LAYOUTS = {
    "micro 4": GoldenLayout(micro_batch=4),
    "PP2": GoldenLayout(pipeline=2),
    "PP2, projector only": GoldenLayout(pipeline=2, trained="a"),
    "PP2, clipped": GoldenLayout(pipeline=2, trained="c", micro_batch=2),
    "PP2, layers 1 + 3": GoldenLayout(pipeline=2, decoder=(("pipeline_num_layers", [1, 3]),)),
    "PP2, layers 0 + 4": GoldenLayout(pipeline=2, decoder=(("pipeline_num_layers", [0, 4]),)),
    "PP2 VPP2": GoldenLayout(pipeline=2, virtual=2),
    "PP2 VPP2, projector only": GoldenLayout(pipeline=2, virtual=2, trained="a"),
    "PP2 VPP2, layers 0 + 1, 2 + 1": GoldenLayout(
        pipeline=2, virtual=2, decoder=(("pipeline_num_layers", [[0, 1], [2, 1]]),), trained="c"
    ),
    "TP2 PP2 VPP2 SP": GoldenLayout(tensor=2, pipeline=2, virtual=2, flags="--sequence-parallel"),
    "PP2 VPP2 DP2 distributed overlap": GoldenLayout(pipeline=2, virtual=2, data=2, flags=OVERLAP),
    "TP2 SP": GoldenLayout(tensor=2, flags="--sequence-parallel"),
    "CP2": GoldenLayout(context=2),
    "CP2, projector only": GoldenLayout(context=2, trained="a"),
    "DP2 distributed overlap": GoldenLayout(data=2, flags=OVERLAP),
    "DP2 overlap": GoldenLayout(data=2, flags="--overlap-grad-reduce"),
    "TP2 DP2 SP": GoldenLayout(tensor=2, data=2, flags="--sequence-parallel"),
    "TP2 PP2 SP": GoldenLayout(tensor=2, pipeline=2, flags="--sequence-parallel"),
    "PP2 DP2 distributed overlap": GoldenLayout(pipeline=2, data=2, flags=OVERLAP),
    "PP2 CP2": GoldenLayout(pipeline=2, context=2),
    "CP2 DP2 distributed": GoldenLayout(context=2, data=2, flags="--use-distributed-optimizer", trained="c"),
}


# Trained from a checkpoint, since fresh weights depend on the layout.
GROUPED = {
    "PP2": GoldenLayout(pipeline=2, grouped=True),
    "CP2": GoldenLayout(context=2, grouped=True, micro_batch=2),
    "TP2 CP2 SP": GoldenLayout(tensor=2, context=2, flags="--sequence-parallel", grouped=True),
    "TP2 PP2": GoldenLayout(tensor=2, pipeline=2, grouped=True),
    "PP2 VPP2": GoldenLayout(pipeline=2, virtual=2, grouped=True),
}
FOUR_GROUPS = (("num_query_groups", 4),)

EIGHT = {
    "TP2 PP2 CP2 SP": GoldenLayout(tensor=2, pipeline=2, context=2, flags="--sequence-parallel", grouped=True),
    "TP2 PP2 DP2 distributed overlap": GoldenLayout(tensor=2, pipeline=2, data=2, flags=OVERLAP, grouped=True),
    "PP2 CP2 DP2 distributed": GoldenLayout(
        pipeline=2, context=2, data=2, flags="--use-distributed-optimizer", grouped=True
    ),
    "TP2 CP2 DP2 SP": GoldenLayout(tensor=2, context=2, data=2, flags="--sequence-parallel", grouped=True),
    "TP2 PP2 VPP2 DP2": GoldenLayout(tensor=2, pipeline=2, virtual=2, data=2, grouped=True),
    "PP4 DP2": GoldenLayout(pipeline=4, data=2, grouped=True),
    "CP4 DP2": GoldenLayout(context=4, data=2, grouped=True),
}

FULL = (("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 1))
PAIRS = (("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 2))
BLOCK = (("recompute_granularity", "full"), ("recompute_method", "block"), ("recompute_num_layers", 1))
SELECTIVE = (("recompute_granularity", "selective"),)
RECOMPUTED = {
    "uniform": GoldenLayout(decoder=PAIRS, vision_encoder=FULL),
    "block": GoldenLayout(decoder=BLOCK, vision_encoder=BLOCK),
    "selective": GoldenLayout(decoder=SELECTIVE, vision_encoder=SELECTIVE),
    "uniform, projector only": GoldenLayout(decoder=FULL, vision_encoder=FULL, trained="a"),
    "uniform, PP2 VPP2": GoldenLayout(decoder=FULL, vision_encoder=FULL, pipeline=2, virtual=2),
    "uniform, TP2 SP": GoldenLayout(decoder=PAIRS, vision_encoder=FULL, tensor=2, flags="--sequence-parallel"),
    "block, PP2": GoldenLayout(decoder=BLOCK, vision_encoder=BLOCK, pipeline=2),
    "selective, CP2": GoldenLayout(decoder=SELECTIVE, vision_encoder=SELECTIVE, context=2),
}


@pytest.mark.parametrize(
    "name",
    names(
        LAYOUTS,
        slow=(
            *("PP2, projector only", "PP2 VPP2, projector only", "PP2, layers 1 + 3", "DP2 overlap", "TP2 DP2 SP"),
            *("PP2 DP2 distributed overlap", "CP2, projector only", "PP2, clipped", "PP2, layers 0 + 4", "PP2 VPP2"),
            *("DP2 distributed overlap", "TP2 PP2 SP"),
        ),
    ),
)
def test_every_layout_trains_alike(ranks, golden, single, tmp_path, name):
    layout = LAYOUTS[name]
    ranks(layout.ranks).run(train_golden, golden, layout, str(tmp_path), "--no-save-optim")
    found = records(tmp_path)
    compare((found, full_tensors(tmp_path)), single(layout.trained))
    compare_with_transformers(golden, found, layout.trained)


@pytest.mark.parametrize(
    "name", names(RECOMPUTED, slow=("uniform, projector only", "block, PP2", "uniform", "selective"))
)
def test_recomputation_changes_no_number(ranks, golden, single, tmp_path, name):
    layout = RECOMPUTED[name]
    ranks(layout.ranks).run(train_golden, golden, layout, str(tmp_path), "--no-save-optim")
    compare((records(tmp_path), full_tensors(tmp_path)), single(layout.trained))


@pytest.fixture(scope="module")
def grouped(ranks, golden, tmp_path_factory):
    """(a checkpoint to begin from, five steps from it in one process)."""
    start, save = tmp_path_factory.mktemp("start"), tmp_path_factory.mktemp("grouped")
    ranks(1).run(train_golden, golden, GoldenLayout(grouped=True), str(start), "", 1)
    ranks(1).run(train_golden, golden, GoldenLayout(grouped=True), str(save), f"--pretrained-checkpoint {start}")
    return start, (records(save), full_tensors(save))


@pytest.mark.parametrize("name", names(GROUPED, slow=("CP2", "TP2 PP2", "PP2 VPP2")))
def test_grouped_queries_tied_head_and_odd_vocabulary(ranks, golden, grouped, tmp_path, name):
    layout = GROUPED[name]
    start, wanted = grouped
    ranks(layout.ranks).run(train_golden, golden, layout, str(tmp_path), f"--pretrained-checkpoint {start}")
    compare((records(tmp_path), full_tensors(tmp_path)), wanted)


def test_four_ranks_share_heads_and_an_odd_vocabulary(ranks, golden, tmp_path):
    one, four = (
        GoldenLayout(grouped=True, decoder=FOUR_GROUPS),
        GoldenLayout(tensor=4, grouped=True, decoder=FOUR_GROUPS),
    )
    start = tmp_path / "start"
    ranks(1).run(train_golden, golden, one, str(start), "", 1)
    for name, layout in (("one", one), ("four", four)):
        ranks(layout.ranks).run(train_golden, golden, layout, str(tmp_path / name), f"--pretrained-checkpoint {start}")
    runs = [(records(tmp_path / name), full_tensors(tmp_path / name)) for name in ("four", "one")]
    compare(*runs)
    assert runs[0][1]["text_decoder.embedding.word_embeddings.weight"].shape[0] == 1004  # 1001 rows, padded


@pytest.mark.slow
@pytest.mark.parametrize("name", EIGHT)
def test_eight_ranks(ranks, golden, grouped, tmp_path, name):
    layout = EIGHT[name]
    start, wanted = grouped
    flags = f"--pretrained-checkpoint {start}"
    ranks(layout.ranks).run(train_golden, golden, layout, str(tmp_path), flags, timeout=600)
    compare((records(tmp_path), full_tensors(tmp_path)), wanted)
