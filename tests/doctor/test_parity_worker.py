"""What the processes of `doctor --parity` write, and what is said of one that ends before."""

import pytest
import torch

from mindspeed_mm.doctor.parity import run
from mindspeed_mm.doctor.parity.operators import compute
from mindspeed_mm.doctor.parity.verdict import Collected
from mindspeed_mm.doctor.parity.worker import read, write
from mindspeed_mm.errors import TrainingError
from mindspeed_mm.platform import get_platform


def test_results_that_share_memory_are_written(tmp_path):
    """As both gradients of a sum do."""
    cases = dict(compute(get_platform("cpu"), torch.float32))
    values = cases["operator: add_rms_norm"]()
    assert {"operator: add_rms_norm: gradient 0", "operator: add_rms_norm: gradient 1"} <= values.keys()
    values["turned"] = torch.arange(6.0).view(2, 3).T
    write(Collected(values, {"a case": "failed"}), tmp_path)
    found = read(tmp_path)
    assert found.errors == {"a case": "failed"} and found.values.keys() == values.keys()
    assert all(torch.equal(found.values[name], value) for name, value in values.items())


PREFIXED = "[rank0]: [rank0]: ValueError: no\\n[rank0]: [rank0]: \\n"


@pytest.mark.parametrize(("said", "told"), [(PREFIXED, "ValueError: no"), ("", "nothing was said")])
def test_the_last_words_of_a_process_are_told(tmp_path, monkeypatch, said, told):
    monkeypatch.setattr(run, "WORKER", "own")
    (tmp_path / "own.py").write_text(f"import sys; sys.exit(sys.stderr.write('{said}') * 0 + 3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(TrainingError, match=f"cpu ended with exit code 3: {told}"):
        run._wait([run._start("cpu", tmp_path)], "cpu")
