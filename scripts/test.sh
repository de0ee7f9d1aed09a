#!/usr/bin/env bash
# Sets up the environment and runs the tests; arguments go to pytest, which runs in the repository's folder.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup_env.sh --test
# Two processes, one thread each: the tests of a file stay together. For one process: TEST_JOBS=0.
exec "${PYTHON:-.venv/bin/python}" -m pytest -q -n "${TEST_JOBS:-2}" --dist loadfile "$@"
