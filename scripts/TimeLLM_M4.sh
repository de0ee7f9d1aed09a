#!/usr/bin/env bash
# The M4 competition, a run for each of its six patterns with the flags of the published script and its recipe (the rate
# begins at 0.001 / 25), then one table of all.
# Qwen2.5-3B in 4 bits, for a GPU with 6 GB. Flags of your own come last and win; M4_PATTERNS chooses:
#   M4_PATTERNS="Weekly Hourly" bash scripts/TimeLLM_M4.sh --train_epochs 10
# The parentheses keep the caller's shell, folder and variables as they are, also with `source`.
(
  . "$(dirname "${BASH_SOURCE[0]:-$0}")/common.sh"
  set_allocator || exit 1
  patterns=${M4_PATTERNS:-Monthly Yearly Weekly Daily Quarterly Hourly}
  data_dir=./dataset/m4
  own=
  for flag in "$@"; do
    case $flag in
      --root_path | --root_path=*) own=1 ;;  # the user's own folder
    esac
  done
  missing() {  # the patterns whose files are not there
    for pattern in $patterns; do
      [ -f "$data_dir/$pattern-train.csv" ] && [ -f "$data_dir/$pattern-test.csv" ] || printf ' %s' "$pattern"
    done
  }
  if [ -z "$own" ]; then
    if [ -n "$(missing)" ]; then
      answer=$("$python" scripts/get_data.py --name m4) || exit 1
      printf '%s\n' "$answer"
      path=$(printf '%s\n' "$answer" | sed -n 's/^data: //p' | tail -n 1)
      case $path in
        *synthetic*)
          echo "TimeLLM_M4.sh: error: m4: got only synthetic data ($path), expected the public files; to train on what there" \
            "is add --root_path $path" >&2
          exit 1
          ;;
      esac
    fi
    if [ -n "$(missing)" ]; then  # now, not when the patterns before them have trained for hours
      echo "TimeLLM_M4.sh: error: m4: got no training and test file of$(missing) in $data_dir, expected those of all that" \
        "M4_PATTERNS names: $patterns" >&2
      exit 1
    fi
  fi

  log=$(mktemp) || exit 1
  trap 'rm -f "$log"' EXIT
  folders=()
  for pattern in $patterns; do
    run_program run_m4.py \
      --task_name short_term_forecast \
      --is_training 1 \
      --root_path "$data_dir" \
      --seasonal_patterns "$pattern" \
      --model_id "m4_$pattern" \
      --model_comment TimeLLM-M4 \
      --model TimeLLM \
      --data m4 \
      --features M \
      --dec_in 1 \
      --c_out 1 \
      --llm_layers 6 \
      --d_model 8 \
      --d_ff 32 \
      --patch_len 1 \
      --stride 1 \
      --batch_size 24 \
      --des Exp \
      --itr 1 \
      --recipe published \
      --learning_rate 0.001 \
      --loss SMAPE \
      --train_epochs 50 \
      --llm_model QWEN \
      --llm_model_path "$weights" \
      --load_in_4bit \
      --resume \
      "$@" | tee -i "$log"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || exit "$code"
    folders+=("$(sed -n 's/^Checkpoints saved at: //p' "$log" | tail -n 1)")
  done
  [ -n "${TIMELLM_PROGRAM:-}" ] || "$python" scripts/m4_scores.py "${folders[@]}"
)
