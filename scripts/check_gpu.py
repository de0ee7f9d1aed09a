"""What a run would take on this machine, measured with a few real steps; nothing is left behind.

    python scripts/check_gpu.py FLAGS...                                   the flags of run_main.py
    TIMELLM_PROGRAM=scripts/check_gpu.py bash scripts/TimeLLM_ETTh1_2.sh   those of a script
    python scripts/check_gpu.py --json FILE FLAGS...                       the figures in a file, too
    python run_main.py --help                                              all flags of run_main.py

Steps, a save of the state and an evaluation of a few batches run in a temporary folder. The report is made to be
pasted into an issue. On a machine without a GPU it is about the processor and its memory.
"""

import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import closing
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from utils.script import exit_code, script_parser  # noqa: E402

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402

from data_provider.batches import Batch  # noqa: E402
from layers.errors import input_error  # noqa: E402
from utils.flags import parse_flags  # noqa: E402
from utils.saving.files import duration, write_json  # noqa: E402
from utils.saving.interrupt import Interrupts  # noqa: E402
from utils.setup import setup  # noqa: E402
from utils.study.cells import nvidia_smi, processor  # noqa: E402
from utils.training.context import Context  # noqa: E402
from utils.training.evaluate import score  # noqa: E402
from utils.training.memory import advice, memory_limit, peak_memory_gib  # noqa: E402
from utils.training.train import Clock, now, save, train_step  # noqa: E402

WARM_UP, STEPS, EVALUATED = 2, 6, 3  # batches
GIB = 2**30
PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes")
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ARGUMENTS = {"--json": dict(metavar="FILE", type=Path, help="write the figures there, too")}


def main(argv: list[str]) -> int:
    parser = script_parser("check_gpu.py", __doc__, ARGUMENTS)
    mine, words = parser.parse_known_args(argv)
    args = parse_flags(words, parser.prog)

    def work() -> None:
        if args.model != "TimeLLM":
            raise input_error("--model", args.model, "TimeLLM, whose memory on a GPU is the question")
        with tempfile.TemporaryDirectory(prefix="check_gpu.") as folder:
            vars(args).update(
                is_training=1, itr=1, checkpoints=folder, checkpoint=None, resume=False, save_steps=0, tensorboard=False,
                do_predict=False, predict_path=None, predict_steps=None,
            )  # fmt: skip
            context = setup(args, 0, Interrupts())
            batches, evaluated = islice(context.loaders["train"], WARM_UP + STEPS), islice(context.loaders["val"], EVALUATED)
            figures = {"flags": shlex.join(words)} | measure(context, batches, evaluated)
        print("\n".join(["", "```", *report(figures), "```"]))
        if mine.json:
            write_json(mine.json, figures)

    return exit_code(parser.prog, work)


def measure(context: Context, batches: Iterable[Batch], evaluated: Iterable[Batch]) -> dict[str, Any]:
    """Train, save and evaluate a little in a run that is set up, and close it.

    Args:
        batches: of `WARM_UP` steps or more, and of those that are timed, with the wait for them.

    Returns:
        JSON values: seconds, and GiB of memory by phase, allocated and reserved.

    Raises:
        RunError: as the run itself would.
    """
    args, device = context.args, context.device
    peaks: dict[str, tuple[float, float]] = {}

    def note_peaks(phase: str) -> None:
        # GiB allocated and reserved at the peak since the last call; of the computer's memory the largest so far, twice.
        peaks[phase] = (peak_memory_gib(device),) * 2
        if device.type == "cuda":
            peaks[phase] = peaks[phase][0], torch.cuda.max_memory_reserved(device) / GIB
            torch.cuda.reset_peak_memory_stats(device)

    with closing(context):
        note_peaks("loading")
        losses, times, began = [], [], now(device)
        for batch in batches:
            losses.append(train_step(context, batch.to(device))[0])
            times.append(now(device) - began)
            began += times[-1]
        note_peaks("steps")
        saving = timed(device, save, context)
        note_peaks("save")
        context.loaders["val"] = list(evaluated)  # type: ignore[assignment]
        clock, seconds = Clock(context), float(np.median(times[WARM_UP:] or times))
        windows = sum(len(batch.index) for batch in context.loaders["val"])
        clock.evaluation = timed(device, score, context, "val") / windows
        note_peaks("evaluation")
        changes = advice(args, context.model)
    context.training.progress.iteration = 0  # the whole run is still to come
    sequences = context.sequences_per_step
    weights = "4 bit" if args.load_in_4bit else context.precision.weights_dtype
    return {
        "machine": machine(device),
        "numbers": f"{context.precision.autocast_dtype or 'float32'}, frozen weights {weights}".replace("torch.", ""),
        "path": context.model.path(),
        "sequences": sequences,
        "at_once": min(context.step_limit.sequences or sequences, sequences),
        "loss": float(np.mean(losses)),
        "skipped": context.training.progress.skipped,
        "s_per_step": seconds,
        "s_save": saving,
        "s_per_window": clock.evaluation,
        "s_run": clock.left(seconds),
        "epochs": args.train_epochs,
        "limit_gib": memory_limit(device) / GIB,
        "peaks_gib": peaks,
        "to_take_less": changes,
    }


def timed(device: torch.device, work: Callable, *args: Any) -> float:
    # Seconds that `work(*args)` takes, until the device has done it.
    began = now(device)
    work(*args)
    return now(device) - began


def machine(device: torch.device) -> dict[str, str]:
    # Names and versions of what a run runs on.
    found = {"system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}"}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        free, total = (value / GIB for value in torch.cuda.mem_get_info(device))
        bf16 = "with" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
        found["card"] = (
            f"{card.name}, {total:.2f} GiB, {free:.2f} of them free, capability {card.major}.{card.minor}, {bf16} bf16"
        )
    else:
        found["card"] = f"none in use; {processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return found | {
        "driver, CUDA": f"{next(iter(nvidia_smi('driver_version')), 'none')}, {torch.version.cuda or 'none'}",
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "allocator": " ".join(f"{name}={os.environ[name]}" for name in ALLOCATOR if os.environ.get(name)) or "as it comes",
    }


def report(figures: dict[str, Any]) -> list[str]:
    # The lines to paste.
    lines = figures["machine"] | {
        "flags": figures["flags"],
        "numbers": f"{figures['numbers']}; {figures['path']}",
        "a step": f"{figures['s_per_step']:.4f} s for {figures['sequences']} sequences, {figures['at_once']} at once; "
        f"mean loss {figures['loss']:.4f}, {figures['skipped']} of {WARM_UP + STEPS} steps skipped",
        "the run": f"about {duration(figures['s_run'] / figures['epochs'])} an epoch with its evaluations; "
        f"{figures['epochs']} epochs {duration(figures['s_run'])}",
        "a save": f"{figures['s_save']:.1f} s",
        "memory for the run": f"{figures['limit_gib']:.2f} GiB",
    }
    return [
        *(f"{name + ':':20}{text}" for name, text in lines.items()),
        "peak, GiB           allocated   reserved",
        *(f"  {phase:18}{peak[0]:9.2f} {peak[1]:10.2f}" for phase, peak in figures["peaks_gib"].items()),
        f"To take less (counted from bytes, not measured): {figures['to_take_less']}",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
