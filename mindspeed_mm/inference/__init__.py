"""Models for inference: where the files of a model lie, the loaded model, `mm.load`, requests from a file."""
