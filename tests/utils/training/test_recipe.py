"""`--recipe` and `--lradj`: rates, betas and batches against PyTorch driven as the published code drives it."""

import math
import re
from argparse import Namespace
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

import utils.training.train
from data_provider.data_factory import EpochBatches
from layers.backbone import Backbone, find_backbone
from models.TimeLLM import Model
from tests.small_run import COLUMNS, PRED_LEN, SEQ_LEN, refusal, train
from utils.flags import parse_flags
from utils.training.optimizer import build_scheduler

EPOCHS, STEPS, LR = 25, 2, 0.01
TYPE2 = {2: 5e-5, 4: 1e-5, 6: 5e-6, 8: 1e-6, 10: 5e-7, 15: 1e-7, 20: 5e-8}
Rate = tuple[float, tuple[float, float]]


def published(schedule: str, optimizer: torch.optim.Optimizer, epochs: int, steps: int, lr: float = LR) -> Iterator[Rate]:
    """The published loop's rate and betas at each step; the caller steps the optimizer."""
    if schedule == "COS":
        scheduler = CosineAnnealingLR(optimizer, T_max=20, eta_min=1e-8)
    else:
        scheduler = OneCycleLR(optimizer, max_lr=lr, steps_per_epoch=steps, epochs=epochs, pct_start=0.2)
    (group,) = optimizer.param_groups
    found = group["lr"]
    for epoch in range(1, epochs + 1):
        for _ in range(steps):
            yield group["lr"], group["betas"]
            if schedule == "TST":
                scheduler.step()
        new = {
            "type1": found * 0.5 ** (epoch - 1),
            "type2": TYPE2.get(epoch),
            "type3": found if epoch < 3 else found * 0.9 ** (epoch - 3),
            "PEMS": found * 0.95**epoch,
            "constant": found,
        }.get(schedule)
        if schedule == "COS":
            scheduler.step()
        elif new is not None:
            group["lr"] = new


@pytest.mark.filterwarnings("ignore:Detected call")
@pytest.mark.parametrize("schedule", ["type1", "type2", "type3", "PEMS", "constant", "TST", "COS"])
def test_published_rates_and_betas_through_a_resume(small, capsys, monkeypatch, schedule: str) -> None:
    """25 epochs of a run that is cut off in its 7th, in the middle of an epoch, and resumes: to the last bit."""
    seen: dict[int, Rate] = {}
    usual, steps = utils.training.train.train_step, [0]

    def watched(context, batch, due):
        progress, group = context.training.progress, context.training.optimizer.param_groups[0]
        step = (progress.epoch - 1) * STEPS + progress.iteration
        seen[step] = group["lr"], group["betas"]
        steps[0] += 1
        if steps[0] == 14:
            raise KeyboardInterrupt
        return usual(context, batch, due)

    monkeypatch.setattr(utils.training.train, "train_step", watched)
    flags = {"model": "DLinear", "llm_model_path": None, "recipe": "published", "lradj": schedule, "learning_rate": LR}
    words = small(train_epochs=EPOCHS, max_iters=STEPS, save_steps=1, test_every=0, patience=99, **flags)
    with pytest.raises(KeyboardInterrupt):
        train(words, capsys)
    assert sorted(seen) == list(range(14))
    lines = train([*words, "--resume", "--save_steps", "0"], capsys)
    assert steps[0] == EPOCHS * STEPS + 1 and any("epoch 7, iteration 1" in line for line in lines)
    expected = published(schedule, torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=LR), EPOCHS, STEPS)
    assert [seen[step] for step in range(EPOCHS * STEPS)] == list(expected)


@pytest.mark.filterwarnings("ignore:Detected call")
@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("constant", lambda step: 1),
        ("type1", lambda step: 2.0 ** -(step // 5)),
        ("type2", lambda step: [1, 1, 0.025, 0.025, 0.005, 0.005][step // 5]),
        ("type3", lambda step: [1, 1, 1, 0.9, 0.81, 0.729][step // 5]),
        ("PEMS", lambda step: 0.95 ** (step // 5)),
        ("COS", lambda step: (1 + math.cos(math.pi * step / 30)) / 2),
        ("TST", lambda step: 0.04 + 0.96 * (1 - math.cos(math.pi * step / 5)) / 2 if step < 5 else {29: 4e-6}.get(step)),
    ],
)
def test_own_rates_are_their_formulas(schedule: str, formula) -> None:
    """Six epochs of five steps, the betas Adam's own; in a group of two processes the same."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    args = Namespace(recipe="own", lradj=schedule, learning_rate=2e-3, train_epochs=6, pct_start=0.2)
    scheduler, per_step = build_scheduler(args, optimizer, steps_per_epoch=5, ranks=2)
    for step in range(30):
        (group,) = optimizer.param_groups
        assert group["betas"] == (0.9, 0.999)
        if formula(step) is not None:
            assert group["lr"] == pytest.approx(2e-3 * formula(step), abs=1e-12)
        for _ in range(per_step or step % 5 == 4):
            scheduler.step()


@pytest.mark.filterwarnings("ignore:Detected call")
@pytest.mark.parametrize(("steps", "epochs"), [(5, 1), (1, 1), (2, 1), (7, 3)])  # 0.2 * 5: a rise of no length
def test_one_cycle_of_any_length(steps: int, epochs: int) -> None:
    args = Namespace(recipe="published", lradj="TST", learning_rate=1.0, train_epochs=epochs, pct_start=0.2)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    scheduler, per_step = build_scheduler(args, optimizer, steps, ranks=2)
    for _ in range(steps * epochs * per_step):
        assert 0 < optimizer.param_groups[0]["lr"] <= 1
        scheduler.step()


def test_a_published_run_is_the_plain_loop(argv, backbones, capsys, tmp_path) -> None:
    """30 steps of windows of one channel, drawn over all channels, without dropout: each loss to 1e-6.

    An item's number over the number of windows is its channel; the rate rises and falls, and the beta falls and rises.
    """
    flags = {"recipe": "published", "lradj": "TST", "learning_rate": 0.005, "dropout": 0.0, "batch_size": 10}
    words = argv(train_epochs=2, max_iters=15, log_every=1, max_sequences=0, plots=0, test_every=0, **flags)
    lines = train(words, capsys)
    found = [float(re.search(r"loss: (\S+)", line)[1]) for line in lines if line.startswith("\titers:")]
    assert "train 555" in lines and any(line.startswith("recipe published: learning rate 0.0002, ") for line in lines)

    values = pd.read_csv(tmp_path / "series.csv")[list(COLUMNS)].to_numpy()
    values = ((values - values[:224].mean(0)) / values[:224].std(0)).astype(np.float32)
    set_seed(2021)
    args = parse_flags(words)
    args.enc_in, args.llm_dim, args.prompt_text = 3, 64, prompt_text(lines)
    model = Model(args, Backbone(find_backbone("QWEN", str(backbones["qwen2"])), 1)).train()
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.005), []
    order, rates = EpochBatches(3 * 185, 10, seed=2021), published("TST", optimizer, 2, 15, 0.005)
    for epoch in (1, 2):
        order.set_epoch(epoch)
        for items, _ in zip(order, range(15), strict=False):
            next(rates)
            rows = [values[item % 185 :][: SEQ_LEN + PRED_LEN, item // 185] for item in items]
            windows = torch.from_numpy(np.stack(rows))[:, :, None]  # (B, T + H, 1)
            loss = torch.nn.functional.mse_loss(model(windows[:, :SEQ_LEN]), windows[:, SEQ_LEN:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert len(found) == 30 and found == pytest.approx(losses, rel=1e-6, abs=1e-6)


def prompt_text(lines: list[str]) -> str:
    return next(line.removeprefix("prompt: ") for line in lines if line.startswith("prompt: "))


def test_lines_and_refusals(small, capsys) -> None:
    few = {"model": "DLinear", "llm_model_path": None, "max_iters": 1}
    told = "learning rate 0.001 as it stands; the published code would train at 4e-05 (--recipe published)"
    assert told in train(small(model_id="a", **few), capsys)
    assert not any("published" in line for line in train(small(model_id="b", learning_rate=None, **few), capsys))
    cosine = train(small(model_id="c", learning_rate=None, lradj="COS", **few), capsys)
    assert any("would lower it along a cosine of 20 epochs" in line for line in cosine)
    whole = refusal(small(model="Autoformer", llm_model_path=None, recipe="published"), capsys)
    assert whole.startswith("--recipe: got published, expected own, for --model Autoformer")
    other = small(model_id="a", recipe="published", resume=True, **few)
    assert refusal(other, capsys).startswith("--resume: got --recipe published; ")
