#!/usr/bin/env bash
# A forecaster for your own CSV (a date column, and columns of numbers): trains, tests, and forecasts what follows
# the last row. Flags of your own come last and win:
#   bash scripts/TimeLLM_custom.sh my.csv
#   bash scripts/TimeLLM_custom.sh my.csv.gz --date_column Zeit --drop_columns remark
#   bash scripts/TimeLLM_custom.sh my.csv --seq_len 192 --pred_len 24 --prompt_text "Sales of one shop, in pieces a day."
# The forecast is that of a ridge regression, and what Time-LLM adds to it (--skip ridge: ours, not the paper's; RESULTS.md
# has the figures). --skip none is the paper's model.
# After an interruption the same command resumes; where the file has changed, --resume False starts anew.
# The parentheses keep the caller's shell, folder and variables as they are, also with `source`.
(
  if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: bash scripts/TimeLLM_custom.sh FILE.csv [flags of run_main.py]" >&2
    exit 2
  fi
  if [ ! -f "$1" ]; then
    echo "TimeLLM_custom.sh: error: $1: got no such file, expected a CSV file" >&2
    exit 2
  fi
  # Relative to the caller's folder, so it is made absolute before common.sh changes it.
  unset CDPATH
  folder=$(cd "$(dirname "$1")" && pwd) || exit 1
  file=$(basename "$1")
  name=${file%.gz}
  shift
  . "$(dirname "${BASH_SOURCE[0]:-$0}")/common.sh"
  set_allocator || exit 1
  # A preset sets these by itself.
  recipe=(--d_model 32 --d_ff 32 --n_heads 8 --batch_size 4 --train_epochs 3 --skip ridge)
  case " $*" in *" --preset"*) recipe=() ;; esac
  four_bit=()
  # On a CPU the weights stay as they are; 4 bits are for the GPU.
  if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    four_bit=(--load_in_4bit)
  fi
  run_program run_main.py \
    --task_name long_term_forecast --is_training 1 --model TimeLLM \
    --model_id "${name%.*}" --model_comment custom \
    --data custom --root_path "$folder" --data_path "$file" --features M \
    ${recipe[@]+"${recipe[@]}"} \
    --llm_model QWEN --llm_model_path "$weights" ${four_bit[@]+"${four_bit[@]}"} \
    --do_predict --resume \
    "$@"
)
