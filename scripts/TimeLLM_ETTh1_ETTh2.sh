#!/usr/bin/env bash
# Transfer: trained on ETTh1, validated and tested on ETTh2; 512 rows of history, 96 to forecast, Qwen2.5-3B in 4 bits: for
# a GPU with 6 GB. It trains as the published script of that name: 24 windows of one channel a step, the rate 0.01 / 25.
# Flags of your own come last and win: bash scripts/TimeLLM_ETTh1_ETTh2.sh --pred_len 192
# The parentheses keep the caller's shell, folder and variables as they are, also with `source`.
(
  . "$(dirname "${BASH_SOURCE[0]:-$0}")/common.sh"
  run_transfer ETTh1 ETTh2 \
    --task_name long_term_forecast \
    --is_training 1 \
    --model_id ETTh1_ETTh2_512_96 \
    --model_comment Qwen3B_fast \
    --model TimeLLM \
    --features M \
    --seq_len 512 \
    --label_len 48 \
    --pred_len 96 \
    --e_layers 2 \
    --d_layers 1 \
    --factor 3 \
    --dec_in 7 \
    --c_out 7 \
    --recipe published \
    --batch_size 24 \
    --learning_rate 0.01 \
    --d_model 32 \
    --n_heads 8 \
    --d_ff 32 \
    --llm_layers 6 \
    --num_workers 2 \
    --prompt_domain 1 \
    --train_epochs 5 \
    --itr 1 \
    --dropout 0.1 \
    --llm_model QWEN \
    --load_in_4bit \
    --resume \
    "$@"
)
