#!/usr/bin/env bash
# The tests that take minutes: a short training run that is killed 20 times at random moments and compared with an unharmed
# one, and the longer ones of the runs in several processes. Files or tests as arguments: those alone.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then
  set -- tests/test_kill.py tests/utils/training/test_processes.py
fi
exec "${PYTHON:-.venv/bin/python}" -m pytest -q -m long "$@"
