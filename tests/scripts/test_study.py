"""Studies: grids and their errors, tables against numbers worked by hand, and real runs that are killed and go on."""

import csv
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from layers.errors import InputError
from scripts.make_backbone import make_backbone
from scripts.study import PUBLISHED, main
from tests.realdata import ROOT
from tests.small_run import command_line
from utils.study.cells import Measured, interval_figures
from utils.study.grid import Grid, read_grid
from utils.study.pictures import draw
from utils.study.queue import time_text
from utils.study.statistics import (
    MEAN,
    Column,
    Figure,
    differences,
    mean_over,
    paired,
    read_published,
    sections,
)
from utils.study.table import (
    _as_latex,
    _as_markdown,
    _as_text,
    _differences,
    _errors,
    _few_pairs,
    _intervals,
    difference_texts,
    figure_text,
)

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


def grid_of(folder: Path, text: str, axes: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> Grid:
    file = folder / "grid.toml"
    file.write_text(text, encoding="utf-8")
    return read_grid(file, axes, flags)


def test_a_grid_is_all_combinations_but_those_left_out(tmp_path: Path) -> None:
    text = 'title = "T"\nreference = "short, 4"\n' + FLAGS + VARIANTS + "[grid]\nseed = [1, 2]\npred_len = [96, 192]\n"
    grid = grid_of(tmp_path, text + '[[skip]]\nvariant = "plain"\nseed = 2\n')
    assert grid.title == "T" and list(grid.axes) == ["variant", "seed", "pred_len"] and len(grid.cells) == 6
    assert {cell.args.prompt_decimals for cell in grid.cells if cell.values["variant"] == "short, 4"} == {4}
    assert not any(cell.values["variant"] == "plain" and cell.args.seed == 2 for cell in grid.cells)
    assert len({cell.id for cell in grid.cells}) == 6


def test_a_cells_id_is_readable_and_says_what_was_tried(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, FLAGS + VARIANTS + "[grid]\nseed = [1]\n")
    ids = [cell.id for cell in grid.cells]
    assert all(re.fullmatch(r"(plain|short_4)_seed-1_[0-9a-f]{8}", name) for name in ids)
    assert ids == [cell.id for cell in grid_of(tmp_path, "# other\n" + FLAGS + VARIANTS + "[grid]\nseed = [1]\n").cells]
    # Another form of a value, and flags of output, are the same run; another rate is another.
    assert ids == [
        c.id for c in grid_of(tmp_path, FLAGS.replace("Time", "time") + VARIANTS, ("seed=1",), ("--plots", "0")).cells
    ]
    others = [c.id for c in grid_of(tmp_path, FLAGS + VARIANTS, ("seed=1",), ("--learning_rate=1e-3",)).cells]
    assert not set(ids) & set(others)


def test_a_grid_on_the_command_line_alone() -> None:
    grid = read_grid(None, ["model=TimeLLM", "pred_len=96,192", "seed=1,2,3"], ["--data", "ETTh1", "--load_in_4bit"])
    assert len(grid.cells) == 6 and grid.cells[0].args.load_in_4bit is True
    assert [cell.args.pred_len for cell in grid.cells] == [96] * 3 + [192] * 3


@pytest.mark.parametrize(
    ("text", "axes", "flags", "line"),
    [
        ("[grid\n", (), (), "no TOML"),
        ("[grid]\noptimizer = ['adma']\n", (), (), "got 'adma', expected one of adam, adamw, adamw8bit; perhaps adam"),
        ("[gird]\nseed = [1]\n", (), (), "gird: got an unknown part, expected perhaps grid"),
        ("[grid]\nsede = [1]\n", (), (), "[grid] sede: got an unknown flag, expected perhaps seed"),
        ("[flags]\nlerning_rate = 1\n", (), (), "expected perhaps learning_rate"),
        ("[grid]\nseed = []\n", (), (), "[grid] seed: got no values, expected a list of values"),
        ("[grid]\nseed = 3\n", (), (), "[grid] seed: got 3, expected a list of values"),
        ("[grid]\nseed = [1, 'x']\n", (), (), "[grid] seed: got 'x', expected a whole number from 0 to"),
        ("[grid]\nseed = [1, 1]\n", (), (), "[grid] seed: got '1' twice, expected each value once"),
        (
            FLAGS + "seed = 1\n[grid]\nseed = [1]\n",
            (),
            (),
            "seed: got an axis, and a flag of [flags], expected one of the two",
        ),
        ("[flags]\nresume = true\n", (), (), "[flags] resume: got a flag that the study sets"),
        (FLAGS + VARIANTS + "[[variant]]\nname = 'plain'\n", (), (), "got 'plain' again, expected a name of its own"),
        (FLAGS + VARIANTS.replace("= 4", "= -1"), (), (), "[[variant]] 2 prompt_decimals: got -1, expected a whole number"),
        (FLAGS + VARIANTS + "[[variant]]\nname = 'again'\n", (), (), "got the flags of variant = plain, expected others"),
        (
            FLAGS + VARIANTS + "[[skip]]\nvariant = 'plan'\n",
            (),
            (),
            "[[skip]] 1: variant: got 'plan', expected perhaps plain",
        ),
        (FLAGS + "[grid]\nseed=[1]\n[[skip]]\nseed = 9\n", (), (), "got a combination that no cell has"),
        (FLAGS + "[grid]\nseq_len = [512, 8]\n", (), (), "cell seq_len = 8: got a refusal of run_main.py (--seq_len: got 8"),
        (FLAGS, ("seed=",), (), "--grid seed: got no values"),
        (FLAGS, ("seed=1",), ("--itr", "2"), "got --is_training 1 --itr 2, expected 1 of both"),
        (FLAGS, ("seed=1",), ("--lradjj", "COS"), "after --: lradjj: got an unknown flag, expected perhaps lradj"),
        (
            FLAGS + VARIANTS,
            (),
            ("--prompt_decimals", "2"),
            "after --: prompt_decimals: got a flag of the variant 'short, 4' too",
        ),
        ("reference = 'plian'\n" + FLAGS + VARIANTS, (), (), "reference: got 'plian', expected perhaps plain"),
    ],
)
def test_a_wrong_grid_is_one_line(tmp_path: Path, text: str, axes, flags, line: str) -> None:
    with pytest.raises(InputError) as error:
        grid_of(tmp_path, text, axes, flags)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_grid_ends_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "g.toml", tmp_path / "out"
    file.write_text(FLAGS + "[grid]\nseed = [1, 2.5]\n")
    assert main([str(file), "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.err == f"study.py: error: {file}: [grid] seed: got 2.5, expected a whole number from 0 to 4294967295\n"
    assert not out.exists() and said.out == ""


def test_example_and_published_figures_are_sound() -> None:
    grid = read_grid(ROOT / "scripts" / "studies" / "example.toml", [], [])
    assert len(grid.cells) == 12
    paper = read_published(PUBLISHED)[0]
    for data, mse in (("ETTh1", 0.408), ("ETTh2", 0.334), ("ETTm1", 0.329), ("ETTm2", 0.251)):
        assert abs(sum(pair[0] for pair in paper[data].values()) / 4 - mse) < 0.0006, data  # the paper's own averages


def test_mean_deviation_and_interval_by_hand() -> None:
    assert mean_over([1.0, 2.0, 3.0]) == Figure(2.0, 1.0, 3)  # squares 1, 0, 1 over n - 1 = 2
    assert figure_text(Figure(0.37012, 0.00314, 3)) == "0.3701 ± 0.0031"
    one = mean_over([0.5])
    assert one == Figure(0.5, None, 1) and figure_text(one) == "0.5000" and mean_over([]) is None
    # Differences 1, 2, 3: mean 2, deviation 1, t(2; 0.975) = 4.30265, half the interval 4.30265 / sqrt(3).
    found = paired({1: 2.0, 2: 4.0, 3: 6.0, 4: 9.0}, {1: 1.0, 2: 2.0, 3: 3.0, 5: 7.0})
    assert found is not None and found.number == 3 and found.mean == 2.0
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    a, b = [0.37, 0.38, 0.36, 0.40], [0.39, 0.385, 0.37, 0.395]
    theirs = stats.ttest_rel(a, b).confidence_interval(0.95)
    ours = paired(dict(enumerate(a)), dict(enumerate(b)))
    assert ours is not None and (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    single = paired({1: 0.5}, {1: 0.4})
    assert single is not None and difference_texts(single) == ("+0.1000", "1 seed: no interval")
    two = paired({1: 0.5, 2: 0.6, 3: 0.7}, {1: 0.4, 2: 0.4})
    assert two is not None and two.number == 2 and difference_texts(two) == ("+0.1500", "2 seeds: no interval")
    assert paired({1: 0.5}, {2: 0.4}) is None


def measured(mse: float, ridge: float = 0.5) -> Measured:
    return Measured(mse, mse + 0.1, 2785, 10, 1, 1, 0.4, 60.0, "a machine", "ETTh1.csv", False,
                    {"ridge regression": (ridge, ridge), "repeat the last value": (1.3, 0.7)})  # fmt: skip


def test_a_table_of_prediction_intervals(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, FLAGS + VARIANTS + "[grid]\npred_len = [96]\nseed = [1, 2]\n")
    levels = {"80": {"coverage": 0.79, "width": 1.25}, "95": {"coverage": 0.94, "width": 2.5}}
    ridge = interval_figures({"levels": levels, "wql": 0.2})
    assert ridge == {"in 80 %": 0.79, "width 80 %": 1.25, "in 95 %": 0.94, "width 95 %": 2.5, "WQL": 0.2}
    results = []
    for cell in grid.cells:
        own = ridge | {"in 80 %": 0.8 + cell.args.seed / 100} if cell.values["variant"] == "plain" else {}
        results.append((cell, replace(measured(0.37), intervals=own, baseline_intervals={"ridge regression": ridge})))
    (section,) = sections(grid, results, [])
    table = _intervals(section)
    assert table is not None and table.heads == ["", "in 80 %", "width 80 %", "in 95 %", "width 95 %", "WQL"]
    assert [[[cell.text for cell in line] for line in block] for block in table.blocks] == [
        [["plain", "81.5 %", "1.25", "94.0 %", "2.5", "0.2"]],  # the mean of two seeds; a run without any has no row
        [["ridge regression", "79.0 %", "1.25", "94.0 %", "2.5", "0.2"]],
    ]
    assert section.columns == [Column(96, "mse"), Column(96, "mae")]
    (bare,) = sections(grid, [(cell, measured(0.37)) for cell in grid.cells], [])
    assert _intervals(bare) is None and interval_figures(None) == {}


def test_a_table_has_means_best_baselines_published_and_paired_differences(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, FLAGS + VARIANTS + "[grid]\npred_len = [96, 192]\nseed = [1, 2, 3]\n")
    errors = {"plain": (0.36, 0.38, 0.37), "short, 4": (0.35, 0.36, 0.37)}
    results = []
    for cell in grid.cells[:-1]:  # the last one is not done
        mse = errors[cell.values["variant"]][cell.args.seed - 1] + (0.04 if cell.args.pred_len == 192 else 0)
        results.append((cell, measured(mse, ridge=0.365 if cell.args.pred_len == 96 else 0.3985)))
    (section,) = sections(grid, results, read_published(PUBLISHED))
    assert section.horizons == [96, 192] and [row.label for row in section.rows] == ["plain", "short, 4"]
    plain, short = (row.figure(Column(96, "mse")) for row in section.rows)
    assert plain == Figure(pytest.approx(0.37), pytest.approx(0.01), 3) and short and short.mean == pytest.approx(0.36)
    mean = section.rows[1].figure(Column(MEAN, "mse"))
    assert mean is not None and mean.number == 2 and mean.mean == pytest.approx((0.35 + 0.36 + 0.39 + 0.40) / 4)
    assert [fixed.label for fixed in section.baselines] == ["ridge regression", "repeat the last value"]
    paper = section.published[0]
    assert paper.values[Column(96, "mse")] == 0.362 and paper.values[Column(MEAN, "mse")] == pytest.approx(0.38)
    assert "drops the last short batch" in paper.note

    table = _errors(section)
    best = [line[0].text for block in table.blocks for line in block if line[2].best]
    assert best == ["short, 4"] and table.blocks[0][1][1].text == "3, 2"  # seeds by horizon
    latex = _as_latex("100 % of it", [table], [])
    assert r"\textbf{0.3600 $\pm$ 0.0100}" in latex and latex.count(r"\midrule") == 3 and r"\bottomrule" in latex

    ((row, other, by_column),) = differences(grid, section)
    assert (row.label, other.label) == ("short, 4", "plain")
    theirs = stats.ttest_rel(errors["short, 4"], errors["plain"]).confidence_interval(0.95)
    ours = by_column[Column(96, "mse")]
    assert (ours.number, ours.low, ours.high) == (3, pytest.approx(theirs.low), pytest.approx(theirs.high))
    assert by_column[Column(192, "mse")].number == 2 and by_column[Column(192, "mse")].low is None
    differing = _differences(grid, section)
    assert differing is not None
    for text in (
        _as_text("", [differing], []),
        _as_markdown(tmp_path, "", [differing], [], []),
        _as_latex("", [differing], []),
    ):
        (line,) = (line for line in text.splitlines() if re.search(r"\b192\b", line))
        assert line.count("2 seeds: no interval") == 2
    assert len(_few_pairs(grid, [section])) == 1
    three = [(cell, found) for cell, found in results if cell.args.pred_len == 96]
    assert not _few_pairs(grid, sections(grid, three, []))
    assert all(path.stat().st_size > 5000 for path in draw(tmp_path, [section])) and len(list(tmp_path.glob("*.png"))) == 2


def test_published_figures_stand_beside_the_same_conditions_alone(tmp_path: Path) -> None:
    for flags, shown in (((), True), (("--percent", "10"), False), (("--features", "S"), False)):
        grid = grid_of(tmp_path, FLAGS + "[grid]\nseed = [1]\n", (), flags)
        (section,) = sections(grid, [(cell, measured(0.4)) for cell in grid.cells], read_published(PUBLISHED))
        assert bool(section.published) == shown


def test_times_for_people() -> None:
    assert [time_text(s) for s in (45, 252, 6600)] == ["45 s", "4 min 12 s", "1 h 50 min"]


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

    def start(self, out: str) -> subprocess.Popen:
        with (self.folder / f"{out}.log").open("ab") as log:
            return subprocess.Popen(self.command(out, "--jobs", "2"), cwd=self.folder, stdout=log, stderr=log)

    def run(self, out: str, *more: str) -> tuple[int, str]:
        done = subprocess.run(self.command(out, *more), cwd=self.folder, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    def rows(self, out: str) -> list[dict[str, str]]:
        with (self.folder / out / "results.csv").open(newline="") as file:
            return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A laboratory in whose folder `whole` a study of 4 cells has run to its end."""
    lab = Lab(tmp_path_factory.mktemp("studies"))
    code, said = lab.run("whole", "--jobs", "2")
    assert code == 0 and "cell 4 of 4 done in " in said and "nothing left" in said, said
    return lab


def test_a_study_leaves_its_tables(lab: Lab) -> None:
    assert {row["state"] for row in lab.rows("whole")} == {"done"}
    assert {(row["windows"], row["windows_dropped"]) for row in lab.rows("whole")} == {("57", "0")}
    text = (lab.folder / "whole" / "results.md").read_text(encoding="utf-8")
    for part in ("ridge regression", "repeat the last value", "57 (horizon 8); none dropped", "torch ", "short - plain"):
        assert part in text, part
    assert text.count("run_main.py --") == 4 and "![error_by_row.png]" in text


def wait_for_cells_to_begin(lab: Lab, process: subprocess.Popen, seconds: float) -> None:
    """Until this study has begun a cell and that has printed something, and a while longer.

    A run that a killed study has left behind goes on to print; the study alone writes the notes.
    """

    def found(name: str) -> set[tuple[Path, int, int]]:
        files = [(file, file.stat()) for file in (lab.folder / "killed").glob(f"cells/*/{name}")]
        return {(file, stat.st_mtime_ns, stat.st_size) for file, stat in files}

    end = time.monotonic() + 120
    for name in ("cell.json", "log.txt"):
        before = found(name)
        while process.poll() is None and time.monotonic() < end and found(name) == before:
            time.sleep(0.01)
    time.sleep(seconds)


def test_a_killed_and_a_stopped_study_goes_on_to_the_same_figures(lab: Lab) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print("seed of the moment:", seed)
    study = lab.start("killed")
    wait_for_cells_to_begin(lab, study, random.Random(seed).uniform(0, 3))
    study.kill()
    study.wait()
    study = lab.start("killed")
    wait_for_cells_to_begin(lab, study, 0.3)
    study.send_signal(signal.SIGTERM)
    assert study.wait(60) == 128 + signal.SIGTERM
    said = (lab.folder / "killed.log").read_text()
    assert "of 4 cells done. To go on: python scripts/study.py " in said and "failed" not in said, said
    code, said = lab.run("killed", "--jobs", "2")
    assert code == 0 and "failed" not in said, said
    assert lab.rows("killed") == lab.rows("whole")


def test_two_studies_do_not_run_in_one_folder(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    holder = "import sys, time; from pathlib import Path; from utils.study.cells import StudyLock\n"
    holder += "StudyLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", holder, str(lab.folder / "whole")], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        assert main(lab.command("whole")[2:]) == 2
    finally:
        other.kill()
        other.wait()
    assert "got another study that runs in it, expected none" in capsys.readouterr().err


def test_a_changed_grid_runs_what_changed_and_a_failing_cell_does_not_end_it(lab: Lab) -> None:
    out, before = lab.folder / "whole", {row["cell"]: row for row in lab.rows("whole")}
    times = {log: log.stat().st_mtime_ns for log in out.glob("cells/*/log.txt")}
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
    rows = {row["variant"] + row["seed"]: row for row in lab.rows("whole")}
    assert {name: row["state"] for name, row in rows.items()} == {
        "no column1": "failed", "plain1": "done", "plain2": "done", "short1": "done",
    }  # fmt: skip
    assert all(rows[name] == before[rows[name]["cell"]] for name in ("plain1", "plain2"))
    assert all(log.stat().st_mtime_ns == when for log, when in times.items())  # nothing ran twice, nothing is gone
    code, said = lab.run("whole", "--list")
    assert code == 0 and said.count("  done      ") == 3 and "  failed    no_column" in said


def test_a_folder_with_a_run_of_other_flags_is_no_result(lab: Lab) -> None:
    # Last: it spoils a record.
    (record,) = (lab.folder / "killed").glob("cells/plain_seed-1_*/*/checkpoint.json")
    held = json.loads(record.read_text())
    held["flags"]["batch_size"] = 3
    record.write_text(json.dumps(held))
    lab.write(['[[variant]]\nname = "plain"'])
    code, said = lab.run("killed", "--list")
    assert code == 0 and "2 cells: 1 done, 1 half way" in said


assert os.environ.get("OMP_NUM_THREADS")  # set by tests/conftest.py, for the studies too
