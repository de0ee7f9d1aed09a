"""Learning rates (`--lradj`) as plain functions of the step, so that a resumed run needs no state for them."""

import math


def learning_rate(schedule: str, base: float, step: int, steps_per_epoch: int, epochs: int, pct_start: float = 0.2) -> float:
    """The rate of training step `step` (0, 1, … over the whole run).

    type1 halves it each epoch; type3 keeps it for 3 epochs, then multiplies by 0.9 each; COS is a half
    cosine over the run, step by step; TST is one cycle (Smith and Topin, 2018) with PyTorch's defaults:
    from base / 25 up to base over `pct_start` of the run, then down to base / 250,000, both as cosines.
    """
    epoch = step // steps_per_epoch  # 0, 1, …
    total = steps_per_epoch * epochs
    if schedule == "constant":
        return base
    if schedule == "type1":
        return base * 0.5**epoch
    if schedule == "type3":
        return base * 0.9 ** max(0, epoch - 2)
    if schedule == "COS":
        return _cosine(base, 0.0, step / total)
    if schedule == "TST":
        top = pct_start * total - 1  # the step that has the full rate
        if 0 < top >= step:
            return _cosine(base / 25, base, step / top)
        return _cosine(base, base / 25e4, (step - top) / (total - 1 - top))
    raise ValueError(f"unknown schedule {schedule}")


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
