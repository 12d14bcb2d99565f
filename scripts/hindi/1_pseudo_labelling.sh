#!/usr/bin/env bash
# Stage 1: the teacher transcribes all splits. More flags may follow, such as --push_to_hub.
source "$(dirname "$0")/settings.sh"

accelerate launch run_pseudo_labelling.py \
    --model_name_or_path "$TEACHER" \
    --dataset_name "$DATASET" \
    --dataset_config_name "$DATASET_CONFIG" \
    --dataset_split_name "train+validation+test" \
    --text_column_name "$TEXT_COLUMN" \
    --id_column_name "$ID_COLUMN" \
    --output_dir "$LABELLED" \
    --wandb_project "distil-whisper-labelling" \
    --per_device_eval_batch_size "$BATCH_SIZE" \
    --dtype "$DTYPE" \
    --dataloader_num_workers "$WORKERS" \
    --preprocessing_num_workers "$WORKERS" \
    --logging_steps 500 \
    --max_label_length 128 \
    --report_to "$REPORT_TO" \
    --language "$LANGUAGE_CODE" \
    --task "transcribe" \
    --return_timestamps \
    --attn_type "flash_attn" \
    --streaming False \
    --generation_num_beams 1 \
    --decode_token_ids False \
    "$@"
