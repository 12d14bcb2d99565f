#!/usr/bin/env bash
# Stage 4: WER on long recordings, in chunks. There is no long Hindi set at hand, so this measures the teacher on English
# talks. More flags may follow; --chunk_length_s None is the sequential algorithm.
source "$(dirname "$0")/settings.sh"

python run_long_form_eval.py \
    --model_name_or_path "$TEACHER" \
    --dataset_name "$LONG_DATASET" \
    --dataset_split_name "$LONG_SPLIT" \
    --text_column_name "text" \
    --output_dir "$EVALUATION/long_form" \
    --per_device_eval_batch_size "$BATCH_SIZE" \
    --chunk_length_s "$CHUNK_LENGTH_S" \
    --language "$LONG_LANGUAGE_CODE" \
    --return_timestamps \
    --dtype "$DTYPE" \
    --report_to "$REPORT_TO" \
    --streaming \
    "$@"
