"""Studies on several GPUs and on a cluster: which card a cell gets; job arrays run by a stand-in for Slurm's commands."""

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from layers.errors import InputError
from scripts.study import main
from tests.realdata import ROOT
from tests.small_run import command_line
from utils.study import queue
from utils.study.cells import Place, ResultsLock
from utils.study.devices import read_gpus
from utils.study.grid import read_grid
from utils.study.slurm import array_of, read_options

STUDY = str(ROOT / "scripts" / "study.py")


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_gpus_are_those_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi: what is named counts
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert read_gpus(["0,1"]) == read_gpus(["0", "1"]) == ["0", "1"]
    assert read_gpus(["GPU-1a2b-3c", "07"]) == ["GPU-1a2b-3c", "7"]
    with pytest.raises(InputError, match="^--gpus all: got no card that nvidia-smi lists, expected one or more; "):
        read_gpus(["all"])
    program(tmp_path / "nvidia-smi", '#!/bin/sh\n[ "$1" = --query-gpu=index ] && echo 0 && echo 1 && echo 2\n')
    assert read_gpus(["all"]) == ["0", "1", "2"] and read_gpus(["2", "0"]) == ["2", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-77")  # as a batch system gives them out
    assert read_gpus(["all"]) == ["2", "GPU-77"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError, match="got no card in CUDA_VISIBLE_DEVICES"):
        read_gpus(["all"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gpus", "0", "0"], "--gpus: got 0 twice, expected each card once; --jobs N lets cells share cards"),
        (["--gpus", "0,x"], "--gpus: got 'x', expected all, or the numbers that nvidia-smi shows, such as 0 1"),
        (["--gpus", "-1"], "--gpus: got '-1', expected all, or the numbers"),
        (["--gpus", ","], "--gpus: got nothing, expected all, or the numbers"),
        (["--gpus", "3"], "--gpus: got 3, expected one of 0, 1, 2"),
        (["--gpus", "0", "my.toml"], "--gpus: got 'my.toml', expected all, or the numbers that nvidia-smi shows, such as "
                                     "0 1; GRID.toml goes before it"),
        (["--gpus", "0", "--slurm"], "--gpus: got it with --slurm, expected one of the two; Slurm gives out cards"),
        (["--slurm", "--list"], "--slurm: got it with --list, expected one of the two"),
        (["--cell", "x", "--table"], "--cell: got it with --table, expected one of the two"),
        (["--cell", "x", "--jobs", "2"], "--cell: got it with --jobs, expected one cell on one card"),
        (["--cell", "x", "--gpus", "0", "1"], "--cell: got it with several --gpus, expected one cell on one card"),
        (["--slurm_args", "--time=1"], "--slurm_args: got it without --slurm, expected both"),
        (["--slurm", "--slurm_args", "--time='1"], "--slurm_args: got \"--time='1\" (No closing quotation), expected"),
        (["--slurm", "--slurm_args", "--array=1-3"], "--slurm_args: got --array=1-3, expected sbatch's other options; the"),
        (["--slurm", "--slurm_args", "-a1"], "--slurm_args: got -a1, expected sbatch's other options"),
        (["--slurm", "--jobs", "0"], "--jobs: got 0, expected a whole number of at least 1"),
    ],
)  # fmt: skip
def test_wrong_words_are_one_line(tmp_path: Path, monkeypatch, capsys, words: list[str], line: str) -> None:
    program(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\necho 0; echo 1; echo 2\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(SystemExit) as stop:
        main(["--grid", "seed=1", "--out", str(tmp_path / "out"), *words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"study.py: error: {line}") and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


def places_of(out: Path, seeds: int) -> list[Place]:
    seeds_axis = "seed=" + ",".join(map(str, range(seeds)))
    return [Place(out, cell) for cell in read_grid(None, ["model=DLinear", seeds_axis], ["--data", "ETTh1"]).cells]


RECORDER = """
import os, sys, time
folder = sys.argv[sys.argv.index("--checkpoints") + 1]
begin = time.time()
time.sleep(0.4)
with open(folder + "/record", "w") as file:
    print(os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"], begin, time.time(), file=file)
sys.exit(3)
"""


@pytest.mark.parametrize(("jobs", "most"), [(2, 1), (4, 2)])
def test_a_cell_has_a_gpu_and_frees_it_when_it_fails(tmp_path, monkeypatch, capsys, jobs: int, most: int) -> None:
    """Cells of a program that writes down what it sees, and fails."""
    monkeypatch.setattr(queue, "PROGRAM", tmp_path / "recorder.py")
    queue.PROGRAM.write_text(RECORDER)
    places = places_of(tmp_path, 6)
    cells = queue.Queue(places, jobs, ["0", "3"])
    cells.run()
    assert len(cells.failed) == 6
    records = [(place.folder / "record").read_text().split() for place in places]
    assert {order for _, order, *_ in records} == {"PCI_BUS_ID"} and {card for card, *_ in records} == {"0", "3"}
    for card, _, begin, _ in records:  # at the moment in which a cell begins
        beside = [other for other in records if other[0] == card and other[2] <= begin < other[3]]
        assert len(beside) <= most
    said = capsys.readouterr().out
    for place, (card, *_) in zip(places, records, strict=True):
        assert f"{place.cell.id} begins on GPU {card}\n" in said and f"failed on GPU {card} (exit code 3)" in said
        assert place.log.read_text() == f"study.py: on GPU {card}\n"


HEARER = """
import os, signal, sys, time
heard = []
def handle(number, frame):
    heard.append(number)
    os.write(2, b"\\nSIGTERM: ending after the work in hand; once more ends at once\\n")
signal.signal(signal.SIGTERM, handle)
for process in PROCESSES:
    os.kill(process, signal.SIGTERM)
time.sleep(1.5)
with open(sys.argv[sys.argv.index("--checkpoints") + 1] + "/heard", "w") as file:
    print(len(heard), file=file)
sys.exit(143)
"""


@pytest.mark.parametrize("processes", ["os.getpid(), os.getppid()", "os.getppid(),"], ids=["all", "the first one"])
def test_a_tasks_run_hears_the_signal_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: str) -> None:
    """A program that ends its task as Slurm does, by SIGTERM to all of its processes or to the first one."""
    monkeypatch.setattr(queue, "PROGRAM", tmp_path / "program.py")
    monkeypatch.setattr(queue, "GRACE", 0.4)
    queue.PROGRAM.write_text(HEARER.replace("PROCESSES", f"({processes})"))
    (place,) = places_of(tmp_path, 1)
    place.write_note()
    place.log.write_text("\nSIGTERM: ending after the work in hand\n")  # of an earlier call
    task = queue.Queue([place], task=True)
    task.run()
    assert (place.folder / "heard").read_text() == "1\n" and task.received == signal.SIGTERM and not task.failed


def test_numbers_of_an_array() -> None:
    assert array_of([0], None) == "0" and array_of([0, 1, 2, 5, 7, 8], 4) == "0-2,5,7-8%4"
    assert read_options("--partition=gpu --comment='two words'") == ["--partition=gpu", "--comment=two words"]


# Runs the tasks of an array here, at most as many at once as the array says, before it answers.
SBATCH = """
import os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
words = sys.argv[1:]
with open(os.environ["SBATCH_LOG"], "a") as file:
    print(*words, sep="\\n", file=file)
if "--partition=none" in words:
    sys.exit("sbatch: error: invalid partition specified: none")
said = dict(word.split("=", 1) for word in words if "=" in word)
numbers, _, most = said["--array"].partition("%")
tasks = []
for part in numbers.split(","):
    first, _, last = part.partition("-")
    tasks += range(int(first), int(last or first) + 1)
def run(task):
    output = said["--output"].replace("%A", "77").replace("%a", str(task)).replace("%%", "%")
    with open(output, "a") as file:
        own = dict(os.environ, SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID=str(task), CUDA_VISIBLE_DEVICES="")
        subprocess.run(["bash", words[-1]], cwd="/", env=own, stdout=file, stderr=file)
with ThreadPoolExecutor(int(most or 1)) as pool:
    list(pool.map(run, tasks))
print("77;cluster")
"""
SCONTROL = """
import os, sys
with open(os.environ["SBATCH_LOG"] + ".scontrol", "a") as file:
    print(*sys.argv[1:], file=file)
"""


class Cluster:
    """A folder with a grid of two cells, and a PATH with stand-ins for sbatch and scontrol."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL)):
            program(folder / "bin" / name, f"#!{sys.executable}\n{text}")
        self.environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SBATCH_LOG": str(folder / "log")}
        self.flags = command_line(folder, folder, model="DLinear", llm_model=None, llm_model_path=None, llm_layers=None,
                                  d_model=None, n_heads=None, d_ff=None, seed=None, checkpoints=None, plots=0,
                                  torch_checkpoint=0, save_predictions=0, save_steps=2)  # fmt: skip

    def words(self, out: str, *more: str, flags: tuple[str, ...] = ()) -> list[str]:
        own = ["--grid", "seed=1,2", "--out", out, "--reference", "2", *more]
        return [sys.executable, STUDY, *own, "--", *self.flags, *flags]

    def run(self, out: str, *more: str, flags: tuple[str, ...] = ()) -> tuple[int, str]:
        done = subprocess.run(
            self.words(out, *more, flags=flags),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout + done.stderr

    def rows(self, out: str) -> list[dict[str, str]]:
        with (self.folder / out / "results.csv").open(newline="") as file:
            return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A cluster in whose folder `plain` the study has run on one machine, on two cards by their names."""
    cluster = Cluster(tmp_path_factory.mktemp("it's 100 %"))
    code, said = cluster.run("plain", "--gpus", "GPU-a", "GPU-b")
    assert code == 0 and len(re.findall(r"cell \d of 2 done in \d+ s on GPU GPU-[ab]: ", said)) == 2, said
    return cluster


def test_a_dry_run_writes_the_script_and_prints_the_command(cluster: Cluster) -> None:
    code, said = cluster.run("dry", "--slurm_dry", "--jobs", "3", "--slurm_args", "--gres=gpu:1")
    assert code == 0 and not (cluster.folder / "log").exists(), said
    words = shlex.split(said.splitlines()[-1])
    script = cluster.folder / "dry" / "slurm" / "array.sh"
    assert words[:4] == ["sbatch", "--parsable", "--array=0-1%3", "--job-name=dry"] and words[5:] == [
        "--gres=gpu:1",
        str(script),
    ]
    assert words[4].endswith("/dry/slurm/%A_%a.out") and "100 %%" in words[4]
    lines = script.read_text().splitlines()
    assert lines[:4] == ["#!/bin/bash", "#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=B:USR1@120"]
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_an_array_comes_to_the_plain_runs_results(cluster: Cluster) -> None:
    code, said = cluster.run("array", "--slurm", "--jobs", "2", "--slurm_args", "--partition=none")
    assert code == 2 and said.splitlines()[-1] == (
        "study.py: error: --slurm: got a refusal of sbatch (sbatch: error: invalid partition specified: none), expected a "
        "job's number; see --slurm_args"
    )
    code, said = cluster.run("array", "--slurm", "--jobs", "2", "--slurm_args", "--comment='two words' --time=1")
    assert code == 0 and "2 cells submitted as job 77; what they print: " in said, said
    assert "--comment=two words\n--time=1\n" in (cluster.folder / "log").read_text()
    assert cluster.rows("array") == cluster.rows("plain")
    for name in ("results.md", "results.tex", "results.txt", "error_by_row.png"):
        assert (cluster.folder / "array" / name).is_file()
    tasks = [(cluster.folder / "array" / "slurm" / f"77_{number}.out").read_text() for number in (0, 1)]
    assert all("CUDA_VISIBLE_DEVICES: \n" in text and "cell 1 of 1 done in" in text for text in tasks), tasks

    # The same command once more: nothing to submit, the tables as they were.
    before = (cluster.folder / "log").read_text()
    code, said = cluster.run("array", "--slurm")
    assert code == 0 and "submitted" not in said and "Written to" in said
    assert (cluster.folder / "log").read_text() == before and cluster.rows("array") == cluster.rows("plain")


def test_without_sbatch_and_without_the_cell_it_is_one_line(cluster: Cluster, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(cluster.folder)
    assert main(cluster.words("none", "--slurm")[2:]) == 2
    assert "--slurm: got no program sbatch on the PATH, expected a machine from which jobs" in capsys.readouterr().err
    assert main(cluster.words("none", "--cell", "seed-9")[2:]) == 2
    assert "--cell: got 'seed-9', expected a cell of the grid; --list shows" in capsys.readouterr().err


class Task:
    """A task of the array, as Slurm starts it; its run trains for as long as it is let."""

    def __init__(self, cluster: Cluster, out: str, flags: tuple[str, ...]):
        words = cluster.words(out, "--slurm_dry", flags=flags)
        subprocess.run(words, cwd=cluster.folder, env=cluster.environment, check=True, capture_output=True)
        script = (cluster.folder / out / "slurm" / "array.sh").read_text()
        self.cell = re.findall("^    (.*)$", script, re.MULTILINE)[1]
        self.study = cluster.folder / out
        self.output = self.study / "task.out"
        own = cluster.environment | {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "1"}
        with self.output.open("a") as file:
            script = ["bash", str(self.study / "slurm" / "array.sh")]
            self.process = subprocess.Popen(script, cwd="/", env=own, stdout=file, stderr=file)

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in self.study.glob("cells/*/log.txt"))

    def until(self, seen: str) -> None:
        """Wait until the run has printed something."""
        self.until_after("", seen)

    def until_after(self, before: str, seen: str) -> None:
        """Wait until the run has printed something after the last of something else."""
        end = time.monotonic() + 120
        while seen not in self.log.rpartition(before)[2] if before else seen not in self.log:
            assert time.monotonic() < end and self.process.poll() is None, self.log
            time.sleep(0.02)


LONG = ("--train_epochs", "5000", "--patience", "5000")  # minutes of it


def test_a_task_whose_time_is_up_saves_and_goes_back_into_the_queue(cluster: Cluster) -> None:
    task = Task(cluster, "limit", LONG)
    task.until("Epoch: 2 cost")
    code, said = cluster.run("limit")  # a plain study beside a task
    assert code == 2 and "got another study that runs in it, expected none" in said
    code, said = cluster.run("limit", "--cell", task.cell, flags=LONG)
    assert code == 2 and f"--cell {task.cell}: got another task that runs it, expected none" in said
    code, said = cluster.run("limit", "--slurm_dry", flags=LONG)
    assert code == 0 and "1 cells run in tasks already, and are left to them" in said and " --array=0 " in said, said
    task.process.send_signal(signal.SIGUSR1)
    assert task.process.wait(60) == 128 + signal.SIGUSR1, task.output.read_text()
    assert "Time is up: task 77_1 is back in the queue, to resume" in task.output.read_text()
    assert (cluster.folder / "log.scontrol").read_text() == "requeue 77_1\n"
    assert "SIGTERM: ending after the work in hand" in task.log and list(task.study.glob("cells/*/*/state.*.safetensors"))

    # Slurm ends a job by SIGTERM to each of its processes: the run hears it once, and the task stays away.
    again = Task(cluster, "limit", LONG)
    again.until("Resuming from")
    again.until_after("Resuming from", "Epoch: ")
    (run,) = Path(f"/proc/{again.process.pid}/task/{again.process.pid}/children").read_text().split()
    os.kill(int(run), signal.SIGTERM)
    again.process.send_signal(signal.SIGTERM)
    assert again.process.wait(60) == 128 + signal.SIGTERM
    assert again.log.count("SIGTERM: ending after") == 2 and "ended at once" not in again.log
    assert (cluster.folder / "log.scontrol").read_text() == "requeue 77_1\n"
    assert [row["state"] for row in cluster.rows("limit")] == ["to do", "half way"]


def test_tables_are_written_one_after_the_other(cluster: Cluster) -> None:
    with ResultsLock(cluster.folder / "plain"):
        table = subprocess.Popen(cluster.words("plain", "--table"), cwd=cluster.folder, stdout=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            table.wait(2)
    assert table.wait(60) == 0
