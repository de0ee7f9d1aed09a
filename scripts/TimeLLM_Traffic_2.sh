#!/usr/bin/env bash
# Traffic, 862 sensors, hourly, 512 rows of history, 96 to forecast, Qwen2.5-3B in 4 bits: for a GPU with 6 GB.
# A step holds 4 windows of 862 channels, run in parts of what fits (--max_sequences). docs/wide.md says what it takes.
# Flags of your own come last and win: bash scripts/TimeLLM_Traffic_2.sh --percent 10
# The parentheses keep the caller's shell, folder and variables as they are, also with `source`.
(
  . "$(dirname "${BASH_SOURCE[0]:-$0}")/common.sh"
  run_family Traffic \
    --task_name long_term_forecast \
    --is_training 1 \
    --model_id Traffic_512_96 \
    --model_comment Qwen3B_fast \
    --model TimeLLM \
    --features M \
    --seq_len 512 \
    --label_len 48 \
    --pred_len 96 \
    --e_layers 2 \
    --d_layers 1 \
    --factor 3 \
    --dec_in 862 \
    --c_out 862 \
    --batch_size 4 \
    --eval_batch_size 4 \
    --learning_rate 0.01 \
    --d_model 16 \
    --n_heads 8 \
    --d_ff 32 \
    --llm_layers 6 \
    --num_workers 2 \
    --prompt_domain 1 \
    --train_epochs 1 \
    --itr 1 \
    --dropout 0.1 \
    --llm_model QWEN \
    --load_in_4bit \
    --resume \
    "$@"
)
