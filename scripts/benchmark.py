"""Benchmark of the training step and the evaluation: plain path against fast path, on the same weights and batches.

    python scripts/benchmark.py --preset small
    python scripts/benchmark.py --preset qwen2.5-3b --tokenizer DIR --layers 6
    python scripts/benchmark.py --preset qwen2.5-3b --load_in_4bit --variants fast
    python scripts/benchmark.py --preset small --channels 862 --max_sequences 7 --variants fast --loader

What is measured and how the floor is counted stands in scripts/BENCHMARK.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, only scripts/ is on the path

import torch  # noqa: E402

from layers.errors import InputError  # noqa: E402
from scripts.make_backbone import PRESETS, make_backbone  # noqa: E402
from scripts.measure import MEASUREMENTS, VARIANTS  # noqa: E402
from utils.errors import RunError  # noqa: E402
from utils.flags import parse_flags  # noqa: E402


def main() -> int:
    """Measure and print; return the exit code."""
    args, flags = read_arguments()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            backbone = args.backbone or make_backbone(
                Path(scratch) / "backbone", args.preset, args.layers, tokenizer=args.tokenizer
            )
            if args.child:
                print(json.dumps(MEASUREMENTS[args.child](args, flags)))
                return 0
            result = measure(args, ["--backbone", str(backbone), *sys.argv[1:]])
    except (InputError, RunError) as error:
        print(f"benchmark.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    show(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def read_arguments() -> tuple[Namespace, Namespace]:
    """The benchmark's own arguments, and the flags of the run whose step is measured."""
    parser = argparse.ArgumentParser(prog="benchmark.py", description=str(__doc__).split("\n")[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="shape of the random backbone")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder for the random backbone")
    parser.add_argument("--backbone", type=Path, help="an existing folder instead of a random backbone")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--channels", type=int, default=7)
    parser.add_argument("--pred_len", type=int, default=96)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eval_batches", type=int, default=4, help="batches of one evaluation")
    parser.add_argument("--max_sequences", type=int, default=0, help="sequences run at once; 0: all")
    parser.add_argument("--workers", type=int, default=2, help="processes that make batches, for --loader")
    parser.add_argument("--loader", action="store_true", help="also what part of a step waits for the loader")
    parser.add_argument("--prototypes", choices=["vocab", "direct"], default="vocab", help="of the fast path alone")
    parser.add_argument("--prompt_decimals", type=int, help="of the fast path alone")
    parser.add_argument("--growth", action="store_true", help="also over channels and pred_len")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--peak_steps", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=sorted(MEASUREMENTS), help=argparse.SUPPRESS)
    parser.add_argument("--variant", choices=sorted(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    flags = parse_flags(
        "--task_name long_term_forecast --is_training 1 --model_id b --model_comment b --model TimeLLM --data ETTh1 "
        f"--seq_len 512 --pred_len {args.pred_len} --d_model 32 --d_ff 32 --n_heads 8 --prompt_domain 1 "
        f"--llm_layers {args.layers}".split()
    )
    return args, flags


def measure(args: Namespace, common: list[str]) -> dict[str, Any]:
    """All results; None stands for what a variant could not do for lack of GPU memory.

    Args:
        common: the words of the command line that every measurement's process has.
    """
    result: dict[str, Any] = {"machine": machine(args), "command": " ".join(sys.argv), "torch": torch.__version__}
    result |= child(common, "steps")
    for name in args.variants:
        # The seconds are those of "steps", where the variants took turns.
        result[name] = child(common, "peak", "--variant", name) | result[name]
        result[name] |= child(common, "evaluation", "--variant", name)
    result["speedup"] = ratio(result, "plain", "fast", "s_per_step")
    result["speedup_over_sdpa"] = ratio(result, "plain_sdpa", "fast", "s_per_step")
    result["eval"] = {
        "speedup": ratio(result, "plain", "fast", "eval_s_per_batch"),
        "speedup_alone": ratio(result, "plain", "fast", "eval_alone_s_per_batch"),
    }
    result["memory_ratio"] = ratio(result, "fast", "plain", "peak_gib")
    if args.loader:
        result["loader"] = child(common, "loader")
    if args.growth:
        result["growth"] = growth(common)
    return result


def child(common: list[str], task: str, *more: str) -> dict[str, Any]:
    """Run one measurement in a process of its own; what it prints last is its result.

    Raises:
        RunError: it has ended otherwise, and has said why unless a signal ended it.
    """
    command = [sys.executable, __file__, *common, "--child", task, *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunError(f"the measurement of {' '.join((task, *more))} ended with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def ratio(result: dict[str, Any], over: str, under: str, figure: str) -> float | None:
    """One variant's figure over another's; None where one of them has none."""
    numbers = [result.get(name, {}).get(figure) for name in (over, under)]
    return None if None in numbers else numbers[0] / numbers[1]


def growth(common: list[str]) -> list[dict[str, Any]]:
    """The fast step of one window over channels, 7 sequences at once, and of 7 channels over the horizon."""
    rows = []
    for channels, horizon in [(7, 96), (28, 96), (112, 96), (321, 96), (862, 96), (7, 192), (7, 336), (7, 720)]:
        more = f"--variant fast --windows 1 --channels {channels} --pred_len {horizon} --max_sequences 7 --peak_steps 3"
        rows.append({"channels": channels, "pred_len": horizon} | child(common, "peak", *more.split()))
    return rows


def machine(args: Namespace) -> str:
    """The GPU's name, or the processor's with its cores and PyTorch's threads."""
    if args.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


# Heading, key, decimals of the table's columns.
COLUMNS = [
    ("s/step", "s_per_step", 3),
    ("peak GiB", "peak_gib", 2),
    ("reserved", "peak_reserved_gib", 2),
    ("eval s", "eval_s_per_batch", 3),
    ("alone s", "eval_alone_s_per_batch", 3),
]


def show(result: dict[str, Any]) -> None:
    """Print the results as a table."""
    print(
        f"{result['machine']}, torch {result['torch']}; {result['sequences']} sequences, tokens {result['tokens']}, "
        f"vocabulary {result['vocabulary']}"
    )
    rows = {name: result[name] for name in VARIANTS if name in result}
    columns = [column for column in COLUMNS if any(column[1] in row for row in rows.values())]
    print(f"{'':12}" + "".join(f"{heading:>10}" for heading, _, _ in columns))
    for name, row in rows.items():
        print(f"{name:12}" + "".join(f"{figure(row.get(key), places):>10}" for _, key, places in columns))
    if any(None in row.values() for row in rows.values()):
        print("OOM: the GPU had too little memory for it; --max_sequences 7 takes less")
    if result["speedup"] is not None:
        over_sdpa = (
            "" if result["speedup_over_sdpa"] is None else f" (over plain with sdpa {result['speedup_over_sdpa']:.2f})"
        )
        print(
            f"speedup {result['speedup']:.2f}{over_sdpa}, memory ratio {figure(result['memory_ratio'], 2)}, evaluation "
            f"{figure(result['eval']['speedup'], 2)}, in a process of its own {figure(result['eval']['speedup_alone'], 2)}"
        )
    if "flops" in result:
        print(
            f"floor {result['floor_s']:.3f} s = {result['flops'] / 1e9:.0f} GFLOP at "
            f"{result['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s; fast step at {result['floor_fraction']:.2f} of it"
        )
    if "loader" in result:
        loader = result["loader"]
        print(
            f"loader: a batch takes {loader['batch_s']:.3f} s of a worker's time; with {loader['workers']} workers "
            f"{100 * loader['waits']:.1f} % of a fast step waits for it"
        )
    for row in result.get("growth", []):
        print(
            f"channels {row['channels']:4}  pred_len {row['pred_len']:4}  {figure(row['s_per_step'], 3):>8} s/step  "
            f"{figure(row['peak_gib'], 2):>6} GiB"
        )


def figure(value: float | None, places: int) -> str:
    """A number as the table has it."""
    return "OOM" if value is None else f"{value:.{places}f}"


if __name__ == "__main__":
    sys.exit(main())
