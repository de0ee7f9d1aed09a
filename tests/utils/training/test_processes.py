"""The same loop in a group of two processes (gloo on the CPU), as torchrun or accelerate start it."""

import re
from pathlib import Path

import torch.distributed

from tests.small_run import command_line, figures, train, train_in_two_processes


def test_two_processes_train_and_score_as_one(backbones, capsys, tmp_path: Path) -> None:
    words = command_line(tmp_path, backbones["qwen2"], batch_size=8, eval_batch_size=5)
    assert torch.distributed.is_gloo_available()
    lines = train_in_two_processes(words)
    # every line once; 185 windows are 11 iterations of 2 x 8
    assert [line for line in lines if line in ("train 185", "val 25", "test 57")] == [
        "train 185",
        "val 25",
        "test 57",
    ]
    assert [line for line in lines if "iters:" in line] == [
        line for line in lines if re.match(r"\titers: (4|8), epoch: 1 \| loss: ", line)
    ]
    assert sum("iters:" in line for line in lines) == 2 and sum(line.startswith("Test MSE") for line in lines) == 1
    # 12 test batches: 6 for each process, of 30 and 27 windows. One process gets the same sums.
    assert figures(train([*words, "--is_training", "0"], capsys)) == figures(lines)
