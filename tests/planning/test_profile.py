"""--profile: the trace, and a table whose lines add up to the step."""

import json

import pytest

from megatron.driver.arguments import add_arguments, from_namespace
from mindspeed_mm.errors import ConfigError


def span(name, start, length, category="user_annotation"):
    return {"ph": "X", "name": name, "ts": start, "dur": length, "cat": category}


def test_every_moment_belongs_to_one_line(single_process):
    from megatron.driver.profiling import shares, table

    events = [
        span("step: whole step", 0, 100),
        span("step: data wait", 0, 10),
        span("step: backward", 10, 70),
        span("step: decoder", 20, 20),
        span("step: optimizer", 85, 10),
        span("aten::mm", 20, 15, "cpu_op"),
        # 5 of these 30 run beside a matrix product, 25 do not: 5 inside the decoder, 20 in the backward region
        span("gloo:all_reduce", 30, 30, "cpu_op"),
        span("step: decoder", 20, 20, "gpu_user_annotation"),
    ]
    found = shares(events)
    assert found == {
        "communication": 25,
        "backward": 30,
        "decoder": 15,
        "data wait": 10,
        "optimizer": 10,
        "other (host)": 10,
    }
    assert sum(found.values()) == 100
    assert "100.00" in table(events).splitlines()[-1]


def test_kernels_decide_on_a_device(single_process):
    from megatron.driver.profiling import shares

    events = [
        span("step: whole step", 0, 100),
        span("aten::mm", 0, 100, "cpu_op"),
        span("ampere_sgemm", 0, 40, "kernel"),
        span("ncclDevKernel_AllReduce", 30, 30, "kernel"),
    ]
    assert shares(events) == {"other (host)": 80, "communication": 20}


def profiled(folder, world_size):
    """Train a tiny language model with --profile on this rank."""
    import logging

    from megatron.driver import profiling
    from tests.helpers.tiny_training import arguments, run

    told = []
    profiling.logger.addHandler(handler := logging.Handler())
    handler.emit = lambda record: told.append(record.getMessage())
    profiling.logger.setLevel(logging.INFO)
    flags = ["--save", folder, "--profile", "--profile-step-start", "2", "--profile-step-end", "4"]
    run(arguments(*flags, world_size=world_size))
    profiling.logger.removeHandler(handler)
    return told


@pytest.mark.parametrize("size", [1, 2])
def test_a_run(ranks, tmp_path, size):
    told, *others = ranks(size).run(profiled, str(tmp_path), size)
    assert all(not lines for lines in others)  # --profile-ranks is 0
    path = tmp_path / "profile" / "trace_rank0_step2.json"
    events = json.loads(path.read_text())["traceEvents"]
    assert sum(event.get("name") == "step: whole step" for event in events) == 2
    (message,) = [lines for lines in told if lines.startswith("profile of rank 0")]
    lines = message.splitlines()[2:]
    percent = {line[:24].strip(): float(line.split()[-1]) for line in lines}
    assert percent.pop("sum") == 100
    assert sum(percent.values()) == pytest.approx(100, abs=0.1)
    assert {"backward", "optimizer", "data wait"} <= set(percent)
    assert ("communication" in percent) == (size > 1) or size == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--profile --save x --profile-step-start 5 --profile-step-end 5", "--profile-step-end 5: expected"),
        ("--profile --save x --profile-step-start 99 --profile-step-end 100", "behind --train-iters 9"),
        ("--profile --save x --profile-step-start 1 --profile-ranks 7", "--profile-ranks 7: expected a rank below 1"),
        ("--profile --profile-step-start 1", "--profile needs a folder"),
    ],
)
def test_refused_flags(flags, message):
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ConfigError, match=message):
        from_namespace(parser.parse_args(f"--lr 1 --train-iters 9 {flags}".split()), world_size=1)


class TestTools:
    """The ancestor's tools.json."""

    def namespace(self):
        import argparse

        return argparse.Namespace(
            profile=False, profile_ranks=(0,), profile_step_start=10, profile_step_end=12, profile_dir=None
        )

    def apply(self, folder, tool):
        from mindspeed_mm.config.tools import apply_tools

        (folder / "tools.json").write_text(json.dumps(tool))
        namespace = self.namespace()
        apply_tools(namespace, folder / "tools.json")
        return namespace

    def test_static_profile(self, tmp_path, caplog):
        caplog.set_level("INFO")
        static = {"level": "level1", "with_stack": False, "start_step": 3, "end_step": 5, "save_path": "traces"}
        namespace = self.apply(tmp_path, {"profile": {"enable": True, "ranks": [-1], "static_param": static}})
        assert (namespace.profile, namespace.profile_ranks) == (True, (-1,))
        assert (namespace.profile_step_start, namespace.profile_step_end) == (3, 5)
        assert namespace.profile_dir == "traces"
        assert "--mm-tool: level choose counters" in caplog.text

    def test_switched_off(self, tmp_path):
        off = {"enable": False, "profile_type": "dynamic", "static_param": {"with_stack": True}}
        assert not self.apply(tmp_path, {"profile": off, "memory_profile": {"enable": False}}).profile

    def test_the_example(self):
        from mindspeed_mm.config.tools import apply_tools

        namespace = self.namespace()
        apply_tools(namespace, "examples/llava1.5/tools.json")
        assert not namespace.profile

    @pytest.mark.parametrize(
        ("tool", "message"),
        [
            ({"memory_profile": {"enable": True}}, "memory_profile.enable"),
            ({"profile": {"enable": True, "profile_type": "dynamic"}}, 'profile_type is "dynamic"'),
            ({"profile": {"enable": True, "static_param": {"with_stack": True}}}, "with_stack is true: expected false"),
            ({"profile": {"enable": True, "static_param": {"with_cpu": False}}}, "with_cpu is false: expected true"),
            ({"profile": {"ranks": "all"}}, "profile.ranks"),
            ({"profiler": {}}, "profiler.*profile"),
        ],
    )
    def test_refused(self, tmp_path, tool, message):
        with pytest.raises(ConfigError, match=message):
            self.apply(tmp_path, tool)
