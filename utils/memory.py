"""CUDA out of memory: the step is repeated in smaller parts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from utils.errors import RunError
from utils.files import size_text
from utils.state import random_state, set_random_state

# PyTorch before 2.5 has only the second name.
OutOfMemory = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


@contextmanager
def out_of_memory_told(what: str, change: Callable[[], str]) -> Iterator[None]:
    """For work that no smaller parts would help: no memory inside becomes a RunError.

    Args:
        what: the work, as in "CUDA out of memory in ...".
        change: gives the words that say what to change.
    """
    try:
        yield
    except OutOfMemory:
        raise RunError(f"CUDA out of memory in {what}; {change()}") from None


def within_memory(run, sequences: int, work: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """`work(max_sequences)`; where CUDA has no memory for it, again with half of them.

    The random generators go back to where they were, so the step is repeated with the same numbers.
    `run.max_sequences` stays what it has become.

    Args:
        run: a `utils.train.Run`.
        sequences: how many the work runs in all.

    Raises:
        RunError: not even one sequence fits.
    """
    device = run.accelerator.device
    before = random_state(device)
    while True:
        try:
            return work(run.max_sequences)
        except OutOfMemory:
            tried = min(run.max_sequences or sequences, sequences)
            if tried == 1:
                raise RunError(f"CUDA out of memory with one sequence at a time; {advice(run)}") from None
        # Here the exception, and with it every tensor of the failed attempt, is gone.
        run.max_sequences = tried // 2
        if run.optimizer is not None:
            run.optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        set_random_state(before, device)
        if not run.memory_was_short:
            run.log(
                f"CUDA out of memory with {tried} sequences at once: going on with at most {tried // 2} "
                f"(--max_sequences {tried // 2} starts that way), or fewer where these do not fit"
            )
            run.memory_was_short = True


def loading_advice(args) -> str:
    """What to change where there is no model yet whose parts could be counted."""
    savings = [] if args.load_in_4bit else ["--load_in_4bit"]
    if args.llm_layers > 1:
        savings.append(f"--llm_layers {args.llm_layers // 2}")
    if args.prototypes != "direct":
        savings.append("--prototypes direct")
    named = f"change {' or '.join(savings)}, or " if savings else ""
    return f"{named}end other programs that use the GPU"


def advice(run) -> str:
    """What to change, the largest saving first."""
    args, model = run.args, run.model
    trained = sum(parameter.numel() for parameter in model.parameters())
    moments = 2 if args.optimizer == "adamw8bit" else 8  # bytes a trained value, beside 4 and its gradient's 4
    layers = sum(p.numel() * p.element_size() for p in model.backbone.model.parameters()) - (
        model.backbone.embeddings.numel() * model.backbone.embeddings.element_size()
    )
    savings = {f"--llm_layers {max(args.llm_layers // 2, 1)}": layers / 2}
    if model.mapping_layer is not None:
        savings["--prototypes direct"] = model.mapping_layer.weight.numel() * (8 + moments)
    if args.optimizer != "adamw8bit":
        savings["--optimizer adamw8bit"] = trained * 6
    if not args.load_in_4bit:
        savings["--load_in_4bit"] = layers * 0.7
    ordered = sorted(savings, key=savings.get, reverse=True)
    named = ", ".join(f"{flag} (saves about {size_text(savings[flag])})" for flag in ordered)
    return f"change, in order of effect: {named}, a shorter --seq_len; or end other programs that use the GPU"
