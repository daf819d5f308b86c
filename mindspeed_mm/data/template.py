"""Conversation templates as data.

Templates are JSON files in the folder `templates`; a new one is a new file. Other packages register the path of
theirs under PACKAGE. The name "tokenizer" stands for the chat
template that comes with the tokenizer (see chat_template.py). What is made of them: rendering.py and encode.py.
"""

from functools import lru_cache
from pathlib import Path

from mindspeed_mm.config.load import load_config, nearest
from mindspeed_mm.data.template_form import Template
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import TemplateError
from mindspeed_mm.registry import registered

FOLDER = Path(__file__).parent / "templates"

PACKAGE = "mindspeed_mm.data.templates"
"""Where the registry keeps templates of other packages."""

OWN_TEMPLATE = "tokenizer"
"""The name that stands for the tokenizer's own chat template."""


@lru_cache(maxsize=1)
def _own_templates() -> dict[str, Template]:
    """Every template of the folder by its name (the file's) and its aliases."""
    found: dict[str, Template] = {}
    for path in sorted(FOLDER.glob("*.json")):
        _add(found, path.stem, path)
    return found


def _templates() -> dict[str, Template]:
    """The folder's templates and those that other packages registered: paths of JSON files."""
    further = registered(PACKAGE)
    if not further:
        return _own_templates()
    found = dict(_own_templates())
    for name, path in further.items():
        _add(found, name, path)
    return found


def _add(found: dict[str, Template], name: str, path: Path) -> None:
    template = load_config(Template, path, what="template")
    for each in (name, *template.aliases):
        if each in found:
            raise TemplateError(f'the template name "{each}" is used twice, the second time in {path}.')
        found[each] = template


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
        from mindspeed_mm.data.chat_template import template_from_tokenizer  # imports jinja2, for this name alone

        return template_from_tokenizer(tokenizer)
    templates = _templates()
    if template not in templates:
        close = nearest(template, template_names())
        hint = f'did you mean "{close}"?' if close else f"known: {', '.join(sorted(templates))}"
        raise TemplateError(f'unknown template "{template}"; {hint}')
    return templates[template]
