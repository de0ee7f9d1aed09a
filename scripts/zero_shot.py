"""Zero-shot forecasting: train on one data set, test on another (the paper's section 4.4).

    python scripts/zero_shot.py --source ETTh1 --target ETTh2 --llm_layers 6 --load_in_4bit

For each horizon a model is trained on the source (a run that is there already resumes, or is only tested, if it has
the same flags), and tested on the target by the test of run_pretrain.py. Here no row of the target is seen before: the
source's validation windows choose the epoch, where run_pretrain.py lets the target's choose it. All other flags go to
both. The table has beside it what simple forecasts reach on the target; the ridge regression there was fitted on it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, only scripts/ is on the path

from data_provider.splits import DATASETS  # noqa: E402
from utils.flags import (
    parse_flags,  # noqa: E402
    run_name,  # noqa: E402
)

COLUMNS = ("zero-shot", "source", "last 24 h", "ridge")
Errors = tuple[float, float] | None  # MSE and MAE; None: the data have no season to repeat


def main(argv: list[str]) -> int:
    """Train and test what is missing, print the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="zero_shot.py", description=str(__doc__).splitlines()[0], allow_abbrev=False)
    named = [name for name in DATASETS if DATASETS[name].borders]
    parser.add_argument("--source", choices=named, default="ETTh1", help="train on this (default: ETTh1)")
    parser.add_argument("--target", choices=named, default="ETTh2", help="test on this (default: ETTh2)")
    parser.add_argument("--horizons", type=int, nargs="+", default=[96, 192, 336, 720], metavar="H",
                        help="values of --pred_len (default: 96 192 336 720)")  # fmt: skip
    args, others = parser.parse_known_args(argv)
    rows = {}
    for horizon in args.horizons:
        errors = measure(args.source, args.target, horizon, others)
        if errors is None:
            return 1
        rows[horizon] = errors
    print(table(args.source, args.target, rows))
    return 0


def measure(source: str, target: str, horizon: int, others: list[str]) -> dict[str, Errors] | None:
    """(MSE, MAE) by column for one horizon; None where a run failed."""
    flags = [
        *("--task_name", "long_term_forecast", "--model", "TimeLLM", "--model_id", f"{source}_zeroshot"),
        *("--model_comment", "zeroshot", "--root_path", "./dataset/ETT-small/", "--seq_len", "512"),
        *("--pred_len", str(horizon), "--d_model", "32", "--d_ff", "32", "--prompt_domain", "1", *others),
    ]
    train = [*flags, "--is_training", "1", "--data", source]
    parsed = parse_flags(train, "zero_shot.py")
    folder = Path(parsed.checkpoints) / run_name(parsed, 0)
    if _run([*train, "--resume"]):  # a finished run is only tested, one with other flags is refused
        return None
    test = [*flags, "--is_training", "0", "--data_pretrain", source, "--data", target, "--checkpoint", str(folder)]
    if _run(test, "run_pretrain.py"):
        return None
    tested = REPO / folder / f"on_{target}" / "metrics.json"
    own, other = (json.loads(path.read_text(encoding="utf-8")) for path in (REPO / folder / "metrics.json", tested))
    simple = {row["name"]: (row["mse"], row["mae"]) for row in other["baselines"]["rows"]}
    figures = [(of["test"]["mse"], of["test"]["mae"]) for of in (other, own)]
    return dict(zip(COLUMNS, [*figures, simple.get("last season"), simple["ridge"]], strict=True))


def _run(flags: list[str], program: str = "run_main.py") -> int:
    return subprocess.run([sys.executable, program, *flags], cwd=REPO).returncode


def table(source: str, target: str, rows: dict[int, dict[str, Errors]]) -> str:
    """A row a horizon, and their mean."""
    heads = {"zero-shot": f"{source}->{target}", "source": f"{source} itself", "last 24 h": "repeat 24 h", "ridge": "ridge"}
    every = {str(horizon): row for horizon, row in rows.items()}
    if len(rows) > 1:
        every["mean"] = {name: _mean([row[name] for row in rows.values()]) for name in COLUMNS}
    lines = ["", f"Trained on {source}, tested on {target} (MSE MAE, standardised scale, lower is better)", ""]
    lines.append(f"{'horizon':>8}" + "".join(f"  {heads[name]:>15}" for name in COLUMNS))
    for name, row in every.items():
        lines.append(f"{name:>8}" + "".join(f"  {_pair(row[column]):>15}" for column in COLUMNS))
    return "\n".join(lines)


def _mean(rows: list[Errors]) -> Errors:
    known = [row for row in rows if row is not None]
    if len(known) < len(rows):
        return None
    mse, mae = (sum(values) / len(known) for values in zip(*known, strict=True))
    return mse, mae


def _pair(errors: Errors) -> str:
    return "-" if errors is None else f"{errors[0]:.3f} {errors[1]:.3f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
