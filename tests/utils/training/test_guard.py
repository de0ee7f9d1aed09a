"""Numbers that go wrong, number types with their loss scale, and memory that runs out, on real runs with a tiny backbone."""

import gc
import multiprocessing
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import utils.training.train
from data_provider.data_factory import Loader
from layers.errors import LoaderError, RunError
from tests.small_run import figures, run_folder, train
from utils.flags import parse_flags
from utils.saving.interrupt import Interrupts
from utils.saving.state import FIRST_SCALE, state_files
from utils.setup import setup
from utils.training.context import Context
from utils.training.evaluate import score
from utils.training.precision import choose_precision
from utils.training.train import Clock, train_epoch
from utils.training.train import train as fit

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def begin(small, tmp_path: Path):
    """`begin(where, scale, **flags)`: a run that is set up to train, its folder in `where`; `scale`: of an fp16 run's loss.

    The tiny model's gradients are large: with the first scale of a run, its first step overflows.
    """
    contexts: list[Context] = []

    def begun(where: str = "runs", scale: float = 2.0**12, **flags: object) -> Context:
        words = small(**{"checkpoints": tmp_path / where, "save_steps": 0, "batch_size": 8} | flags)
        contexts.append(setup(parse_flags(words), 0, Interrupts()))
        contexts[-1].training.progress.loss_scale = scale
        return contexts[-1]

    yield begun
    for context in contexts:
        context.close()


def epoch(context: Context) -> float:
    torch.manual_seed(0)
    return train_epoch(context, Clock(context))


def logged(context: Context) -> str:
    return (context.folder / "train.log").read_text(encoding="utf-8")


def break_targets(context: Context, iterations: set[int], value: float) -> None:
    """Let the loader's batches of these iterations (from 1) carry a wrong value in column "flow" of window 2."""
    collate, count = context.loaders["train"].collate_fn, iter(range(1, 1000))

    def broken(items):
        batch = collate(items)
        if next(count) in iterations:
            batch.y[2 * 3 + 1, 3] = value
        return batch

    context.loaders["train"].collate_fn = broken


def assert_same(one: Context, two: Context) -> None:
    held = []
    for context in (one, two):
        moments = [value for of in context.training.optimizer.state_dict()["state"].values() for value in of.values()]
        held.append([*context.model.state_dict().values(), *moments])
    assert all(torch.equal(a, b) for a, b in zip(*held, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_step_with_wrong_numbers_is_skipped_and_counted(begin, value: float) -> None:
    context, first = begin(max_iters=2), begin("one", max_iters=1)
    break_targets(context, {2}, value)
    assert epoch(context) == epoch(first)  # the mean is of the steps that count
    assert_same(context, first)
    assert context.training.progress.skipped == 1
    assert "epoch 1, iteration 2: the loss is" in logged(context) and "1 in a row" in logged(context)


def test_more_than_ten_in_a_row_end_the_run(begin) -> None:
    context = begin(batch_size=6, train_epochs=2)  # 16 steps an epoch
    break_targets(context, {3, *range(5, 16)}, float("nan"))  # the first batch is made once more, for the dry run
    with pytest.raises(RunError, match="11 steps in a row had no finite loss or gradient; try a lower --learning_rate; "):
        fit(context)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_killed_workers_end_the_run_between_two_steps_with_its_state(begin, small, capsys, monkeypatch) -> None:
    """They die in the middle of a step, as where memory runs out; the same command with --resume leaves what a run that was
    not hit leaves."""
    flags = {"num_workers": 1, "batch_size": 8, "train_epochs": 1, "dropout": 0.1}
    whole, hit = begin("whole", **flags), begin("hit", **flags)
    torch.manual_seed(0)
    fit(whole)
    step = utils.training.train.train_step

    def short(context: Context, *rest: object):
        for worker in multiprocessing.active_children() if context.training.progress.iteration == 2 else ():
            worker.kill()
            worker.join()
        time.sleep(0)  # where PyTorch's own handler would raise
        return step(context, *rest)

    monkeypatch.setattr(utils.training.train, "train_step", short)
    torch.manual_seed(0)
    with pytest.raises(RunError, match="^the loader.s workers cannot go on .*--num_workers 0 .*resumes from state.1.pt"):
        fit(hit)
    done = hit.training.progress.iteration
    assert 3 <= done < hit.steps_per_epoch
    monkeypatch.undo()
    args = {"checkpoints": hit.folder.parent, "save_steps": 0, "resume": True}
    assert f"Resuming from state.1.pt: epoch 1, iteration {done}" in train(small(**flags | args), capsys)
    one, two = (load_file(run.folder / "checkpoint.safetensors") for run in (whole, hit))
    two.pop("intervals.newest")  # of a test, which the other has not had
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_no_worker_and_no_shared_memory_are_one_line_and_a_wrong_number_is_not(monkeypatch) -> None:
    def no_fork(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    def full(*_: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    def wrong(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    for collate, told in ((full, "No space left on device"), (wrong, None)):
        with pytest.raises(LoaderError if told else RuntimeError, match=told or "shapes do not fit"):
            list(Loader([1, 2], collate_fn=collate, num_workers=1, multiprocessing_context="fork"))
    monkeypatch.setattr("os.fork", no_fork)
    with pytest.raises(LoaderError, match="temporarily unavailable.*--num_workers 0"):
        list(Loader([1, 2], num_workers=1, multiprocessing_context="fork"))

    def no_queue(*_: object) -> None:
        raise OSError(28, "No space left on device")

    tracebacks: list[object] = []  # of what fails while it is given back
    monkeypatch.setattr("sys.unraisablehook", tracebacks.append)
    monkeypatch.setattr("multiprocessing.context.BaseContext.Queue", no_queue)
    with pytest.raises(LoaderError, match="No space left on device"):
        list(Loader([1, 2], num_workers=1, multiprocessing_context="fork"))
    gc.collect()
    assert not tracebacks


def short_of_memory(context: Context, limit: int) -> list[int]:
    """Let the model run out of memory above `limit` sequences, as CUDA does; returns what was tried."""
    forward, tried = context.model.forward, []

    def short(batch, *rest):
        tried.append(len(batch))
        out = forward(batch, *rest)
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return out

    context.model.forward = short
    return tried


def test_a_step_without_memory_is_repeated_in_smaller_parts(begin) -> None:
    context, given = begin(max_iters=3), begin("given", max_iters=3, max_sequences=6)
    tried = short_of_memory(context, 7)
    assert epoch(context) == epoch(given)
    assert tried[:3] == [24, 12, 6] and set(tried[2:]) == {6} and context.step_limit.sequences == 6
    assert_same(context, given)
    told = "CUDA out of memory with 24 sequences at once: going on with at most 12 (--max_sequences 12 starts that way)"
    assert logged(context).count("out of memory") == 2 and told in logged(context)
    assert score(context, "val").mse == pytest.approx(score(given, "val").mse, rel=1e-6)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("models.TimeLLM.Model.forward", "with one sequence at a time; change, in order of effect: --"),
        ("utils.training.optimizer.BlockAdam.step", "in the optimizer's step; change, in order of effect: --"),
        ("models.TimeLLM.Model.prototype_kv", "in an evaluation; change, in order of effect: --"),
        ("utils.setup.Backbone", "in loading the model; change --load_in_4bit or "),
        ("utils.setup.ForecastModel.to", "in loading the model; change --load_in_4bit or "),
    ],
)
def test_no_memory_where_no_smaller_parts_help_is_one_line(begin, monkeypatch, place: str, told: str) -> None:
    def no_memory(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(place, no_memory)
    with pytest.raises(RunError, match=f"^CUDA out of memory {told}"):
        context = begin()
        if "prototype_kv" in place:
            score(context, "val")
        epoch(context)


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
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation)
    args = Namespace(**{"amp_dtype": "auto", "use_amp": False, "load_in_4bit": False} | flags)
    chosen = choose_precision(args, torch.device(device))
    assert (chosen.autocast_dtype, chosen.weights_dtype, chosen.note) == (autocast, held, note)
    assert chosen.is_scaled == (autocast == FP16)


@pytest.mark.parametrize("path", ["auto", "plain"])
def test_a_run_in_fp16_is_about_one_in_float32(begin, path: str) -> None:
    """Losses, an evaluation, and the gradients' means, out of which the scale is taken again."""
    found, moments = [], []
    for dtype in ("fp32", "fp16"):
        context = begin(
            dtype, amp_dtype=dtype, fast_path=path, features="S", batch_size=4, max_iters=4, log_every=1, dropout=0
        )
        epoch(context)
        losses = [float(line.split("loss: ")[1]) for line in logged(context).splitlines() if "iters:" in line]
        found.append([*losses, score(context, "val").mse])
        moments.append(context.training.optimizer.state[context.model.output_projection.linear.bias]["exp_avg"])
    assert len(found[1]) == 5 and found[1] == pytest.approx(found[0], rel=0.02) and found[0] != found[1]
    assert (moments[1] - moments[0]).norm() < 0.05 * moments[0].norm()


def test_a_checkpoint_is_tested_whatever_it_was_trained_in(small, capsys) -> None:
    """Number types are the machine's: a checkpoint of a small GPU is used on a larger one, or on the CPU."""
    words = small(amp_dtype="fp16", max_iters=2, load_in_4bit=True, batch_size=4, features="S")
    mse = float(figures(train(words, capsys))[0])
    test = ["--is_training", "0", "--checkpoint", str(run_folder(words)), "--device", "cpu", "--amp_dtype"]
    for dtype in ("auto", "fp16"):
        assert float(figures(train([*test, dtype], capsys))[0]) == pytest.approx(mse, rel=0.02)


def overflow(context: Context, steps: set[int]) -> None:
    """Let a gradient of these steps (from 1) be infinite."""
    calls = iter(range(1, 1000))
    bias = context.model.output_projection.linear.bias
    bias.register_hook(lambda gradient: gradient * (float("inf") if next(calls) in steps else 1))


def test_the_average_of_the_weights_is_what_is_validated_and_kept(begin, monkeypatch) -> None:
    """Six steps, of which one is skipped, against a loop by hand; the run itself goes on from its own weights."""
    context = begin(amp_dtype="fp16", ema=0.6, skip="linear", max_iters=7, batch_size=4)
    made: list[dict[str, torch.Tensor]] = []  # the weights after each step
    overflow(context, {3})
    step = utils.training.train.train_step

    def watched(*given: object):
        told = step(*given)
        made.append({name: value.detach().clone() for name, value in context.model.named_parameters()})
        return told

    monkeypatch.setattr(utils.training.train, "train_step", watched)
    fit(context)
    assert "iteration 3: a gradient is NaN or infinite; the step is skipped" in logged(context) and len(made) == 7
    del made[2]
    average = made[0]
    for t, weights in enumerate(made[1:], start=2):
        decay = min(0.6, 1 - 4 / (t + 3))  # 0.2, 0.33, 0.43, 0.5, 0.56: of the last quarter
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    kept = load_file(context.folder / "checkpoint.safetensors")
    state = torch.load(state_files(context.folder)[0])
    for name, held in context.model.state_dict().items():  # names and layout of the checkpoint
        wanted = average[name].t() if name == "mapping_layer.weight" else average[name]
        torch.testing.assert_close(kept[name], wanted, rtol=1e-5, atol=1e-7)
        last = made[-1][name].t() if name == "mapping_layer.weight" else made[-1][name]
        assert torch.equal(held, last) and torch.equal(state["model"][name], last)
    context.model.load_state_dict({name: kept[name] for name in context.model.state_dict()})
    assert context.training.progress.best_vali_loss == score(context, "val").loss


def test_skips_end_the_run_once_the_scale_is_one(begin) -> None:
    context = begin(scale=FIRST_SCALE, amp_dtype="fp16", train_epochs=2, batch_size=4)
    overflow(context, set(range(1, 100)))
    with pytest.raises(RunError, match="17 steps in a row had no finite loss or gradient"):
        fit(context)  # 16 halvings, and one step that was not scaled
    assert context.training.progress.loss_scale == 1


def test_the_scale_doubles_after_good_steps(begin, monkeypatch) -> None:
    monkeypatch.setattr(utils.training.train, "GOOD_STEPS", 3)
    context, seen = begin(scale=4.0, amp_dtype="fp16", max_iters=13, batch_size=6), []
    overflow(context, {5, 9, 10, 11, 12, 13})
    due = context.training.saver.due  # asked in each step, before its change of the scale
    monkeypatch.setattr(context.training.saver, "due", lambda at, ahead: seen.append(at.loss_scale) or due(at, ahead))
    epoch(context)
    assert [*seen[1:], context.training.progress.loss_scale] == [4, 4, 8, 8, 4, 4, 4, 8, 4, 2, 1, 1, 1]
