"""Zero-shot forecasting: train on one data set, test on another (the paper's section 4.4).

    python scripts/zero_shot.py --source ETTh1 --target ETTh2 --llm_layers 6 --load_in_4bit

For each horizon a model is trained on the source (a run that is there already goes on, or is only tested,
if it has the same flags) and tested on the target without seeing a row of it in training. All other
flags go to run_main.py. The table has beside it what simple forecasts reach on the target; the ridge
regression there was fitted on the target.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, only scripts/ is on the path

from utils.flags import parse_flags, run_name  # noqa: E402

ETT = ("ETTh1", "ETTh2", "ETTm1", "ETTm2")
COLUMNS = ("zero-shot", "source", "last 24 h", "ridge")


def main(argv: list[str]) -> int:
    """Train and test what is missing, print the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="zero_shot.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--source", choices=ETT, default="ETTh1", help="train on this (default: ETTh1)")
    parser.add_argument("--target", choices=ETT, default="ETTh2", help="test on this (default: ETTh2)")
    parser.add_argument("--horizons", type=int, nargs="+", default=[96, 192, 336, 720], metavar="H",
                        help="values of --pred_len (default: 96 192 336 720)")  # fmt: skip
    args, others = parser.parse_known_args(argv)
    rows = {}
    for horizon in args.horizons:
        rows[horizon] = measure(args.source, args.target, horizon, others)
        if rows[horizon] is None:
            return 1
    print(table(args.source, args.target, rows))
    return 0


def measure(source: str, target: str, horizon: int, others: list[str]) -> dict[str, tuple[float, float]] | None:
    """(MSE, MAE) by column for one horizon; None where a run failed."""
    flags = [
        *("--task_name", "long_term_forecast", "--model", "TimeLLM", "--model_id", f"{source}_zeroshot"),
        *("--model_comment", "zeroshot", "--root_path", "./dataset/ETT-small/", "--seq_len", "512"),
        *("--pred_len", str(horizon), "--d_model", "32", "--d_ff", "32", "--prompt_domain", "1", *others),
    ]
    train = [*flags, "--is_training", "1", "--data", source]
    parsed = parse_flags(train)
    folder = Path(parsed.checkpoints) / run_name(parsed, 0)
    if _run([*train, "--resume"]):  # a finished run is only tested, one with other flags is refused
        return None
    if _run([*flags, "--is_training", "0", "--data", target, "--checkpoint", str(folder)]):
        return None
    tested = REPO / folder / f"on_{target}" / "metrics.json"
    own, other = (json.loads(path.read_text(encoding="utf-8")) for path in (REPO / folder / "metrics.json", tested))
    simple = {row["name"]: (row["mse"], row["mae"]) for row in other["baselines"]["rows"]}
    figures = [(of["test"]["mse"], of["test"]["mae"]) for of in (other, own)]
    return dict(zip(COLUMNS, [*figures, simple.get("last season"), simple["ridge"]], strict=True))


def _run(flags: list[str]) -> int:
    return subprocess.run([sys.executable, "run_main.py", *flags], cwd=REPO).returncode


def table(source: str, target: str, rows: dict[int, dict]) -> str:
    """A row a horizon, and their mean."""
    heads = {"zero-shot": f"{source}->{target}", "source": f"{source} itself", "last 24 h": "repeat 24 h", "ridge": "ridge"}
    every = dict(rows)
    if len(rows) > 1:
        every["mean"] = {name: _mean([row[name] for row in rows.values()]) for name in COLUMNS}
    lines = ["", f"Trained on {source}, tested on {target} (MSE MAE, standardised scale, lower is better)", ""]
    lines.append(f"{'horizon':>8}" + "".join(f"  {heads[name]:>15}" for name in COLUMNS))
    for name, row in every.items():
        lines.append(f"{name:>8}" + "".join(f"  {_pair(row[column]):>15}" for column in COLUMNS))
    return "\n".join(lines)


def _mean(pairs: list) -> tuple[float, float] | None:
    if None in pairs:
        return None
    return tuple(sum(values) / len(pairs) for values in zip(*pairs, strict=True))


def _pair(figures: tuple[float, float] | None) -> str:
    return "-" if figures is None else f"{figures[0]:.3f} {figures[1]:.3f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
