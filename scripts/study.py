"""Study: a grid of runs of run_main.py, each in a process of its own, and the tables of what they come to.

    python scripts/study.py scripts/studies/example.toml --out studies/example
    python scripts/study.py --grid seed=1,2,3 --grid pred_len=96,192 --out studies/NAME -- --data ETTh1 ...

What stands after -- goes to every run, and wins over the file's [flags]. The same command goes on where a study was
stopped, and tries again what failed; a changed grid runs what has changed and keeps the rest. Nothing is ever deleted.
"""

import argparse
import shlex
import sys
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, only scripts/ is on the path

from layers.errors import InputError, input_error  # noqa: E402
from utils.command_line import FlagParser  # noqa: E402
from utils.errors import StorageError  # noqa: E402
from utils.study.cells import CELLS, DONE, FAILED, HALF, NEW, Place, StudyLock, left_over  # noqa: E402
from utils.study.grid import Grid, read_grid  # noqa: E402
from utils.study.queue import Queue  # noqa: E402
from utils.study.statistics import read_published  # noqa: E402
from utils.study.table import CSV, LATEX, MARKDOWN, TEXT, write_csv, write_tables  # noqa: E402

PUBLISHED = REPO / "scripts" / "published.toml"
SHOWN = 5  # names of cells in a line


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
        prog="study.py", description=str(__doc__).splitlines()[0], allow_abbrev=False,
        usage="python scripts/study.py [GRID.toml] --out FOLDER [options] [-- flags for every run]",
    )  # fmt: skip
    parser.add_argument(
        "file", type=Path, nargs="?", metavar="GRID.toml", help="axes, flags and variants (see scripts/studies/)"
    )
    parser.add_argument("--grid", action="append", default=[], metavar="FLAG=A,B", help="an axis: a flag and its values")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the study's folder")
    parser.add_argument("--reference", metavar="VALUE", help="the value of an axis that the others are compared with")
    parser.add_argument("--jobs", type=int, metavar="N", help="cells that run at once (default: 1, or one a GPU)")
    parser.add_argument("--gpus", default="", metavar="0,1", help="graphics cards: a cell has one")
    parser.add_argument("--list", action="store_true", help="show the cells and how far they are; run nothing")
    parser.add_argument("--table", action="store_true", help="make tables and pictures of what is there; run nothing")
    args = parser.parse_args(argv)
    if args.file is None and not args.grid:
        parser.error("got neither GRID.toml nor --grid, expected one of them")
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs: got {args.jobs}, expected a whole number of at least 1")
    args.out = args.out.resolve()
    return args


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
    if args.table:
        if not any(place.measured() for place in places):
            raise input_error(
                f"--table of {args.out}", "no cell that is done", "a study that has run", "--list shows its cells"
            )
        return finish(args.out, grid, places, published)
    lock = StudyLock(args.out)
    tell_start(args.out, grid, places)
    gpus = [name for name in args.gpus.split(",") if name]
    queue = Queue(places, args.jobs or max(1, len(gpus)), gpus, lambda: write_csv(args.out, grid, places))
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


def finish(study: Path, grid: Grid, places: list[Place], published: list[dict]) -> int:
    """Write pictures and tables of what is done, and print the table."""
    if not any(place.measured() for place in places):
        write_csv(study, grid, places)
        return 0
    from utils.study.pictures import draw  # only now: matplotlib takes a second to load

    sections = write_tables(study, grid, places, published)
    if draw(study, sections):
        write_tables(study, grid, places, published)  # results.md shows the pictures that are there
    print(f"\n{(study / TEXT).read_text(encoding='utf-8')}")
    print(f"Written to {study}: {CSV}, {MARKDOWN}, {LATEX}, {TEXT}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
