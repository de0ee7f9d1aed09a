"""The dry run before the first step: its line, and that a run comes out the same to the last bit with and without it."""

import re

import pytest
import torch

import utils.training.dry_run
import utils.training.train
from tests.small_run import run_folder, train
from utils.training.dry_run import duration

LINE = (
    r"Dry run: \d+\.\d{4}s/iter; about \d+ s an epoch with its evaluations, \d+ s in all; "
    r"memory \d+\.\dGB at the peak, of \d+\.\dGB"
)


def dry_runs(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("Dry run:")]


def without_times(lines: list[str]) -> list[str]:
    return [line for line in lines if not re.search("speed:|cost time:|Memory:|Dry run:|saved at", line)]


@pytest.mark.parametrize("flags", [{}, {"num_workers": 1, "prototypes": "direct"}], ids=["vocab", "workers"])
def test_a_run_is_the_same_with_and_without(argv, capsys, monkeypatch, tmp_path, flags) -> None:
    words = argv(train_epochs=2, plots=0, checkpoints=tmp_path / "with", **flags)
    lines = train(words, capsys)
    (line,) = dry_runs(lines)
    assert re.fullmatch(LINE, line)
    assert lines.index(line) < next(n for n, text in enumerate(lines) if "iters:" in text)

    monkeypatch.setattr(utils.training.train, "dry_run", lambda *_: None)
    bare = argv(train_epochs=2, plots=0, checkpoints=tmp_path / "without", **flags)
    other = train(bare, capsys)
    assert not dry_runs(other) and without_times(lines) == without_times(other)
    for name in ("checkpoint.safetensors", "state.2.pt"):
        one, two = (run_folder(w) / name for w in (words, bare))
        assert one.read_bytes() == two.read_bytes(), name


def test_it_leaves_no_gradient_and_no_drawn_number(argv, capsys, monkeypatch) -> None:
    """What it could leave behind, at the moment when it ends."""
    seen = []

    def watched(job, work, left):
        before = torch.get_rng_state()
        job.loaders["train"].batch_sampler.set_epoch(1)
        order = list(job.loaders["train"].batch_sampler)
        drawn = job.loaders["train"].generator.get_state()
        utils.training.dry_run.dry_run(job, work, left)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(drawn, job.loaders["train"].generator.get_state())
        assert order == list(job.loaders["train"].batch_sampler)
        assert not list(job.model.gradients()) and not job.training.optimizer.state
        seen.append(job)

    monkeypatch.setattr(utils.training.train, "dry_run", watched)
    assert dry_runs(train(argv(train_epochs=2, plots=0), capsys)) and len(seen) == 1


def test_short_and_resumed_runs_have_none(argv, capsys) -> None:
    assert not dry_runs(train(argv(train_epochs=1, plots=0), capsys))  # 11 steps
    assert not dry_runs(train(argv(train_epochs=3, max_iters=6, plots=0, model_id="other"), capsys))  # 18
    resumed = train(argv(train_epochs=3, plots=0, resume=True), capsys)  # goes on from the first one's end
    assert any(line.startswith("Resuming from") for line in resumed) and not dry_runs(resumed)


def test_a_dry_run_without_memory_leaves_fewer_sequences_at_once(argv, capsys, monkeypatch) -> None:
    usual = utils.training.train.forward_backward

    def short(model, batch, precision, size, *rest):
        if not 0 < size <= 24:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(model, batch, precision, size, *rest)

    monkeypatch.setattr(utils.training.train, "forward_backward", short)
    lines = train(argv(train_epochs=2, plots=0), capsys)
    told = [n for n, line in enumerate(lines) if "going on with at most 24" in line]
    assert len(told) == 1 and told[0] < lines.index(dry_runs(lines)[0])


def test_durations() -> None:
    assert [duration(s) for s in (3.4, 119, 150, 5300, 5400, 90000)] == [
        "3 s",
        "2 min",
        "2 min",
        "88 min",
        "1 h 30 min",
        "25 h 0 min",
    ]
