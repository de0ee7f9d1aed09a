"""The trial before a run's first step: what the run will take, told before it takes it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch

from data_provider.batches import Batch
from utils.results.log import peak_memory_gib
from utils.saving.state import random_state, set_random_state
from utils.training.memory import OPTIMIZER_BYTES
from utils.training.session import Job

FEWEST_STEPS = 20  # a shorter run is over before its trial would be worth it
Work = Callable[[Batch], torch.Tensor]  # -> loss; leaves gradients, in parts that fit into memory


def trial(job: Job, work: Work, left: Callable[[float], float]) -> None:
    """Run the first batch forward and backward, twice, and log what the run will take; no step is made.

    A run that resumes has no trial, and neither has a very short one. Gradients, random generators and the loader
    are afterwards as they were. Where the GPU's memory is short, the trial finds how many sequences fit, as the first
    step would have.

    Args:
        left: seconds that the whole run takes at so many seconds a step, evaluations included.

    Raises:
        RunError: not even one sequence fits.
    """
    progress, epochs = job.training.progress, job.args.train_epochs
    if (progress.epoch, progress.iteration) != (1, 0) or epochs * job.steps_per_epoch < FEWEST_STEPS:
        return
    with _undone(job):
        batch = first_batch(job).to(job.device)
        for _ in range(2):  # the first one also makes caches and loads kernels
            job.model.zero_grad(set_to_none=True)
            began = now(job.device)
            work(batch)
            seconds = now(job.device) - began
    whole = left(seconds)
    job.log(
        f"Trial: {seconds:.4f}s/iter; about {duration(whole / epochs)} an epoch with its evaluations, "
        f"{duration(whole)} in all; {memory_to_come(job)}"
    )


@contextmanager
def _undone(job: Job) -> Iterator[None]:
    """Put back what work inside draws from the random generators, and what a batch normalisation has seen; forget
    gradients."""
    before, training = random_state(job.device), job.model.training
    buffers = [(buffer, buffer.clone()) for buffer in job.model.buffers()]
    job.model.train()
    try:
        yield
    finally:
        job.model.zero_grad(set_to_none=True)
        job.model.train(training)
        for buffer, held in buffers:
            buffer.copy_(held)
        set_random_state(before, job.device)


def first_batch(job: Job) -> Batch:
    """The batch that the first epoch begins with, made beside the loader: no worker starts, and the loader draws nothing."""
    loader = job.loaders["train"]
    batches = loader.batch_sampler
    batches.set_epoch(1)  # type: ignore[union-attr]
    indices = next(iter(batches))  # type: ignore[arg-type]
    return loader.collate_fn([loader.dataset[index] for index in indices])


def now(device: torch.device) -> float:
    """The clock's seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def moments_bytes(job: Job) -> int:
    """Bytes of the optimizer's moments, which its first step makes."""
    return sum(p.numel() for p in job.model.parameters()) * OPTIMIZER_BYTES[job.args.optimizer]


def memory_limit(device: torch.device) -> int:
    """Bytes that the process may take: of the GPU what its cap leaves, else all of the computer's."""
    if device.type != "cuda":
        return psutil.virtual_memory().total
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    return int(fraction * torch.cuda.get_device_properties(device).total_memory)


def memory_to_come(job: Job) -> str:
    """Peak memory so far with the moments that are still to come, beside what there is."""
    peak = peak_memory_gib(job.device) + moments_bytes(job) / 2**30
    kind = "GPU memory" if job.device.type == "cuda" else "memory"
    return f"{kind} {peak:.1f}GB at the peak, of {memory_limit(job.device) / 2**30:.1f}GB"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{max(seconds, 1):.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
