"""Which TextVQA question a stored LLaVA prompt asks; answers are matched to questions by it."""

OCR_START = "OCR tokens: "
OCR_LINE = "Reference OCR token: "


def question_of_prompt(prompt: str) -> str:
    """The question, lower-cased, of one of the three prompt forms that LLaVA's eval_textvqa knows.

    Raises ValueError for any other form.
    """
    if prompt.startswith(OCR_START):
        start, end = prompt.find("Question: "), prompt.find(" Short answer:")
        if 0 <= start < end:
            return prompt[start + len("Question: ") : end].lower()
    elif OCR_LINE in prompt:
        lines = prompt.split("\n")
        if len(lines) == 3:
            return (lines[1] if prompt.startswith(OCR_LINE) else lines[0]).lower()
    elif prompt.count("\n") == 1:
        return prompt.split("\n")[0].lower()
    raise ValueError(
        f"found the prompt {prompt[:80]!r}; expected a question, at most one line of OCR tokens, and an instruction."
    )
