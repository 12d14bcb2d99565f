#!/usr/bin/env bash
# Stage 3: the student learns the teacher's labels and predictions. More flags may follow, such as --push_to_hub.
# Training on train and validation together shows how datasets are combined; keep validation apart for tuning.
source "$(dirname "$0")/settings.sh"

accelerate launch run_distillation.py \
    --model_name_or_path "$STUDENT_INIT" \
    --teacher_model_name_or_path "$TEACHER" \
    --train_dataset_name "$LABELLED+$LABELLED" \
    --train_dataset_config_name "$DATASET_CONFIG+$DATASET_CONFIG" \
    --train_split_name "train+validation" \
    --text_column_name "$TEXT_COLUMN+$TEXT_COLUMN" \
    --train_dataset_samples "10+5" \
    --eval_dataset_name "$LABELLED" \
    --eval_dataset_config_name "$DATASET_CONFIG" \
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
    --wer_threshold 10 \
    --per_device_train_batch_size "$BATCH_SIZE" \
    --per_device_eval_batch_size "$BATCH_SIZE" \
    --dataloader_num_workers "$WORKERS" \
    --preprocessing_num_workers "$WORKERS" \
    --ddp_timeout 7200 \
    --dtype "$DTYPE" \
    --output_dir "$STUDENT" \
    --do_train \
    --do_eval \
    --gradient_checkpointing \
    --predict_with_generate \
    --freeze_encoder \
    --streaming False \
    --report_to "$REPORT_TO" \
    "$@"
