"""The watch over a group of processes: when one fails, all end within seconds, and one line says which and why.

Without it the others would wait in the middle of a sum for numbers that never come. Each process holds a connection to the
first one; an operating system closes it however its process ends, so that no timer is in the way of long steps.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from layers.errors import InputError
from utils.errors import RunError
from utils.saving.interrupt import Interrupted, end_workers

GRACE = 1.0  # seconds in which other processes may say what they have found
AGREED = 5.0  # the same where a process refuses something, which the others are likely to refuse, too
CONNECT = 60  # seconds to reach the first process
# What a process finds that waits for one that has failed; not worth a word beside that one's own.
CONSEQUENCES = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL error", "ProcessGroupNCCL")
KEPT = "what was saved is kept, and the same command with --resume resumes from it"
LOST = "ended without a word, as a process that is killed does"


class Watch:
    """One process's end of the watch; `run` does the work under it."""

    def __init__(self, rank: int, world: int, connect: Callable[[Any], Any]):
        """Args:
        connect: gives every process what the first one calls it with.
        """
        self.rank, self.world = rank, world
        self.host = socket.gethostname()
        self._failures: dict[int, dict[str, Any]] = {}  # of the processes, by rank; what they said, or that they are gone
        self._lock = threading.Lock()
        self._over = threading.Event()  # the work is done, or the end has been told
        self._others: list[socket.socket] = []
        self._listeners: list[threading.Thread] = []
        if rank == 0:
            self._open(connect)
        else:
            self._reach(connect)

    def run(self, work: Callable[[], int]) -> int:
        """The exit code of `work`, or of the failure that has ended the group."""
        try:
            code = work()
        except Interrupted as signal:
            code = signal.exit_code  # all have left at the same place
        except InputError as error:
            self._fail(str(error), 2)
        except RunError as error:
            self._fail(str(error), 1)
        except Exception as error:  # whatever it is: the others wait for this process
            text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
            consequence = any(word in text for word in CONSEQUENCES)
            if not consequence:
                traceback.print_exc()
            self._fail(text, 1, consequence)
        self._leave()
        return code

    def _open(self, connect: Callable[[Any], Any]) -> None:
        """The first process: wait for the connections of all others."""
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        token = secrets.token_hex(16)
        local = address in ("localhost", "127.0.0.1") or int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == self.world
        with socket.create_server(("127.0.0.1" if local else "", 0), backlog=self.world) as server:
            connect(("127.0.0.1" if local else address, server.getsockname()[1], token, self.host))
            until = time.monotonic() + CONNECT
            while len(self._others) < self.world - 1:
                server.settimeout(max(until - time.monotonic(), 0.1))
                try:
                    other, _ = server.accept()
                except TimeoutError:
                    missing = self.world - 1 - len(self._others)
                    raise RunError(f"{missing} of {self.world} processes did not reach the first one's watch") from None
                other.settimeout(2)
                lines = other.makefile("r", encoding="utf-8")
                try:
                    hello = json.loads(lines.readline())
                except (OSError, ValueError):
                    hello = {}
                if not isinstance(hello, dict) or hello.get("token") != token:
                    other.close()  # somebody else's
                    continue
                self._others.append(_kept_alive(other))
                self._start(lines, hello["rank"], hello["host"])

    def _reach(self, connect: Callable[[Any], Any]) -> None:
        address, port, token, host = connect(None)
        try:
            first = socket.create_connection((address, port), timeout=CONNECT)
        except OSError as error:
            raise RunError(f"rank {self.rank} on {self.host}: no way to the first process, {address} ({error})") from error
        self._others.append(_kept_alive(first))
        self._tell({"token": token, "rank": self.rank, "host": self.host})
        self._start(first.makefile("r", encoding="utf-8"), 0, host)

    def _start(self, lines: Any, rank: int, host: str) -> None:
        self._listeners.append(threading.Thread(target=self._listen, args=(lines, rank, host), daemon=True))
        self._listeners[-1].start()

    def _tell(self, words: dict[str, Any]) -> None:
        for other in self._others:
            try:
                other.sendall((json.dumps(words) + "\n").encode())
            except OSError:
                continue  # it is gone, which its own listener sees

    def _listen(self, lines: Any, rank: int, host: str) -> None:
        """Thread: what process `rank` says, until it leaves or its connection ends."""
        said: dict[str, Any] = {}
        try:
            for line in lines:
                said = json.loads(line)
                break
        except (OSError, ValueError):
            said = {}
        if said.get("left") or self._over.is_set():
            return
        if self.rank > 0:
            self._end_with_first(said, host)
        failure = {"text": said.get("failed", LOST), "code": said.get("code", 1), "host": host}
        with self._lock:
            self._failures[rank] = failure | {"consequence": bool(said.get("consequence"))}
            if len(self._failures) > 1:
                return  # the thread that came first sees to the rest
        self._gather()
        self._end()

    def _gather(self) -> None:
        """Give the others time to say what they have found."""
        until = time.monotonic() + AGREED
        time.sleep(GRACE)
        while time.monotonic() < until:
            with self._lock:
                found = list(self._failures.values())
            if len(found) == self.world or any(failure["code"] != 2 for failure in found):
                return
            time.sleep(0.1)

    def _end_with_first(self, said: dict[str, Any], host: str) -> NoReturn:
        """The first process has told the end, or is gone: so does this one, in the middle of whatever it does."""
        # Of each machine one process says so; where the first one lived the second does.
        speaks = self.rank == 1 or int(os.environ.get("LOCAL_RANK", "0")) == 0
        if not said and speaks:
            _print(f"rank 0 on {host}: {LOST}; {KEPT}")
        end_workers()
        os._exit(int(said.get("end", 1)))

    def _fail(self, text: str, code: int, consequence: bool = False) -> NoReturn:
        """This process has failed; the first one gathers what all say."""
        failure = {"text": text, "code": code, "host": self.host, "consequence": consequence}
        if self.rank > 0:
            self._tell({"failed": text, "code": code, "consequence": consequence})
            time.sleep(2 * AGREED)  # the first process ends this one, when it has heard all
            os._exit(code)
        with self._lock:
            first = not self._failures
            self._failures[0] = failure
        if first:
            self._gather()
        else:
            time.sleep(2 * AGREED)  # the listener that came first sees to the end
        self._end()

    def _end(self) -> NoReturn:
        """Say who has failed and why, each thing once, and end all."""
        with self._lock:
            self._over.set()
            failures = dict(self._failures)
        causes = {rank: failure for rank, failure in failures.items() if not failure["consequence"]} or failures
        shown: dict[str, list[int]] = {}
        for rank in sorted(causes):
            shown.setdefault(causes[rank]["text"], []).append(rank)
        for text, ranks in shown.items():
            who = "" if len(ranks) == self.world else f"rank {', '.join(map(str, ranks))} on {causes[ranks[0]]['host']}: "
            _print(f"{who}{text}" + (f"; {KEPT}" if text == LOST else ""))
        code = max(failure["code"] for failure in causes.values())
        self._tell({"end": code})
        end_workers()
        os._exit(code)

    def _leave(self) -> None:
        """The work is done here; the first process stays until the others have left."""
        if self.rank == 0:
            for listener in self._listeners:
                listener.join()
        self._over.set()
        self._tell({"left": True})


def _kept_alive(connection: socket.socket) -> socket.socket:
    """Of a machine that is gone without a word, power or network, the system tells within half a minute."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _print(line: str) -> None:
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)
