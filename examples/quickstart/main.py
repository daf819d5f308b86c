"""The quickstart: data, weights, pretraining, fine-tuning with an interruption, evaluation and inference on CPU.

Started by run.sh, which makes the environment first. What is done is noted in OUT/state.json: a run that was stopped
goes on where it was, and a folder of another run is refused.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from examples.quickstart.commands import StepError, say
from examples.quickstart.settings import FAST, FULL, Settings
from examples.quickstart.state import FolderError, RunFolder, exclusive
from examples.quickstart.steps import STEPS, Run


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


def walk(run: Run) -> float:
    """All steps that are not done yet; returns the seconds that all steps took, earlier runs included."""
    for number, (name, title, step) in enumerate(STEPS, start=1):
        done = run.folder.result(name)
        say(f"\n[{number}/{len(STEPS)}] {title}" + (": done before" if done is not None else ""))
        if done is None:
            start = time.monotonic()
            result = step(run)
            run.folder.finish(name, {**result, "seconds": round(time.monotonic() - start, 1)})
    return sum(run.folder.result(name)["seconds"] for name, _, _ in STEPS)


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
        seconds = walk(run)
        verdict(run)
        result = run.folder.result("evaluate")
        return {
            "accuracy": result["accuracy"],
            "n": result["n"],
            "seconds": round(seconds, 1),
            "checkpoint": run.folder.result("stage2")["checkpoint"],
        }


def main(argv: list[str] | None = None) -> int:
    """0 on success, 1 with a message otherwise, 130 when interrupted; the last line is JSON on success."""
    options = parse(argv)
    out = (Path(options.relative_to) / options.out).resolve()
    try:
        result = quickstart(out, FAST if options.fast else FULL, options.clean)
    except (StepError, FolderError) as error:
        sys.stdout.flush()
        sys.stderr.write(f"\nquickstart: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nquickstart: interrupted; the same command goes on where it was\n")
        return 130
    say(f"\nEverything is in {out}")
    say(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
