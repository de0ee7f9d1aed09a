#!/usr/bin/env bash
# ETTh1 with the whole of Qwen2.5-3B (36 layers, 4 bits) and prototypes that are trained directly: for a GPU with 6 GB, overnight.
# Flags of your own come last and win: bash scripts/TimeLLM_ETTh1_36L.sh --train_epochs 10
# The parentheses keep the caller's shell, folder and variables as they are, also with `source`.
(
  . "$(dirname "${BASH_SOURCE[0]:-$0}")/common.sh"
  run_ett ETTh1 \
    --task_name long_term_forecast \
    --is_training 1 \
    --model_id ETTh1_512_96 \
    --model_comment Qwen3B_36L \
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
    --batch_size 4 \
    --d_model 32 \
    --n_heads 8 \
    --d_ff 32 \
    --llm_layers 36 \
    --num_workers 2 \
    --prompt_domain 1 \
    --train_epochs 3 \
    --itr 1 \
    --dropout 0.1 \
    --llm_model QWEN \
    --load_in_4bit \
    --prototypes direct \
    --prompt_decimals 4 \
    --resume \
    "$@"
)
