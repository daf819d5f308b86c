"""Servers: the OpenAI protocol over HTTP in front of the generation engine."""
