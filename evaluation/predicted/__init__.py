"""Answers to sets of a data.json: asked, judged, written in order and drawn (docs/prediction.md)."""
