"""Runs with notes: what is announced is forecast, what is not known is not seen, and without notes nothing changes."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from data_provider.synthetic import write_synthetic
from layers.errors import InputError
from layers.notes import NotesEffect
from tests.small_run import command_line, figures, refusal, run_folder, train
from utils.forecaster import Forecaster

QUIET = {"plots": 0, "torch_checkpoint": 0, "prototypes": "direct", "use_prompt": 0, "llm_ablation": "none"}


@pytest.fixture(scope="module")
def announced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An hourly wave that is half as large wherever a note of the day before says so; the notes know nothing else."""
    folder, rows = tmp_path_factory.mktemp("announced"), 2400
    random, dates = np.random.default_rng(3), pd.date_range("2024-01-01", periods=rows, freq="h")
    values, notes = 10 + 3 * np.sin(np.arange(rows) / 12 * np.pi) + 0.2 * random.standard_normal(rows), []
    for start in range(60, rows - 40, 40):
        factor, words = ((0.5, "half of it"), (2, "twice as much"))[random.integers(2)]
        values[start : start + 16] *= factor
        notes.append([dates[start], dates[start + 15], dates[start - 20], words])
    pd.DataFrame({"date": dates, "load": values}).to_csv(folder / "series.csv", index=False)
    pd.DataFrame(notes, columns=["date", "until", "known", "text"]).to_csv(folder / "notes.csv", index=False)
    return folder


def words_of(announced: Path, backbone: Path, where: Path, **flags: object) -> list[str]:
    given = {"root_path": announced, "checkpoints": where, "seq_len": 48, "pred_len": 12, "learning_rate": 5e-3,
             "train_epochs": 4, "lradj": "constant", "skip": "ridge", "batch_size": 32, "eval_batch_size": 64}  # fmt: skip
    return command_line(announced, backbone, **QUIET | given | flags)


def test_what_is_announced_is_forecast_and_the_control_says_so(backbones, announced: Path, tmp_path: Path, capsys) -> None:
    words = words_of(announced, backbones["qwen2"], tmp_path, text_path="notes.csv", do_predict=True)
    lines, folder = train(words, capsys), run_folder(words)
    found = json.loads((folder / "metrics.json").read_text())["control"]
    true, shuffled, none = (found[name]["mse_concerned"] for name in ("true", "shuffled", "no"))
    assert true <= 0.5 * none and shuffled >= none and found["no"]["difference"][2] < 0
    assert figures(lines)[0] == f"{found['true']['mse']:.7f}"  # the test's own pass
    (said,) = (line for line in lines if line.startswith("Notes: test MSE true"))
    assert said.endswith("reading them helps")

    # A note about the future changes the rows that it speaks of, unless it is known too late.
    table, notes = pd.read_csv(announced / "series.csv"), pd.read_csv(announced / "notes.csv")
    end = pd.Timestamp(table["date"].iloc[-1])
    hours = [str(end + pd.Timedelta(hours=n)) for n in range(13)]
    note = pd.DataFrame({"date": [hours[4]], "until": [hours[9]], "known": [hours[0]], "text": ["half of it"]})
    forecaster, late = Forecaster.load(folder), note.assign(known=hours[1])
    plain, told, leaking = (forecaster.predict(table, notes=of)["load"] for of in (notes, pd.concat([notes, note]), late))
    np.testing.assert_allclose(plain, pd.read_csv(folder / "forecast.csv")["load"], rtol=1e-6)
    assert (plain == forecaster.predict(table)["load"]).all() and (plain == leaking).all()
    changed = (told != plain).to_numpy()
    assert changed.tolist() == [False] * 3 + [True] * 6 + [False] * 3
    assert (told[changed] < 0.75 * plain[changed]).all()
    far = forecaster.predict(table, steps=24, notes=note)["load"]  # the second half goes on from the first
    np.testing.assert_allclose(far[:12], told, rtol=1e-6)
    scored = [forecaster.evaluate(table[-400:], notes=of)["test"]["mse"] for of in (notes, None)]
    assert scored[0] < scored[1]

    # The same notes from a column of texts, known at their rows, are another model's; they train and forecast, too.
    told = table.assign(words=[*["up"] * 1200, *["down"] * 1200])
    told.to_csv(announced / "column.csv", index=False)
    train([*words, "--data_path", "column.csv", "--text_column", "words", "--train_epochs", "1", "--max_iters", "4"], capsys)
    frame = pd.read_csv(announced / "column.csv")
    again = Forecaster.load(folder).predict(frame)
    np.testing.assert_allclose(again["load"], pd.read_csv(folder / "forecast.csv")["load"], rtol=1e-5)
    silent = Forecaster.load(folder).predict(frame.assign(words=None))["load"]  # rows that nobody has remarked on
    assert (silent == Forecaster.load(folder).predict(frame.drop(columns="words"))["load"]).all()
    assert (silent != again["load"]).any()
    both = pd.concat([frame.assign(shop="a"), frame.assign(shop="b")])
    with pytest.raises(InputError, match="notes: got nothing, expected a frame of them"):
        Forecaster.load(folder).predict(both, id_column="shop")


def test_without_notes_nothing_changes(backbones, announced: Path, tmp_path: Path, capsys) -> None:
    flags = {"train_epochs": 1, "max_iters": 6, "skip": "none", "text_prompt": 0}
    without = words_of(announced, backbones["qwen2"], tmp_path / "without", **flags)
    lines, folder = train(without, capsys), run_folder(without)
    test = ["--is_training", "0", "--checkpoint", str(folder)]
    later = train([*without, *test, "--text_path", "notes.csv"], capsys)
    assert figures(later) == figures(lines)
    assert any("was trained without notes: they are not read" in line for line in later)
    # A model with notes begins as one without, and without them forecasts as if it had none.
    given = words_of(announced, backbones["qwen2"], tmp_path / "with", text_path="notes.csv", **flags)
    train(given, capsys)
    other = json.loads((run_folder(given) / "metrics.json").read_text())
    assert other["control"]["true"]["mse"] != other["control"]["no"]["mse"]
    table, model = pd.read_csv(announced / "series.csv"), Forecaster.load(run_folder(given))
    before = model.predict(table)
    model.context.model.notes = None
    pd.testing.assert_frame_equal(before, model.predict(table))


def test_a_run_that_resumes_needs_the_same_notes(backbones, announced: Path, tmp_path: Path, capsys) -> None:
    flags = {"train_epochs": 1, "max_iters": 4, "text_path": tmp_path / "own.csv", "resume": True}
    words = words_of(announced, backbones["qwen2"], tmp_path, **flags)
    own = pd.read_csv(announced / "notes.csv")
    own.to_csv(tmp_path / "own.csv", index=False)
    train(words, capsys)
    own.assign(text="other words").to_csv(tmp_path / "own.csv", index=False)
    assert "notes (SHA-256)" in refusal([*words, "--train_epochs", "2"], capsys)


@pytest.mark.parametrize("flags", [
    {"text_prompt": 1, "llm_ablation": "off", "use_prompt": 1}, {"recipe": "published"}, {"llm_ablation": "random"},
    {"text_encoder": "words", "skip_mode": "beside"},
])  # fmt: skip
def test_notes_go_with_other_ways_to_train(backbones, announced: Path, tmp_path: Path, capsys, flags) -> None:
    words = words_of(
        announced, backbones["qwen2"], tmp_path, **{"train_epochs": 1, "max_iters": 3, "text_path": "notes.csv"} | flags
    )
    lines = train(words, capsys)
    assert any(line.startswith("Notes: test MSE true") for line in lines)
    if "text_prompt" in flags:
        model = Forecaster.load(run_folder(words)).context.model
        model.prompts.texts = ["half of it"]
        notes = torch.tensor([[[0, 2, 3, 2], [-1, -1, -1, -1]]])
        x = torch.zeros(1, 48, 1)
        said, plain = (model.prompts.tokenizer.decode(model.prompts.for_windows(x, of)[0]) for of in (notes, None))
        assert said == plain + "Notes: half of it"


def test_what_cannot_have_notes_says_so(backbones, announced: Path, tmp_path: Path, capsys) -> None:
    words = words_of(announced, backbones["qwen2"], tmp_path, text_path="notes.csv")
    assert refusal([*words, "--model", "Ridge"], capsys).startswith("--text_path: got notes.csv, expected nothing: TimeLLM")
    other = [*words, "--data_pretrain", "custom", "--data_path_pretrain", "series.csv"]
    assert refusal(other, capsys) == "--text_path: got notes.csv, expected nothing with --data_pretrain"


def test_the_effect_is_that_of_its_formula() -> None:
    torch.manual_seed(0)
    effect, T, H = NotesEffect(5, 6, 4), 6, 4
    effect.read(torch.randn(3, 5), torch.tensor([0.5, -1.0]))
    effect.fit([0, 1])
    x, base = torch.randn(4, T), torch.randn(4, H)
    notes = torch.tensor([[[0, 1, 2, 1], [2, 0, 3, -3]], [[-1, -1, -1, -1], [1, 3, 3, 3]]]).repeat_interleave(2, 0)
    given = base, x, torch.tensor([0, 1, 0, 1]), notes
    assert (effect(*given) == 0).all()  # before training
    for parameter in effect.parameters():
        torch.nn.init.normal_(parameter)
    expected = torch.zeros(4, H)
    for m in range(4):
        zero, mean = effect.zero[m % 2], x[m].mean()
        course = (effect.maps.weight @ (x[m] - mean)).view(H, -1)
        for text, first, last, began in notes[m].tolist():
            for row in range(first, last + 1) if first >= 0 else ():
                known = effect.embed((effect.vectors[text] - effect.centre) / effect.scale)
                when = torch.tensor([(row - began) / H, row / H, min(max(-began / T, 0), 1)])
                gates = effect.gate(torch.cat([known, when]))
                seen = torch.cat([torch.stack([base[m, row] - zero, mean - zero, torch.ones(())]), course[row]])
                expected[m, row] += (gates * seen).sum()
    torch.testing.assert_close(effect(*given), expected, rtol=1e-4, atol=1e-4)


def test_the_made_up_announcements_use_other_words_in_the_test(tmp_path: Path) -> None:
    series = pd.read_csv(write_synthetic("announced", tmp_path))
    seen, unseen = (pd.read_csv(tmp_path / f"announced-notes-{name}.csv") for name in ("seen", "unseen"))
    tested = seen["date"] >= series["date"][int(0.8 * len(series))]
    assert (seen[~tested] == unseen[~tested]).all(axis=None) and (seen["known"] < seen["date"]).all()
    assert (seen.drop(columns="text") == unseen.drop(columns="text")).all(axis=None)
    assert not set(unseen["text"][tested]) & set(seen["text"])
