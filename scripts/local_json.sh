#!/usr/bin/env bash
# Distillation on files of one's own: two JSON manifests, a row an utterance, audio paths relative to the manifest:
#   {"audio": "clips/0001.wav", "sentence": "what is said in it"}
# The labels are the transcripts, so there is no stage 1. Names and sizes come from the environment; more flags may follow.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${TEACHER:=openai/whisper-large-v2}"
: "${STUDENT_INIT:=outputs/local/distil-large-v2-init}"
: "${STUDENT:=outputs/local/distil-large-v2-zh}"
: "${TRAIN_FILE:=datasets/train.json}"
: "${EVAL_FILE:=datasets/dev.json}"
: "${TEXT_COLUMN:=sentence}"
: "${LANGUAGE_CODE:=zh}"
: "${BATCH_SIZE:=64}"
: "${WORKERS:=16}"
: "${MAX_STEPS:=5000}"
: "${EVAL_STEPS:=1000}"
: "${DTYPE:=bfloat16}"

python create_student_model.py --teacher_checkpoint "$TEACHER" --decoder_layers 2 --save_dir "$STUDENT_INIT"

accelerate launch run_distillation.py \
    --model_name_or_path "$STUDENT_INIT" \
    --teacher_model_name_or_path "$TEACHER" \
    --train_dataset_name "$TRAIN_FILE" \
    --train_split_name "train" \
    --text_column_name "$TEXT_COLUMN" \
    --eval_dataset_name "$EVAL_FILE" \
    --eval_split_name "test" \
    --eval_text_column_name "$TEXT_COLUMN" \
    --eval_steps "$EVAL_STEPS" \
    --save_steps "$EVAL_STEPS" \
    --warmup_steps 50 \
    --learning_rate 0.0001 \
    --lr_scheduler_type "constant_with_warmup" \
    --logging_steps 25 \
    --save_total_limit 1 \
    --max_steps "$MAX_STEPS" \
    --per_device_train_batch_size "$BATCH_SIZE" \
    --per_device_eval_batch_size "$BATCH_SIZE" \
    --dataloader_num_workers "$WORKERS" \
    --preprocessing_num_workers "$WORKERS" \
    --ddp_timeout 7200 \
    --dtype "$DTYPE" \
    --language "$LANGUAGE_CODE" \
    --output_dir "$STUDENT" \
    --do_train \
    --do_eval \
    --gradient_checkpointing \
    --predict_with_generate \
    --freeze_encoder \
    --streaming False \
    "$@"
