#!/usr/bin/env bash
# ETTh1 with the whole of Qwen2.5-3B (36 layers, bf16), batches of 64 and early stopping: for a GPU with 80 GB.
# Flags of your own come last and win: bash scripts/TimeLLM_ETTh1_80G.sh --train_epochs 10
# The parentheses keep the caller's shell, folder and variables as they are, also with `source`.
(
  . "$(dirname "${BASH_SOURCE[0]:-$0}")/common.sh"
  run_ett ETTh1 \
    --task_name long_term_forecast \
    --is_training 1 \
    --model_id ETTh1_512_96 \
    --model_comment Qwen3B_80G \
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
    --batch_size 64 \
    --d_model 32 \
    --n_heads 8 \
    --d_ff 128 \
    --llm_layers 36 \
    --num_workers 2 \
    --prompt_domain 1 \
    --train_epochs 100 --patience 10 \
    --itr 1 \
    --dropout 0.1 \
    --llm_model QWEN \
    --resume \
    "$@"
)
