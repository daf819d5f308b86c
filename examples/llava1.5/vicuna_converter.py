"""Convert a Hugging Face Llama or Vicuna folder into converted_vicuna.pt.

Example: python examples/llava1.5/vicuna_converter.py --load-dir vicuna-7b-v1.5 --save-dir weights
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
    parser.add_argument("--load-dir", type=Path, required=True, help="folder with config.json and the weights")
    parser.add_argument("--save-dir", type=Path, required=True, help="folder for converted_vicuna.pt; it is created")
    parser.add_argument(
        "--trust-remote-code",
        choices=("True", "False"),
        default="False",
        help="accepted because the guide gives it; no code of the folder is ever run, whatever it says",
    )
    add_dtype(parser, "keep")  # the ancestor rounds to bf16; a bf16 run casts on loading anyway
    flags = parser.parse_args()
    return run("text_decoder", flags.load_dir, flags.save_dir, dtype=flags.dtype)


if __name__ == "__main__":
    sys.exit(main())
