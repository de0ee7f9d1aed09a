#!/usr/bin/env bash
# What a new GPU is asked first: seconds a step and peak memory of the main settings, one epoch of ETTh1, --itr 2, recovery
# from too little memory, a kill and a resume, fp16, and the plain path as the fast one's peer. Qwen2.5-3B's shape with
# random weights, 6 layers, 4 bits; nothing is downloaded but ETTh1. Writes a table in Markdown.
#
#   bash scripts/first_ten_minutes.sh           on a GPU; the epoch at the end takes longer than the rest
#   bash scripts/first_ten_minutes.sh --tiny    a tiny model on the CPU: does this script work?
#
#   OUT        the table (default: first_ten_minutes.md in the caller's folder)
#   FREE_GIB   GPU memory that is left free, the rest is held (default: 5.5, a 6 GB card with a desktop on it)
#   TOKENIZER  folder of Qwen's tokenizer (default: one made here, whose prompts are about as long)
#   PYTHON     as in common.sh
tiny=
case ${1:-} in
  '') ;;
  --tiny) tiny=1 ;;
  *)
    echo "first_ten_minutes.sh: error: got $1, expected nothing or --tiny" >&2
    exit 2
    ;;
esac
out=${OUT:-first_ten_minutes.md}
case $out in /*) ;; *) out=$PWD/$out ;; esac
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_allocator || exit 1

work=$(mktemp -d) || exit 1
held=
clean_up() {
  [ -z "$held" ] || kill "$held" 2>/dev/null
  rm -rf "$work"
}
trap clean_up EXIT
failed=0
say() { echo "first ten minutes: $*" >&2; }

# hold_memory: another process takes what a 6 GB card would not have.
hold_memory() {
  "$python" - "${FREE_GIB:-5.5}" >"$work/held" <<'EOF' &
import sys
import time

import torch

free, _ = torch.cuda.mem_get_info()
more = int(free - float(sys.argv[1]) * 2**30)
block = torch.empty(more, dtype=torch.uint8, device="cuda") if more > 0 else None
print(f"{max(more, 0) / 2**30:.1f}", flush=True)
time.sleep(10**6)
EOF
  held=$!
  until [ -s "$work/held" ]; do
    kill -0 "$held" 2>/dev/null || { echo "first_ten_minutes.sh: error: the GPU's memory could not be held" >&2; exit 1; }
    sleep 0.2
  done
}

# measure NAME EXPECTED FLAGS...: a row of steps and peaks.
measure() {
  local name=$1 expected=$2
  shift 2
  say "measuring $name"
  if "$python" scripts/check_gpu.py --json "$work/figures.json" "${flags[@]}" "${full[@]}" "$@" >"$work/check.log" 2>&1; then
    "$python" - "$work/figures.json" "$name" "$expected" >>"$work/rows" <<'EOF'
import json
import sys

figures = json.load(open(sys.argv[1]))
peaks = figures["peaks_gib"]
cells = [sys.argv[2], f"{figures['at_once']} of {figures['sequences']}", f"{figures['s_per_step']:.3f}"]
cells += [f"{peaks[phase][0]:.2f}" for phase in ("steps", "save", "evaluation")]
cells += [f"{max(reserved for _, reserved in peaks.values()):.2f}", sys.argv[3], f"{figures['s_run'] / figures['epochs'] / 60:.1f}"]
print("| " + " | ".join(cells) + " |")
EOF
    [ -f "$work/machine.json" ] || cp "$work/figures.json" "$work/machine.json"
  else
    echo "| $name | $(tail -n 1 "$work/check.log" | tr '|' '/') | | | | | | $expected | |" >>"$work/rows"
    failed=1
  fi
}

# train NAME FLAGS...: a run, its lines in NAME.log.
train() {
  local name=$1
  shift
  say "running $name"
  "$python" run_main.py "${flags[@]}" "$@" >"$work/$name.log" 2>&1 || echo "exit code $?" >>"$work/$name.log"
}

# answer NAME ROW PATTERN...: a row of the checks: passed where the run ended well and every pattern is in NAME.log.
answer() {
  local name=$1 row=$2 pattern verdict=passed
  shift 2
  if grep -q '^exit code' "$work/$name.log"; then
    verdict="**failed**: $(tail -n 2 "$work/$name.log" | paste -sd ' ' | tr '|' '/')"
  fi
  for pattern in "$@"; do
    grep -q "$pattern" "$work/$name.log" || verdict="$verdict; **failed**: no line with '$pattern'"
  done
  [ "$verdict" = passed ] || failed=1
  echo "| $row | $verdict | $(found "$name") |" >>"$work/checks"
}

# found NAME: what a run says of itself, in one cell.
found() {
  grep -aE '^(Test MSE|GPU Memory|Memory|Dry run|CUDA out of memory|Resuming from|Epoch: [0-9]+ cost)' "$work/$1.log" |
    tr '|' '/' | paste -sd ';' | sed 's/;/; /g'
}

# kill_and_resume: kill -9 once a state is there; the same command goes on from it.
kill_and_resume() {
  local victim folder=$work/killed
  train unharmed "${short[@]}" --model_comment unharmed --max_iters "$long" --save_steps 2
  say "running a run that is killed"
  "$python" run_main.py "${flags[@]}" "${short[@]}" --model_comment killed --checkpoints "$folder" \
    --max_iters "$long" --save_steps 2 --resume >"$work/victim.log" 2>&1 &
  victim=$!
  until compgen -G "$folder/*/state.*" >/dev/null || ! kill -0 "$victim" 2>/dev/null; do
    sleep 0.05
  done
  kill -9 "$victim" 2>/dev/null
  wait "$victim" 2>/dev/null
  train resumed "${short[@]}" --model_comment killed --checkpoints "$folder" --max_iters "$long" --save_steps 2 --resume
  answer resumed "kill -9 and resume" "^Resuming from" "^Test MSE"
  echo "| the same run, unharmed | | $(found unharmed) |" >>"$work/checks"
}

answer_data=$("$python" scripts/get_data.py --name ETTh1) || exit 1
csv=$(printf '%s\n' "$answer_data" | sed -n 's/^data: //p' | tail -n 1)
flags=(
  --task_name long_term_forecast --is_training 1 --model_id first --model_comment first --model TimeLLM --features M
  --label_len 48 --batch_size 4 --prompt_domain 0 --llm_model QWEN --llm_model_path "$work/backbone"
  --train_epochs 1 --num_workers 2 --checkpoints "$work/runs" --plots 0 --save_predictions 0 --torch_checkpoint 0
)
if [ -n "$tiny" ]; then
  rows=400 long=12 few=4
  make=(--preset tiny --layers 2)
  flags+=(--seq_len 96 --pred_len 24 --d_model 8 --n_heads 2 --d_ff 8 --llm_layers 2 --device cpu --log_every 4)
else
  rows=2000 long=40 few=20
  make=(--preset qwen2.5-3b --layers 6)
  [ -z "${TOKENIZER:-}" ] || make+=(--tokenizer "$TOKENIZER")
  flags+=(--seq_len 512 --pred_len 96 --d_model 32 --n_heads 8 --d_ff 32 --llm_layers 6 --load_in_4bit --device cuda)
fi
head -n $((rows + 1)) "$csv" >"$work/short.csv"
short=(--data custom --root_path "$work" --data_path short.csv)
full=(--data ETTh1 --root_path "$(dirname "$csv")" --data_path "$(basename "$csv")")
[ -z "$tiny" ] || full=("${short[@]}")
"$python" scripts/make_backbone.py "${make[@]}" --out "$work/backbone" >"$work/backbone.log" 2>&1 || {
  cat "$work/backbone.log" >&2
  exit 1
}
[ -n "$tiny" ] || hold_memory

measure "plain, 7 at once" 3.97 --fast_path plain --max_sequences 7
measure "fast" 3.34
measure "fast, adamw8bit" - --optimizer adamw8bit
measure "fast, direct" 1.20 --prototypes direct
measure "fast, direct, 4 decimals" 1.20 --prototypes direct --prompt_decimals 4
measure "fast, fp16 forced" - --amp_dtype fp16

train repeats "${short[@]}" --model_comment repeats --itr 2 --max_iters 5
[ "$(grep -c '^Test MSE' "$work/repeats.log")" = 2 ] && echo "both tested" >>"$work/repeats.log"
answer repeats "--itr 2" "^both tested"
if [ -z "$tiny" ]; then
  train memory "${short[@]}" --model_comment memory --fast_path plain --max_sequences 0 --max_iters 5
  answer memory "too little memory (plain, all 28 at once)" "^CUDA out of memory with" "^Test MSE"
else
  echo "| too little memory | not on the CPU | |" >>"$work/checks"
fi
kill_and_resume
train half "${short[@]}" --model_comment half --amp_dtype fp16 --max_iters "$few"
answer half "fp16 forced" "^Test MSE"
train peer "${short[@]}" --model_comment peer --fast_path plain --max_sequences 7 --max_iters "$few"
answer peer "plain path, $few steps" "plain path" "^Test MSE"
train fast "${short[@]}" --model_comment fast --max_sequences 7 --max_iters "$few"
answer fast "fast path, the same" "fast path" "^Test MSE"
more=()
[ -z "$tiny" ] || more=(--max_iters "$few")
train epoch "${full[@]}" --model_comment epoch ${more[@]+"${more[@]}"}
answer epoch "one epoch" "^Test MSE"

{
  echo "# First ten minutes"
  echo
  if [ -f "$work/machine.json" ]; then
    "$python" -c 'import json, sys
for name, text in json.load(open(sys.argv[1]))["machine"].items(): print(f"- {name}: {text}")' "$work/machine.json"
  fi
  [ -z "$held" ] || echo "- held by another process, so that about ${FREE_GIB:-5.5} GiB were free: $(cat "$work/held") GiB"
  echo "- commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown); $("$python" -c 'import sys; print(" ".join(sys.argv[1:]))' "${make[@]}"), random weights"
  echo "- data: $(basename "$csv"); of the short runs and, with --tiny, of all: its first $rows rows"
  echo
  echo "Peaks in GiB; on the CPU the process's largest so far. Expected: of a step at most, counted over tensors without values, 3B shape."
  echo
  echo "| | sequences at once | s a step | step | save | evaluation | reserved | expected | min an epoch |"
  echo "|---|---|---|---|---|---|---|---|---|"
  cat "$work/rows"
  echo
  echo "| check | verdict | what it said |"
  echo "|---|---|---|"
  cat "$work/checks"
} >"$out" || exit 1
say "the table is in $out"
exit "$failed"
