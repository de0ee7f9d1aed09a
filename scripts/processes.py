"""What several processes make of a training step: windows a second, bytes that travel, memory of the optimizer.

    OMP_NUM_THREADS=1 python scripts/processes.py --processes 1 2 --preset small
    OMP_NUM_THREADS=1 python scripts/processes.py --processes 2 4 --preset qwen2.5-3b --layers 1 --rounds 2

Each number of processes takes the same batch, in turn with the others. The step is the run's own: forward, backward with the
gradients added up meanwhile, and the optimizer.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, only scripts/ is on the path

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from utils.training.reduction import GradientReducer  # noqa: E402

import layers.ranks  # noqa: E402
from data_provider.batches import WindowCollate  # noqa: E402
from models.TimeLLM import Model  # noqa: E402
from scripts.make_backbone import PRESETS, make_backbone  # noqa: E402
from scripts.measure import open_backbone  # noqa: E402
from utils.command_line import parse_flags  # noqa: E402
from utils.training.optimizer import build_optimizer  # noqa: E402
from utils.training.train import forward_backward  # noqa: E402


def main() -> int:
    """Measure and print; return the exit code."""
    args = read_arguments()
    if args.child:
        measure(args)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        backbone = args.backbone or make_backbone(Path(scratch) / "backbone", args.preset, args.layers)
        rounds: dict[int, list[dict[str, Any]]] = {count: [] for count in args.processes}
        for _ in range(args.rounds):
            for count in args.processes:
                rounds[count].append(launch(count, ["--backbone", str(backbone), *sys.argv[1:]]))
    show(args, rounds)
    return 0


def read_arguments() -> Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser(prog="processes.py", description=str(__doc__).split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes, measured in turn")
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="shape of the random backbone")
    parser.add_argument("--backbone", type=Path, help="an existing folder instead of a random backbone")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--windows", type=int, default=4, help="of the whole batch")
    parser.add_argument("--channels", type=int, default=7)
    parser.add_argument("--prototypes", choices=["vocab", "direct"], default="vocab")
    parser.add_argument("--optimizer", choices=["adam", "adamw", "adamw8bit"], default="adam")
    parser.add_argument("--max_sequences", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round, after one to warm up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def launch(processes: int, words: list[str]) -> dict[str, Any]:
    """One round with so many processes; what the first of them prints."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), __file__, *words, "--child"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        sys.exit(f"processes.py: error: {processes} processes ended with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


class Counted:
    """Bytes that this process hands to collectives, and what of them a ring of processes sends on."""

    def __init__(self) -> None:
        self.handed = self.ring = 0
        usual, gather = dist.all_reduce, layers.ranks._gather

        def all_reduce(tensor: torch.Tensor, *args: Any, **words: Any) -> Any:
            self._count(tensor.nbytes, 2 * (world() - 1) / world())
            return usual(tensor, *args, **words)

        def gathered(whole: torch.Tensor, part: torch.Tensor) -> Any:
            self._count(part.nbytes, world() - 1)
            return gather(whole, part)

        dist.all_reduce, layers.ranks._gather = all_reduce, gathered

    def _count(self, size: int, sent: float) -> None:
        self.handed, self.ring = self.handed + size, self.ring + round(size * sent)


def world() -> int:
    """How many processes there are."""
    return layers.ranks.processes()


def measure(args: Namespace) -> None:
    """One process of the group; the first prints its figures, the others' are like them."""
    flags = parse_flags(
        "--task_name long_term_forecast --is_training 1 --model_id b --model_comment b --model TimeLLM --data ETTh1 "
        f"--seq_len 512 --pred_len 96 --d_model 32 --d_ff 32 --n_heads 8 --prompt_domain 1 --llm_layers {args.layers} "
        f"--prototypes {args.prototypes} --optimizer {args.optimizer}".split()
    )
    backbone, accelerator = open_backbone(args)
    rank, count = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(0)
    model = Model(flags, backbone)
    model.to(accelerator.device).train()
    optimizer = build_optimizer(args.optimizer, model, 1e-4)
    reducer = None
    if count > 1:
        mapping = model.mapping_layer
        reducer = GradientReducer(model.parameters(), [mapping.weight] if mapping and mapping.factored else [])
    series = torch.randn(args.windows, 512 + flags.pred_len, args.channels).cumsum(1)  # (B, T + H, N)
    first, last = (args.windows * part // count for part in (rank, rank + 1))
    items = [{"x": w[:512], "y": w[512:], "x_mark": w[:512], "y_mark": w[512:], "index": i} for i, w in enumerate(series)]
    batch = WindowCollate(flags.pred_len, None, model.prompts)(items[first:last]).to(accelerator.device)
    sequences, seconds = batch, []
    counted = Counted()
    for _ in range(1 + args.steps):
        counted.handed = counted.ring = 0
        began = time.perf_counter()
        total = args.windows * args.channels
        forward_backward(model, sequences, accelerator, args.max_sequences, total=total, reducer=reducer)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        accelerator.wait_for_everyone()
        seconds.append(time.perf_counter() - began)
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    values = sum(parameter.nbytes for parameter in model.parameters())
    if rank == 0:
        figures = {"seconds": median(seconds[1:]), "moments": moments, "values": values}
        print(json.dumps(figures | {"handed": counted.handed, "ring": counted.ring}))


def show(args: Namespace, rounds: dict[int, list[dict[str, Any]]]) -> None:
    """Print a row for each number of processes."""
    print(f"{args.preset}, {args.prototypes}, {args.optimizer}; {args.windows} windows of {args.channels} channels a step")
    print("processes   s/step  windows/s   ratio  MB handed over a step  MB sent (ring)  optimizer MB  trained MB")
    base = median(row["seconds"] for row in rounds[args.processes[0]])
    for count, rows in rounds.items():
        seconds, row = median(row["seconds"] for row in rows), rows[0]
        size = {name: row[name] / 1e6 for name in ("handed", "ring", "moments", "values")}
        print(
            f"{count:9} {seconds:8.3f} {args.windows / seconds:10.2f} {base / seconds:7.2f} {size['handed']:22.2f} "
            f"{size['ring']:15.2f} {size['moments']:13.1f} {size['values']:11.1f}"
        )


if __name__ == "__main__":
    sys.exit(main())
