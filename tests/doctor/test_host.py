"""Versions, variables and cards: what is right, what is told, what is refused."""

import pytest

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.host import cards, variables, versions
from mindspeed_mm.host.finding import Finding, worst


def have(monkeypatch, **installed):
    """Pretend that these versions are installed; the rest stays as it is."""
    real = versions.installed
    given = {name.replace("_", "-") if name != "torch_npu" else name: version for name, version in installed.items()}
    monkeypatch.setattr(versions, "installed", lambda package: given[package] if package in given else real(package))


def test_what_the_tests_run_with_is_in_the_table():
    assert [finding.level for finding in versions.look() if finding.name != "Python"] == ["ok", "ok", "ok"]


@pytest.mark.parametrize(
    ("package", "version", "reason"),
    [
        ("Python", "3.9.18", r"Python 3.9.18: does not work, since the code uses syntax of 3.10"),
        ("torch", "2.4.1+cpu", r"torch 2.4.1\+cpu: does not work, since its scaled_dot_product_attention"),
        ("megatron-core", "0.12.0", "megatron-core 0.12.0: does not work, since nobody ran it here"),
        ("megatron-core", "0.15.3", "megatron-core 0.15.3: does not work, since its distributed optimizer stores"),
        ("megatron-core", None, "megatron-core not installed: pip install"),
    ],
)
def test_known_broken_versions_are_refused(monkeypatch, package, version, reason):
    have(monkeypatch, **{package.replace("-", "_"): version})
    with pytest.raises(ConfigError, match=reason):
        versions.check("cpu")


def test_other_versions_are_told_with_the_nearest_set(monkeypatch):
    have(monkeypatch, megatron_core="0.17.2", Python="3.11.7")
    told = []
    monkeypatch.setattr(versions.logger, "warning", lambda text, finding: told.append(text % finding))
    versions.check("cpu")
    (text,) = told
    assert text.startswith("megatron-core 0.17.2: not among the versions that were run; the nearest set")
    assert "torch 2.13.0, megatron-core 0.16.1" in text
    monkeypatch.setenv("RANK", "1")
    versions.check("cpu")
    assert len(told) == 1


def test_torch_and_torch_npu_belong_together(monkeypatch):
    have(monkeypatch, torch_npu=None)
    assert versions.torch_npu_finding() is None
    have(monkeypatch, torch_npu="2.7.1.post2", torch="2.7.1+cpu")
    assert versions.torch_npu_finding() == Finding("versions", "torch_npu", "2.7.1.post2")
    have(monkeypatch, torch_npu="2.7.1", torch="2.13.0")
    found = versions.torch_npu_finding()
    assert found.level == "bad" and "was made for torch 2.7.1, found torch 2.13.0: install torch 2.7.1" in str(found)


@pytest.mark.parametrize(
    ("name", "good", "wrong", "expected"),
    [
        ("ASCEND_RT_VISIBLE_DEVICES", "0,1,2", "0,1,", "numbers of NPUs"),
        ("ASCEND_RT_VISIBLE_DEVICES", "7", "1,1", "name each NPU once"),
        ("ASCEND_SLOG_PRINT_TO_STDOUT", "0", "yes", "one of 0, 1"),
        ("ASCEND_GLOBAL_LOG_LEVEL", "4", "5", "one of 0, 1, 2, 3, 4"),
        ("TASK_QUEUE_ENABLE", "2", "3", "one of 0, 1, 2"),
        ("COMBINED_ENABLE", "1", "2", "one of 0, 1"),
        ("CPU_AFFINITY_CONF", "1,npu0:0-1", "3", "0, 1 or 2"),
        ("HCCL_CONNECT_TIMEOUT", "120", "119", r"an integer in \[120, 7200\] s"),
        ("HCCL_CONNECT_TIMEOUT", "7200", "7201", r"an integer in \[120, 7200\] s"),
        ("HCCL_CONNECT_TIMEOUT", "1200", "20m", r"an integer in \[120, 7200\] s"),
        ("HCCL_EXEC_TIMEOUT", "0", "-1", "an integer in"),
        ("NPUS_PER_NODE", "8", "0", "an integer of at least 1"),
        ("MASTER_PORT", "29500", "65536", "an integer in"),
    ],
)
def test_variables_have_ranges(name, good, wrong, expected):
    variables.check({name: good, "HOME": "anything"})
    with pytest.raises(ConfigError, match=f"{name} '{wrong}': .*{expected}"):
        variables.check({name: wrong})


def test_every_wrong_variable_is_told_at_once():
    with pytest.raises(ConfigError, match=r"(?s)TASK_QUEUE_ENABLE.*HCCL_CONNECT_TIMEOUT"):
        variables.check({"HCCL_CONNECT_TIMEOUT": "5", "TASK_QUEUE_ENABLE": "9"})


def test_cards():
    assert cards.judge("Ascend910B3") == ("ok", "")
    assert cards.judge("Ascend910_9382")[0] == "ok"
    assert cards.judge("Ascend910ProB")[0] == cards.judge("Ascend310P3")[0] == "bad"
    assert cards.judge("Ascend1234")[0] == "warn"


def test_the_worst_level_counts():
    assert worst([]) == "ok"
    assert worst([Finding("", "a", "", "warn"), Finding("", "b", ""), Finding("", "c", "", "bad")]) == "bad"
