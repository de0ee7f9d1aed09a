#!/usr/bin/env bash
# Kills a short training run 20 times at random moments and compares what is left with an unharmed run; the longer ones of
# the runs in several processes (minutes).
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
exec "${PYTHON:-.venv/bin/python}" -m pytest -q -m long tests/test_kill.py tests/utils/training/test_processes.py \
  tests/utils/test_m4_run.py "$@"
