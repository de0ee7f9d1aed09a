"""Calibration: the errors of a pass over the validation windows, and the prediction intervals that they make."""

from contextlib import suppress

import numpy as np
import torch

from data_provider.batches import Batch
from layers.norm import instance_norm
from utils.intervals import LARGEST, Intervals, probabilities, quantiles
from utils.saving.array_file import ArrayFile
from utils.saving.files import PARTIAL, writing
from utils.training.session import Job

AT_ONCE = 1 << 23  # errors in memory at a time: 32 MB
KEPT = "validation_errors.npy"  # of the repeats of a run, for the mean of their forecasts


class Calibration:
    """Takes in the batches of a pass over the validation split, within `with`.

    Pass `consume` to `score`, then call `end`. The errors lie on the disk meanwhile, `[W, N, H]` float32; the
    processes of a group write to the same file. It goes, however the pass ends.
    """

    def __init__(self, job: Job, levels: tuple[float, ...] | None = None):
        """Args:
        levels: per cent; None: the job's.

        Raises:
            StorageError: the file system refused.
        """
        series = job.windows
        self.job, self.levels = job, job.levels if levels is None else levels
        shape = (len(series.windows("val")), len(series.forecast_columns), series.pred_len)
        self.errors = ArrayFile(job.folder / f".{KEPT}{PARTIAL}", shape, job.folder / KEPT)
        if job.accelerator.is_main_process:
            job.folder.mkdir(parents=True, exist_ok=True)
            self.errors.create()
        job.accelerator.wait_for_everyone()

    def __enter__(self) -> "Calibration":
        return self

    def __exit__(self, *error: object) -> None:
        if self.job.accelerator.is_main_process:
            with suppress(OSError):
                self.errors.path.unlink(missing_ok=True)

    def consume(self, batch: Batch, forecast: torch.Tensor) -> None:
        """Take in M = B*N sequences, window by window, and their standardised forecasts `[M, H]`."""
        deviation = instance_norm(batch.x)[2]  # (M, 1)
        errors = ((batch.y - forecast) / deviation).view(len(batch.index), *self.errors.shape[1:])
        self.errors.write(int(batch.index[0]), errors.float().cpu().numpy())  # neighbours: these batches come in order

    def end(self) -> None:
        """Give the job the intervals that the pass comes to; none where errors are no finite numbers.

        The errors of repeats (`--itr`) stay in the run's folder, as `KEPT`.
        """
        job, path = self.job, self.errors.path
        job.accelerator.wait_for_everyone()  # all have written their windows
        found = intervals_of(self.errors, self.levels)
        finite = bool((np.abs(found.offsets[~np.isnan(found.offsets)]) < LARGEST).all())
        job.intervals = found if finite else None
        if not finite:
            job.log("No prediction intervals: errors of the validation windows are no finite numbers")
        job.accelerator.wait_for_everyone()
        if job.args.itr > 1 and finite and job.accelerator.is_main_process:
            with writing(path):
                path.replace(job.folder / KEPT)


def intervals_of(errors: ArrayFile, levels: tuple[float, ...]) -> Intervals:
    """Errors `[W, N, H]` in deviations of their windows' histories -> the intervals; memory holds some of the channels."""
    W, N, H = errors.shape
    step = max(1, AT_ONCE // (W * H))  # a channel alone would have the file read once more for each
    rows = []
    for start in range(0, N, step):
        block = errors.read(slice(start, start + step))  # (W, n, H)
        rows += [quantiles(block[:, place], probabilities(levels)) for place in range(block.shape[1])]
    return Intervals(levels, np.stack(rows, axis=1), W)
