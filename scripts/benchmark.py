"""Measure the training step and the evaluation: plain path against fast path, on the same weights and batches.

    python scripts/benchmark.py --preset small
    python scripts/benchmark.py --preset qwen2.5-3b --tokenizer DIR --layers 6

What is measured and how the floor is counted stands in scripts/BENCHMARK.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, only scripts/ is on the path

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402

from layers.backbone import Backbone  # noqa: E402
from layers.backbone_files import find_backbone  # noqa: E402
from layers.reprogramming import ReprogrammingLayer  # noqa: E402
from models.TimeLLM import Model  # noqa: E402
from scripts.flops import matmul_rate, training_step_flops  # noqa: E402
from scripts.make_backbone import make_backbone  # noqa: E402
from utils.batches import Batch, SequenceCollate  # noqa: E402
from utils.evaluate import evaluate  # noqa: E402
from utils.flags import parse_flags  # noqa: E402
from utils.run_log import peak_memory_gib  # noqa: E402
from utils.step import build_optimizer, gradients  # noqa: E402

# Attention of each variant in the language model. Published implementations ask transformers for the
# attention weights, which makes it fall back to eager attention, and write out the scores of the
# cross-attention; "plain_sdpa" is the same path without either.
VARIANTS = {"plain": "eager", "plain_sdpa": "sdpa", "fast": "sdpa"}


def main() -> int:
    args, flags = read_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        backbone = args.backbone or make_backbone(
            Path(scratch) / "backbone", args.preset, args.layers, tokenizer=args.tokenizer
        )
        common = ["--backbone", str(backbone), *sys.argv[1:]]
        if args.child:
            print(json.dumps(CHILDREN[args.child](args, flags)))
            return 0
        result = {"machine": machine(args), "command": " ".join(sys.argv), "torch": torch.__version__}
        result |= child(common, "steps")
        for name in args.variants:
            result[name]["peak_gib"] = child(common, "peak", "--variant", name)["peak_gib"]
            result[name] |= child(common, "evaluation", "--variant", name)
        alone = [result[name]["eval_alone_s_per_batch"] for name in ("plain", "fast")]
        result["eval"]["speedup_alone"] = alone[0] / alone[1]
        result["memory_ratio"] = result["fast"]["peak_gib"] / result["plain"]["peak_gib"]
        if args.growth:
            result["growth"] = growth(common)
    show(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def read_arguments() -> tuple[argparse.Namespace, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="small", help="shape of the random backbone (scripts/make_backbone.py)")
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
    parser.add_argument("--prototypes", default="vocab", help="of the fast path; the plain path has the paper's")
    parser.add_argument("--prompt_decimals", type=int, help="of the fast path; the plain path prints all digits")
    parser.add_argument("--growth", action="store_true", help="also over channels and pred_len")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--peak_steps", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=sorted(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--variant", choices=sorted(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not {"plain", "fast"} <= set(args.variants):
        parser.error(f"--variants: found {' '.join(args.variants)}, need plain and fast, which are compared")
    flags = parse_flags(
        "--task_name long_term_forecast --is_training 1 --model_id b --model_comment b --model TimeLLM --data ETTh1 "
        f"--seq_len 512 --pred_len {args.pred_len} --d_model 32 --d_ff 32 --n_heads 8 --prompt_domain 1 "
        f"--llm_layers {args.layers}".split()
    )
    return args, flags


def child(common: list[str], task: str, *more: str) -> dict:
    """Run one measurement in a process of its own; what it prints last is its result."""
    done = subprocess.run(
        [sys.executable, __file__, *common, "--child", task, *more], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def attend_written_out(queries, keys, values, dropout):
    """The cross-attention as published implementations have it: scores, softmax, dropout, product."""
    scores = torch.softmax(queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5, -1)
    return torch.dropout(scores, dropout, train=dropout > 0) @ values


class Bench:
    """A model, its batch (always the same series), and the training step of each variant that shares them."""

    def __init__(self, args, flags, prototypes: str, decimals: int | None, backbone: Backbone, accelerator: Accelerator):
        flags.prototypes, flags.prompt_decimals = prototypes, decimals
        torch.manual_seed(0)
        self.model = Model(flags, backbone).to(accelerator.device).train()
        self.accelerator, self.backbone, self.max_sequences = accelerator, backbone, args.max_sequences
        self.optimizer = build_optimizer("adam", self.model, 1e-4)
        collate = SequenceCollate(self.model.prompts, flags.pred_len, None)
        series = torch.randn(args.windows, 512 + flags.pred_len, args.channels).cumsum(1)
        self.batch: Batch = collate(
            [{"x": w[:512], "y": w[512:], "index": i} for i, w in enumerate(series)]
        ).to(accelerator.device)

    def step(self, variant: str) -> float:
        """Seconds of one training step."""
        self._take(variant)
        began = self._now()
        gradients(self.model, self.batch, self.accelerator, self.max_sequences)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self._now() - began

    def evaluate(self, variant: str, batches: int) -> float:
        """Seconds a batch; the plain path makes the prototypes anew for each batch, as published code does."""
        self._take(variant)
        once = batches if variant == "fast" else 1
        began = self._now()
        evaluate(self.model, [self.batch] * once, self.accelerator)
        return (self._now() - began) / once

    def _take(self, variant: str) -> None:
        self.model.fast_path = variant == "fast"
        self.backbone.plain_attention = VARIANTS[variant]
        attend = attend_written_out if variant == "plain" else ReprogrammingLayer.attend
        self.model.reprogramming_layer.attend = attend

    def _now(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def benches(args, flags, names: list[str], backbone: Backbone, accelerator: Accelerator) -> dict[str, Bench]:
    """One bench for each variant; those with the same prototypes and prompts share one, and its memory."""
    made: dict[tuple, Bench] = {}

    def bench(*options) -> Bench:
        if options not in made:
            made[options] = Bench(args, flags, *options, backbone, accelerator)
        return made[options]

    return {
        name: bench(args.prototypes, args.prompt_decimals) if name == "fast" else bench("vocab", None) for name in names
    }


def open_backbone(args) -> tuple[Backbone, Accelerator]:
    cuda = args.device != "cpu" and torch.cuda.is_available()
    accelerator = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no")
    info = find_backbone("QWEN", str(args.backbone))
    return Backbone(info, args.layers, accelerator.device, args.load_in_4bit), accelerator


def measure_steps(args, flags) -> dict:
    """Steps and evaluations of all variants in turn, several rounds after a warm-up; medians."""
    backbone, accelerator = open_backbone(args)
    bench = benches(args, flags, args.variants, backbone, accelerator)
    steps, evaluations = ({name: [] for name in bench} for _ in range(2))
    rates = []
    for name in bench:
        bench[name].step(name)
    for _ in range(args.rounds):
        for name in bench:
            rates.append(matmul_rate(accelerator.device, backbone.dtype))
            steps[name].append(bench[name].step(name))
    for _ in range(args.rounds):
        for name in bench:
            evaluations[name].append(bench[name].evaluate(name, args.eval_batches))
    result = {
        name: {"s_per_step": median(steps[name]), "eval_s_per_batch": median(evaluations[name])} for name in bench
    }
    fast = bench["fast"]
    flops, rate = training_step_flops(fast.model, fast.batch), max(rates)
    result["speedup"] = median(steps["plain"]) / median(steps["fast"])
    if "plain_sdpa" in bench:
        result["speedup_over_sdpa"] = median(steps["plain_sdpa"]) / median(steps["fast"])
    return result | {
        "eval": {"speedup": median(evaluations["plain"]) / median(evaluations["fast"])},
        "flops": flops,
        "matmul_flops_per_s": rate,
        "floor_s": flops / rate,
        "floor_fraction": flops / rate / median(steps["fast"]),
        "sequences": len(fast.batch.x),
        "tokens": {"opening": len(fast.model.prompts.opening_ids), "statistics": int(fast.batch.prompts.ids.shape[1])},
        "vocabulary": backbone.vocab_size,
    }


def measure_peak(args, flags) -> dict:
    """Peak memory of one variant's steps in a process that does nothing else; seconds after a warm-up."""
    backbone, accelerator = open_backbone(args)
    bench = benches(args, flags, [args.variant], backbone, accelerator)[args.variant]
    bench.step(args.variant)
    seconds = [bench.step(args.variant) for _ in range(args.peak_steps)]
    return {"peak_gib": peak_memory_gib(accelerator.device), "s_per_step": median(seconds)}


def measure_evaluation(args, flags) -> dict:
    """Seconds a batch in a process that has only evaluated, as the test of a checkpoint has.

    Where no training step has grown the heap, the allocator may hand each batch's memory back to the
    system and have it cleared again; this costs the variant more that holds more.
    """
    backbone, accelerator = open_backbone(args)
    bench = benches(args, flags, [args.variant], backbone, accelerator)[args.variant]
    bench.evaluate(args.variant, 1)
    return {"eval_alone_s_per_batch": median(bench.evaluate(args.variant, args.eval_batches) for _ in range(args.rounds))}


CHILDREN = {"steps": measure_steps, "peak": measure_peak, "evaluation": measure_evaluation}


def growth(common: list[str]) -> list[dict]:
    """The fast step of one window over channels, 7 sequences at once, and of 7 channels over the horizon."""
    rows = []
    for channels, horizon in [(7, 96), (28, 96), (112, 96), (321, 96), (7, 192), (7, 336), (7, 720)]:
        options = {
            "--variant": "fast", "--windows": 1, "--channels": channels, "--pred_len": horizon,
            "--max_sequences": 7, "--peak_steps": 3,
        }
        more = [str(word) for option in options.items() for word in option]
        rows.append({"channels": channels, "pred_len": horizon} | child(common, "peak", *more))
    return rows


def machine(args) -> str:
    if args.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def show(result: dict) -> None:
    """The results as a table."""
    print(f"{result['machine']}, torch {result['torch']}; {result['sequences']} sequences, tokens {result['tokens']}, "
          f"vocabulary {result['vocabulary']}")
    print(f"{'':12}{'s/step':>9}{'peak GiB':>10}{'eval s':>9}{'alone s':>9}")
    for name in (name for name in VARIANTS if name in result):
        row = result[name]
        print(f"{name:12}{row['s_per_step']:9.3f}{row['peak_gib']:10.2f}{row['eval_s_per_batch']:9.3f}"
              f"{row['eval_alone_s_per_batch']:9.3f}")
    over_sdpa = f" (over plain with sdpa {result['speedup_over_sdpa']:.2f})" if "speedup_over_sdpa" in result else ""
    print(f"speedup {result['speedup']:.2f}{over_sdpa}, memory ratio {result['memory_ratio']:.2f}, "
          f"evaluation {result['eval']['speedup']:.2f}, in a process of its own {result['eval']['speedup_alone']:.2f}")
    print(f"floor {result['floor_s']:.3f} s = {result['flops'] / 1e9:.0f} GFLOP at "
          f"{result['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s; fast step at {result['floor_fraction']:.2f} of it")
    for row in result.get("growth", []):
        print(f"channels {row['channels']:4}  pred_len {row['pred_len']:4}  {row['s_per_step']:8.3f} s/step  "
              f"{row['peak_gib']:6.2f} GiB")


if __name__ == "__main__":
    sys.exit(main())
