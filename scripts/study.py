"""Study: a grid of runs of run_main.py, each in a process of its own, and the tables of what they come to.

    python scripts/study.py scripts/studies/example.toml --out studies/example
    python scripts/study.py --grid seed=1,2,3 --grid pred_len=96,192 --out studies/NAME -- --data ETTh1 ...
    python scripts/study.py GRID.toml --out studies/NAME --gpus all                                   # a cell a GPU
    python scripts/study.py GRID.toml --out studies/NAME --cell 7         # one cell, as a task of a cluster's job array

What stands after -- goes to every run, and wins over the file's [flags]. The same command goes on where a study was
stopped, and tries again what failed; a changed grid runs what has changed and keeps the rest. Nothing is ever deleted.
"""

import fcntl
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ is on the path

from utils.script import exit_code, script_parser  # noqa: E402

# isort: split
from layers.errors import input_error  # noqa: E402
from utils.results.log import Progress  # noqa: E402
from utils.saving.files import duration  # noqa: E402
from utils.saving.interrupt import SIGNALS  # noqa: E402
from utils.study.cells import (  # noqa: E402
    DONE,
    FAILED,
    HALF,
    LOG,
    NEW,
    NOTE,
    Cell,
    Study,
    cores,
    last_line,
    machine,
    measure,
    nvidia_smi,
    read_json,
    read_study,
    write_note,
)
from utils.study.tables import write_results  # noqa: E402

VISIBLE = "CUDA_VISIBLE_DEVICES"
ARGUMENTS: dict[str, dict] = {
    "file": dict(type=Path, nargs="?", metavar="GRID.toml", help="axes, flags and variants (see scripts/studies/)"),
    "--grid": dict(action="append", default=[], metavar="FLAG=A,B", help="an axis: a flag and its values"),
    "--out": dict(type=Path, required=True, metavar="FOLDER", help="the study's folder"),
    "--reference": dict(metavar="VALUE", help="the value of an axis that the others are compared with"),
    "--jobs": dict(type=int, default=0, metavar="N", help="cells that run at once (default: 1, or one a GPU)"),
    "--gpus": dict(nargs="+", metavar="GPU", help="graphics cards of this machine, as nvidia-smi numbers them (0 1 2), or "
                   "all: a cell has one; with more --jobs than cards they share them"),
}  # fmt: skip
MODES: dict[str, dict] = {  # at most one of them
    "--list": dict(action="store_true", help="show the cells and how far they are; run nothing"),
    "--table": dict(action="store_true", help="make tables of what is there; run nothing"),
    "--cell": dict(metavar="N", help="run one cell, by its number or name in --list, beside others: what a task of a "
                   "cluster does (docs/cluster.md); --table makes the tables then"),
}  # fmt: skip


def main(argv: list[str]) -> int:
    # Run the study; the exit code: 2 for what the user can mend, 1 where cells failed, 128 + n after signal n.
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    usage = "python scripts/study.py [GRID.toml] --out FOLDER [options] [-- flags for every run]"
    parser = script_parser("study.py", __doc__, ARGUMENTS, usage=usage)
    mode = parser.add_mutually_exclusive_group()
    for name, words in MODES.items():
        mode.add_argument(name, **words)
    args = parser.parse_args(own)

    def work() -> int:
        if args.jobs < 0:
            raise input_error("--jobs", args.jobs, "1 or more cells at once")
        if args.cell is not None and (args.jobs or args.gpus):
            raise input_error("--cell", "--jobs or --gpus beside it", "neither: one cell, on the card that its task has")
        args.gpus = read_gpus(args.gpus or [])
        study = read_study(args.out.resolve(), args.file, args.grid, flags, args.reference)
        if args.list or args.table:
            list_cells(study) if args.list else show_results(study)
            return 0
        handle = lock(study.folder, shared=args.cell is not None)
        if args.cell is not None:
            return run_cell(study, args.cell)
        tell_start(study)
        failed, received = run_cells(study.cells, args.jobs or len(args.gpus) or 1, args.gpus, handle)
        done, again = show_results(study), shlex.join(["python", "scripts/study.py", *argv])
        if failed:
            print(
                f"{len(failed)} cells failed; {len(study.cells) - done} to do are tried again by the same command: {again}"
            )
        if received:
            print(f"Stopped; {done} of {len(study.cells)} cells done. To go on: {again}")
        return 128 + received if received else bool(failed)

    return exit_code(parser.prog, work)


def read_gpus(words: list[str]) -> list[str]:
    # The cards that --gpus names, each a value for CUDA_VISIBLE_DEVICES; `all`: those of that variable where it is set.
    names = [name for word in words for name in word.split(",")]
    if names == ["all"]:
        names = os.environ.get(VISIBLE, ",".join(map(str, range(len(nvidia_smi("name")))))).split(",")
    for name in names:
        if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", name):
            raise input_error(
                "--gpus",
                repr(name),
                "all, or the numbers that nvidia-smi shows, such as 0 1",
                "GRID.toml stands before it" if name.endswith(".toml") else "",
            )
    return names


def lock(folder: Path, shared: bool) -> int:
    """A handle that keeps the study's folder for this process, and for the runs that inherit it, until all have ended.

    Args:
        shared: with others that run a cell each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Another study, or a run that it has left behind, works in {folder}: waiting for its end", flush=True)
        fcntl.flock(handle, how)
    except OSError as error:
        print(f"WARNING: {folder} cannot be locked ({error.strerror}): start no second study in it", flush=True)
    os.set_inheritable(handle, True)
    return handle


def run_cells(cells: list[Cell], jobs: int, gpus: list[str], lock: int) -> tuple[list[str], int]:
    """Run the cells that are not done, each in a process; signals are passed on, failures told, and the rest goes on.

    Args:
        cells: all cells of the study, in order.
        jobs: how many run at once.
        gpus: the cards that they share; none: what the flags say.
        lock: a file handle that the runs keep open until they end.

    Returns:
        The cells that failed, and the number of the signal that has ended the study, or 0.
    """
    seconds = {cell.name: found["seconds"] for cell in cells if (found := measure(cell))["state"] == DONE}
    cards = [gpus[number % len(gpus)] if gpus else None for number in range(jobs)]  # free ones
    processes: list[subprocess.Popen] = []
    received, failed = 0, []

    def pass_on(number: int, _frame: object) -> None:
        # The runs save and end, and no other starts; a second signal ends them at once.
        nonlocal received
        received = number
        for process in processes:
            process.send_signal(number)  # one that has ended gets none

    def run(cell: Cell) -> tuple[int, float, str] | None:
        if received:
            return None
        card, environment = cards.pop(0), os.environ.copy()
        if jobs > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, int(environment.get("OMP_NUM_THREADS") or cores()) // jobs))
        if card is not None:
            # CUDA counts the fastest card first unless it is told to count as nvidia-smi does.
            environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **environment, VISIBLE: card}
            bar.log(f"{cell.name} begins on GPU {card}")
        write_note(cell, exit_code=0, machine=machine())
        began = time.monotonic()
        with (cell.folder / LOG).open("ab") as log:
            # A session of its own: Ctrl+C reaches the run once, through `pass_on`, and not twice.
            process = subprocess.Popen(
                cell.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
                pass_fds=[lock],
            )  # fmt: skip
        processes.append(process)
        if received:  # it came between the two lines
            process.send_signal(received)
        while (code := process.poll()) is None:
            time.sleep(0.5)
            bar.set_postfix_str(f"{cell.name}: {last_line(cell)}")
        cards.append(card)
        return code, time.monotonic() - began, f" on GPU {card}" if gpus else ""

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
            signal.signal(number, pass_on)
    with ThreadPoolExecutor(jobs) as pool, Progress(total=len(cells), initial=len(seconds), desc="cells") as bar:
        waiting = {pool.submit(run, cell): cell for cell in cells if cell.name not in seconds}
        for future in as_completed(waiting):
            if (ended := future.result()) is None:
                continue
            bar.update()
            cell, (code, spent, where) = waiting[future], ended
            stopped = bool(received and code)  # a run that is stopped while it starts may die with any code
            spent_before = read_json(cell.folder / NOTE).get("seconds", 0.0)
            write_note(cell, exit_code=0 if stopped else code, seconds=spent_before + spent)
            found = measure(cell)
            if stopped:
                bar.log(f"{cell.name}: stopped, {found['state']}")
            elif code or found["state"] != DONE:
                failed.append(cell.name)
                bar.log(f"{cell.name} failed{where} (exit code {code}): {last_line(cell)}; the rest goes on")
            else:
                seconds[cell.name] = found["seconds"]
                rest = len(cells) - len(seconds) - len(failed)
                left = duration(sum(seconds.values()) / len(seconds) * rest / jobs)
                bar.log(
                    f"cell {len(seconds)} of {len(cells)} done in {duration(spent)}{where}: {cell.name} "
                    f"mse {found['mse']:.4f} mae {found['mae']:.4f}; {f'left about {left}' if rest else 'nothing left'}"
                )
    return failed, received


def run_cell(study: Study, chosen: str) -> int:
    """Become the run of one cell, whose signals and exit code are then this process's; 0 where it is done.

    Raises:
        InputError: the grid has no such cell.
    """
    cell = next((cell for number, cell in enumerate(study.cells) if chosen in (str(number), cell.name)), None)
    if cell is None:
        raise input_error(
            "--cell", repr(chosen), f"a number from 0 to {len(study.cells) - 1}, or a name", "--list shows them"
        )
    how, cards = measure(cell)["state"], os.environ.get(VISIBLE, "not set")
    print(f"{cell.name}: {how}; on {platform.node()}, {VISIBLE}: {cards}", flush=True)
    if how == DONE:
        return 0
    write_note(cell, exit_code=0, machine=machine())
    os.execv(sys.executable, cell.command)


def tell_start(study: Study) -> None:
    # A line of what is to be done, and one of what lies there that the grid does not have.
    states = Counter(measure(cell)["state"] for cell in study.cells)
    parts = ", ".join(f"{states[name]} {name}" for name in (DONE, HALF, FAILED, NEW) if states[name])
    print(f"{study.title}: {len(study.cells)} cells: {parts}; in {study.folder}", flush=True)
    others = {path.name for path in study.folder.glob("cells/*/")} - {cell.folder.name for cell in study.cells}
    if others:
        print(f"{len(others)} cells of an earlier grid, left as they are and in no table: {', '.join(sorted(others))}")


def list_cells(study: Study) -> None:
    # Print the cells with their numbers, and how far they are.
    tell_start(study)
    for number, cell in enumerate(study.cells):
        found = measure(cell)
        more = f"mse {found['mse']:.4f} mae {found['mae']:.4f}" if found["state"] == DONE else ""
        more = last_line(cell) if found["state"] == FAILED else more
        print(f"{number:4}  {found['state']:8}  {cell.name}  {more}".rstrip())


def show_results(study: Study) -> int:
    """Write tables of what is done, and print the table; how many cells are done.

    Raises:
        StorageError: a table cannot be written.
    """
    done = sum(measure(cell)["state"] == DONE for cell in study.cells)
    if done:
        written = write_results(study)
        print(f"\n{(study.folder / 'results.txt').read_text(encoding='utf-8')}")
        print(f"Written to {study.folder}: {', '.join(written)}")
    else:
        print("No cell is done, so there are no tables")
    return done


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
