"""Numbers that go wrong and memory that runs out, on real runs with a tiny backbone."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.live import Lab
from utils.errors import RunError
from utils.flags import parse_flags, run_name
from utils.interrupt import Interrupts
from utils.run import Accelerator, check, describe_run, set_up
from utils.saver import Saver
from utils.train import Clock, Run, train_epoch


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"), rows=300)


def make_run(lab: Lab, where: Path, *flags: object) -> Run:
    args = parse_flags(lab.argv(where, "--num_workers", 0, "--save_steps", 0, *flags))
    folder = where / run_name(args, 0)
    series, info, _ = check(args, folder)
    run = set_up(args, 0, folder, series, info, Accelerator(cpu=True), describe_run(args, series, info), Interrupts())
    run.saver = Saver(run, {}, run.interrupts)
    run.lines = []
    run.log = run.lines.append
    return run


def epoch(run: Run) -> float:
    """Train an epoch with dropout that starts at the same numbers in each run."""
    torch.manual_seed(0)
    return train_epoch(run, Clock(run))


def break_targets(run: Run, iterations: set[int], value: float) -> None:
    """Let the loader's batches of these iterations (from 1) carry a wrong value in column b of window 2."""
    collate, count = run.loaders["train"].collate_fn, iter(range(1, 1000))

    def broken(items):
        batch = collate(items)
        if next(count) in iterations:
            batch.y[2 * 2 + 1, 3] = value
        return batch

    run.loaders["train"].collate_fn = broken


def weights(run: Run) -> list[torch.Tensor]:
    state = run.optimizer.state_dict()["state"]
    return [t.clone() for t in run.model.state_dict().values()] + [
        t.clone() for held in state.values() for t in held.values()
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_step_with_wrong_numbers_is_skipped_and_counted(lab: Lab, tmp_path: Path, value: float) -> None:
    run = make_run(lab, tmp_path, "--max_iters", 2)
    break_targets(run, {2}, value)
    first = make_run(lab, tmp_path / "one", "--max_iters", 1)
    loss, alone = epoch(run), epoch(first)
    assert loss == alone and run.progress.skipped == 1  # the mean is of the steps that count
    assert all(torch.equal(a, b) for a, b in zip(weights(run), weights(first), strict=True))
    assert any("epoch 1, iteration 2: the loss is" in line and "1 in a row" in line for line in run.lines)


def test_more_than_ten_in_a_row_end_the_run_and_are_named(lab: Lab, tmp_path: Path) -> None:
    run = make_run(lab, tmp_path)
    break_targets(run, {2, *range(4, 15)}, float("nan"))
    run.loaders["train"].batch_sampler.set_epoch(1)
    batches = list(run.loaders["train"].batch_sampler)
    with pytest.raises(RunError, match="11 steps in a row had no finite loss") as error:
        epoch(run)
    date = str(pd.Timestamp("2020-01-01") + pd.Timedelta(hours=batches[13][2]))
    assert f"the windows that start at {date}, columns b; " in str(error.value)
    assert "\n" not in str(error.value)


def test_an_infinite_gradient_is_skipped_too(lab: Lab, tmp_path: Path) -> None:
    run = make_run(lab, tmp_path, "--max_iters", 2)
    bias = run.model.output_projection.linear.bias
    calls = iter(range(100))
    bias.register_hook(lambda gradient: gradient * (float("inf") if next(calls) == 1 else 1))
    epoch(run)
    assert torch.isfinite(bias).all() and any("a gradient is NaN or infinite" in line for line in run.lines)


def test_constant_channels_gaps_and_huge_values_train_without_nan(lab: Lab, tmp_path: Path) -> None:
    table = pd.read_csv(lab.csv)
    table["constant"] = 5.0
    table["late"] = [0.0] * 250 + [1e30] * 50  # constant where it is fitted, then huge
    table["spike"] = [1e18 if row == 100 else 0.0 for row in range(300)]
    table.drop(index=range(40, 80)).to_csv(lab.folder / "odd.csv", index=False)
    with pytest.raises(ValueError, match="column 'late': 1e.30 in deviations of the training rows is too large"):
        make_run(lab, tmp_path, "--data_path", "odd.csv")
    table["late"] /= 1e13
    table.drop(index=range(40, 80)).to_csv(lab.folder / "odd.csv", index=False)
    run = make_run(lab, tmp_path, "--data_path", "odd.csv")
    loss = epoch(run)
    assert loss == loss and run.progress.skipped == 0
    assert all(torch.isfinite(tensor).all() for tensor in weights(run))
    assert run.evaluate("test").mse < float("inf")


def short_of_memory(run: Run, limit: int) -> list[int]:
    """Let the model run out of memory above `limit` sequences, as CUDA does; returns what was tried."""
    forecast, tried = run.model.forecast, []

    def short(x, prompts, prototypes):
        tried.append(len(x))
        out = forecast(x, prompts, prototypes)
        if len(x) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return out

    run.model.forecast = short
    return tried


def test_a_step_without_memory_is_repeated_in_smaller_parts(lab: Lab, tmp_path: Path) -> None:
    run = make_run(lab, tmp_path, "--max_iters", 3)
    given = make_run(lab, tmp_path / "given", "--max_iters", 3, "--max_sequences", 4)
    tried = short_of_memory(run, 7)
    assert epoch(run) == epoch(given)
    assert tried[:3] == [16, 8, 4] and set(tried[2:]) == {4} and run.max_sequences == 4
    assert all(torch.equal(a, b) for a, b in zip(weights(run), weights(given), strict=True))
    assert [line for line in run.lines if "out of memory" in line] == [
        "CUDA out of memory with 16 sequences at once: going on with at most 8 (--max_sequences 8 starts that way), "
        "or fewer where these do not fit"
    ]
    assert run.evaluate("val").mse == pytest.approx(given.evaluate("val").mse, rel=1e-6)


def test_when_not_even_one_sequence_fits_the_line_says_what_to_change(lab: Lab, tmp_path: Path) -> None:
    run = make_run(lab, tmp_path)
    short_of_memory(run, 0)
    with pytest.raises(RunError, match="CUDA out of memory with one sequence at a time; change, in order of effect: ") as e:
        epoch(run)
    flags = [word for word in str(e.value).split() if word.startswith("--")]
    assert set(flags) >= {"--prototypes", "--optimizer", "--llm_layers", "--load_in_4bit"}


def no_memory(*_args: object, **_kwargs: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


ADVICE = "; change, in order of effect: --"


def test_no_memory_for_the_optimizers_moments_is_one_line(lab: Lab, tmp_path: Path, monkeypatch) -> None:
    run = make_run(lab, tmp_path)
    monkeypatch.setattr(run.optimizer, "step", no_memory)
    with pytest.raises(RunError, match=f"^CUDA out of memory in the optimizer's step{ADVICE}"):
        epoch(run)


def test_no_memory_for_an_evaluations_prototypes_is_one_line(lab: Lab, tmp_path: Path, monkeypatch) -> None:
    run = make_run(lab, tmp_path)
    monkeypatch.setattr(run.model, "text_prototypes", no_memory)
    with pytest.raises(RunError, match=f"^CUDA out of memory in an evaluation{ADVICE}"):
        run.evaluate("val")


@pytest.mark.parametrize("place", ["utils.run.Backbone", "utils.run.Model.to"])
def test_no_memory_for_the_model_is_one_line(lab: Lab, tmp_path: Path, monkeypatch, place: str) -> None:
    monkeypatch.setattr(place, no_memory)
    with pytest.raises(RunError, match="^CUDA out of memory in loading the model; change --load_in_4bit or "):
        make_run(lab, tmp_path)


def test_no_memory_to_name_wrong_numbers_does_not_hide_them(lab: Lab, tmp_path: Path, monkeypatch) -> None:
    run = make_run(lab, tmp_path, "--max_iters", 1)
    monkeypatch.setattr("utils.guard.LIMIT", 0)
    break_targets(run, {1}, float("nan"))
    forecast, tried = run.model.text_prototypes, []

    def short():
        tried.append(1)
        return forecast() if len(tried) == 1 else no_memory()

    monkeypatch.setattr(run.model, "text_prototypes", short)
    with pytest.raises(RunError, match="no finite loss or gradient; the last is of the windows that start at 2020-"):
        epoch(run)
