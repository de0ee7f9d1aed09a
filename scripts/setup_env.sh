#!/usr/bin/env bash
# Makes .venv in the repository and installs requirements.txt there; does nothing where that has been done.
#
#   bash scripts/setup_env.sh          what running needs
#   bash scripts/setup_env.sh --test   the packages of the tests and of scripts/lint.sh too
#
#   TORCH_INDEX_URL  package index that torch is taken from, e.g. https://download.pytorch.org/whl/cu126; torch is
#                    installed anew where it came from another one
#   PYTHON           where set, nothing is made or installed: that Python is taken as it is
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -n "${PYTHON:-}" ]; then
  echo "environment: PYTHON=$PYTHON, taken as it is"
  exit 0
fi

files=(requirements.txt)
if [ "${1:-}" = --test ]; then
  files+=(requirements-test.txt)
fi

# python3 where it is new enough: several of the pinned packages need 3.11.
find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  echo "setup_env.sh: error: python3: got $(python3 --version 2>&1 || true), expected Python 3.11 or newer" >&2
  return 1
}

make_venv() {
  local base
  base=$(find_python)
  if ! "$base" -c 'import venv, ensurepip' 2>/dev/null; then
    echo "setup_env.sh: error: $base: got no venv module, expected one; on Debian and Ubuntu:" \
      "apt install python3-venv" >&2
    return 1
  fi
  echo "environment: making .venv with $("$base" --version)"
  rm -f .venv/*.installed
  # A drive without symbolic links (some that Windows shares) takes copies, and a folder where the link lib64 would be.
  "$base" -m venv .venv 2>/dev/null || { mkdir -p .venv/lib64 && "$base" -m venv --copies .venv; }
}

pip_install() {
  .venv/bin/python -m pip install -qq --disable-pip-version-check "$@"
}

has_gpu() {
  command -v nvidia-smi >/dev/null || [ -x /usr/lib/wsl/lib/nvidia-smi ]
}

# On Linux PyPI's torch brings gigabytes of CUDA with it, which a machine without a GPU has no use for.
install_torch() {
  local pin cpu_index=https://download.pytorch.org/whl/cpu
  pin=$(grep '^torch==' requirements.txt)
  if [ -n "${TORCH_INDEX_URL:-}" ]; then
    echo "environment: $pin from TORCH_INDEX_URL ($TORCH_INDEX_URL)"
    pip_install --index-url "$TORCH_INDEX_URL" "$pin"
  elif [ "$(uname -s)" != Linux ] || has_gpu; then
    echo "environment: $pin as pip's index has it"
    pip_install "$pin"
  elif pip_install "$pin+cpu" 2>/dev/null; then
    echo "environment: $pin+cpu, found where pip is set to look"
  elif pip_install --timeout 15 --retries 1 --extra-index-url "$cpu_index" "$pin+cpu" 2>/dev/null; then
    echo "environment: $pin+cpu from $cpu_index"
  else
    echo "environment: no CPU build of $pin could be had; taking the one with CUDA (several GB)"
    pip_install "$pin"
  fi
}

# Whether torch came from the index that is asked for, if one is.
same_index() {
  [ -z "${TORCH_INDEX_URL:-}" ] || [ "$TORCH_INDEX_URL" = "$(cat .venv/torch.index 2>/dev/null)" ]
}

# A copy of each file as it was installed tells whether anything is to be done.
up_to_date() {
  local file
  for file in "${files[@]}"; do
    cmp -s "$file" ".venv/$file.installed" || return 1
  done
  same_index || return 1
  .venv/bin/python -c '' 2>/dev/null
}

install_all() {
  local file
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then  # none yet, or its base Python is gone
    make_venv
  fi
  if ! same_index; then  # builds for different CUDA have the same number, so pip would keep the one that is there
    .venv/bin/python -m pip uninstall -qq -y torch 2>/dev/null || true
  fi
  if ! cmp -s requirements.txt .venv/requirements.txt.installed || ! same_index; then
    install_torch
    echo "${TORCH_INDEX_URL:-}" >.venv/torch.index
  fi
  for file in "${files[@]}"; do
    if ! cmp -s "$file" ".venv/$file.installed"; then
      echo "environment: installing $file"
      pip_install -r "$file"
      cp "$file" ".venv/$file.installed"
    fi
  done
}

# One line where there is an NVIDIA GPU that this torch cannot use; on the CPU everything runs all the same.
check_gpu() {
  .venv/bin/python - <<'EOF' || true
import torch

if not torch.cuda.is_available():
    from argparse import Namespace

    from layers.errors import InputError
    from utils.validate import check_device

    try:
        check_device(Namespace(device="auto", load_in_4bit=False))
    except InputError as error:
        print(f"environment: WARNING: {error}")
EOF
}

mkdir -p .venv
if command -v flock >/dev/null; then  # two set-ups at once: the second waits, then finds all done
  exec 9>.venv/setup.lock
  flock 9 || true  # some mounted Windows drives have no locks
fi
if ! up_to_date; then
  install_all
fi
if has_gpu; then
  check_gpu
fi
echo "environment: .venv ready ($(.venv/bin/python --version))"
