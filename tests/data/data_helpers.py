"""Records for the data tests."""


def make_record(number: int, image=None, text: str | None = None) -> dict:
    """One question and answer; with `image` (a name or a list of names) as many placeholders."""
    count = 0 if image is None else 1 if isinstance(image, str) else len(image)
    record = {
        "id": f"r{number}",
        "conversations": [
            {"from": "human", "value": "<image>\n" * count + f"What is number {number}?"},
            {"from": "gpt", "value": text or f"It is {number}."},
        ],
    }
    return record if image is None else record | {"image": image}
