"""The dry run before the first step: what the run will take, told before it takes it."""

import time
from collections.abc import Callable

import torch

from data_provider.batches import Batch
from utils.results.log import peak_memory_gib
from utils.saving.files import duration
from utils.saving.state import random_state, set_random_state
from utils.training.context import Context
from utils.training.memory import OPTIMIZER_BYTES, memory_limit

FEWEST_STEPS = 20  # a shorter run is over before its dry run would be worth it


def dry_run(context: Context, gradients: Callable[[Batch], torch.Tensor], left: Callable[[float], float]) -> None:
    """Run the first batch forward and backward, twice, and log what the run will take; no step is made.

    A run that resumes has none, and neither has a very short one. Random generators, buffers and the loader are afterwards
    as they were. Where the GPU's memory is short, this finds how many sequences fit, as the first step would have.

    Args:
        gradients: forward and backward pass of a batch, in parts that fit into memory.
        left: seconds that the whole run takes at so many seconds a step, evaluations included.

    Raises:
        RunError: not even one sequence fits.
    """
    progress, epochs, model = context.training.progress, context.args.train_epochs, context.model
    if (progress.epoch, progress.iteration) != (1, 0) or epochs * context.steps_per_epoch < FEWEST_STEPS:
        return
    before = random_state(context.device)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # a batch normalisation's
    model.train()
    # The batch is made beside the loader: no worker starts, and the loader draws nothing.
    loader = context.loaders["train"]
    loader.batch_sampler.set_epoch(1)  # type: ignore[union-attr]
    first = next(iter(loader.batch_sampler))  # type: ignore[arg-type]
    batch = loader.collate_fn([loader.dataset[index] for index in first]).to(context.device)
    for _ in range(2):  # the first one also makes caches and loads kernels
        began = now(context.device)
        gradients(batch)
        model.zero_grad(set_to_none=True)
        seconds = now(context.device) - began
    for buffer, held in buffers:
        buffer.copy_(held)
    set_random_state(before, context.device)
    moments = (
        sum(p.numel() for p in model.parameters()) * OPTIMIZER_BYTES[context.args.optimizer]
    )  # the first step makes them
    kind = "GPU memory" if context.device.type == "cuda" else "memory"
    context.log(
        f"Dry run: {seconds:.4f}s/iter; about {duration(left(seconds) / epochs)} an epoch with its evaluations, "
        f"{duration(left(seconds))} in all; {kind} {peak_memory_gib(context.device) + moments / 2**30:.1f}GB at the peak, "
        f"of {memory_limit(context.device) / 2**30:.1f}GB"
    )


def now(device: torch.device) -> float:
    """The clock's seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
