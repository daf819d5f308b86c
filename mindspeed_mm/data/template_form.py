"""What a conversation template says: the forms of its turns, its marks and its stop strings."""

import hashlib
from functools import cached_property

from mindspeed_mm.config.load import StrictModel

SLOT = "{text}"
SYSTEM_SLOT = "{system}"


class Template(StrictModel):
    """A template's file. `{text}` stands for the text of the turn, once in each form. Wordings are those of LLaVA's
    conversation.py where it has the template."""

    aliases: tuple[str, ...] = ()
    prefix: str = ""
    """What comes before the first turn."""

    human: str
    human_first: str | None = None
    """The first human turn where it differs (a system text inside)."""

    with_system: str | None = None
    """Start of a conversation that brings its own system text: prefix and first human turn with `{system}` and
    `{text}`; None: such a conversation is refused."""

    human_empty: str | None = None
    """A human turn without text; None: as any other."""

    gpt_header: str = ""
    """Opens an answer; not supervised."""

    gpt: str
    """An answer behind its header, end marker included; supervised."""

    gpt_empty: str = ""
    """An answer without text (LLaVA leaves the end marker out); not supervised (except for captions, as in LLaVA)."""

    gpt_footer: str = ""
    """What follows an answer; not supervised."""

    suffix: str = ""
    """What ends a conversation; not supervised."""

    end: str
    """The end marker of an answer: one token, unless `end_is_text`."""

    end_is_text: bool = False
    """The end marker is ordinary text, of any number of tokens."""

    stop: tuple[str, ...]
    """Strings that end generation."""

    captions_only: bool = False
    """The template is one image and its caption: the human text is dropped, exactly one answer follows."""

    @cached_property
    def digest(self) -> str:
        """Changes with any field."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()
