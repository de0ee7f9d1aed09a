"""Benchmark of the training step and the evaluation: plain path against fast path, on the same weights and batch.

    python scripts/benchmark.py --preset small
    python scripts/benchmark.py --preset qwen2.5-3b --tokenizer DIR --layers 6
    python scripts/benchmark.py --preset qwen2.5-3b --load_in_4bit --variants fast
    python scripts/benchmark.py --preset small --channels 862 --max_sequences 7 --variants fast

All other flags, such as --load_in_4bit, --max_sequences, --pred_len or --device, are those of run_main.py. What is
measured stands in scripts/BENCHMARK.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from utils.script import exit_code, script_parser  # noqa: E402

# isort: split
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402

from data_provider.description import PROMPT_BANK  # noqa: E402
from layers.reprogramming import attend  # noqa: E402
from scripts import check_gpu  # noqa: E402
from scripts.check_gpu import EVALUATED, WARM_UP  # noqa: E402
from scripts.make_backbone import PRESETS, make_backbone  # noqa: E402
from utils.flags import parse_flags  # noqa: E402
from utils.saving.files import write_json  # noqa: E402
from utils.saving.interrupt import Interrupts  # noqa: E402
from utils.setup import setup  # noqa: E402

# Published implementations ask transformers for the attention weights, which makes it fall back to eager
# attention, and write out the scores of the cross-attention; "plain_sdpa" is the same path without either.
VARIANTS = ("plain", "plain_sdpa", "fast")
COLUMNS = ["s_per_step", "peak_gib", "reserved_gib", "s_per_window", "at_once"]
ARGUMENTS = {
    "--preset": dict(choices=list(PRESETS), default="small", help="shape of the random backbone"),
    "--layers": dict(type=int, default=6, help="of the language model (6)"),
    "--tokenizer": dict(type=Path, help="tokenizer folder for the random backbone"),
    "--backbone": dict(type=Path, help="an existing folder instead of a random backbone"),
    "--windows": dict(type=int, default=4, help="of a batch (4)"),
    "--channels": dict(type=int, default=7, help="of a window (7)"),
    "--variants": dict(nargs="+", choices=VARIANTS, default=VARIANTS),
    "--rounds": dict(type=int, default=5, help="steps that the median is of (5)"),
    "--prototypes": dict(default="vocab", help="vocab or direct, of the fast variant alone"),
    "--prompt_decimals": dict(help="of the fast variant alone"),
    "--json": dict(type=Path, metavar="FILE", help="write the results there, too"),
    "--variant": dict(choices=VARIANTS, help=argparse.SUPPRESS),
}


def main(argv: list[str]) -> int:
    """Measure each variant in a process of its own, and print a table; return the exit code."""
    parser = script_parser("benchmark.py", __doc__, ARGUMENTS)
    args, run_flags = parser.parse_known_args(argv)

    def work(scratch: str) -> int:
        if args.variant:
            print(json.dumps(measure(args, run_flags, Path(scratch))))
            return 0
        folder = args.backbone or make_backbone(
            Path(scratch) / "backbone", args.preset, args.layers, tokenizer=args.tokenizer
        )
        found: dict[str, Any] = {}
        for name in args.variants:
            command = [sys.executable, __file__, *argv, "--backbone", str(folder), "--variant", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:  # it has said why
                return done.returncode
            found[name] = json.loads(done.stdout.splitlines()[-1])
        said = "{sequences} sequences, {opening} opening and {statistics} statistics tokens, vocabulary {vocabulary}"
        print(said.format(**next(iter(found.values()))))
        table = pd.DataFrame(found).T.reindex(columns=COLUMNS).astype({"at_once": int})
        print(table.to_string(float_format="{:.3f}".format))
        if "fast" in found:
            ratios = table[COLUMNS[:-1]] / table.loc["fast", COLUMNS[:-1]]
            print(f"\nover fast:\n{ratios.to_string(float_format='{:.2f}'.format)}")
        if args.json:
            write_json(args.json, {"command": " ".join(sys.argv)} | found)
        return 0

    with tempfile.TemporaryDirectory() as scratch:
        return exit_code(parser.prog, lambda: work(scratch))


def measure(args: argparse.Namespace, run_flags: list[str], scratch: Path) -> dict[str, Any]:
    """Seconds and memory of one variant: steps on one batch, a save, and an evaluation; of a run on random walks of
    `--channels` columns, described as the ETT data are."""
    described = (PROMPT_BANK / "ETT.txt").read_text(encoding="utf-8").strip()
    words = (
        "--task_name long_term_forecast --is_training 1 --model_id b --model_comment b --model TimeLLM --data custom "
        f"--data_path walks.csv --features M --seq_len 512 --d_model 32 --d_ff 32 --n_heads 8 --batch_size {args.windows} "
        f"--llm_layers {args.layers} --max_sequences 0 --device {'auto' if torch.cuda.is_available() else 'cpu'}"
    ).split()
    words += ["--root_path", str(scratch), "--checkpoints", str(scratch), "--llm_model_path", str(args.backbone)]
    fast = ["--prototypes", args.prototypes, *(["--prompt_decimals", args.prompt_decimals] if args.prompt_decimals else [])]
    words += ["--prompt_text", described, *run_flags, *(fast if args.variant == "fast" else ["--fast_path", "plain"])]
    flags = parse_flags(words, "benchmark.py")
    # 70 % of the rows train: enough for as many batches as are asked for, and a tenth for a window of validation.
    rows = 2 * (flags.seq_len + flags.pred_len + args.windows * (args.rounds + 2)) + 10 * flags.pred_len
    walks = np.random.default_rng(0).standard_normal((rows, args.channels)).cumsum(axis=0).round(4)
    pd.DataFrame(walks, pd.date_range("2020", periods=rows, freq="h", name="date")).to_csv(scratch / "walks.csv")
    context = setup(flags, 0, Interrupts())
    if args.variant != "fast":
        context.model.backbone.model.set_attn_implementation("eager" if args.variant == "plain" else "sdpa")
    if args.variant == "plain":
        context.model.reprogramming_layer.attend = attend
    model, batch = context.model, next(iter(context.loaders["train"])).to(context.device)
    found = check_gpu.measure(context, [batch] * (WARM_UP + args.rounds), [batch] * EVALUATED)
    return found | {
        "peak_gib": found["peaks_gib"]["steps"][0],
        "reserved_gib": found["peaks_gib"]["steps"][1],
        "opening": len(model.prefix_ids),
        "statistics": batch.prompts.ids.shape[1],
        "vocabulary": model.backbone.vocab_size,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
