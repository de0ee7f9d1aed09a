"""Measurements of scripts/benchmark.py: seconds and memory of each variant's training step and evaluation.

Each runs in a process of its own. Shapes: B windows, T rows of history, H rows of horizon, N channels.
"""

import sys

if __name__ == "__main__":  # before the imports, which would not be found
    sys.exit("scripts/measure.py is a part of scripts/benchmark.py, not a program: python scripts/benchmark.py --help")

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator

from data_provider.batches import Batch, WindowCollate
from data_provider.data_factory import make_loader
from data_provider.data_loader import WindowDataset
from data_provider.sampler import EpochBatches
from data_provider.timefeatures import time_marks
from layers.backbone import Backbone, find_backbone
from layers.fast import cross_attention
from layers.reprogramming import Attend, attend
from models.TimeLLM import Model
from scripts.flops import matmul_rate, training_step_flops
from utils.results.log import peak_memory_gib
from utils.training.evaluate import Shared, evaluate, forecast_in_parts
from utils.training.memory import cap_memory, is_out_of_memory
from utils.training.optimizer import build_optimizer
from utils.training.precision import choose_precision
from utils.training.train import forward_backward


@dataclass(frozen=True)
class Variant:
    """What runs the language model and the cross-attention."""

    attention: str | None  # transformers' attention on the plain path; None: the fast path
    attend: Attend


# Published implementations ask transformers for the attention weights, which makes it fall back to eager
# attention, and write out the scores of the cross-attention; "plain_sdpa" is the same path without either.
VARIANTS = {
    "plain": Variant("eager", attend),
    "plain_sdpa": Variant("sdpa", cross_attention),
    "fast": Variant(None, cross_attention),
}


class Bench:
    """A model, its batch (always the same series), and the training step of each variant that shares them."""

    def __init__(self, args: Namespace, flags: Namespace, backbone: Backbone, accelerator: Accelerator):
        torch.manual_seed(0)
        self.model = Model(flags, backbone).to(accelerator.device).train()
        self.accelerator, self.backbone, self.max_sequences = accelerator, backbone, args.max_sequences
        self.fast_path = self.model.language_model
        self.optimizer = build_optimizer("adam", self.model, 1e-4)
        series = torch.randn(args.windows, 512 + flags.pred_len, args.channels).cumsum(1)  # (B, T + H, N)
        items = [
            {"x": w[:512], "y": w[512:], "x_mark": w[:512], "y_mark": w[512:], "index": i} for i, w in enumerate(series)
        ]
        self.take(WindowCollate(flags.pred_len, None, self.model.prompts)(items))

    def take(self, batch: Batch) -> None:
        """Let the steps that follow run on this batch."""
        self.batch = batch.to(self.accelerator.device)
        self.sequences = self.batch

    def step(self, variant: str) -> float:
        """Seconds of one training step."""
        self._choose(variant)
        began = self.now()
        try:
            forward_backward(self.model.train(), self.sequences, self.accelerator, self.max_sequences)
            self.optimizer.step()
        finally:  # the memory is the next step's, also where this one had too little
            self.model.zero_grad(set_to_none=True)
        return self.now() - began

    def evaluate(self, variant: str, batches: int) -> float:
        """Seconds a batch; the plain path makes the prototypes anew for each batch, as published code does."""
        self._choose(variant)
        once = batches if variant == "fast" else 1
        began = self.now()
        evaluate(self.model, [self.batch] * once, self.accelerator, self._forecast)
        return (self.now() - began) / once

    def _forecast(self, sequences: Batch, shared: Shared) -> torch.Tensor:
        return forecast_in_parts(self.model, self.accelerator, sequences, shared, self.max_sequences)

    def _choose(self, variant: str) -> None:
        chosen = VARIANTS[variant]
        if chosen.attention is not None:
            self.backbone.plain_attention = chosen.attention
        self.model.language_model = self.backbone.plain if chosen.attention else self.fast_path
        self.model.reprogramming_layer.attend = chosen.attend

    def now(self) -> float:
        """The clock's seconds, once the device has done all that it was given."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def benches(
    args: Namespace, flags: Namespace, names: list[str], backbone: Backbone, accelerator: Accelerator
) -> dict[str, Bench]:
    """One bench for each variant; those with the same prototypes and prompts share one, and its memory."""
    made: dict[tuple, Bench] = {}

    def bench(prototypes: str, decimals: int | None) -> Bench:
        if (prototypes, decimals) not in made:
            chosen = Namespace(**vars(flags) | {"prototypes": prototypes, "prompt_decimals": decimals})
            made[prototypes, decimals] = Bench(args, chosen, backbone, accelerator)
        return made[prototypes, decimals]

    return {name: bench(args.prototypes, args.prompt_decimals) if name == "fast" else bench("vocab", None) for name in names}


def open_backbone(args: Namespace) -> tuple[Backbone, Accelerator]:
    """The backbone where a run would have it, with the number types and the share of the GPU that `utils.setup` chooses."""
    cuda = args.device != "cpu" and torch.cuda.is_available()
    torch.backends.cuda.matmul.allow_tf32 = True
    usual = Namespace(amp_dtype="auto", use_amp=False, load_in_4bit=args.load_in_4bit)
    precision = choose_precision(usual, torch.device("cuda" if cuda else "cpu"))
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "no"}[precision.autocast_dtype]
    accelerator = Accelerator(cpu=not cuda, mixed_precision=name)
    cap_memory(accelerator.device)
    info = find_backbone("QWEN", str(args.backbone))
    return Backbone(info, args.layers, accelerator.device, args.load_in_4bit, dtype=precision.weights_dtype), accelerator


def in_turn(names: list[str], warm_up: int, rounds: int, work: Callable[[str], float]) -> dict[str, float | None]:
    """Medians of `rounds` results of `work(name)`, the names in turn, after some to warm up; None: out of memory."""
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warm_up + rounds):
        for name in list(taken):
            try:
                taken[name].append(work(name))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                del taken[name]
    return {name: median(taken[name][warm_up:]) if name in taken else None for name in names}


def measure_steps(args: Namespace, flags: Namespace) -> dict[str, Any]:
    """Steps and evaluations of all variants in turn, several rounds after a warm-up; medians."""
    backbone, accelerator = open_backbone(args)
    bench = benches(args, flags, args.variants, backbone, accelerator)
    rates: list[float] = []

    def step(name: str) -> float:
        rates.append(matmul_rate(accelerator.device, backbone.dtype))
        return bench[name].step(name)

    steps = in_turn(args.variants, 1, args.rounds, step)
    evaluations = in_turn(args.variants, 0, args.rounds, lambda name: bench[name].evaluate(name, args.eval_batches))
    shown = bench.get("fast", bench[args.variants[0]])
    assert shown.batch.prompts is not None
    result: dict[str, Any] = {
        "sequences": len(shown.sequences),
        "tokens": {"opening": len(shown.model.prefix_ids), "statistics": shown.batch.prompts.ids.shape[1]},
        "vocabulary": backbone.vocab_size,
    }
    result |= {name: {"s_per_step": steps[name], "eval_s_per_batch": evaluations[name]} for name in args.variants}
    if (fast := steps.get("fast")) is not None:
        flops, rate = training_step_flops(shown.model, shown.batch), max(rates)
        floor = flops / rate
        result |= {"flops": flops, "matmul_flops_per_s": rate, "floor_s": floor, "floor_fraction": floor / fast}
    return result


def measure_peak(args: Namespace, flags: Namespace) -> dict[str, Any]:
    """Peak memory of one variant's steps in a process that does nothing else; seconds after a warm-up."""
    backbone, accelerator = open_backbone(args)
    bench = benches(args, flags, [args.variant], backbone, accelerator)[args.variant]
    seconds = in_turn([args.variant], 1, args.peak_steps, bench.step)[args.variant]
    peaks = {"peak_gib": peak_memory_gib(accelerator.device)}
    if accelerator.device.type == "cuda":  # what the GPU must have free for it
        peaks["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return {"s_per_step": seconds} | (peaks if seconds is not None else dict.fromkeys(peaks))


def measure_evaluation(args: Namespace, flags: Namespace) -> dict[str, Any]:
    """Seconds a batch in a process that has only evaluated, as the test of a checkpoint has.

    Where no training step has grown the heap, the allocator may hand each batch's memory back to the
    system and have it cleared again; this costs the variant more that holds more.
    """
    backbone, accelerator = open_backbone(args)
    bench = benches(args, flags, [args.variant], backbone, accelerator)[args.variant]
    seconds = in_turn([args.variant], 1, args.rounds, lambda name: bench.evaluate(name, args.eval_batches))
    return {"eval_alone_s_per_batch": seconds[args.variant]}


def measure_loader(args: Namespace, flags: Namespace) -> dict[str, Any]:
    """The part of the fast path's training steps in which it waits for the loader, in a loop as a training's; and what
    one batch with its prompts takes of a worker's time."""
    backbone, accelerator = open_backbone(args)
    bench = benches(args, flags, ["fast"], backbone, accelerator)["fast"]
    rows = args.windows * (args.rounds + 1) + flags.seq_len + flags.pred_len - 1
    series = np.random.default_rng(0).standard_normal((rows, args.channels)).cumsum(axis=0).astype(np.float32)
    dates = pd.date_range("2020", periods=rows, freq="h")
    windows = WindowDataset(series, time_marks(dates, "h", "timeF"), dates, flags.seq_len, 0, flags.pred_len)
    collate = WindowCollate(flags.pred_len, None, bench.model.prompts)
    began = time.process_time()
    collate([windows[index] for index in range(args.windows)])
    made = time.process_time() - began
    order = EpochBatches(len(windows), args.windows, seed=0)
    batches = iter(make_loader(windows, order, args.workers, collate, pin=accelerator.device.type == "cuda"))
    waited, whole = 0.0, 0.0
    for step in range(args.rounds + 1):
        began = bench.now()
        bench.take(next(batches))
        wait = bench.now() - began
        bench.step("fast")
        if step:  # the first one waits for workers that start
            waited, whole = waited + wait, whole + bench.now() - began
    return {"batch_s": made, "workers": args.workers, "waits": waited / whole}


MEASUREMENTS = {"loader": measure_loader, "steps": measure_steps, "peak": measure_peak, "evaluation": measure_evaluation}
