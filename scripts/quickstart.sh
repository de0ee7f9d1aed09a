#!/usr/bin/env bash
# From a bare clone to a trained forecaster and a table of what it is worth, on two CPU cores in under ten minutes.
# The backbone is a tiny one with random weights, so nothing large is downloaded; with --pretrained, which comes first, it is
# SmolLM2-135M, which has read much (a download of 100 MB).
# Flags of your own go to run_main.py and win: bash scripts/quickstart.sh --train_epochs 3
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pretrained=
if [ "${1:-}" = --pretrained ]; then
  pretrained=1
  shift
fi
bash scripts/setup_env.sh
python=${PYTHON:-.venv/bin/python}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# last_value LABEL FILE: what stands behind LABEL in the last line of FILE that has it.
last_value() {
  sed -n "s/^$1: //p" "$2" | tail -n 1
}

"$python" scripts/get_data.py --name ETTh1 | tee "$work/data.log"
data=$(last_value data "$work/data.log")

if [ -n "$pretrained" ]; then
  "$python" scripts/get_backbone.py smollm2-135m | tee "$work/backbone.log"
  backbone=$(last_value backbone "$work/backbone.log")
  comment=pretrained
  # What two cores can do in ten minutes.
  chosen=(--llm_model LLAMA --llm_layers 1 --max_iters 80)
  echo "quickstart: cut to fit two cores: 1 of the language model's 30 layers, 80 iterations; every validation and test window counts"
else
  backbone=base_models/tiny-random
  comment=quickstart
  chosen=(--llm_model QWEN --llm_layers 1 --max_iters 200)
  if [ ! -f "$backbone/config.json" ]; then
    "$python" scripts/make_backbone.py --preset tiny --out "$backbone"
  fi
fi

# tee -i: Ctrl+C ends the run, which then still has something to say.
"$python" run_main.py \
  --task_name long_term_forecast --is_training 1 --model TimeLLM \
  --model_id "$(basename "$data" .csv)_512_96" --model_comment "$comment" \
  --data ETTh1 --root_path "$(dirname "$data")" --data_path "$(basename "$data")" --features M \
  --seq_len 512 --label_len 48 --pred_len 96 \
  --preset best --prompt_domain 1 \
  --llm_model_path "$backbone" "${chosen[@]}" \
  --train_epochs 1 --eval_batch_size 32 \
  --do_predict --resume \
  "$@" | tee -i "$work/run.log"

# The table: this run beside simple baselines on the same windows.
"$python" scripts/report.py "$(last_value 'Checkpoints saved at' "$work/run.log")"

echo "quickstart: $((SECONDS / 60)) min $((SECONDS % 60)) s in all"
