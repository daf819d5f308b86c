"""Our training checkpoints as a source and as a target of conversions."""


def register_checkpoints() -> None:
    """Add the layout to those that are recognised (weights/sources.py) and written (targets.py); again has no effect.

    Whoever opens weights that may be a training checkpoint calls it first.
    """
    from checkpoint_converters.checkpoint.source import open_training_checkpoint
    from checkpoint_converters.checkpoint.target import plan_checkpoint
    from checkpoint_converters.targets import register_target
    from mindspeed_mm.weights.sources import register_detector

    register_detector(open_training_checkpoint)
    register_target("checkpoint", plan_checkpoint)
