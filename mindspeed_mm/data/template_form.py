"""What a conversation template says: the forms of its turns, its marks and its stop strings."""

import hashlib
from functools import cached_property
from typing import Literal

import pydantic

from mindspeed_mm.config.load import StrictModel
from mindspeed_mm.constants import IMAGE_TOKEN

SLOT = "{text}"
SYSTEM_SLOT = "{system}"
IMAGES_SLOT = "{images}"


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

    ends_with_eos: bool = False
    """Behind that stands the token that ends a sequence, supervised."""

    end: str
    """The end marker of an answer: one token, unless `end_is_text`."""

    end_is_text: bool = False
    """The end marker is ordinary text, of any number of tokens."""

    stop: tuple[str, ...]
    """Strings that end generation."""

    captions_only: bool = False
    """The template is one image and its caption: the human text is dropped, exactly one answer follows."""

    captions_in_context: bool = False
    """With captions_only: further images with their captions may stand before."""

    asks_for_short_answers: bool = False
    """The form itself asks for a short answer; benchmarks leave LLaVA's words for that out."""

    image: str | None = None
    """What an image becomes, with one `<image>` in it, such as `<Img><image></Img> `. The images of a human turn then
    stand at `{images}` in its form, and white space around them goes with them. None: they stay where the text has
    them."""

    bos_behind_images: bool = False
    """The token that begins a sequence stands behind the images with which it starts (BLIP-2's processor)."""

    answers_apart: bool = False
    """An answer is encoded by itself, and so is what follows it (MiniGPT-4): for tokenizers that put a space before
    every text, there is one more before it."""

    trimmed: tuple[Literal["human", "gpt", "system"], ...] = ()
    """Turns from whose text white space at both ends is taken, as many chat templates do (`content | trim`)."""

    @pydantic.model_validator(mode="after")
    def _images_have_a_place(self) -> "Template":
        forms = {"human": self.human, "human_first": self.human_first, "with_system": self.with_system}
        for name, form in forms.items():
            if form is not None and form.count(IMAGES_SLOT) != (self.image is not None):
                raise ValueError(
                    f"{name} is {form!r}; expected {IMAGES_SLOT} once in a template with `image`, and nowhere else"
                )
        if self.image is not None and self.image.count(IMAGE_TOKEN) != 1:
            raise ValueError(f"image is {self.image!r}; expected {IMAGE_TOKEN} in it, once")
        return self

    @cached_property
    def digest(self) -> str:
        """Changes with any field."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()
