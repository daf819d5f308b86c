"""Conversation templates as data.

Templates are JSON files in the folder `templates`; a new one is a new file. The name "tokenizer" stands for the chat
template that comes with the tokenizer (see chat_template.py). What is made of them: rendering.py and encode.py.
"""

import hashlib
from functools import cached_property, lru_cache
from pathlib import Path

from mindspeed_mm.config.load import StrictModel, load_config, nearest
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import TemplateError

FOLDER = Path(__file__).parent / "templates"

OWN_TEMPLATE = "tokenizer"
"""The name that stands for the tokenizer's own chat template."""

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


@lru_cache(maxsize=1)
def _templates() -> dict[str, Template]:
    """Every template by its name (the file's) and its aliases."""
    found: dict[str, Template] = {}
    for path in sorted(FOLDER.glob("*.json")):
        template = load_config(Template, path, what="template")
        for name in (path.stem, *template.aliases):
            if name in found:
                raise TemplateError(f'the template name "{name}" is used twice, the second time in {path.name}.')
            found[name] = template
    return found


def template_names() -> list[str]:
    """Names and aliases of all templates."""
    return sorted([*_templates(), OWN_TEMPLATE])


def get_template(template: str | Template, tokenizer: Tokenizer | None = None) -> Template:
    """The template of a name or alias (a Template is returned as it is).

    "tokenizer" is the chat template of the `tokenizer` that is given. Raises TemplateError for an unknown name, or
    where the tokenizer has no chat template or one that is not made of turns.
    """
    if isinstance(template, Template):
        return template
    if template == OWN_TEMPLATE:
        if tokenizer is None:
            raise TemplateError('the template "tokenizer" needs the tokenizer that brings it; name another one here.')
        from mindspeed_mm.data.chat_template import template_from_tokenizer

        return template_from_tokenizer(tokenizer)
    templates = _templates()
    if template not in templates:
        close = nearest(template, template_names())
        hint = f'did you mean "{close}"?' if close else f"known: {', '.join(sorted(templates))}"
        raise TemplateError(f'unknown template "{template}"; {hint}')
    return templates[template]
