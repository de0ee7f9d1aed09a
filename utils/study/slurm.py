"""Studies on a cluster: the script and the command that hand the cells to Slurm, and a task's own return to its queue.

Each task of a job array runs one cell by `study.py --cell`. Facts of Slurm: man sbatch (--array, --parsable, --requeue,
--open-mode, --signal), https://slurm.schedmd.com/job_array.html.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layers.errors import input_error
from utils.flags import clean_name
from utils.saving.files import write_text
from utils.study.cells import Place

FOLDER, SCRIPT = "slurm", "array.sh"  # in the study's folder
SECONDS = 120  # before the time limit, in which a run saves; Slurm may send its signal up to 60 s earlier
TASK = "SLURM_ARRAY_TASK_ID"
OWN = {
    "--array": "the study says which cells; --jobs N lets N of them run at once",
    "-a": "the study says which cells; --jobs N lets N of them run at once",
    "--wrap": "the study has a script of its own",
}


@dataclass(frozen=True)
class Submission:
    """What is handed to Slurm.

    Attributes:
        script: the file that each task runs; text: what is in it.
        command: sbatch with its words.
    """

    script: Path
    text: str
    command: list[str]


def read_options(text: str) -> list[str]:
    """The words of --slurm_args.

    Raises:
        InputError: a quotation without an end, or an option that the study gives.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise input_error("--slurm_args", f"{text!r} ({error})", "sbatch's options as a shell reads them") from None
    for word in words:
        name = word.split("=")[0] if word.startswith("--") else word[:2]
        if name in OWN:
            raise input_error("--slurm_args", word, "sbatch's other options", OWN[name])
    return words


def array_of(indexes: Sequence[int], jobs: int | None) -> str:
    """Ascending whole numbers as --array takes them, `0-2,5%4`.

    Args:
        jobs: how many tasks run at once; None: as many as the cluster lets.
    """
    parts: list[list[int]] = []
    for index in indexes:
        if parts and index == parts[-1][-1] + 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    text = ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return text if jobs is None else f"{text}%{jobs}"


def prepare(
    study: Path, places: list[Place], todo: list[Place], words: Sequence[str], options: Sequence[str], jobs: int | None
) -> Submission:
    """The script of a job array and the command that submits it.

    Args:
        places: all cells of the study: a task's number is its cell's place among them.
        todo: those that shall run.
        words: study.py's command line for a cell, without --cell and its name; the flags after -- with them.
        options: more options of sbatch, which win over the script's.
        jobs: how many tasks run at once; None: as many as the cluster lets.
    """
    own, flags = (list(words[: words.index("--")]), list(words[words.index("--") :])) if "--" in words else (words, [])
    program = Path(__file__).resolve().parents[2] / "scripts" / "study.py"
    lines = [
        "#!/bin/bash",
        "#SBATCH --requeue",  # after a node's failure, and when a task asks for it
        "#SBATCH --open-mode=append",  # a task that is run again goes on in its file
        f"#SBATCH --signal=B:USR1@{SECONDS}",
        "# Written by scripts/study.py: a task runs the cell of its number. What is done is not run again, what was stopped",
        "# resumes. USR1 comes before the time limit: the run saves, and the task goes back to the queue.",
        "cells=(",
        *(f"    {shlex.quote(place.cell.id)}" for place in places),
        ")",
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
        # exec: Slurm's signal to the batch shell reaches the study itself.
        f'exec {shlex.join([sys.executable, str(program), *own])} --cell="${{cells[${TASK}]}}" {shlex.join(flags)}'.rstrip(),
        "",
    ]
    script = study / FOLDER / SCRIPT
    log = f"{str(script.parent).replace('%', '%%')}/%A_%a.out"  # %A: the array's job, %a: the task
    indexes = [number for number, place in enumerate(places) if place in todo]
    command = ["sbatch", "--parsable", f"--array={array_of(indexes, jobs)}", f"--job-name={clean_name(study.name)}"]
    return Submission(script, "\n".join(lines), [*command, f"--output={log}", *options, str(script)])


def write_script(submission: Submission) -> None:
    """Write the script, and make the folder for the tasks' output.

    Raises:
        InputError: the folder cannot be made.
        StorageError: the script cannot be written.
    """
    try:
        submission.script.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"no writing ({error.strerror})"
        raise input_error(f"--out {submission.script.parent.parent}", got, "a folder that can be written") from None
    write_text(submission.script, submission.text)


def submit(submission: Submission) -> str:
    """Hand the array to Slurm; its job's number.

    Raises:
        InputError: there is no sbatch, or it refuses.
    """
    if shutil.which(submission.command[0]) is None:
        hint = "--slurm_dry writes the script and prints the command"
        raise input_error("--slurm", "no program sbatch on the PATH", "a machine from which jobs are submitted", hint)
    answer = subprocess.run(submission.command, capture_output=True, text=True)
    if answer.returncode:
        said = answer.stderr.strip() or f"nothing, with exit code {answer.returncode}"
        raise input_error("--slurm", f"a refusal of sbatch ({said})", "a job's number", "see --slurm_args")
    return answer.stdout.strip().split(";")[0]  # number;cluster where there are several clusters


def requeue() -> str:
    """Put this task back into Slurm's queue: it begins anew, and so resumes; what became of it, as a line."""
    job, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get(TASK)
    if not job or not task:
        return "no task of an array of Slurm: not put back into a queue"
    try:
        answer = subprocess.run(["scontrol", "requeue", f"{job}_{task}"], capture_output=True, text=True)
    except OSError as error:
        return f"scontrol cannot be run ({error.strerror}): submit the study again to go on"
    if answer.returncode:
        return f"scontrol refuses to requeue task {job}_{task} ({answer.stderr.strip()}): submit the study again to go on"
    return f"Time is up: task {job}_{task} is back in the queue, to resume"
