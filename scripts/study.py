"""Study: a grid of runs of run_main.py, each in a process of its own, and the tables of what they come to.

    python scripts/study.py scripts/studies/example.toml --out studies/example
    python scripts/study.py --grid seed=1,2,3 --grid pred_len=96,192 --out studies/NAME -- --data ETTh1 ...
    python scripts/study.py GRID.toml --out studies/NAME --gpus all                                   # a cell a GPU
    python scripts/study.py GRID.toml --out studies/NAME --slurm --slurm_args "--gres=gpu:1 --time=8:00:00" --jobs 4

What stands after -- goes to every run, and wins over the file's [flags]. The same command goes on where a study was
stopped, and tries again what failed; a changed grid runs what has changed and keeps the rest. Nothing is ever deleted.
"""

import argparse
import os
import platform
import shlex
import sys
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, only scripts/ is on the path

from layers.errors import InputError, input_error  # noqa: E402
from utils.command_line import FlagParser  # noqa: E402
from utils.errors import StorageError  # noqa: E402
from utils.study import slurm  # noqa: E402
from utils.study.cells import (  # noqa: E402
    CELLS,
    DONE,
    FAILED,
    HALF,
    NEW,
    CellLock,
    Place,
    ResultsLock,
    StudyLock,
    has_task,
    left_over,
)
from utils.study.devices import VISIBLE, read_gpus  # noqa: E402
from utils.study.grid import Grid, read_grid  # noqa: E402
from utils.study.queue import TIME_LIMIT, Queue  # noqa: E402
from utils.study.statistics import read_published  # noqa: E402
from utils.study.table import CSV, LATEX, MARKDOWN, TEXT, write_csv, write_tables  # noqa: E402

PUBLISHED = REPO / "scripts" / "published.toml"
SHOWN = 5  # names of cells in a line
STATES = "state.*.pt"  # what a run that was stopped resumes from


def main(argv: list[str]) -> int:
    """Run the study; the exit code: 2 for what the user can mend, 1 where cells failed, 128 + n after signal n."""
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = read_arguments(own)
    try:
        grid = read_grid(args.file, args.grid, flags, args.reference)
        return study(args, grid, argv)
    except (InputError, StorageError) as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """The study's own words."""
    parser = FlagParser(
        prog="study.py", description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="python scripts/study.py [GRID.toml] --out FOLDER [options] [-- flags for every run]",
    )  # fmt: skip
    parser.add_argument(
        "file", type=Path, nargs="?", metavar="GRID.toml", help="axes, flags and variants (see scripts/studies/)"
    )
    parser.add_argument("--grid", action="append", default=[], metavar="FLAG=A,B", help="an axis: a flag and its values")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the study's folder")
    parser.add_argument("--reference", metavar="VALUE", help="the value of an axis that the others are compared with")
    parser.add_argument("--jobs", type=int, metavar="N", help="cells that run at once (default: 1, or one a GPU; with "
                        "--slurm as many as the cluster lets)")  # fmt: skip
    parser.add_argument("--gpus", nargs="+", metavar="GPU", help="graphics cards of this machine, as nvidia-smi numbers "
                        "them (0 1 2), or all: a cell has one; with more --jobs than cards they share them")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="show the cells and how far they are; run nothing")
    parser.add_argument("--table", action="store_true", help="make tables and pictures of what is there; run nothing")
    cluster = parser.add_argument_group("cluster (docs/cluster.md)")
    cluster.add_argument("--slurm", action="store_true", help="submit what is not done as a job array, a cell a task")
    cluster.add_argument("--slurm_args", metavar="WORDS", help='options for sbatch, such as "--partition=gpu --gres=gpu:1 '
                         '--time=08:00:00"')  # fmt: skip
    cluster.add_argument("--slurm_dry", action="store_true", help="as --slurm, but print sbatch's command alone")
    cluster.add_argument("--cell", metavar="NAME", help="run one cell, as --list names it, beside others: what a task does")
    args = parser.parse_args(_joined(argv, "--slurm_args"))
    args.slurm = args.slurm or args.slurm_dry
    try:
        _check(args)
    except InputError as error:
        parser.error(str(error))
    if args.file is None and not args.grid:
        parser.error("got neither GRID.toml nor --grid, expected one of them")
    args.out = args.out.resolve()
    return args


def _joined(argv: list[str], name: str) -> list[str]:
    """The words with a flag and its value in one: argparse takes a value that begins with dashes for a flag."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] == name:
            words[-1] = f"{name}={word}"
        else:
            words.append(word)
    return words


def _check(args: argparse.Namespace) -> None:
    """Set the study's own words against each other; fill in the cards and sbatch's options.

    Raises:
        InputError: at the first that is wrong.
    """
    args.gpus = [] if args.gpus is None else read_gpus(args.gpus)
    if args.jobs is not None and args.jobs < 1:
        raise input_error("--jobs", args.jobs, "a whole number of at least 1")
    modes = {"--list": args.list, "--table": args.table, "--slurm": args.slurm, "--cell": args.cell is not None}
    given = [name for name, value in modes.items() if value]
    if len(given) > 1 and given != ["--list", "--table"]:
        raise input_error(given[-1], f"it with {given[0]}", "one of the two")
    if args.slurm_args is not None and not args.slurm:
        raise input_error("--slurm_args", "it without --slurm", "both")
    if args.slurm and args.gpus:
        raise input_error(
            "--gpus", "it with --slurm", "one of the two", 'Slurm gives out cards: --slurm_args "--gres=gpu:1"'
        )
    if args.cell is not None and (args.jobs or len(args.gpus) > 1):
        raise input_error("--cell", f"it with {'--jobs' if args.jobs else 'several --gpus'}", "one cell on one card")
    args.slurm_args = slurm.read_options(args.slurm_args or "")


def study(args: argparse.Namespace, grid: Grid, argv: list[str]) -> int:
    """List, tabulate or run the cells of a grid.

    Raises:
        InputError: the folder cannot be used, or a file in it is damaged.
        StorageError: results cannot be written.
    """
    places = [Place(args.out, cell) for cell in grid.cells]
    if args.list:
        return list_cells(args.out, grid, places)
    published = read_published(PUBLISHED)
    if args.cell is not None:
        return run_cell(args, grid, places, published)
    if args.table:
        if not any(place.measured() for place in places):
            raise input_error(
                f"--table of {args.out}", "no cell that is done", "a study that has run", "--list shows its cells"
            )
        return finish(args.out, grid, places, published)
    if args.slurm:
        return submit(args, grid, places, argv) if todo(places) else finish(args.out, grid, places, published)
    lock = StudyLock(args.out)
    tell_start(args.out, grid, places)
    jobs = args.jobs or max(1, len(args.gpus))
    queue = Queue(places, jobs, args.gpus, lambda: write_results(args.out, grid, places))
    queue.run()
    finish(args.out, grid, places, published)
    lock.release()
    again = shlex.join(["python", "scripts/study.py", *argv])
    done = sum(place.measured() is not None for place in places)
    if queue.failed:
        print(f"{len(queue.failed)} cells failed; {len(places) - done} to do are tried again by the same command: {again}")
    if queue.received:
        print(f"Stopped; {done} of {len(places)} cells done. To go on: {again}")
        return 128 + queue.received
    return 1 if queue.failed else 0


def run_cell(args: argparse.Namespace, grid: Grid, places: list[Place], published: list[dict]) -> int:
    """Run one cell beside others, on this machine or another one, and make the tables anew; the exit code as `main`'s.

    Raises:
        InputError: the grid has no such cell, another task runs it, or a whole study runs in the folder.
        StorageError: results cannot be written.
    """
    place = next((place for place in places if place.cell.id == args.cell), None)
    if place is None:
        raise input_error("--cell", repr(args.cell), "a cell of the grid", "--list shows their names")
    locks = StudyLock(args.out, shared=True), CellLock(args.out, place)
    cards = os.environ.get(VISIBLE, "not set")
    print(f"{place.cell.id}: {place.state()}; on {platform.node()}, {VISIBLE}: {cards}", flush=True)
    before = _states(place)
    queue = Queue([place], 1, args.gpus, task=True)
    queue.run()
    # Every task does, as none knows whether it is the last one.
    finish(args.out, grid, places, published, show=False)
    for lock in locks:
        lock.release()
    if place.measured() is not None:
        return 0
    if queue.received == TIME_LIMIT:
        if _states(place) == before:
            print("Time is up before the run could save: not put back into the queue; give it a longer --time", flush=True)
        else:
            print(slurm.requeue(), flush=True)
    return 128 + queue.received if queue.received else 1


def _states(place: Place) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_mtime_ns) for path in place.run.glob(STATES)}


def todo(places: list[Place]) -> list[Place]:
    """The cells that are not done, in order."""
    return [place for place in places if place.measured() is None]


def submit(args: argparse.Namespace, grid: Grid, places: list[Place], argv: list[str]) -> int:
    """Hand the cells that are not done, and that no task runs, to Slurm, or print how; the exit code.

    Raises:
        InputError: Slurm refuses, or is not there, or the folder cannot be written.
        StorageError: the script cannot be written.
    """
    StudyLock(args.out, shared=True).release()  # the tasks would meet a study that runs there
    tell_start(args.out, grid, places)
    cells = todo(places)
    running = [place for place in cells if has_task(place)]
    if running:
        cells = [place for place in cells if place not in running]
        print(f"{len(running)} cells run in tasks already, and are left to them", flush=True)
    if not cells:
        return 0
    words = [] if args.file is None else [str(args.file.resolve())]
    words += [word for axis in args.grid for word in ("--grid", axis)] + ["--out", str(args.out)]
    words += [f"--reference={args.reference}"] if args.reference else []
    words += argv[argv.index("--") :] if "--" in argv else []
    submission = slurm.prepare(args.out, places, cells, words, args.slurm_args, args.jobs)
    slurm.write_script(submission)
    if args.slurm_dry:
        print(shlex.join(submission.command))
        return 0
    job = slurm.submit(submission)
    folder = submission.script.parent
    print(f"{len(cells)} cells submitted as job {job}; what they print: {folder}/{job}_*.out")
    print(f"squeue -j {job} shows them, scancel {job} stops them; each makes the tables anew when it ends")
    return 0


def tell_start(study: Path, grid: Grid, places: list[Place]) -> None:
    """A line of what is to be done, and one of what lies there that the grid does not have."""
    states = Counter(place.state() for place in places)
    parts = ", ".join(f"{states[state]} {state}" for state in (DONE, HALF, FAILED, NEW) if states[state])
    print(f"{grid.title}: {len(places)} cells: {parts}; in {study}", flush=True)
    if others := left_over(study, grid):
        names = ", ".join(others[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
        print(
            f"{len(others)} cells of an earlier grid, left as they are and in no table: {names}; in {study / CELLS}",
            flush=True,
        )


def list_cells(study: Path, grid: Grid, places: list[Place]) -> int:
    """Print the cells and how far they are."""
    tell_start(study, grid, places)
    for place in places:
        state, found = place.state(), place.measured()
        more = f"  mse {found.mse:.4f} mae {found.mae:.4f}" if found else f"  {place.last_line()}" if state == FAILED else ""
        print(f"  {state:8}  {place.cell.id}{more}")
    return 0


def write_results(study: Path, grid: Grid, places: list[Place]) -> None:
    """Write results.csv while others wait."""
    with ResultsLock(study):
        write_csv(study, grid, places)


def finish(study: Path, grid: Grid, places: list[Place], published: list[dict], show: bool = True) -> int:
    """Write pictures and tables of what is done, and print the table where it shall be shown.

    Raises:
        InputError: the folder cannot be used, or a file in it is damaged.
        StorageError: a table cannot be written.
    """
    with ResultsLock(study):
        if not any(place.measured() for place in places):
            write_csv(study, grid, places)
            return 0
        from utils.study.pictures import draw  # only now: matplotlib takes a second to load

        sections = write_tables(study, grid, places, published)
        if draw(study, sections):
            write_tables(study, grid, places, published)  # results.md shows the pictures that are there
        text = (study / TEXT).read_text(encoding="utf-8")
    if show:
        print(f"\n{text}")
    print(f"Written to {study}: {CSV}, {MARKDOWN}, {LATEX}, {TEXT}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
