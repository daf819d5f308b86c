"""Grounding: texts that speak of boxes and points of an image (docs/grounding.md).

`item` is what every data set is read into, `notation` writes boxes as text and reads them back, `geometry` moves them
with the image.
"""
