"""Which evaluations a run makes; its time, its price and the room that it takes follow."""

from ml_collections import ConfigDict


def splits_after(config: ConfigDict, start: int = 0, every: int | None = None) -> list[str]:
    """The splits that a run evaluates after step `start`, in order, each as often as it does.

    Args:
      start: steps that are done. The evaluation after the last of them, which an earlier start may
        not have come to, is not counted.
      every: steps from one evaluation to the next; None is `evaluation.every`, 0 is never.
    """
    evaluation, steps = config.evaluation, config.train.steps
    every = evaluation.every if every is None else every
    number = 0
    if every and start < steps:
        # After every so many steps, and after the last one in any case.
        number = -(-steps // every) - start // every
    return [evaluation.split] * number + [evaluation.final] * bool(evaluation.final)
