"""--cfg-options; what it does stands in config/options.py, which --help does not wait for."""

from __future__ import annotations

from typing import Any


def add_cfg_options(group: Any) -> None:
    """The flag, for commands that read --mm-model and --mm-data."""
    group.add_argument(
        "--cfg-options",
        nargs="+",
        action="extend",
        metavar="FILE.KEY=VALUE",
        help="change values of the files: model.text_decoder.freeze=true data.dataloader_param.shuffle=false",
    )
