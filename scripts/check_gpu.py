"""What a run would take on this machine, measured with a few real steps; nothing is left behind.

    python scripts/check_gpu.py FLAGS...                                   the flags of run_main.py
    TIMELLM_PROGRAM=scripts/check_gpu.py bash scripts/TimeLLM_ETTh1_2.sh   those of a script
    python scripts/check_gpu.py --json FILE FLAGS...                       the figures in a file, too
    python run_main.py --help                                              all flags of run_main.py

Steps, a save of the state and an evaluation of a few batches run in a temporary folder. The report is made to be
pasted into an issue. On a machine without a GPU it is about the processor and its memory.
"""

import json
import os
import platform
import shlex
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, only scripts/ is on the path

from layers.errors import InputError, input_error  # noqa: E402
from utils.command_line import FlagParser, parse_flags  # noqa: E402
from utils.errors import RunError  # noqa: E402

if TYPE_CHECKING:
    import torch

    from utils.training.session import Job

WARM_UP, STEPS, EVALUATION_BATCHES = 2, 6, 3
GIB = 2**30
PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes")


def main(argv: list[str]) -> int:
    """Measure and print the report; return the exit code, 2 for what the user can mend."""
    own = FlagParser(prog="check_gpu.py", add_help=False, allow_abbrev=False)
    own.add_argument("--json", nargs="?", const="")
    own.add_argument("-h", "--help", action="store_true")
    mine, words = own.parse_known_args(argv)
    if mine.help:
        print(str(__doc__).strip())
        return 0
    if mine.json == "":
        own.error(str(input_error("--json", "no value right after it", "a file name")))
    args = parse_flags(words, own.prog)
    try:
        if args.model != "TimeLLM":
            raise input_error("--model", args.model, "TimeLLM, whose memory on a GPU is the question")
        with tempfile.TemporaryDirectory(prefix="check_gpu.") as folder:
            figures = measure(args, folder) | {"flags": shlex.join(words)}
        print("\n".join(["", "```", *report(figures), "```"]))
        if mine.json:
            _write(Path(mine.json), figures)
    except (InputError, RunError) as error:
        print(f"check_gpu.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def _write(path: Path, figures: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise input_error(
            "--json", f"{path}, where no writing is ({error.strerror})", "a file that can be written"
        ) from error


def measure(args: Namespace, folder: str) -> dict[str, Any]:
    """Set the run up, train, save and evaluate a little.

    Args:
        folder: for what the run would leave.

    Returns:
        JSON values: seconds, and GiB of memory by phase, allocated and reserved.

    Raises:
        InputError, RunError: as the run itself would.
    """
    # Only now, so that a wrong flag answers without waiting for torch.
    from utils.saving.interrupt import Interrupts
    from utils.setup import setup
    from utils.training.dry_run import memory_limit, now
    from utils.training.evaluate import score
    from utils.training.train import Clock, save, train_epoch

    short = dict(is_training=1, itr=1, max_iters=WARM_UP + STEPS, checkpoints=folder, checkpoint=None, resume=False)
    short |= dict(do_predict=False, predict_path=None, predict_steps=None, tensorboard=False, save_steps=0)
    job = setup(Namespace(**vars(args) | short), 0, Interrupts())
    device, peaks = job.device, {"loading": _peaks(job.device)}
    try:
        batches = _Timed(job.loaders["train"], device)
        job.loaders["train"] = batches  # type: ignore[assignment]
        loss = train_epoch(job, Clock(job))
        steps = [after - before for before, after in zip(batches.times, batches.times[1:], strict=False)]
        peaks["steps"] = _peaks(device)
        began = now(device)
        save(job)
        saving = now(device) - began
        peaks["save"] = _peaks(device)
        job.loaders["val"] = list(islice(job.loaders["val"], EVALUATION_BATCHES))  # type: ignore[assignment]
        windows = sum(len(batch.x) for batch in job.loaders["val"])
        began = now(device)
        score(job, "val")
        evaluation = (now(device) - began) / windows
        peaks["evaluation"] = _peaks(device)
    finally:
        job.close()
    seconds = median(steps[WARM_UP - 1 :] or steps)
    whole = Clock(_whole(job, args.max_iters))
    whole.evaluation = evaluation
    sequences = len(job.loaders["val"][0]) // len(job.loaders["val"][0].index) * args.batch_size  # type: ignore[index]
    return {
        "machine": machine(device),
        "numbers": f"{job.precision.autocast_dtype or 'float32'}, frozen weights "
        f"{'4 bit' if args.load_in_4bit else job.precision.weights_dtype}".replace("torch.", ""),
        "path": "fast" if job.model.fast_path else "plain",
        "sequences": sequences,
        "at_once": min(job.step_limit.sequences or sequences, sequences),
        "loss": loss,
        "skipped": job.training.progress.skipped,
        "s_per_step": seconds,
        "s_save": saving,
        "s_per_window": evaluation,
        "s_run": whole.left(seconds),
        "epochs": args.train_epochs,
        "limit_gib": memory_limit(device) / GIB,
        "peaks_gib": peaks,
        "would_take_gib": estimates(job, sequences, peaks["steps"][0]),
    }


def _whole(job: "Job", max_iters: int) -> "Job":
    """The job as it would be at the start of the whole run."""
    from utils.saving.state import Progress

    args = Namespace(**vars(job.args) | dict(max_iters=max_iters))
    return replace(job, args=args, _training=replace(job.training, progress=Progress()))


class _Timed:
    """A loader that notes when each batch was asked for, and so when the step before it had ended."""

    def __init__(self, loader: Any, device: "torch.device"):
        self.loader, self.batch_sampler, self.device = loader, loader.batch_sampler, device
        self.times: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        from utils.training.dry_run import now

        for batch in self.loader:
            yield batch
            self.times.append(now(self.device))


def _peaks(device: "torch.device") -> tuple[float, float]:
    """GiB allocated and reserved at the peak since the last call; of the computer's memory the largest so far, twice."""
    import torch

    from utils.results.log import peak_memory_gib

    allocated = peak_memory_gib(device)
    if device.type != "cuda":
        return allocated, allocated
    reserved = torch.cuda.max_memory_reserved(device) / GIB
    torch.cuda.reset_peak_memory_stats(device)
    return allocated, reserved


def machine(device: "torch.device") -> dict[str, str]:
    """Names and versions of what the run would run on."""
    import torch

    from utils.checks import nvidia_driver

    found = {"system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}"}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        found["card"] = f"{card.name}, {total / GIB:.2f} GiB, of which {free / GIB:.2f} are free while the model is loaded"
        found["compute capability"] = f"{card.major}.{card.minor}, bf16: {'yes' if bf16 else 'no'}"
    else:
        found["card"] = f"none in use; {_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    found["driver, CUDA"] = f"{nvidia_driver() or 'none'}, {torch.version.cuda or 'none'}"
    found["versions"] = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    named = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    found["allocator"] = " ".join(f"{name}={os.environ[name]}" for name in named if os.environ.get(name)) or "as it comes"
    return found


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "CPU"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def estimates(job: "Job", sequences: int, peak: float) -> dict[str, float]:
    """GiB that steps with other flags would take, from the measured peak and counted bytes.

    Returns:
        By flags; those with "--llm_layers" are the largest number that fits.
    """
    from models.TimeLLM import Model
    from utils.training.dry_run import memory_limit
    from utils.training.memory import OPTIMIZER_BYTES

    args, model = job.args, job.model
    assert isinstance(model, Model)
    backbone = model.backbone
    moments = OPTIMIZER_BYTES[args.optimizer]
    values = sum(parameter.numel() for parameter in model.parameters())
    embeddings = backbone.embeddings.numel() * backbone.embeddings.element_size()
    layers = sum(p.numel() * p.element_size() for p in backbone.model.parameters()) - embeddings
    patches = model.output_projection.linear.in_features // model.d_ff
    prompt = len(model.prefix_ids) + model.make_prompts(_some_windows(job)).ids.shape[1]
    each = backbone.bytes_per_sequence(patches, prompt, model.fast_path, args.grad_checkpoint)
    at_once = min(job.step_limit.sequences or sequences, sequences)

    savings: dict[str, float] = {}
    if model.mapping_layer is not None:
        on_card = embeddings if job.device.type == "cuda" else 0  # they go to the computer's memory
        savings["--prototypes direct"] = model.mapping_layer.weight.numel() * (4 + moments) + on_card
    if args.optimizer != "adamw8bit":
        savings["--optimizer adamw8bit"] = values * (moments - OPTIMIZER_BYTES["adamw8bit"])
        if model.mapping_layer is not None:  # whose whole gradient it forms
            savings["--optimizer adamw8bit"] -= 4 * model.mapping_layer.weight.numel()
    if not args.load_in_4bit:
        savings["--load_in_4bit"] = layers * (1 - 0.28 * 2 / backbone.embeddings.element_size())
    if at_once > 1:
        savings[f"--max_sequences {at_once // 2}"] = each * (at_once - at_once // 2)
    if not args.grad_checkpoint:
        recomputed = backbone.bytes_per_sequence(patches, prompt, model.fast_path, True)
        savings["--grad_checkpoint"] = (each - recomputed) * at_once
    found = {flags: max(peak - saved / GIB, 0.0) for flags, saved in savings.items() if saved > 0}

    per_layer = (layers / args.llm_layers + each * at_once / (args.llm_layers + 1)) / GIB
    limit = memory_limit(job.device) / GIB
    for flags in ("", "--prototypes direct"):
        if flags and flags not in found:
            continue
        more = int((limit - found.get(flags, peak)) / per_layer)
        name = f"{flags} --llm_layers".strip()
        found[name] = max(1, min(args.llm_layers + more, backbone.info.layers))
    return found


def _some_windows(job: "Job") -> "torch.Tensor":
    return job.loaders["val"][0].x.cpu()  # type: ignore[index]


def report(figures: dict[str, Any]) -> list[str]:
    """The lines to paste."""
    from utils.training.dry_run import duration

    lines = [f"{name + ':':20}{text}" for name, text in figures["machine"].items()]
    run, epochs = figures["s_run"], figures["epochs"]
    lines += [
        f"{'flags:':20}{figures['flags']}",
        f"{'numbers:':20}{figures['numbers']}; {figures['path']} path",
        f"{'a step:':20}{figures['s_per_step']:.4f} s for {figures['sequences']} sequences, {figures['at_once']} at once; "
        f"mean loss {figures['loss']:.4f}, {figures['skipped']} of {WARM_UP + STEPS} steps skipped",
        f"{'the run:':20}about {duration(run / epochs)} an epoch with its evaluations; {epochs} epochs {duration(run)}",
        f"{'a save:':20}{figures['s_save']:.1f} s",
        f"{'memory for the run:':20}{figures['limit_gib']:.2f} GiB",
        "peak, GiB           allocated   reserved",
    ]
    lines += [f"  {phase:18}{peak[0]:9.2f} {peak[1]:10.2f}" for phase, peak in figures["peaks_gib"].items()]
    lines.append("Estimated from counted bytes, not measured (a step's peak with one flag changed):")
    for flags, value in figures["would_take_gib"].items():
        layers = flags.endswith("--llm_layers")
        lines.append(f"  {flags} {value}, the most that fit" if layers else f"  {flags:30}{value:5.2f} GiB")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
