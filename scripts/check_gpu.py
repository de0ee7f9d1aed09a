"""What a run would take on this machine, measured with a few real steps; nothing is left behind.

    python scripts/check_gpu.py FLAGS...                                   the flags of run_main.py
    TIMELLM_PROGRAM=scripts/check_gpu.py bash scripts/TimeLLM_ETTh1_2.sh   those of a script
    python scripts/check_gpu.py --json FILE FLAGS...                       the figures in a file, too
    python run_main.py --help                                              all flags of run_main.py

Steps, a save of the state and an evaluation of a few batches run in a temporary folder. The report is made to be
pasted into an issue. On a machine without a GPU it is about the processor and its memory.
"""

import argparse
import shlex
import sys
import tempfile
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from utils.script import exit_code, script_parser  # noqa: E402

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402

from layers.errors import input_error  # noqa: E402
from scripts.benchmark import GIB, machine, timed  # noqa: E402
from utils.flags import parse_flags  # noqa: E402
from utils.results.log import peak_memory_gib  # noqa: E402
from utils.saving.files import write_json  # noqa: E402
from utils.saving.interrupt import Interrupts  # noqa: E402
from utils.setup import setup  # noqa: E402
from utils.training.dry_run import now  # noqa: E402
from utils.training.evaluate import score  # noqa: E402
from utils.training.memory import advice, memory_limit  # noqa: E402
from utils.training.train import save, train_step  # noqa: E402

WARM_UP, STEPS, EVALUATION_BATCHES = 2, 6, 3
ARGUMENTS = {"--json": dict(metavar="FILE", type=Path, help="write the figures there, too")}


def main(argv: list[str]) -> int:
    parser = script_parser("check_gpu.py", __doc__, ARGUMENTS)
    mine, words = parser.parse_known_args(argv)
    args = parse_flags(words, parser.prog)

    def work() -> None:
        if args.model != "TimeLLM":
            raise input_error("--model", args.model, "TimeLLM, whose memory on a GPU is the question")
        with tempfile.TemporaryDirectory(prefix="check_gpu.") as folder:
            figures = {"flags": shlex.join(words)} | measure(args, folder)
        print("\n".join(["", "```", *report(figures), "```"]))
        if mine.json:
            write_json(mine.json, figures)

    return exit_code(parser.prog, work)


def measure(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Set the run up in a folder, train, save and evaluate a little.

    Returns:
        JSON values: seconds, and GiB of memory by phase, allocated and reserved.

    Raises:
        InputError, RunError: as the run itself would.
    """
    short = dict(
        is_training=1, itr=1, checkpoints=folder, checkpoint=None, resume=False, save_steps=0, tensorboard=False,
        do_predict=False, predict_path=None, predict_steps=None,
    )  # fmt: skip
    context = setup(argparse.Namespace(**vars(args) | short), 0, Interrupts())
    device, train, val = context.device, context.loaders["train"], context.loaders["val"]
    peaks: dict[str, tuple[float, float]] = {}

    def note_peaks(phase: str) -> None:
        # GiB allocated and reserved at the peak since the last call; of the computer's memory the largest so far, twice.
        peaks[phase] = (peak_memory_gib(device),) * 2
        if device.type == "cuda":
            peaks[phase] = peaks[phase][0], torch.cuda.max_memory_reserved(device) / GIB
            torch.cuda.reset_peak_memory_stats(device)

    try:
        note_peaks("loading")
        losses, times, began = [], [], now(device)
        for batch in islice(train, WARM_UP + STEPS):  # with the wait for the loader
            losses.append(train_step(context, batch.to(device))[0])
            times.append(now(device) - began)
            began += times[-1]
        note_peaks("steps")
        saving = timed(device, save, context)
        note_peaks("save")
        context.loaders["val"] = list(islice(val, EVALUATION_BATCHES))  # type: ignore[assignment]
        windows = sum(len(batch.index) for batch in context.loaders["val"])
        per_window = timed(device, score, context, "val") / windows
        note_peaks("evaluation")
        changes = advice(context.args, context.model)
    finally:
        context.close()
    seconds, epochs, every = float(np.median(times[WARM_UP:] or times)), args.train_epochs, args.test_every
    tests = (epochs // every if every else 0) + (every != 1)  # the best epoch is tested at the end, unless all were
    evaluated = epochs * len(val.dataset) + tests * len(context.loaders["test"].dataset)
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
        "s_per_window": per_window,
        "s_run": epochs * context.steps_per_epoch * seconds + evaluated * per_window,
        "epochs": epochs,
        "limit_gib": memory_limit(device) / GIB,
        "peaks_gib": peaks,
        "to_take_less": changes,
    }


def report(figures: dict[str, Any]) -> list[str]:
    # The lines to paste.
    run = timedelta(seconds=round(figures["s_run"]))
    lines = figures["machine"] | {
        "flags": figures["flags"],
        "numbers": f"{figures['numbers']}; {figures['path']}",
        "a step": f"{figures['s_per_step']:.4f} s for {figures['sequences']} sequences, {figures['at_once']} at once; "
        f"mean loss {figures['loss']:.4f}, {figures['skipped']} of {WARM_UP + STEPS} steps skipped",
        "the run": f"about {run / figures['epochs']} an epoch with its evaluations; {figures['epochs']} epochs {run}",
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
