import argparse
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.driver.arguments import (
    DriverArguments,
    add_arguments,
    from_namespace,
    refuse_unknown,
    with_virtual_stages,
)
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.platform import get_platform

get_platform("cpu")

from megatron.driver.initialize import initialize  # noqa: E402

REQUIRED = ["--lr", "1e-3", "--train-iters", "100"]

# The flags of the ancestor's pretrain launcher, with its values.
ANCESTOR = """
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --context-parallel-size 1 --micro-batch-size 8
    --global-batch-size 64 --seq-length 2048 --tokenizer-type NullTokenizer --vocab-size 32000
    --position-embedding-type rope --no-masked-softmax-fusion --lr 1.0e-3 --train-iters 10000 --lr-decay-style cosine
    --weight-decay 0.0 --lr-warmup-fraction 0.03 --clip-grad 0.0 --adam-beta1 0.9 --adam-beta2 0.999
    --no-gradient-accumulation-fusion --bf16 --use-flash-attn --use-fused-rotary-pos-emb --no-load-optim --no-load-rng
    --no-save-optim --no-save-rng --num-workers 8 --log-interval 1 --save-interval 5000 --eval-interval 5000
    --eval-iters 5000 --save save_dir --load save_dir --distributed-backend nccl
""".split()


def parse(*flags, world_size=1):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    namespace, unknown = parser.parse_known_args(list(flags))
    refuse_unknown(parser, unknown)
    return from_namespace(namespace, world_size=world_size)


def test_the_ancestors_launcher_flags():
    args = parse(*ANCESTOR, world_size=8)
    assert (args.data_parallel_size, args.micro_batch_size, args.global_batch_size) == (8, 8, 64)
    assert args.warmup_steps == 300
    assert args.decay_steps == 10000
    assert args.model_flags() == {"seq_length": 2048, "vocab_size": 32000}
    notes = "\n".join(args.notes())
    assert (args.eval_interval, args.eval_iters) == (5000, 5000)
    assert "--use-flash-attn (the platform picks its fastest exact attention kernel)" in notes


def test_arguments_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(*REQUIRED).lr = 1.0


def test_every_problem_is_listed_at_once():
    with pytest.raises(ConfigError) as error:
        parse("--lr", "-1", "--micro-batch-size", "0", "--bf16", "--fp16", "--finetune", "--save-interval", "5")
    message = str(error.value)
    for part in (
        "--lr is -1.0: expected at least 0",
        "--micro-batch-size is 0: expected at least 1",
        "--train-iters is required",
        "--bf16 and --fp16",
        "--finetune needs --load",
        "--save-interval is given without --save",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "nan"], "--lr is nan"),
        (["--min-lr", "1"], r"--min-lr is 1.0: expected at most --lr"),
        (["--lr-warmup-fraction", "1.5"], "--lr-warmup-fraction is 1.5"),
        (["--lr-warmup-fraction", "0.1", "--lr-warmup-iters", "3"], "keep one of them"),
        (["--lr-warmup-iters", "100"], "the warm-up takes 100 of 100 decay steps"),
        (["--lr-decay-style", "linear_warmup_step_lr"], "linear_warmup_step_lr needs --iters-per-epoch"),
        (
            ["--lr-decay-style", "linear_warmup_step_lr", "--iters-per-epoch", "0"],
            "--iters-per-epoch is 0: expected at",
        ),
        (["--iters-per-epoch", "5"], "--iters-per-epoch has no meaning with --lr-decay-style linear"),
        (["--lr-warmup-in-epoch"], "--lr-warmup-in-epoch has no meaning with --lr-decay-style linear"),
        (["--lr-decay-rate", "0.5"], "--lr-decay-rate has no meaning with --lr-decay-style linear"),
        (["--lr-decay-rate", "0"], "--lr-decay-rate is 0.0: expected above 0"),
        (["--lr-warmup-init", "1"], r"--lr-warmup-init is 1.0: expected at most --lr"),
        (["--loss-scale", "8"], "--loss-scale is for --fp16 only"),
        (["--initial-loss-scale", "1", "--min-loss-scale", "2"], "--initial-loss-scale is 1.0: expected at least"),
        (["--overlap-param-gather"], "--overlap-param-gather needs"),
        (["--ckpt-format", "torch"], "only torch_dist is supported"),
        (["--adam-beta2", "1"], "--adam-beta2 is 1.0: expected a value below 1"),
        (["--use-checkpoint-opt-param-scheduler", "--override-opt-param-scheduler"], "exclude each other"),
        (["--exit-on-missing-checkpoint"], "--exit-on-missing-checkpoint needs --load"),
        (["--tensor-model-parallel-size", "2"], r"1 process\(es\) cannot be divided by tensor 2 x pipeline 1"),
    ],
)
def test_bad_values(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse(*REQUIRED, *flags)


def test_unknown_flags_are_named_with_their_neighbours():
    with pytest.raises(ConfigError, match="unknown flag --micro-batchsize: did you mean --micro-batch-size"):
        parse(*REQUIRED, "--micro-batchsize", "3")
    with pytest.raises(ConfigError, match="'stray' belongs to no flag"):
        parse(*REQUIRED, "stray")
    with pytest.raises(ConfigError, match="unknown flag --zzz: see --help"):
        parse(*REQUIRED, "--zzz")


def test_batch_sizes_that_do_not_divide_name_the_nearest():
    with pytest.raises(ConfigError, match=r"60 cannot be divided by --micro-batch-size 8 x 4 .* = 32: take 32 or 64"):
        parse(*REQUIRED, "--micro-batch-size", "8", "--global-batch-size", "60", world_size=4)


@settings(deadline=None, max_examples=50)
@given(micro=st.integers(1, 9), world=st.integers(1, 9), global_batch=st.integers(1, 200))
def test_a_batch_size_is_taken_or_a_valid_one_is_named(micro, world, global_batch):
    flags = [*REQUIRED, "--micro-batch-size", str(micro), "--global-batch-size"]
    try:
        args = parse(*flags, str(global_batch), world_size=world)
    except ConfigError as error:
        named = str(error).rsplit("take ", 1)[1].split(" or ")
        assert all(parse(*flags, size, world_size=world).global_batch_size == int(size) for size in named)
    else:
        assert args.global_batch_size % (micro * world) == 0


def test_the_default_global_batch_is_one_micro_batch_per_rank():
    assert parse(*REQUIRED, "--micro-batch-size", "3", world_size=4).global_batch_size == 12


def test_warm_up_steps_are_rounded_up():
    args = parse("--lr", "1", "--train-iters", "8", "--lr-warmup-fraction", "0.03")
    assert args.warmup_steps == 1


def test_help_names_every_flag():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = parser.format_help()
    for field in dataclasses.fields(DriverArguments):
        if field.metadata:
            assert "--" + field.name.replace("_", "-") in text


def test_flags_of_checkpoints_need_each_other():
    flags = ["--keep-every", "4", "--save-interval-minutes", "0", "--preflight-timeout-seconds", "-1", "--async-save"]
    with pytest.raises(ConfigError) as error:
        parse(*REQUIRED, *flags)
    for message in (
        "--async-save is given without --save",
        "--keep-every is given without --keep-last",
        "--save-interval-minutes is given without --save",
        "--save-interval-minutes is 0.0: expected above 0",
        "--preflight-timeout-seconds is -1.0: expected above 0",
    ):
        assert message in str(error.value)


PIPELINE = [*REQUIRED, "--pipeline-model-parallel-size", "2", "--seq-length", "64"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            [*REQUIRED, "--num-virtual-stages-per-pipeline-rank", "2"],
            "--num-virtual-stages-per-pipeline-rank needs --pipeline-model-parallel-size above 1",
        ),
        (
            [*PIPELINE, "--num-virtual-stages-per-pipeline-rank", "2", "--num-layers-per-virtual-pipeline-stage", "2"],
            "--num-layers-per-virtual-pipeline-stage are both given: keep one",
        ),
        (
            [*PIPELINE, "--num-virtual-stages-per-pipeline-rank", "2", "--global-batch-size", "3"],
            "need a multiple of 2 micro-batches .*--global-batch-size 3 gives 3: take 4",
        ),
        (
            [*PIPELINE, "--num-virtual-stages-per-pipeline-rank", "0"],
            "--num-virtual-.* is 0: expected at least 1",
        ),
    ],
)
def test_refused_virtual_stages(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse(*flags, world_size=2)


def test_virtual_stages_by_their_layers():
    args = parse(*PIPELINE, "--num-layers-per-virtual-pipeline-stage", "2", "--global-batch-size", "4", world_size=2)
    assert with_virtual_stages(args, 8).num_virtual_stages_per_pipeline_rank == 2
    assert with_virtual_stages(args, 4).num_virtual_stages_per_pipeline_rank is None
    with pytest.raises(ConfigError, match="6 layers cannot be divided by .*-stage 2 x .*-size 2: take 1 or 3"):
        with_virtual_stages(args, 6)
    with pytest.raises(ConfigError, match="7 layers cannot .* use a divisor of the layers as pipeline size"):
        with_virtual_stages(args, 7)
    with pytest.raises(ConfigError, match="needs the layers of the model"):
        initialize(args, get_platform("cpu"))


def test_the_ancestors_name_of_virtual_stages():
    args = parse(*PIPELINE, "--virtual-pipeline-model-parallel-size", "2", "--global-batch-size", "2", world_size=2)
    assert args.num_virtual_stages_per_pipeline_rank == 2


def test_recomputation_is_in_the_model_config():
    with pytest.raises(ConfigError, match="unknown flag --recompute-method: .* keys of each part in the model config"):
        parse(*REQUIRED, "--recompute-method", "uniform")


def test_one_virtual_stage_is_none():
    args = parse(*PIPELINE, "--num-virtual-stages-per-pipeline-rank", "1", world_size=2)
    assert args.num_virtual_stages_per_pipeline_rank is None
