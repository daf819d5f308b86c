"""The quickstart's numbers, in its full and its short form."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, besides the code."""

    form: str
    stage1_steps: int
    stage2_steps: int
    lora_steps: int
    save_interval: int
    interrupt_at: int
    """Stage 2 is killed once this iteration is logged, which lies behind a checkpoint."""

    required_accuracy: float | None
    """Share of the held-out questions that must be right; None where training is too short to ask for one."""

    required_drop: float
    """The mean loss of a stage's last tenth must be below this share of its first tenth's."""

    questions_per_digit: int = 4
    global_batch_size: int = 32
    stage1_lr: float = 1e-3
    stage2_lr: float = 1e-3
    lora_lr: float = 3e-3
    adam_beta2: float = 0.98
    warmup_fraction: float = 0.03
    seed: int = 1234

    def fingerprint(self) -> str:
        """Changes with any setting and with the code that makes data and models."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for name in ("make_data.py", "make_models.py", "configs.py"):
            digest.update(Path(__file__).with_name(name).read_bytes())
        return digest.hexdigest()[:16]


FULL = Settings(
    form="full",
    stage1_steps=250,
    stage2_steps=1000,
    lora_steps=200,
    save_interval=300,
    interrupt_at=340,
    required_accuracy=0.90,
    required_drop=0.5,
)
FAST = Settings(
    form="fast",
    stage1_steps=60,
    stage2_steps=80,
    lora_steps=10,
    save_interval=30,
    interrupt_at=40,
    required_accuracy=None,
    required_drop=0.7,
)
