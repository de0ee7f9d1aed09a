"""The choice of number types, and runs in fp16: their losses, their loss scale, and what becomes of an overflow."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

import utils.training.train
from layers.errors import RunError
from tests.small_run import run_folder, train
from utils.flags import parse_flags
from utils.saving.interrupt import Interrupts
from utils.saving.state import FIRST_SCALE, find_state
from utils.setup import setup
from utils.training.evaluate import score
from utils.training.precision import choose_precision
from utils.training.session import Job
from utils.training.train import Clock, train_epoch
from utils.training.train import train as fit

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def begin(argv, tmp_path: Path):
    """`begin(where, scale, **flags)`: a run in fp16 that is set up to train, its folder in `where`.

    The tiny model's gradients are large: with the first scale of a run, its first step overflows.
    """
    jobs: list[Job] = []

    def begun(where: str = "runs", scale: float = 2.0**12, **flags: object) -> Job:
        words = argv(**{"amp_dtype": "fp16", "save_steps": 0, "checkpoints": tmp_path / where} | flags)
        jobs.append(setup(parse_flags(words), 0, Interrupts()))
        assert jobs[-1].training.progress.loss_scale == FIRST_SCALE
        jobs[-1].training.progress.loss_scale = scale
        return jobs[-1]

    yield begun
    for job in jobs:
        job.close()


def epoch(job: Job) -> float:
    torch.manual_seed(0)
    return train_epoch(job, Clock(job))


def weights(job: Job) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in job.model.state_dict().values()]


def warnings(job: Job) -> list[str]:
    lines = (job.folder / "train.log").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if "WARNING" in line]


def overflow(job: Job, steps: set[int]) -> None:
    """Let a gradient of these steps (from 1) be infinite."""
    calls = iter(range(1, 1000))
    bias = job.model.output_projection.linear.bias
    bias.register_hook(lambda gradient: gradient * (float("inf") if next(calls) in steps else 1))


def losses(lines: list[str]) -> list[float]:
    return [float(line.split("loss: ")[1]) for line in lines if "iters:" in line]


@pytest.mark.parametrize(
    ("device", "flags", "has_bf16", "autocast", "held", "note"),
    [
        ("cuda", {}, True, BF16, BF16, ""),
        ("cuda", {}, False, FP16, FP16, "Numbers: fp16 with loss scaling (this GPU has no bf16)"),
        ("cuda", {"load_in_4bit": True}, False, FP16, FP16, "Numbers: fp16 with loss scaling (this GPU has no bf16)"),
        ("cuda", {"amp_dtype": "bf16"}, False, BF16, BF16, ""),
        ("cuda", {"amp_dtype": "fp16"}, True, FP16, FP16, "Numbers: fp16 with loss scaling"),
        ("cuda", {"amp_dtype": "fp32"}, True, None, FP32, "Numbers: fp32"),
        ("cpu", {}, False, None, FP32, ""),
        ("cpu", {"use_amp": True}, False, BF16, FP32, ""),
        ("cpu", {"load_in_4bit": True}, False, None, BF16, ""),
        ("cpu", {"load_in_4bit": True, "use_amp": True}, False, BF16, BF16, ""),
        ("cpu", {"amp_dtype": "bf16"}, False, BF16, FP32, "Numbers: bf16"),
        ("cpu", {"amp_dtype": "fp16", "use_amp": True}, False, FP16, FP16, "Numbers: fp16 with loss scaling"),
        ("cpu", {"amp_dtype": "fp32", "use_amp": True}, False, None, FP32, "Numbers: fp32"),
        ("cpu", {"amp_dtype": "fp32", "load_in_4bit": True}, False, None, FP32, ""),
    ],
)
def test_choice(monkeypatch, device: str, flags: dict, has_bf16: bool, autocast, held, note: str) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    args = Namespace(**{"amp_dtype": "auto", "use_amp": False, "load_in_4bit": False} | flags)
    chosen = choose_precision(args, torch.device(device))
    assert (chosen.autocast_dtype, chosen.weights_dtype, chosen.note) == (autocast, held, note)
    assert chosen.is_scaled == (autocast == FP16)


@pytest.mark.parametrize("path", ["auto", "plain"])
def test_a_run_in_fp16_loses_as_one_in_float32(begin, argv, capsys, path: str) -> None:
    """Step by step, from a scale at which none is skipped."""
    flags = {"max_iters": 6, "log_every": 1, "fast_path": path, "dropout": 0.0}
    found = {}
    for dtype in ("fp32", "fp16"):
        job = begin(dtype, amp_dtype=dtype, **flags)
        epoch(job)
        found[dtype] = losses((job.folder / "train.log").read_text(encoding="utf-8").splitlines())
        assert not warnings(job)
    assert len(found["fp16"]) == 6
    assert found["fp16"] == pytest.approx(found["fp32"], rel=0.02) and found["fp16"] != found["fp32"]


def test_a_checkpoint_is_tested_whatever_it_was_trained_in(argv, capsys) -> None:
    """Number types are the machine's: a checkpoint of a small GPU is used on a larger one, or on the CPU."""
    words = argv(amp_dtype="fp16", max_iters=2, load_in_4bit=True)
    trained = train(words, capsys)
    for dtype in ("auto", "fp16"):
        found = train(
            ["--is_training", "0", "--checkpoint", str(run_folder(words)), "--amp_dtype", dtype, "--device", "cpu"], capsys
        )
        mse = [float(next(line for line in lines if "Test MSE" in line).split()[2]) for lines in (found, trained)]
        assert mse[0] == pytest.approx(mse[1], rel=0.02)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adamw8bit"])
def test_the_scale_is_taken_out_again(begin, optimizer: str) -> None:
    """Adam hardly sees how large its gradients are, but for its epsilon; its moments are those of the true ones."""
    found = []
    for scale in (2.0**12, 2.0**8):
        job = begin(f"{scale:.0f}", scale, max_iters=3, optimizer=optimizer, prototypes="direct")
        epoch(job)
        # Those of a bias are kept in float32 by all three.
        moments = job.training.optimizer.state[job.model.output_projection.linear.bias]
        found.append((moments["exp_avg" if "exp_avg" in moments else "state1"], weights(job)))
    assert found[0][0].abs().max() < 10  # and not thousands of times that
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0.02, atol=1e-4)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert (a - b).norm() < 0.02 * b.norm() + 1e-3


def test_an_infinite_gradient_halves_the_scale_and_skips(begin) -> None:
    job, first = begin(max_iters=2), begin("one", max_iters=1)
    overflow(job, {2})
    epoch(job), epoch(first)
    assert all(torch.equal(a, b) for a, b in zip(weights(job), weights(first), strict=True))
    assert job.training.progress.loss_scale == 2**11 and job.training.progress.good_steps == 0
    assert len(warnings(job)) == 1 and "a gradient is NaN or infinite; the step is skipped" in warnings(job)[0]
    assert warnings(job)[0].endswith("1 in a row); the loss was scaled by 4096")


def test_a_real_overflow_brings_the_scale_down_until_it_fits(begin) -> None:
    job = begin(scale=2.0**20, max_iters=10)
    epoch(job)
    scale, skipped = job.training.progress.loss_scale, job.training.progress.skipped
    assert 4 < skipped < 10 and scale == 2.0 ** (20 - skipped)
    assert all(torch.isfinite(tensor).all() for tensor in weights(job))


def test_more_than_ten_skips_in_a_row_do_not_end_a_run_whose_scale_comes_down(begin) -> None:
    job = begin(scale=FIRST_SCALE, max_iters=13, batch_size=8)
    overflow(job, set(range(1, 13)))
    epoch(job)
    assert len(warnings(job)) == 12 and job.training.progress.loss_scale == FIRST_SCALE / 2**12
    assert job.training.progress.skipped_in_a_row == 0


def test_skips_end_the_run_once_the_scale_is_one(begin) -> None:
    job = begin(scale=FIRST_SCALE, train_epochs=3)
    overflow(job, set(range(1, 100)))
    with pytest.raises(RunError, match="17 steps in a row had no finite loss or gradient"):
        fit(job)  # 16 halvings, and one step that was not scaled
    assert job.training.progress.loss_scale == 1


def test_the_scale_doubles_after_good_steps(begin, monkeypatch) -> None:
    monkeypatch.setattr(utils.training.train, "GOOD_STEPS", 3)
    job, seen = begin(scale=4.0, max_iters=13, batch_size=8), []
    overflow(job, {5, 9, 10, 11, 12, 13})
    due = job.training.saver.due  # asked in each step, before its change of the scale
    monkeypatch.setattr(
        job.training.saver, "due", lambda progress, **at: seen.append(progress.loss_scale) or due(progress, **at)
    )
    epoch(job)
    assert [*seen[1:], job.training.progress.loss_scale] == [4, 4, 8, 8, 4, 4, 4, 8, 4, 2, 1, 1, 1]


def test_a_resumed_run_goes_on_with_its_scale(argv, capsys, monkeypatch, tmp_path: Path) -> None:
    """Two epochs at once against one and then another: the same tensors, optimizer state and scale."""
    monkeypatch.setattr(utils.training.train, "GOOD_STEPS", 7)
    flags = {"amp_dtype": "fp16", "max_iters": 5, "resume": True}
    whole = argv(train_epochs=2, checkpoints=tmp_path / "whole", **flags)
    parts = [argv(train_epochs=epochs, checkpoints=tmp_path / "parts", **flags) for epochs in (1, 2)]
    for words in (whole, parts[0]):
        train(words, capsys)
    before, _ = find_state(run_folder(parts[0]))
    assert before is not None and before["progress"]["good_steps"] == 4
    assert any("Resuming from" in line for line in train(parts[1], capsys))
    one, two = (find_state(run_folder(words))[0] for words in (whole, parts[1]))
    assert (one["progress"]["loss_scale"], one["progress"]["good_steps"]) == (FIRST_SCALE, 2)  # the first step has halved it
    assert one["path"].read_bytes() == two["path"].read_bytes()


def test_evaluation_is_finite_in_fp16(begin) -> None:
    job = begin(max_iters=1)
    epoch(job)
    assert score(job, "val").mse < 10
