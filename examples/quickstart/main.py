"""The quickstart: data, weights, pretraining, fine-tuning with an interruption, evaluation and inference on CPU.

Started by run.sh, which makes the environment first. What is done is noted in OUT/state.json: a run that was stopped
goes on where it was, and a folder of another run is refused.
"""

import argparse
import sys
from pathlib import Path

from examples.quickstart.commands import StepError
from examples.quickstart.settings import FAST, FULL, Settings
from examples.quickstart.state import RunFolder, exclusive
from examples.quickstart.steps import STEPS, Run
from examples.quickstart.walk import ended, walk


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="examples/quickstart/run.sh",
        description="The main job end to end on real data, on CPU, in a few minutes.",
        epilog="example:\n  bash examples/quickstart/run.sh --out quickstart_out",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="quickstart_out", metavar="DIR", help="folder of all results (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="few steps: checks that all works, not the accuracy")
    parser.add_argument("--clean", action="store_true", help="throw away the run that DIR holds and start over")
    parser.add_argument("--relative-to", default=".", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def verdict(run: Run) -> None:
    """Raises StepError when the answers are not what this form of the quickstart must reach."""
    result, required = run.folder.result("evaluate"), run.settings.required_accuracy
    if required is None and result["unparsed"]:
        raise StepError(f"{result['unparsed']} answers are no option letter, expected none")
    if required is not None and result["accuracy"] < required:
        raise StepError(f"the accuracy is {result['accuracy']:.4f}, at least {required} is required")


def quickstart(out: Path, settings: Settings, clean: bool) -> dict:
    """Walk all steps in the folder `out` and return the last line's values."""
    with exclusive(out):
        run = Run(RunFolder(out, settings.fingerprint()), settings)
        run.folder.open(clean)
        seconds = walk(run.folder, STEPS, run)
        verdict(run)
        result = run.folder.result("evaluate")
        act = run.folder.result("lora")
        return {
            "accuracy": result["accuracy"],
            "n": result["n"],
            **({"odd_or_even": {"before": act["before"], "after": act["after"]}} if act else {}),
            "seconds": round(seconds, 1),
            "checkpoint": run.folder.result("stage2")["checkpoint"],
        }


def main(argv: list[str] | None = None) -> int:
    """0 on success, 1 with a message otherwise, 130 when interrupted; the last line is JSON on success."""
    options = parse(argv)
    out = (Path(options.relative_to) / options.out).resolve()
    return ended("quickstart", out, lambda: quickstart(out, FAST if options.fast else FULL, options.clean))


if __name__ == "__main__":
    sys.exit(main())
