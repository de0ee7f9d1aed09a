"""Numbers that go wrong and memory that runs out, on real runs with a tiny backbone."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from layers.errors import RunError
from tests.live import Lab
from utils.flags import parse_flags
from utils.saving.interrupt import Interrupts
from utils.setup import setup
from utils.training.evaluate import score
from utils.training.session import Job
from utils.training.train import Clock, train, train_epoch


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"), rows=300)


@pytest.fixture
def begin(lab: Lab, tmp_path: Path):
    """`begin(*flags, where="a")`: a run that is set up to train, its folder in `where`."""
    jobs: list[Job] = []

    def begun(*flags: object, where: str = "runs") -> Job:
        words = lab.argv(tmp_path / where, "--num_workers", 0, "--save_steps", 0, *flags)
        jobs.append(setup(parse_flags(words), 0, Interrupts()))
        return jobs[-1]

    yield begun
    for job in jobs:
        job.close()


def epoch(job: Job) -> float:
    """Train an epoch with dropout that starts at the same numbers in each job."""
    torch.manual_seed(0)
    return train_epoch(job, Clock(job))


def logged(job: Job) -> list[str]:
    return (job.folder / "train.log").read_text(encoding="utf-8").splitlines()


def break_targets(job: Job, iterations: set[int], value: float) -> None:
    """Let the loader's batches of these iterations (from 1) carry a wrong value in column b of window 2."""
    collate, count = job.loaders["train"].collate_fn, iter(range(1, 1000))

    def broken(items):
        batch = collate(items)
        if next(count) in iterations:
            batch.y[2 * 2 + 1, 3] = value
        return batch

    job.loaders["train"].collate_fn = broken


def weights(job: Job) -> list[torch.Tensor]:
    state = job.training.optimizer.state_dict()["state"]
    return [t.clone() for t in job.model.state_dict().values()] + [
        t.clone() for held in state.values() for t in held.values()
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_step_with_wrong_numbers_is_skipped_and_counted(begin, value: float) -> None:
    job = begin("--max_iters", 2)
    break_targets(job, {2}, value)
    first = begin("--max_iters", 1, where="one")
    loss, alone = epoch(job), epoch(first)
    assert loss == alone and job.training.progress.skipped == 1  # the mean is of the steps that count
    assert all(torch.equal(a, b) for a, b in zip(weights(job), weights(first), strict=True))
    assert any("epoch 1, iteration 2: the loss is" in line and "1 in a row" in line for line in logged(job))


def test_more_than_ten_in_a_row_end_the_run_and_are_named(begin) -> None:
    job = begin()
    break_targets(job, {3, *range(5, 16)}, float("nan"))  # the first batch is made once more, for the dry run
    job.loaders["train"].batch_sampler.set_epoch(1)
    batches = list(job.loaders["train"].batch_sampler)
    with pytest.raises(RunError, match="11 steps in a row had no finite loss") as error:
        train(job)
    date = str(pd.Timestamp("2020-01-01") + pd.Timedelta(hours=batches[13][2]))
    assert f"the windows that start at {date}, columns b; " in str(error.value)
    assert "\n" not in str(error.value)


def test_an_infinite_gradient_is_skipped_too(begin) -> None:
    job = begin("--max_iters", 2)
    bias = job.model.output_projection.linear.bias
    calls = iter(range(100))
    bias.register_hook(lambda gradient: gradient * (float("inf") if next(calls) == 1 else 1))
    epoch(job)
    assert torch.isfinite(bias).all() and any("a gradient is NaN or infinite" in line for line in logged(job))


def test_constant_channels_gaps_and_huge_values_train_without_nan(lab: Lab, begin) -> None:
    table = pd.read_csv(lab.csv)
    table["constant"] = 5.0
    table["late"] = [0.0] * 250 + [1e30] * 50  # constant where it is fitted, then huge
    table["spike"] = [1e18 if row == 100 else 0.0 for row in range(300)]
    table.drop(index=range(40, 80)).to_csv(lab.folder / "odd.csv", index=False)
    with pytest.raises(ValueError, match="column 'late': got 1e.30 in deviations of the training rows, too large"):
        begin("--data_path", "odd.csv")
    table["late"] /= 1e13
    table.drop(index=range(40, 80)).to_csv(lab.folder / "odd.csv", index=False)
    job = begin("--data_path", "odd.csv")
    loss = epoch(job)
    assert loss == loss and job.training.progress.skipped == 0
    assert all(torch.isfinite(tensor).all() for tensor in weights(job))
    assert score(job, "test").mse < float("inf")


def short_of_memory(job: Job, limit: int) -> list[int]:
    """Let the model run out of memory above `limit` sequences, as CUDA does; returns what was tried."""
    forward, tried = job.model.forward, []

    def short(batch, *rest):
        tried.append(len(batch))
        out = forward(batch, *rest)
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return out

    job.model.forward = short
    return tried


def test_a_step_without_memory_is_repeated_in_smaller_parts(begin) -> None:
    job = begin("--max_iters", 3)
    given = begin("--max_iters", 3, "--max_sequences", 4, where="given")
    tried = short_of_memory(job, 7)
    assert epoch(job) == epoch(given)
    assert tried[:3] == [16, 8, 4] and set(tried[2:]) == {4} and job.step_limit.sequences == 4
    assert all(torch.equal(a, b) for a, b in zip(weights(job), weights(given), strict=True))
    assert [line for line in logged(job) if "out of memory" in line] == [
        "CUDA out of memory with 16 sequences at once: going on with at most 8 (--max_sequences 8 starts that way), "
        "or fewer where these do not fit"
    ]
    assert score(job, "val").mse == pytest.approx(score(given, "val").mse, rel=1e-6)


def test_when_not_even_one_sequence_fits_the_line_says_what_to_change(begin) -> None:
    job = begin("--llm_layers", 2)
    short_of_memory(job, 0)
    with pytest.raises(RunError, match="CUDA out of memory with one sequence at a time; change, in order of effect: ") as e:
        epoch(job)
    flags = [word for word in str(e.value).split() if word.startswith("--")]
    assert set(flags) >= {"--prototypes", "--optimizer", "--llm_layers", "--load_in_4bit"}


def no_memory(*_args: object, **_kwargs: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


ADVICE = "; change, in order of effect: --"


def test_no_memory_for_the_optimizers_moments_is_one_line(begin, monkeypatch) -> None:
    job = begin()
    monkeypatch.setattr(job.training.optimizer, "step", no_memory)
    with pytest.raises(RunError, match=f"^CUDA out of memory in the optimizer's step{ADVICE}"):
        epoch(job)


def test_no_memory_for_an_evaluations_prototypes_is_one_line(begin, monkeypatch) -> None:
    job = begin()
    monkeypatch.setattr(job.model, "prototype_kv", no_memory)
    with pytest.raises(RunError, match=f"^CUDA out of memory in an evaluation{ADVICE}"):
        score(job, "val")


@pytest.mark.parametrize("place", ["utils.setup.Backbone", "utils.setup.ForecastModel.to"])
def test_no_memory_for_the_model_is_one_line(begin, monkeypatch, place: str) -> None:
    monkeypatch.setattr(place, no_memory)
    with pytest.raises(RunError, match="^CUDA out of memory in loading the model; change --load_in_4bit or "):
        begin()
