"""Studies: grids and their errors, tables against numbers worked by hand and by scipy, real runs that are killed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from layers.errors import InputError
from scripts.make_backbone import make_backbone
from scripts.study import main
from tests.realdata import ROOT
from tests.small_run import command_line
from utils.study.cells import Study, read_study

FLAGS = """
[flags]
model = "TimeLLM"
data = "ETTh1"
llm_model_path = "x"
"""
VARIANTS = """
[[variant]]
name = "plain"
[[variant]]
name = "short, 4"
prompt_decimals = 4
"""


def study_of(folder: Path, text: str, axes: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> Study:
    file = folder / "grid.toml"
    file.write_text(text, encoding="utf-8")
    return read_study(folder / "out", file, axes, flags)


def test_a_grid_is_all_combinations_but_those_left_out(tmp_path: Path) -> None:
    text = 'title = "T"\nreference = "short, 4"\n' + FLAGS + VARIANTS + "[grid]\nseed = [1, 2]\npred_len = [96, 192]\n"
    study = study_of(tmp_path, text + '[[skip]]\nvariant = "plain"\nseed = 2\n')
    assert study.title == "T" and list(study.axes) == ["variant", "seed", "pred_len"] and len(study.cells) == 6
    assert {cell.args.prompt_decimals for cell in study.cells if cell.values["variant"] == "short, 4"} == {4}
    assert not any(cell.values["variant"] == "plain" and cell.args.seed == 2 for cell in study.cells)
    bare = read_study(
        tmp_path, None, ["model=TimeLLM", "pred_len=96,192", "seed=1,2"], ["--data", "ETTh1", "--load_in_4bit"]
    )
    assert [cell.args.pred_len for cell in bare.cells] == [96, 96, 192, 192] and bare.cells[0].args.load_in_4bit is True


def test_a_cells_name_says_what_was_tried(tmp_path: Path) -> None:
    names = [cell.name for cell in study_of(tmp_path, FLAGS + VARIANTS + "[grid]\nseed = [1]\n").cells]
    assert all(re.fullmatch(r"(plain|short_4)_seed-1_[0-9a-f]{8}", name) for name in names) and len(set(names)) == 2
    # Another way to write a value, and flags of output, are the same run; another learning rate is another.
    other = FLAGS.replace("Time", "time") + VARIANTS
    assert names == [cell.name for cell in study_of(tmp_path, other, ("seed=1",), ("--plots", "0")).cells]
    assert not set(names) & {cell.name for cell in study_of(tmp_path, other, ("seed=1",), ("--learning_rate=1e-3",)).cells}
    # A run keeps its folder where the axes are named otherwise; the names of a study made by an earlier commit are the same.
    (tmp_path / "out" / "cells" / names[0]).mkdir(parents=True)
    (cell,) = study_of(tmp_path, FLAGS, ("seed=1",)).cells
    assert cell.folder.name == names[0]
    example = read_study(tmp_path, ROOT / "scripts" / "studies" / "example.toml", [], []).cells
    assert (len(example), example[-1].name) == (12, "four_decimals_pred_len-192_seed-3_fe1ef163")


@pytest.mark.parametrize(
    ("text", "axes", "flags", "line"),
    [
        ("[grid\n", (), (), "no readable TOML"),
        ("[gird]\nseed = [1]\n", (), (), "gird: got {'seed': [1]}, expected one of the parts title, reference, flags, grid"),
        ("[grid]\nseed = 3\n", (), (), "[grid] seed: got 3, expected a list of values"),
        ("[grid]\nseed = []\n", (), (), "[grid] seed: got [], expected a list of values"),
        ("[grid]\nsede = [1]\n", (), (), "cell sede = 1: --sede: got an unknown flag, expected perhaps --seed"),
        (FLAGS + "[grid]\nseed = [1, 'x']\n", (), (), "cell seed = x: --seed: got 'x', expected a whole number from 0 to"),
        (FLAGS + "[grid]\nseq_len = [512, 8]\n", (), (), "cell seq_len = 8: --seq_len: got 8, expected --patch_len 16"),
        (FLAGS + "[grid]\nlearning_rate = [0.001, '1e-3']\n", (), (), "got the flags of {'learning_rate': '0.001'}"),
        (FLAGS + "seed = 1\n[grid]\nseed = [1]\n", (), (), "seed: got a flag of '[flags]', and an axis"),
        (FLAGS + VARIANTS, (), ("--prompt_decimals", "2"), "prompt_decimals: got a flag of 'short, 4', and an axis or"),
        (FLAGS + VARIANTS + "[[variant]]\nname = 'plain'\n", (), (), "expected a name of its own for each variant"),
        (FLAGS + "resume = true\n[grid]\nseed = [1]\n", (), (), "got --resume, expected it left out: the study sets it"),
        (FLAGS + "[grid]\nseed=[1]\n[[skip]]\nseed = 9\n", (), (), "{'seed': '9'}: got a combination that no cell has"),
        ("reference = 'plian'\n" + FLAGS + VARIANTS, (), (), "reference: got 'plian', expected a value of an axis"),
        (FLAGS, ("seed=1",), ("--itr", "2"), "got --is_training 1 --itr 2, expected 1 of both"),
        (FLAGS + "[grid]\nseed=[1]\n[[skip]]\nseed = 1\n", (), (), "got no cells, expected an axis, and not all of it left"),
        ("[flags]\ndata = 'ETTh1'\n", (), (), "cell without axes: --model: got nothing"),
    ],
)
def test_a_wrong_grid_is_one_line(tmp_path: Path, text: str, axes, flags, line: str) -> None:
    with pytest.raises(InputError) as error:
        study_of(tmp_path, text, axes, flags)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gpus", "0,x"], "--gpus: got 'x', expected all, or the numbers that nvidia-smi shows, such as 0 1"),
        (["--gpus", "0", "my.toml"], "such as 0 1; GRID.toml stands before it"),
        (["--gpus", "all"], "--gpus: got '', expected all, or the numbers"),
        (["--cell", "x", "--jobs", "2"], "--cell: got --jobs or --gpus beside it, expected neither: one cell, on the card"),
        (["--jobs", "-1"], "--jobs: got -1, expected 1 or more cells at once"),
        (["--cell", "5"], "--cell: got '5', expected a number from 0 to 0, or a name; --list shows them"),
    ],
)
def test_wrong_words_are_one_line(tmp_path: Path, monkeypatch, capsys, words: list[str], line: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    try:
        code = main(
            ["--grid", "seed=1", "--out", str(tmp_path / "out"), *words, "--", "--data", "ETTh1", "--model", "Ridge"]
        )
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and line in said and said.startswith("study.py: error: ") and said.count("\n") == 1, said


def finished(study: Study, errors: dict[str, dict[int, float]], file: str = "ETTh1.csv") -> None:
    """Write what finished runs leave; `errors`: variant -> seed -> MSE at the first horizon, 0.04 more at others."""
    for cell in study.cells:
        variant, first = cell.values["variant"], study.cells[0].args.pred_len
        if cell.args.seed not in errors[variant]:
            continue
        mse = errors[variant][cell.args.seed] + 0.04 * (cell.args.pred_len != first)
        levels = {"80": {"coverage": 0.8 + cell.args.seed / 100, "width": 1.25}, "95": {"coverage": 0.94, "width": 2.5}}
        intervals = {"intervals": {"levels": levels, "wql": 0.2}} if variant == "plain" else {}
        ridge = {"title": "ridge regression", "mse": 0.365 if cell.args.seq_len == 96 else 0.355, "mae": 0.4}
        metrics = {"test": {"mse": mse, "mae": mse + 0.1}, "windows": 2785, "data": {"file": file, "synthetic": False}}
        cell.run.mkdir(parents=True)
        (cell.run / "metrics.json").write_text(json.dumps(metrics | intervals | {"baselines": {"rows": [ridge]}}))
        (cell.run / "checkpoint.json").write_text(json.dumps({"epoch": 1, "vali_loss": 0.4}))


def test_tables_have_means_best_baselines_published_and_paired_differences(tmp_path: Path, capsys) -> None:
    long = '[[variant]]\nname = "long"\nseq_len = 512\n'
    text = FLAGS + "seq_len = 96\n[grid]\npred_len = [96, 192]\nseed = [1, 2, 3]\n"
    text = text.replace("seq_len = 96\n", "") + VARIANTS.replace('"\n', '"\nseq_len = 96\n')
    study = study_of(tmp_path, text + long)
    errors = {"plain": (0.36, 0.38, 0.37), "short, 4": (0.35, 0.36, 0.37), "long": (0.4,)}
    finished(study, {name: dict(enumerate(values, 1)) for name, values in errors.items()})
    (study.cells[-7].run / "metrics.json").unlink()  # short, 192, seed 3
    assert study.cells[-7].values == {"variant": "short, 4", "pred_len": "192", "seed": "3"}
    words = [str(tmp_path / "grid.toml"), "--out", str(study.folder), "--table"]
    assert main(words) == 0
    said = capsys.readouterr().out
    lines = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in said.splitlines() if "  " in line}
    assert lines["plain"] == ["82.0 %", "1.25", "94.0 %", "2.5", "0.2"] * 2  # the mean of three seeds
    tables = said.split("Prediction intervals (ETTh1.csv)")
    rows = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in tables[0].splitlines() if "  " in line}
    assert rows[""] == ["seeds", "96 MSE", "96 MAE", "192 MSE", "192 MAE", "mean MSE", "mean MAE"]
    assert rows["plain"][:3] == ["3", "0.3700 ± 0.0100", "0.4700 ± 0.0100"]  # squares 1, 0, 1 over n - 1 = 2
    # The mean over horizons is that of the seeds with all of them: 1 and 2.
    assert rows["short, 4"][0] == "3, 2" and rows["short, 4"][5] == "0.3750 ± 0.0071"
    assert rows["long"][:2] == ["1", "0.4000"] and rows["ridge regression (beside long)"][1] == "0.3550*"
    assert rows["short, 4"][1] == "0.3600 ± 0.0100" and rows["ridge regression (beside plain)"][1] == "0.3650"
    assert rows["Time-LLM, the paper (published)"][1:6:2] == ["0.362", "0.398", "0.380"]

    ours = [line for line in said.splitlines() if line.startswith("short, 4 - plain")]
    low, high = stats.ttest_rel(errors["short, 4"], errors["plain"]).confidence_interval(0.95)
    assert f" 96     3  -0.0100    {low:+.4f} to {high:+.4f}" in ours[0] and ours[1].count("2 seeds: no interval") == 2
    assert "13 of 18 cells done" in said and "drops the last short batch" in said

    page = (study.folder / "results.md").read_text(encoding="utf-8")
    assert "| ridge regression (beside long) | - | **0.3550** |" in page and page.count("run_main.py --") == 18
    frame = pd.read_csv(study.folder / "results.csv")
    done = frame[frame["state"] == "done"]
    assert len(frame) == 18 and len(done) == 13 and np.isclose(done.loc[frame["variant"] == "plain", "mse"].mean(), 0.39)


@pytest.mark.parametrize(("flags", "shown"), [((), True), (("--percent", "10"), False), (("--features", "S"), False)])
def test_published_figures_stand_beside_the_same_conditions_alone(tmp_path: Path, capsys, flags, shown: bool) -> None:
    finished(study_of(tmp_path, FLAGS + VARIANTS, (), flags), {"plain": {2021: 0.4}, "short, 4": {2021: 0.4}})
    assert main([str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out"), "--table", "--", *flags]) == 0
    assert ("(published)" in capsys.readouterr().out) == shown


RECORDER = """
import os, sys, time
folder = sys.argv[sys.argv.index("--checkpoints") + 1]
began = time.time()
print("begun", flush=True)
time.sleep(float(os.environ.get("SECONDS", 0.4)))
with open(folder + "/record", "a") as file:
    print(os.environ["CUDA_VISIBLE_DEVICES"], os.environ.get("CUDA_DEVICE_ORDER"), began, time.time(), file=file)
sys.exit(3)
"""
DRIVER = """
import sys
from pathlib import Path
from scripts.study import main
from utils.study import cells
cells.PROGRAM = Path(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


def test_two_cells_share_a_gpu_and_free_it_when_they_fail(tmp_path: Path) -> None:
    """Cells of a program that writes down what it sees, and fails, on the two cards that the variable names."""
    (tmp_path / "recorder.py").write_text(RECORDER)
    words = [str(tmp_path / "recorder.py"), "--grid", "seed=0,1,2,3,4,5", "--out", str(tmp_path / "out"), "--jobs", "4"]
    command = [sys.executable, "-c", DRIVER, *words, "--gpus", "all", "--", "--model", "DLinear", "--data", "ETTh1"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "3,GPU-a"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.count(" begins on GPU ") == 6, done.stderr
    records = [path.read_text().split() for path in tmp_path.glob("out/cells/*/record")]
    assert len(records) == 6 and {order for _, order, *_ in records} == {"PCI_BUS_ID"}
    assert {card for card, *_ in records} == {"3", "GPU-a"} and done.stdout.count("failed on GPU 3 (exit code 3)") >= 2
    for card, _, began, _ in records:
        assert sum(other[0] == card and other[2] <= began < other[3] for other in records) <= 2


class Lab:
    """Real studies on a tiny backbone and a short series."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "grid.toml"
        self.backbone = make_backbone(folder / "backbone", family="qwen2")
        words = command_line(folder, self.backbone, plots=0, torch_checkpoint=0, max_iters=8, save_steps=2, seed=None,
                             checkpoints=None, prompt_decimals=None)  # fmt: skip
        self.flags = [*words, "--save_predictions", "0"]
        self.write(['[[variant]]\nname = "plain"', '[[variant]]\nname = "short"\nprompt_decimals = 4'])

    def write(self, parts: list[str]) -> None:
        self.file.write_text("\n".join(["[grid]", "seed = [1, 2]", *parts]) + "\n")

    def command(self, out: str, *more: str) -> list[str]:
        script = str(ROOT / "scripts" / "study.py")
        return [sys.executable, script, str(self.file), "--out", str(self.folder / out), *more, "--", *self.flags]

    def start(self, out: str, command: list[str] | None = None, **words) -> subprocess.Popen:
        with (self.folder / f"{out}.log").open("ab") as log:
            return subprocess.Popen(
                command or self.command(out, "--jobs", "2"), cwd=self.folder, stdout=log, stderr=log, **words
            )

    def run(self, out: str, *more: str) -> tuple[int, str]:
        done = subprocess.run(self.command(out, *more), cwd=self.folder, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    def rows(self, out: str) -> list[dict[str, object]]:
        frame = pd.read_csv(self.folder / out / "results.csv").drop(columns="seconds")
        return frame.astype(object).where(frame.notna(), None).to_dict("records")

    def until(self, pattern: str, text: str, process: subprocess.Popen) -> None:
        """Until a file has some text more often than it had when this was called."""

        def count() -> int:
            return sum(path.read_text(errors="replace").count(text) for path in self.folder.glob(pattern))

        before, end = count(), time.monotonic() + 120
        while count() == before and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A laboratory in whose folder `whole` a study of 4 cells has run to its end."""
    lab = Lab(tmp_path_factory.mktemp("it's 100 %"))
    code, said = lab.run("whole", "--jobs", "2")
    assert code == 0 and "cell 4 of 4 done in " in said and "nothing left" in said, said
    return lab


def test_a_killed_and_a_stopped_study_goes_on_to_the_same_figures(lab: Lab) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print("seed of the moment:", seed)
    study = lab.start("killed")
    lab.until("killed/cells/*/log.txt", "\n", study)
    time.sleep(random.Random(seed).uniform(0, 3))
    study.kill()
    study.wait()
    study = lab.start("killed")  # waits for the runs that the killed one has left
    lab.until("killed.log", "4 cells: ", study)
    lab.until("killed/cells/*/log.txt", "\n", study)
    study.send_signal(signal.SIGTERM)
    assert study.wait(60) in (128 + signal.SIGTERM, 0)
    said = (lab.folder / "killed.log").read_text()
    assert "failed" not in said and "another run" not in said, said
    code, said = lab.run("killed", "--jobs", "2")
    assert code == 0 and "failed" not in said, said
    assert lab.rows("killed") == lab.rows("whole")


def test_a_cluster_runs_a_cell_a_task(lab: Lab) -> None:
    """The script of docs/cluster.md beside stand-ins for Slurm: a task whose time is up returns to the queue and resumes."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    ours = ["python", *lab.command("tasks", "--cell")[1:6], '"$SLURM_ARRAY_TASK_ID"', *lab.command("tasks")[5:]]
    quoted = " ".join(word if word.startswith('"') else f"'{word}'" if "'" not in word else f'"{word}"' for word in ours)
    script, changed = re.subn(r"python scripts/study\.py [^&\n]*", quoted + " ", script)
    assert changed == 1 and len(script.splitlines()) <= 12
    (lab.folder / "bin").mkdir()
    for name, line in (("python", f'exec "{sys.executable}" "$@"'), ("scontrol", f'echo "$@" >> "{lab.folder}/requeued"')):
        (lab.folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (lab.folder / "bin" / name).chmod(0o755)

    def task(number: int) -> subprocess.Popen:
        env = os.environ | {"PATH": f"{lab.folder}/bin:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "77"}
        return lab.start("tasks", ["bash", "-c", script], env=env | {"SLURM_ARRAY_TASK_ID": str(number)})

    last = task(3)
    lab.until("tasks.log", "iters: 4", last)
    last.send_signal(signal.SIGUSR1)
    assert last.wait(60) == 128 + signal.SIGTERM and (lab.folder / "requeued").read_text() == "requeue 77_3\n"
    assert "SIGTERM: ending after the work in hand" in (lab.folder / "tasks.log").read_text()
    code, said = lab.run("tasks", "--list")
    assert (
        code == 0 and "4 cells: 1 half way, 3 to do" in said and re.search(r"^ +3  half way  short_seed-2_\w+$", said, re.M)
    )
    assert task(3).wait(120) == 0
    assert "Resuming from" in (lab.folder / "tasks.log").read_text() and lab.run("tasks", "--table")[0] == 0
    assert lab.rows("tasks")[3:] == lab.rows("whole")[3:]


def test_a_changed_grid_runs_what_changed_and_a_failing_cell_does_not_end_it(lab: Lab) -> None:
    before = {row["cell"]: row for row in lab.rows("whole")}
    times = {log: log.stat().st_mtime_ns for log in lab.folder.glob("whole/cells/*/log.txt")}
    missing = '[[variant]]\nname = "no column"\nfeatures = "S"\ntarget = "none"\n[[skip]]\nvariant = "no column"\nseed = 2'
    changed = '[[variant]]\nname = "short"\nprompt_decimals = 3\n[[skip]]\nvariant = "short"\nseed = 2'
    lab.write([missing, '[[variant]]\nname = "plain"', changed])
    code, said = lab.run("whole", "--jobs", "2")
    assert code == 1, said
    assert re.search(
        r"no_column_seed-1_\w{8} failed \(exit code 2\): run_main.py: error: --target: got 'none', .*; the rest", said
    )
    assert said.count(" done in ") == 1 and "4 cells: 2 done, 2 to do" in said
    assert "2 cells of an earlier grid, left as they are" in said and said.count("short_seed-") >= 2
    rows = {f"{row['variant']}{row['seed']}": row for row in lab.rows("whole")}
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {"no column1": "failed", "plain1": "done", "plain2": "done", "short1": "done"}
    assert all(rows[name] == before[rows[name]["cell"]] for name in ("plain1", "plain2"))
    assert all(log.stat().st_mtime_ns == when for log, when in times.items())  # nothing ran twice, nothing is gone
    code, said = lab.run("whole", "--list")
    assert code == 0 and said.count("  done      ") == 3 and "  failed    no_column" in said
