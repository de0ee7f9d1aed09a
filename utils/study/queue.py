"""Queue of a study's cells: each a process of run_main.py; signals are passed on, failures told, and the rest goes on."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.saving.interrupt import SIGNALS
from utils.study.cells import DONE, HALF, Measured, Place, cores, in_use, machine
from utils.study.devices import environment_of
from utils.study.grid import SEED, VARIANT

PROGRAM = Path(__file__).resolve().parents[2] / "run_main.py"
WAIT = 0.1  # seconds between two looks at the running cells
GRACE = 1.0  # seconds in which a run that a signal has reached says so in its log
TIME_LIMIT = getattr(signal, "SIGUSR1", None)  # a batch system's word that a task's time is about to end; not on Windows
END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl


@dataclass
class Running:
    """A cell whose process runs."""

    place: Place
    process: subprocess.Popen
    slot: int
    began: float
    log_began: int  # bytes of its log that earlier calls wrote
    gpu: str | None = None


@dataclass
class Queue:
    """Runs the cells that are not done, some at once.

    Args of the constructor:
        places: all cells of the study, in order.
        jobs: how many run at once; gpus: the cards they share, none: what the flags say.
        finished: called after each cell that is done.
        task: whether this is a task of a batch system, whose signals reach all processes of it, or the first one alone.
    """

    places: list[Place]
    jobs: int = 1
    gpus: list[str] = field(default_factory=list)
    finished: Callable[[], None] = lambda: None
    task: bool = False
    received: int = 0  # the signal that ends the study
    running: list[Running] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    _done: dict[str, Measured] = field(default_factory=dict)
    _before: dict[int, Any] = field(default_factory=dict)
    _pass_on_at: float | None = None

    def run(self) -> None:
        """Run until every cell is done or has failed, or a signal has come."""
        for number in [*SIGNALS, TIME_LIMIT] if self.task and TIME_LIMIT else SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
                self._before[number] = signal.signal(number, self._handle)
        try:
            self._run()
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _run(self) -> None:
        self._wait_for_orphans()
        for place in self.places:
            if found := place.measured():
                self._done[place.cell.id] = found
        waiting = [place for place in self.places if place.cell.id not in self._done]
        while self.running or (waiting and not self.received):
            while waiting and len(self.running) < self.jobs and not self.received:
                self._start(waiting.pop(0))
            time.sleep(WAIT)
            if self._pass_on_at is not None and time.monotonic() >= self._pass_on_at:
                self._pass_on_at = None
                self._send(self.received, [job for job in self.running if not _has_heard(job, self.received)])
            for job in [job for job in self.running if job.process.poll() is not None]:
                self.running.remove(job)
                self._end(job)

    def _wait_for_orphans(self) -> None:
        """A study that was killed may have left runs behind, which are about to save and end."""
        for place in self.places:
            if in_use(place.run):
                print(f"{place.cell.id} still runs, from a study that was killed: waiting for it", flush=True)
            while in_use(place.run) and not self.received:
                time.sleep(WAIT)

    def _start(self, place: Place) -> None:
        if place.foreign():
            from utils.saving.folder import move_aside  # only now: torch takes seconds to load

            print(f"{place.cell.id}: its folder held a run with other flags, now in {move_aside(place.folder)}", flush=True)
        slot = min(set(range(self.jobs)) - {job.slot for job in self.running})
        gpu = self.gpus[slot % len(self.gpus)] if self.gpus else None
        command = self.command(place)
        place.write_note(command=command, exit_code=0, machine=machine())
        environment = os.environ.copy()
        if self.jobs > 1:
            threads = int(environment.get("OMP_NUM_THREADS") or cores())
            environment["OMP_NUM_THREADS"] = str(max(1, threads // self.jobs))
        if gpu is not None:
            environment = environment_of(gpu, environment)
            print(f"{place.cell.id} begins on GPU {gpu}", flush=True)
        with place.log.open("ab") as log:
            log_began = log.tell()
            if gpu is not None:
                log.write(f"study.py: on GPU {gpu}\n".encode())
                log.flush()
            # A session of its own: Ctrl+C reaches the run once, through `_handle`, and not twice.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip
        self.running.append(Running(place, process, slot, time.monotonic(), log_began, gpu))
        if self.received and self._pass_on_at is None:  # it came between the two lines
            self._send(self.received, self.running[-1:])

    @staticmethod
    def command(place: Place) -> list[str]:
        """The command line of a cell."""
        return [sys.executable, str(PROGRAM), *place.cell.words(), "--checkpoints", str(place.folder), "--resume"]

    def _end(self, job: Running) -> None:
        """Tell what has become of a cell."""
        place, code, spent = job.place, job.process.returncode, time.monotonic() - job.began
        where = "" if job.gpu is None else f" on GPU {job.gpu}"
        stopped = bool(self.received and code)  # a run that is stopped while it starts may die with any code
        place.write_note(exit_code=0 if stopped else code, seconds=place.note().get("seconds", 0.0) + spent)
        name, found = place.cell.id, place.measured()
        if stopped:
            print(f"{name}: stopped, {DONE if found else HALF}", flush=True)
            return
        if code or found is None:
            self.failed.append(name)
            why = place.last_line() if code else "no metrics.json with the cell's flags in it"
            print(f"{name} failed{where} (exit code {code}): {why}; the rest goes on", flush=True)
            return
        self._done[name] = found
        print(
            f"cell {len(self._done)} of {len(self.places)} done in {time_text(spent)}{where}: {name} "
            f"mse {found.mse:.4f} mae {found.mae:.4f}; {self._left()}",
            flush=True,
        )
        self.finished()

    def _left(self) -> str:
        """How long the rest takes, by what the cells that are most alike took, in this call or an earlier one."""
        rest = [place for place in self.places if place.cell.id not in self._done and place.cell.id not in self.failed]
        if not rest:
            return "nothing left"
        running = {job.place.cell.id: time.monotonic() - job.began for job in self.running}
        seconds = sum(max(0.0, self._expected(place) - running.get(place.cell.id, 0.0)) for place in rest)
        return f"left about {time_text(seconds / self.jobs)}"

    def _expected(self, place: Place) -> float:
        done = [(p, self._done[p.cell.id].seconds) for p in self.places if p.cell.id in self._done]
        kinds: list[Callable[[Place], object]] = [
            lambda p: {axis: value for axis, value in p.cell.values.items() if axis != SEED},
            lambda p: (p.cell.values.get(VARIANT), p.cell.args.model),
            lambda p: None,
        ]
        for kind in kinds:
            alike = [spent for p, spent in done if kind(p) == kind(place)]
            if alike:
                return sum(alike) / len(alike)
        return 0.0

    def _handle(self, number: int, _frame: object) -> None:
        """Pass a signal on; the runs save and end, and no other starts. A second one ends them at once."""
        first, self.received = not self.received, number
        if self.task and first and number == signal.SIGTERM:
            # A batch system ends a job by this signal to each of its processes. Passed on at once it would be the run's
            # second, and end it before it has saved.
            self._pass_on_at = time.monotonic() + GRACE
            return
        self._send(number, self.running)

    @staticmethod
    def _send(number: int, jobs: list[Running]) -> None:
        """Send a signal to cells; the time limit's as the one that a run knows."""
        for job in jobs:
            if job.process.poll() is None:
                job.process.send_signal(signal.SIGTERM if number == TIME_LIMIT else number)


def _has_heard(job: Running, number: int) -> bool:
    """Whether a run has said of a signal that it came."""
    with job.place.log.open("rb") as log:
        log.seek(job.log_began)
        return f"\n{signal.Signals(number).name}: end".encode() in log.read()


def _end_with_parent() -> None:
    """Ask the system for SIGTERM when the study dies, so that kill -9 of it leaves no run alone for the night."""
    ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGTERM)


def time_text(seconds: float) -> str:
    """Seconds for people: 45 s, 4 min 12 s, 1 h 50 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
