"""Calibration: the errors of a pass over the validation windows, and the prediction intervals that they make."""

import numpy as np
import torch

from data_provider.batches import Batch
from layers.norm import instance_norm
from utils.intervals import Intervals, probabilities, quantiles
from utils.saving.array_file import ArrayFile
from utils.saving.files import PARTIAL, writing
from utils.training.session import Job

KEPT = "validation_errors.npy"  # of the repeats of a run, for the mean of their forecasts


class Calibration:
    """Takes in the batches of a pass over the validation split.

    Pass `consume` to `score`, then call `end`. The errors lie on the disk meanwhile, `[W, N, H]` float32; the
    processes of a group on one machine write to the same file.
    """

    def __init__(self, job: Job):
        """Raises:
        StorageError: the file system refused.
        """
        series = job.windows
        self.job, self.levels = job, job.levels
        shape = (len(series.windows("val")), len(series.forecast_columns), series.pred_len)
        self.errors = ArrayFile(job.folder / f".{KEPT}{PARTIAL}", shape)
        if job.accelerator.is_main_process:
            job.folder.mkdir(parents=True, exist_ok=True)
            self.errors.create()
        job.accelerator.wait_for_everyone()

    def consume(self, batch: Batch, forecast: torch.Tensor) -> None:
        """Take in M = B*N sequences, window by window, and their standardised forecasts `[M, H]`."""
        sequences = batch.sequences()
        deviation = instance_norm(sequences.x)[2]  # (M, 1)
        errors = ((sequences.y - forecast) / deviation).view(len(batch.index), *self.errors.shape[1:])
        self.errors.write(int(batch.index[0]), errors.float().cpu().numpy())  # neighbours: these batches come in order

    def end(self, use: bool = True) -> None:
        """Give the job the intervals that the pass comes to, or forget it.

        The errors of repeats (`--itr`) stay in the run's folder, as `KEPT`.
        """
        job, path = self.job, self.errors.path
        job.accelerator.wait_for_everyone()  # all have written their windows
        if use:
            job.intervals = intervals_of(self.errors.read(), self.levels)
            job.accelerator.wait_for_everyone()
        if job.accelerator.is_main_process:
            with writing(path):
                if use and job.args.itr > 1:
                    path.replace(job.folder / KEPT)
                else:
                    path.unlink()


def intervals_of(errors: np.ndarray, levels: tuple[float, ...]) -> Intervals:
    """Errors `[W, N, H]` in deviations of their windows' histories -> the intervals; memory holds a channel."""
    rows = [quantiles(np.asarray(errors[:, channel]), probabilities(levels)) for channel in range(errors.shape[1])]
    return Intervals(levels, np.stack(rows, axis=1), len(errors))
