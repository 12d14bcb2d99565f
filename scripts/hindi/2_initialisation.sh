#!/usr/bin/env bash
# Stage 2: a student of the teacher's whole encoder and of its first and last decoder layer. More flags may follow.
source "$(dirname "$0")/settings.sh"

python create_student_model.py \
    --teacher_checkpoint "$TEACHER" \
    --encoder_layers "$ENCODER_LAYERS" \
    --decoder_layers "$DECODER_LAYERS" \
    --save_dir "$STUDENT_INIT" \
    "$@"
