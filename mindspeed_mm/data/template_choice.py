"""Which template a model's prompts have: the first of what the user says, the checkpoint's own record, its tokenizer's
chat template, and the family's usual one."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.template import OWN_TEMPLATE, get_template
from mindspeed_mm.data.template_form import Template
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import TemplateError

logger = logging.getLogger(__name__)

DEFAULT_TEMPLATE = "v1"
"""The template that LLaVA-1.5 is tuned with: of LLaVA's checkpoints and of data without a model."""


@dataclass(frozen=True)
class ChosenTemplate:
    """A template by name, and why it was taken."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def choose_template(
    said: str | None = None,
    record: str | None = None,
    tokenizer: Tokenizer | None = None,
    usual: str | None = DEFAULT_TEMPLATE,
    chats: bool = True,
) -> ChosenTemplate:
    """The template of a model's prompts.

    Args:
        said: what the user named.
        record: what the checkpoint says that it was trained with; a template of captions (stage 1) answers nothing and
            does not count.
        tokenizer: whose own chat template comes next. One that cannot be read is told, and `usual` is taken.
        usual: the family's; None: it has none.
        chats: whether a chat template of the tokenizer is the model's, and not that of its decoder alone.

    Raises:
        TemplateError: nothing gives a template, or a name is unknown.
    """
    if said is not None:
        return ChosenTemplate(said, "as asked for")
    if record is not None and (record == OWN_TEMPLATE or not get_template(record).captions_only):
        return ChosenTemplate(record, "the checkpoint was trained with it")
    problem = "the tokenizer has no chat template"
    if chats and tokenizer is not None and tokenizer.chat_templates:
        try:
            get_template(OWN_TEMPLATE, tokenizer)
        except TemplateError as error:
            problem = str(error).rstrip(".")
            if usual is not None:
                logger.warning("%s; the template %s is taken in its place", problem, usual)
        else:
            return ChosenTemplate(OWN_TEMPLATE, "the tokenizer's own chat template")
    if usual is None:
        raise TemplateError(f"no template is known for this model: {problem}. Name one (--template, template_name).")
    return ChosenTemplate(usual, "the usual one of the model's family")


def with_template(
    config: DataConfig, tokenizer: Tokenizer, usual: str | None = DEFAULT_TEMPLATE, chats: bool = True
) -> DataConfig:
    """A data config whose template_name is filled in, and told where it was not given. Raises TemplateError as
    `choose_template`."""
    parameters = config.dataset_param
    if parameters.template_name is not None:
        return config
    chosen = choose_template(None, None, tokenizer, usual, chats)
    logger.info("template: %s", chosen)
    return config.model_copy(update={"dataset_param": parameters.model_copy(update={"template_name": chosen.name})})


def template_fact(name: str, tokenizer: Tokenizer) -> str:
    """What identifies a template in a fingerprint: its name, of a tokenizer's own also its contents."""
    return f"{name} {get_template(name, tokenizer).digest[:16]}" if name == OWN_TEMPLATE else name


def template_of(config: DataConfig, tokenizer: Tokenizer) -> Template:
    """The template of a data config."""
    name = config.dataset_param.template_name
    return get_template(choose_template(None, None, tokenizer).name if name is None else name, tokenizer)
