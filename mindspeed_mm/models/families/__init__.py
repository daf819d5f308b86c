"""Families of models. One family = one file, found by its model_id."""
