"""Memory: how many sequences fit at once, and what is done and said when the GPU has too little."""

import gc
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from layers.errors import RunError
from layers.mapping import BLOCK_BYTES
from layers.prompt import MAX_PROMPT_TOKENS
from layers.reprogramming import ATTENTION_DROPOUT
from models import model_class
from models.base import ForecastModel
from models.TimeLLM import PROTOTYPES, Model, layers_of
from utils.saving.files import size_text
from utils.saving.state import random_state, set_random_state
from utils.training.context import Context, Limit

# CUDA's libraries have names of their own for it; "device not ready" is WSL2's.
OTHER_NAMES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "device not ready")
RESERVE = 200 * 2**20  # bytes of the GPU that are left to the desktop and the driver
Result = TypeVar("Result")

SHARE = 0.7  # of the free memory; the rest is for what is not counted, and for fragmentation
OPTIMIZER_BYTES = {"adam": 8, "adamw": 8, "adamw8bit": 2}  # of state for each trained value
# On the CPU larger tensors than this are slower: the C library maps memory for each anew and gives it back.
# Below FEW sequences the backbone's weights would be read too often.
LARGEST_TENSOR, FEW = 24 * 2**20, 32
STATISTICS_TOKENS = 128  # about, with all digits
# Where Linux tells of a group of processes (cgroup v2, then v1): its controller in /proc/self/cgroup, the folder of groups,
# the file with the limit, and the row of memory.stat with what is taken for good, as cached files are not.
CGROUPS = (
    ("", "sys/fs/cgroup", "memory.max", "anon"),
    ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "total_rss"),
)
ROOT = Path("/")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of CUDA means that memory has run out, under whichever name it comes."""
    told = isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OTHER_NAMES)
    return told and isinstance(error, RuntimeError) and not isinstance(error, RunError)


@contextmanager
def explain_out_of_memory(what: str, advice: Callable[[], str]) -> Iterator[None]:
    """For work that no smaller parts would help: no memory inside becomes a RunError.

    Args:
        what: the work, as in "CUDA out of memory in ...".
        advice: gives the words that say what to change.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"CUDA out of memory in {what}; {advice()}") from None


def cap_memory(device: torch.device) -> None:
    """Let PyTorch take no more of the GPU than is free now, less a reserve.

    Under WSL2 the driver goes on with the computer's own memory where the GPU's ends: no error, and steps many times
    slower. With a cap PyTorch gives idle blocks back and raises its error itself, which the run knows how to meet.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(free + own - RESERVE, 0) / total), device)


def halve_on_out_of_memory(context: Context, limit: Limit, sequences: int, work: Callable[[int], Result]) -> Result:
    """`work(limit.sequences)`; where CUDA has no memory for it, again with half of them.

    The random generators go back to where they were, so the step is repeated with the same numbers.
    `limit.sequences` stays what it has become.

    Args:
        sequences: how many the work runs in all.

    Raises:
        RunError: not even one sequence fits.
    """
    before, whole = random_state(context.device), context.model.whole_batches
    while True:
        try:
            return work(0 if whole else limit.sequences)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            tried = min(limit.sequences or sequences, sequences)
            if tried == 1 or whole:
                least = "in a batch, which this model takes whole" if whole else "with one sequence at a time"
                raise RunError(f"CUDA out of memory {least}; {advice(context.args, context.model)}") from None
        limit.sequences = tried // 2
        context.model.zero_grad(set_to_none=True)
        free_memory(context.device)
        set_random_state(before, context.device)
        context.log(
            f"CUDA out of memory with {tried} sequences at once: going on with at most {tried // 2} "
            f"(--max_sequences {tried // 2} starts that way)"
        )


def free_memory(device: torch.device) -> None:
    """Give back to the GPU what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        # The thread that ran the backward pass drops what it kept when it next gets Python's lock.
        time.sleep(0.05)
        torch.cuda.empty_cache()


def advice(args: Namespace, model: ForecastModel | None = None) -> str:
    """What to change, the largest saving first; without figures while there is no model yet."""
    if not model_class(args.model).uses_llm:
        return "change --batch_size, --eval_batch_size, --d_model or --seq_len to less, or end other programs of the GPU"
    if not isinstance(model, Model):
        return "change --load_in_4bit or --llm_layers to less, or end other programs that use the GPU"
    loaded, eight_bit, savings = layers_of(args), args.optimizer == "adamw8bit", {}
    words = model.backbone.embeddings.nbytes
    layers = sum(p.nbytes for p in model.backbone.model.parameters()) - words
    mapped = model.mapping_layer.weight.numel() if model.mapping_layer is not None else 0
    if mapped:  # of each value the value, the moments, and with 8 bit alone its gradient as a whole
        on_card = words if model.backbone.device.type == "cuda" else 0  # they stay in the computer's memory then
        savings["--prototypes direct"] = mapped * (4 + OPTIMIZER_BYTES[args.optimizer] + 4 * eight_bit) + on_card
    if not eight_bit:
        savings["--optimizer adamw8bit"] = sum(p.numel() for p in model.parameters()) * 6 - mapped * 4
    if loaded > 1:
        savings[f"--llm_layers {loaded // 2}"] = layers * (1 - loaded // 2 / loaded)
    if not args.load_in_4bit and args.llm_ablation == "off":  # else no layers are read, or they are drawn
        savings["--load_in_4bit"] = layers * 0.7
    ordered = sorted(savings, key=lambda flag: savings[flag], reverse=True)
    named = [f"{flag} (saves about {size_text(savings[flag])})" for flag in ordered]
    changes = ", ".join([*named, "a shorter --seq_len"])
    return f"change, in order of effect: {changes}; or end other programs that use the GPU"


def memory_limit(device: torch.device) -> int:
    """Bytes that the process may take: what the cap leaves of the GPU, else of main memory."""
    if device.type != "cuda":
        return main_memory()[0]
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    return int(fraction * torch.cuda.get_device_properties(device).total_memory)


def main_memory() -> tuple[int, int]:
    """Bytes of main memory, in all and free: the machine's or, where that is less, those of the group of processes that a
    container or a Slurm job is."""
    total, free = psutil.virtual_memory()[:2]
    with suppress(OSError):  # other systems have no groups
        rows = [line.split(":", 2) for line in (ROOT / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
        for controller, place, maximum, taken in CGROUPS:
            for path in (Path(path[1:]) for _, name, path in rows if name == controller):
                for group in (path, *path.parents):  # a limit of an outer group counts, too; "." is a container's own
                    with suppress(OSError, ValueError):  # no such group here, or "max"
                        limit = int((ROOT / place / group / maximum).read_text(encoding="utf-8"))
                        held = (ROOT / place / group / "memory.stat").read_text(encoding="utf-8").split()
                        total, free = min(total, limit), min(free, limit - int(held[held.index(taken) + 1]))
    return total, max(free, 0)


def memory_line(device: torch.device) -> str:
    """Peak memory so far: of the GPU beside its size, or of this process."""
    if device.type == "cuda":
        held = torch.cuda.max_memory_reserved(device) / 2**30
        return f"GPU Memory: {held:.1f}GB / {torch.cuda.get_device_properties(device).total_memory / 2**30:.1f}GB"
    return f"Memory: {peak_memory_gib(device):.1f}GB (RAM, largest so far)"


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory held so far, in GiB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset / 2**30  # type: ignore[attr-defined]  # Windows has it
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def fitting_sequences(model: ForecastModel, args: Namespace) -> int:
    """Sequences that one part of a step may hold, a power of two, at least 1 (`--max_sequences` left out); 0, no limit,
    for a model without a language model, whose sequences take little.

    A power of two, so that the same machine finds the same number in its next run although a little
    more or less is free: the parts decide how sums are rounded.

    Args:
        args: the run's flags, of which `is_training`, `optimizer` and `grad_checkpoint` decide.
    """
    if not isinstance(model, Model):
        return 0
    backbone, head = model.backbone, model.output_projection.linear
    patches = head.in_features // model.d_ff
    prompt = min(len(model.prefix_ids) + STATISTICS_TOKENS, MAX_PROMPT_TOKENS) if model.prompts else 0
    each = backbone.bytes_per_sequence(patches, prompt, model.fast_path, args.grad_checkpoint)
    heads = args.n_heads
    if backbone.device.type == "cpu" and args.is_training and ATTENTION_DROPOUT:
        each += patches * PROTOTYPES * heads  # which scores were dropped, a byte each
    each += 8 * patches * heads * model.d_ff * 4  # queries and their attention's results, and gradients
    _, free = main_memory()
    if backbone.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(backbone.device)
        held, used = torch.cuda.memory_reserved(backbone.device), torch.cuda.memory_allocated(backbone.device)
        cap = int(torch.cuda.get_per_process_memory_fraction(backbone.device) * total)
        free = min(free + held - used, cap - used)
    if args.is_training:  # gradients, optimizer state and average are not there yet
        each_value = 4 + OPTIMIZER_BYTES[args.optimizer] + 4 * bool(args.ema)
        free -= sum(p.numel() for p in model.parameters()) * each_value
        if model.mapping_layer is not None and args.optimizer != "adamw8bit":  # formed in blocks
            free += model.mapping_layer.weight.numel() * 4 - BLOCK_BYTES
    fit = max(1, int(SHARE * free / each))
    if backbone.device.type == "cpu":
        tokens = max(patches, STATISTICS_TOKENS) if model.fast_path else prompt + patches
        fit = min(fit, max(FEW, LARGEST_TENSOR // (tokens * backbone.inner_size * backbone.embeddings.element_size())))
    return 1 << (fit.bit_length() - 1)
