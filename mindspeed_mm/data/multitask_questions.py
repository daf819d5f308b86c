"""How MiniGPT-v2 asks in its training sets: pools of questions, with the tag of the task in front.

The texts are the original's (the `instruction_pool` of each data set in minigpt4/datasets/datasets), since its
checkpoints know these. Blanks at their ends are left out: a template has its own.
"""

from __future__ import annotations

from mindspeed_mm.data.grounding.item import EXPRESSION, OBJECTS, QUESTION

VQA = (
    f"[vqa] {QUESTION}",
    f"[vqa] Based on the image, respond to this question with a short answer: {QUESTION}",
)

CAPTION = tuple(
    f"[caption] {text}"
    for text in (
        "Briefly describe this image.",
        "Provide a concise depiction of this image.",
        "Present a short description of this image.",
        "Summarize this image in a few words.",
        "A short image caption:",
        "A short image description:",
        "A photo of",
        "An image that shows",
        "Write a short description for the image.",
        "Write a description for the photo.",
        "Provide a description of what is presented in the photo.",
        "Briefly describe the content of the image.",
        "Can you briefly explain what you see in the image?",
        "Could you use a few words to describe what you perceive in the photo?",
        "Please provide a short depiction of the picture.",
        "Using language, provide a short account of the image.",
        "Use a few words to illustrate what is happening in the picture.",
    )
)

REFER = tuple(
    f"[refer] {text}"
    for text in (
        EXPRESSION,
        f"give me the location of {EXPRESSION}",
        f"where is {EXPRESSION} ?",
        f"from this image, tell me the location of {EXPRESSION}",
        f"the location of {EXPRESSION} is",
        f"could you tell me the location for {EXPRESSION} ?",
        f"where can I locate the {EXPRESSION} ?",
    )
)

IDENTIFY = tuple(
    f"[identify] {text}"
    for text in (
        OBJECTS,
        f"what object is in this location {OBJECTS}",
        f"identify the object present at this location {OBJECTS}",
        f"what is it in {OBJECTS}",
        f"describe this object in {OBJECTS}",
        f"this {OBJECTS} is",
        f"the object in {OBJECTS} is",
    )
)

GROUNDING = tuple(
    f"[grounding] {text}"
    for text in (
        "please describe this image in details",
        "describe this image as detailed as possible",
        "summarize this image in details",
        "give a thorough description of what you see in this image",
    )
)

DETECTION = (f"[detection] {EXPRESSION}",)
