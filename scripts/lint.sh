#!/usr/bin/env bash
# Sets up the environment; lints, checks the format of, and type-checks the code (settings: pyproject.toml).
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup_env.sh --test
python=${PYTHON:-.venv/bin/python}
failed=0
"$python" -m ruff check . || failed=1
"$python" -m ruff format --check . || failed=1
"$python" -m mypy || failed=1
exit "$failed"
