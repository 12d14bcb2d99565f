#!/usr/bin/env bash
# Stage 3 for little data: many epochs, heavy augmentation, the teacher asked anew about every variant ("a good teacher
# is patient and consistent", arXiv 2106.05237). Takes long: 40,000 steps unless MAX_STEPS says otherwise.
set -euo pipefail
export MAX_STEPS="${MAX_STEPS:-40000}" STUDENT="${STUDENT:-outputs/hindi/distil-whisper-large-v2-hi-patient}"
exec bash "$(dirname "$0")/3_training.sh" \
    --lr_scheduler_type linear \
    --warmup_steps 500 \
    --speed_perturbation 0.9 1.1 \
    --noise_probability 0.5 \
    --noise_snr_db 5 30 \
    --apply_spec_augment \
    --mask_time_prob 0.05 \
    --mask_feature_prob 0.05 \
    --group_by_length \
    "$@"
