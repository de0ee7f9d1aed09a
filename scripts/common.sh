# What the experiment scripts share. They source this file inside a subshell, so nothing of it reaches the caller.
#
#   PYTHON    the Python to use (default: .venv of this repository, else python3)
#   LLM_PATH  folder or hub id of the language model (default: base_models/Qwen2.5-3B of this repository)
#   TIMELLM_PROGRAM  what gets the flags (default: run_main.py, of a transfer run_pretrain.py); scripts/check_gpu.py
#                    measures what the run would take
#
# run_main.py runs in the repository's folder: relative paths in flags (--root_path, --checkpoints) mean that one.

set -u
unset CDPATH  # cd would look there too, and print

scripts_dir=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd) || exit 1
root=$(dirname "$scripts_dir")

# A relative LLM_PATH or PYTHON means the caller's folder, so both are made absolute before the cd.
weights=${LLM_PATH:-$root/base_models/Qwen2.5-3B}
[ -d "$weights" ] && weights=$(cd "$weights" && pwd)

if [ -n "${PYTHON:-}" ]; then
  case $PYTHON in
    /*) python=$PYTHON ;;
    */*) python=$PWD/$PYTHON ;;
    *) python=$PYTHON ;;
  esac
elif [ -x "$root/.venv/bin/python" ]; then
  python=$root/.venv/bin/python
else
  python=python3
fi

cd "$root" || exit 1

# The setting of PyTorch's allocator that reserves least. torch 2.9 renamed the variable; a value that is set stays.
# On WSL none: its driver has no virtual memory calls that expandable segments could use, and other settings keep large
# blocks for themselves. There the program's own cap makes PyTorch give idle blocks back.
set_allocator() {
  local version major minor value=expandable_segments:True
  if [ -n "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" ]; then
    return 0
  fi
  if ! version=$("$python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null); then
    echo "common.sh: error: $python: got no torch, expected an installed one; bash $scripts_dir/setup_env.sh" \
      "installs it" >&2
    return 1
  fi
  case $(uname -r) in
    *[Mm]icrosoft*) return 0 ;;
  esac
  major=${version%%.*}
  minor=${version#*.}
  minor=${minor%%.*}
  if [ "$major" -gt 2 ] || { [ "$major" -eq 2 ] && [ "$minor" -ge 9 ]; }; then
    export PYTORCH_ALLOC_CONF=$value
  else
    export PYTORCH_CUDA_ALLOC_CONF=$value
  fi
}

# find_data NAME FLAGS...: sets $data_dir to the folder that holds NAME.csv; fetches the file where it is missing.
find_data() {
  local name=$1 flag answer path
  shift
  data_dir=./dataset/ETT-small/
  if [ -f "$data_dir/$name.csv" ]; then
    return 0
  fi
  for flag in "$@"; do
    case $flag in
      --root_path | --root_path=* | --data_path | --data_path=*) return 0 ;;  # the user's own file
    esac
  done
  answer=$("$python" scripts/get_data.py --name "$name") || return 1
  printf '%s\n' "$answer"
  path=$(printf '%s\n' "$answer" | sed -n 's/^data: //p' | tail -n 1)
  if [ "$(basename "$path")" != "$name.csv" ]; then
    echo "common.sh: error: $name.csv: got only synthetic data ($path), expected the public file; to train on" \
      "what there is add --root_path $(dirname "$path") --data_path $(basename "$path")" >&2
    return 1
  fi
  data_dir=$(dirname "$path")/
}

# run_program PROGRAM FLAGS...: calls it. A script's flags for the language model are taken back where its user's --model has
# none; a flag that comes twice holds its last value.
run_program() {
  local program=$1 model=TimeLLM flag before=
  shift
  for flag in "$@"; do
    case $before=$flag in
      --model=*) model=$flag ;;
      *=--model=*) model=${flag#--model=} ;;
    esac
    before=$flag
  done
  case $model in
    [Tt]ime[Ll][Ll][Mm]) ;;
    *) set -- "$@" --load_in_4bit False --skip none --max_sequences 0 ;;
  esac
  "$python" "${TIMELLM_PROGRAM:-$program}" "$@"
}

# run_ett NAME FLAGS...: one run on NAME.
run_ett() {
  local name=$1
  shift
  set_allocator || return 1
  find_data "$name" "$@" || return 1
  run_program run_main.py --data "$name" --root_path "$data_dir" --data_path "$name.csv" --llm_model_path "$weights" "$@"
}

# run_transfer SOURCE TARGET FLAGS...: one run that trains on SOURCE, and validates and tests on TARGET.
run_transfer() {
  local source=$1 target=$2
  shift 2
  set_allocator || return 1
  find_data "$source" "$@" || return 1
  find_data "$target" "$@" || return 1
  run_program run_pretrain.py --data_pretrain "$source" --data_path_pretrain "$source.csv" \
    --data "$target" --root_path "$data_dir" --data_path "$target.csv" --llm_model_path "$weights" "$@"
}

# run_family NAME FLAGS...: one run on ECL, Traffic or Weather, whose files nobody fetches: the program looks for
# electricity.csv, traffic.csv or weather.csv in dataset/, in a folder of that name in it, and in $TIMELLM_DATA.
run_family() {
  local name=$1
  shift
  set_allocator || return 1
  run_program run_main.py --data "$name" --root_path ./dataset/ --llm_model_path "$weights" "$@"
}
