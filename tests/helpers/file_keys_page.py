"""The section of docs/weights.md that shows what is known of each file's keys."""

import textwrap

from mindspeed_mm.config.file_keys import COMMON, OLD_OPTIONS, FileKeys
from mindspeed_mm.data.processor_keys import PROCESSOR_CONFIG, PROCESSOR_TABLES
from mindspeed_mm.data.tokenizer_keys import GENERATION_CONFIG, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG
from mindspeed_mm.models.config_keys import TABLES
from mindspeed_mm.models.part import all_parts

BEGIN, END = "<!-- keys: made by tests/helpers/file_keys_page.py -->", "<!-- end of keys -->"


def tables() -> list[FileKeys]:
    """All tables in the order of the page."""
    parts = [part for slot in ("text_decoder", "vision_encoder") for part in all_parts(slot).values()]
    own = [part.keys for part in parts if part.keys is not None]
    files = [GENERATION_CONFIG, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, *PROCESSOR_TABLES, PROCESSOR_CONFIG]
    return [*TABLES, *own, *files]


def section() -> str:
    """The text between the marks, both included."""
    lines = [BEGIN, "", "| file | honoured | refused unless | harmless |", "|---|---|---|---|"]
    found = tables()
    common = frozenset((*COMMON, *OLD_OPTIONS))
    for table in found:
        cells = (
            _list(table.honoured),
            "; ".join(f"`{key}` {_values(values)}" for key, values in sorted(table.neutral.items())),
            _list(table.harmless - common) + (" and the common ones" if "architectures" in table.harmless else ""),
        )
        lines.append(f"| {table.what} | " + " | ".join(cells) + " |")
    told = f"The common ones, as far as they are not honoured: {_list(common)}."
    lines += ["", *textwrap.wrap(told, 110, break_long_words=False, break_on_hyphens=False), "", END]
    return "\n".join(lines)


def _list(keys) -> str:
    return ", ".join(f"`{key}`" for key in sorted(keys))


def _values(values) -> str:
    shown = [str(value).lower() if isinstance(value, bool) else repr(value) for value in values if value is not None]
    return " or ".join(shown) or "null"
