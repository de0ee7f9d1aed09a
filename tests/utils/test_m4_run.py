"""A run on the M4 competition's series as a user sees it: what it prints, leaves, resumes from and refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from data_provider.batches import Batch
from data_provider.m4 import load_m4
from layers.errors import InputError
from layers.norm import instance_norm
from layers.prompt import describe_series
from scripts import m4_scores, summary
from tests.m4_files import write_m4
from tests.realdata import ROOT
from tests.small_run import command_line, launched, refusal, run_folder, run_in_group, train, train_in_two_processes
from utils.command_line import parse_flags
from utils.results.m4_scores import errors_of, naive2, table
from utils.results.report import report
from utils.study.cells import read_study

# As the published script has them; what it leaves out follows from the pattern.
PUBLISHED = {
    "task_name": "short_term_forecast", "data": "m4", "features": "M", "enc_in": 1, "dec_in": 1, "c_out": 1,
    "patch_len": 1, "stride": 1, "loss": "SMAPE", "des": "Exp", "itr": 1,
}  # fmt: skip
LEFT_OUT = dict.fromkeys(("data_path", "seq_len", "label_len", "pred_len"))


@pytest.fixture
def argv(tmp_path: Path, backbones, monkeypatch):
    """`argv(**flags)`: words of a run on six yearly series with a tiny backbone."""

    monkeypatch.delenv("TIMELLM_DATA", raising=False)

    def words(**flags: object) -> list[str]:
        if not (tmp_path / "m4").exists():
            write_m4(tmp_path / "m4", "Yearly")
        chosen = PUBLISHED | LEFT_OUT | {"seasonal_patterns": "Yearly", "batch_size": 2, "root_path": tmp_path / "m4"}
        return command_line(tmp_path, backbones["qwen2"], **chosen | flags)

    return words


def test_the_published_flags_are_taken_and_the_pattern_sets_the_lengths(argv) -> None:
    lengths = {"Yearly": 6, "Quarterly": 8, "Monthly": 18, "Weekly": 13, "Daily": 14, "Hourly": 48}
    for pattern, horizon in lengths.items():
        args = parse_flags(argv(seasonal_patterns=pattern, model_id=f"m4_{pattern}"))
        assert (args.seq_len, args.label_len, args.pred_len) == (2 * horizon, horizon, horizon)
        assert (args.loss, args.data_path, args.intervals) == ("SMAPE", f"{pattern}-train.csv", ())
    assert parse_flags(argv(loss=None)).loss == "SMAPE" and parse_flags(argv(loss="MASE")).loss == "MASE"


def test_a_run_trains_scores_and_leaves_the_competitions_file(argv, capsys, tmp_path: Path) -> None:
    words = argv(train_epochs=2)
    lines = train(words, capsys)
    folder = run_folder(words)
    series = load_m4(tmp_path / "m4", "Yearly", 12, 6, 6)
    made = pd.read_csv(folder / "Yearly_forecast.csv", index_col="id")
    assert list(made.index) == series.ids and list(made.columns) == [f"F{n}" for n in range(1, 7)]
    own = errors_of(made.to_numpy(), series.future, series.known, 1)
    naive = errors_of(np.stack([naive2(v, 1, 6) for v in series.known]), series.future, series.known, 1)
    assert f"Test SMAPE: {own.smape:.3f} MASE: {own.mase:.3f} OWA: {own.owa(naive):.3f}" in lines
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test"]["smape"] == pytest.approx(own.smape) and metrics["test"]["owa"] == pytest.approx(own.owa(naive))
    assert [row["name"] for row in metrics["baselines"]["rows"]] == ["naive2", "last value", "ridge"]
    assert metrics["baselines"]["rows"][0]["owa"] == 1
    record = json.loads((folder / "checkpoint.json").read_text())
    assert record["data"]["rows"] == 6 and record["flags"]["seasonal_patterns"] == "Yearly"
    assert (folder / "plots" / "test_windows.png").is_file() and (folder / "plots" / "loss_by_epoch.png").is_file()
    assert metrics["flags"]["root_path"] == str(tmp_path / "m4") and metrics["flags"]["seasonal_patterns"] == "Yearly"
    assert f"{own.smape:10.3f}{own.mase:9.3f}" in report(folder)
    # the epoch's losses are the run's loss: the best validation loss is what the checkpoint was chosen by
    history = pd.read_csv(folder / "history.csv")
    assert record["vali_loss"] == pytest.approx(history["vali_loss"].min()) and 0 < record["vali_loss"] < 200
    # a test of the checkpoint alone finds the same
    assert summary.main([str(tmp_path / "checkpoints")]) == 0
    heads, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert row[heads.index("mse")] == row[heads.index("mae")] == "-"
    assert row[heads.index("smape")] == f"{own.smape:.4g}" and row[heads.index("owa")] == f"{own.owa(naive):.4g}"
    again = train(["--is_training", "0", "--checkpoint", str(folder)], capsys)
    other = ["--is_training", "0", "--checkpoint", str(folder), "--seasonal_patterns", "Weekly"]
    assert refusal(other, capsys).startswith("--seasonal_patterns: got Weekly, expected Yearly, on whose series")
    assert next(line for line in again if line.startswith("Test ")) in lines


def test_simple_forecasts_are_measured_anew_where_the_test_file_is_another(argv, capsys, tmp_path: Path) -> None:
    words = argv(model="Ridge", llm_model_path=None, plots=0)
    train(words, capsys)
    write_m4(tmp_path / "other", "Yearly", seed=1)
    (tmp_path / "other" / "Yearly-test.csv").replace(tmp_path / "m4" / "Yearly-test.csv")
    train([*words, "--is_training", "0"], capsys)
    series = load_m4(tmp_path / "m4", "Yearly", 12, 6, 6)
    naive = errors_of(np.stack([naive2(v, 1, 6) for v in series.known]), series.future, series.known, 1)
    rows = json.loads((run_folder(words) / "metrics.json").read_text())["baselines"]["rows"]
    assert (rows[0]["smape"], rows[0]["mase"]) == (pytest.approx(naive.smape), pytest.approx(naive.mase))


def test_the_table_says_what_the_model_was_trained_on(argv, capsys, tmp_path: Path) -> None:
    words = argv(model="Ridge", llm_model_path=None, plots=0)
    write_m4(tmp_path / "other", "Yearly", seed=1)
    for name in ("train", "test"):
        file = tmp_path / "m4" / f"Yearly-{name}.csv"
        file.write_text(file.read_text().replace('"Y1"', '"synthetic1"'))
    train(words, capsys)
    assert "generated, not measured; these figures say nothing about M4" in report(run_folder(words))
    lines = train(
        ["--is_training", "0", "--checkpoint", str(run_folder(words)), "--root_path", str(tmp_path / "other")], capsys
    )
    (metrics,) = run_folder(words).glob("on_*/metrics.json")
    for text in ("\n".join(lines), report(metrics.parent), table(*m4_scores.of_runs([metrics.parent]))):
        assert "Yearly: after training on other series, those of Yearly-train.csv" in text
        assert "SYNTHETIC DATA: Yearly-train.csv, which the model was trained on, was generated" in text
        assert "say nothing about M4" not in text


def test_training_lowers_the_loss(argv, capsys) -> None:
    words = argv(train_epochs=8, learning_rate=1e-2, lradj="constant", plots=0)
    train(words, capsys)
    history = pd.read_csv(run_folder(words) / "history.csv")["train_loss"]
    assert history.iloc[-2:].mean() < 0.8 * history.iloc[0]


def test_a_linear_map_is_fitted_and_is_the_baselines(argv, capsys) -> None:
    lines = train(argv(max_iters=1, skip="ridge", model_comment="ridge", plots=0), capsys)
    assert any(line.startswith("Linear map in closed form") for line in lines)
    words = argv(model="Ridge", model_comment="map", llm_model=None, llm_model_path=None, llm_layers=None)
    train(words, capsys)
    metrics = json.loads((run_folder(words) / "metrics.json").read_text())
    ridge = metrics["baselines"]["rows"][2]
    assert metrics["test"]["smape"] == pytest.approx(ridge["smape"], rel=1e-4)


def test_padding_changes_nothing(argv, load) -> None:
    from models.TimeLLM import Model

    args = parse_flags(argv())
    model = Model(args, load("qwen2")).eval()
    x = torch.rand(2, 12) * 50 + 100
    mask = torch.ones(2, 12)
    mask[0, :5] = 0
    z, mean, deviation = instance_norm(x, mask)
    alone = instance_norm(x[:1, 5:])
    torch.testing.assert_close(z[:1, 5:], alone[0])
    torch.testing.assert_close((mean[:1], deviation[:1]), alone[1:])
    assert not z[0, :5].any()
    torch.testing.assert_close(z[1:], instance_norm(x[1:])[0])
    # whatever stands in the padding, the forecast is the same; and it moves with the series' scale
    prompts = model.make_prompts(x[1:, :, None])
    made = [model(Batch(v[:1], v[:1, :0], prompts, x_mask=mask[:1])) for v in (x, x.masked_fill(mask == 0, 1e6))]
    torch.testing.assert_close(made[0], made[1])


def test_prompts_speak_of_what_exists(argv, load, tmp_path: Path) -> None:
    from data_provider.data_factory import batch_loader
    from models.TimeLLM import Model

    args = parse_flags(argv())
    model = Model(args, load("qwen2"))
    assert model.prompts is not None
    series = load_m4(tmp_path / "m4", "Yearly", 12, 6, 6)
    _, loader = batch_loader(args, "val", series, model.prompts)
    batch = next(iter(loader))
    short = list(map(len, series.known)).index(8)  # two values before the held-out ones
    z = instance_norm(torch.tensor(series.known[short][:2], dtype=torch.float32)[None])[0]
    (text,) = describe_series(z.numpy(), model.prompts.template)
    (ids,) = model.prompts.encode([text])
    n = int(batch.prompts.length[short])
    assert batch.prompts.ids[short, :n].tolist() == ids and "top 2 lags" in text


def test_a_killed_run_resumes_to_the_last_bit(argv, capsys, tmp_path: Path) -> None:
    words = argv(train_epochs=3, save_steps=1, log_every=1, test_every=0, plots=0, checkpoints=tmp_path / "whole")
    train(words, capsys)
    killed = argv(
        train_epochs=3, save_steps=1, log_every=1, test_every=0, plots=0, checkpoints=tmp_path / "killed", resume=True
    )
    command = [sys.executable, "run_m4.py", *killed]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "iters: 2, epoch: 2" in line:
                process.kill()
                break
    assert process.wait() == -9
    lines = train(killed, capsys)
    assert any(line.startswith("Resuming from state.") for line in lines)
    whole, resumed = (run_folder(line) / "checkpoint.safetensors" for line in (words, killed))
    assert whole.read_bytes() == resumed.read_bytes()
    assert (run_folder(words) / "Yearly_forecast.csv").read_bytes() == (
        run_folder(killed) / "Yearly_forecast.csv"
    ).read_bytes()


def test_a_run_resumes_with_the_series_that_it_began_with_alone(argv, capsys, tmp_path: Path) -> None:
    words = argv(model="Ridge", llm_model_path=None, plots=0, resume=True)
    train(words, capsys)
    test = write_m4(tmp_path / "other", "Yearly", seed=1) / "Yearly-test.csv"
    test.replace(tmp_path / "m4" / "Yearly-test.csv")  # no training reads it
    assert any(line.startswith("This run is finished") for line in train(words, capsys))
    file = tmp_path / "m4" / "Yearly-train.csv"
    text = file.read_text()
    (tmp_path / "other" / "Yearly-train.csv").replace(file)
    line = refusal(words, capsys)
    assert re.match(r"--resume: got the data's training series \(SHA-256\) \w{8}, expected .*\w{8}, with which", line)
    file.write_text(text.replace('"Y1"', '"Y9"'))  # the same values under another name
    test = tmp_path / "m4" / "Yearly-test.csv"
    test.write_text(test.read_text().replace('"Y1"', '"Y9"'))
    assert "--resume: got the data's training series (SHA-256)" in refusal(words, capsys)
    cut = [line for line in text.splitlines() if not line.startswith('"Y6"')]
    file.write_text("\n".join(cut))
    test.write_text("\n".join(line for line in test.read_text().replace('"Y9"', '"Y1"').splitlines() if '"Y6"' not in line))
    assert "--resume: got the data's number of series 5; the data's training series" in refusal(words, capsys)


@pytest.mark.long
def test_processes_that_read_other_series_do_not_train_together(argv, tmp_path: Path) -> None:
    write_m4(tmp_path / "other", "Yearly", seed=1)
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom run_m4 import main\n"
        f"if os.environ['RANK'] == '1':\n    sys.argv += ['--root_path', {str(tmp_path / 'other')!r}]\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    run = run_in_group(launched(argv(model="Ridge", llm_model_path=None, plots=0), program=str(program)))
    assert run.returncode != 0 and re.search(
        r"^program.py: error: rank 1 on .*: the data's training series \(SHA-256\): got .*, expected .*, as the first",
        run.stderr,
        re.MULTILINE,
    ), run.stderr


def test_two_processes_score_every_series(argv, capsys) -> None:
    words = argv(train_epochs=1, eval_batch_size=2, plots=0)  # three test batches: two for one process, one for the other
    one = train(words, capsys)
    file = run_folder(words) / "Yearly_forecast.csv"
    alone = file.read_text()
    file.unlink()
    two = train_in_two_processes([*words, "--is_training", "0"])
    assert [line for line in one if line.startswith("Test ")] == [line for line in two if line.startswith("Test ")]
    assert file.read_text() == alone


@pytest.mark.parametrize("flags", [{"skip": "ridge"}, {"skip": "linear"}, {"model": "Ridge", "llm_model_path": None}])
def test_a_map_that_nothing_can_be_fitted_to_is_refused_before_the_folder_is_taken(argv, capsys, flags: dict) -> None:
    words = argv(seq_len=49, **flags)  # the longest series has 60 values
    line = refusal(words, capsys)
    flag = f"--skip {flags['skip']}" if "skip" in flags else "--model Ridge"
    assert line.startswith(f"{flag}: got --seq_len 49, with which no training series has a whole window, expected")
    assert line.endswith("series of 61 values") and not run_folder(words).exists()
    train(argv(seq_len=48, max_iters=1, plots=0, **flags), capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"task_name": "long_term_forecast"},
            "--task_name long_term_forecast: got it with --data m4, expected --data m4 with",
        ),
        ({"pred_len": 8}, "--pred_len: got 8, expected 6, the competition's for Yearly"),
        ({"data_path": "my.csv"}, "--data_path: got my.csv, expected nothing with --data m4"),
        ({"features": "S"}, "--features: got S, expected M with --data m4"),
        ({"percent": 10}, "--percent: got 10, expected 100 with --data m4"),
        ({"do_predict": True}, "--do_predict: got it, expected none with --data m4: a test leaves the forecasts"),
        ({"intervals": 80}, "--intervals: got levels with --data m4, expected none"),
        ({"patch_len": 16}, "--seq_len: got 12, shorter than a patch, expected --patch_len 16 or more"),
        ({"seasonal_patterns": "Hourly"}, "--seasonal_patterns Hourly: got no Hourly-train.csv and Hourly-test.csv"),
        ({"model": "DLinear", "llm_model_path": None}, "--model: got DLinear, expected TimeLLM or Ridge with --data m4"),
        ({"batch_size": 7}, "--batch_size: got 7, expected at most 6, for 6 training windows"),
        ({"enc_in": 7}, "--enc_in: got 7, expected 1"),
        ({"data_pretrain": "ETTh1"}, "--data_pretrain: got ETTh1, expected nothing with --data m4"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(argv, capsys, flags: dict, message: str) -> None:
    assert message in refusal(argv(**flags), capsys)


def test_other_data_take_none_of_the_competitions(tmp_path: Path, backbones, capsys) -> None:
    words = command_line(tmp_path, backbones["qwen2"])
    assert "--loss: got SMAPE, expected MSE, or --data m4" in refusal([*words, "--loss", "SMAPE"], capsys)
    assert "--data_pretrain: got m4, expected another data set, or --data m4" in refusal(
        [*words, "--data_pretrain", "m4"], capsys
    )
    line = refusal([*words, "--task_name", "short_term_forecast"], capsys)
    assert line.startswith("--task_name short_term_forecast: got it with --data custom, expected --data m4 with short_term")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Y7,,,", "Yearly-train.csv: row 8, series 'Y7': got no values"),
        ("Y7,1,two,3", "Yearly-train.csv: row 8, series 'Y7', value 2: got 'two', expected a number"),
        ("Y7,1,2,3", "Yearly-test.csv: series 'Y7': got 0 values, expected 6"),
    ],
)
def test_a_broken_file_is_one_line(argv, capsys, tmp_path: Path, line: str, message: str) -> None:
    words = argv()
    with (tmp_path / "m4" / "Yearly-train.csv").open("a") as file:
        file.write(line + "\n")
    assert message in refusal(words, capsys)


@pytest.mark.parametrize("words", ['data = "m4"\ntask_name = "short_term_forecast"', '[grid]\ndata = ["ETTh1", "m4"]'])
def test_a_study_of_it_is_refused(tmp_path: Path, words: str) -> None:
    (tmp_path / "grid.toml").write_text(f'[flags]\nmodel = "TimeLLM"\nllm_model_path = "x"\n{words}\n')
    with pytest.raises(InputError, match="--data: got m4 in .*, expected .*, scripts/m4_scores.py makes the table"):
        read_study(tmp_path, tmp_path / "grid.toml", (), ())
