"""Convert LLaVA's mm_projector.bin into mlp.pt.

Example: python examples/llava1.5/mlp_converter.py --load-file mm_projector.bin --output weights
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the scripts run from a checkout that is not installed, too

from checkpoint_converters.script import add_dtype, run  # noqa: E402


def main() -> int:
    """Parse the flags and convert; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--load-file", "--ckpt-path", type=Path, required=True, help="mm_projector.bin, or any other layout of one"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("."), help="folder for mlp.pt; it is created (default: here)"
    )
    add_dtype(parser, "keep")
    flags = parser.parse_args()
    return run("vision_projector", flags.load_file, flags.output, dtype=flags.dtype)


if __name__ == "__main__":
    sys.exit(main())
