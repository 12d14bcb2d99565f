#!/usr/bin/env bash
# Stage 4: WER in distribution (Common Voice) and out of it (FLEURS). More flags may follow, such as
# --model_name_or_path for another model than the student.
source "$(dirname "$0")/settings.sh"

accelerate launch run_short_form_eval.py \
    --model_name_or_path "$STUDENT" \
    --dataset_name "$LABELLED+$OOD_DATASET" \
    --dataset_config_name "$DATASET_CONFIG+$OOD_CONFIG" \
    --dataset_split_name "test+test" \
    --text_column_name "$TEXT_COLUMN+$OOD_TEXT_COLUMN" \
    --output_dir "$EVALUATION/short_form" \
    --per_device_eval_batch_size "$BATCH_SIZE" \
    --dtype "$DTYPE" \
    --dataloader_num_workers "$WORKERS" \
    --report_to "$REPORT_TO" \
    --generation_max_length 128 \
    --language "$LANGUAGE_CODE" \
    --attn_type "flash_attn" \
    --streaming \
    "$@"
