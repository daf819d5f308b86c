"""What a training run will need: memory of each rank, communication, time; and the layouts that fit a machine.

The formulas and their checks are described in docs/planning.md. `job` says what is planned, `parameters`, `activations`
and `memory` predict bytes, `communication` traffic, `duration` time; `search` compares layouts.
"""
