"""Convert a CLIP vision encoder into converted_clip.pt.

Example: python examples/llava1.5/clip_converter.py --download-root ViT-L-14-336px.pt --output weights
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
        "--download-root",
        type=Path,
        required=True,
        help="OpenAI's CLIP archive (.pt), or any other layout of a vision encoder",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for converted_clip.pt; it is created")
    parser.add_argument(
        "--num-attention-heads", type=int, help="heads of the vision encoder (default: its config, or width / 64)"
    )
    add_dtype(parser, "fp32")
    flags = parser.parse_args()
    return run(
        "vision_encoder",
        flags.download_root,
        flags.output,
        dtype=flags.dtype,
        num_attention_heads=flags.num_attention_heads,
    )


if __name__ == "__main__":
    sys.exit(main())
