# Sourced by the recipes beside it: names and sizes, each of which the environment overrides:
#   TEACHER=openai/whisper-tiny BATCH_SIZE=4 bash scripts/hindi/1_pseudo_labelling.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

: "${TEACHER:=openai/whisper-large-v2}"
: "${LANGUAGE_CODE:=hi}"
: "${DATASET:=outputs/hindi/common_voice_hi}" # as 0_common_voice.sh writes it, or a dataset on the Hub with these columns
: "${DATASET_CONFIG:=default}"
: "${TEXT_COLUMN:=sentence}"
: "${ID_COLUMN:=path}"

: "${OOD_DATASET:=google/fleurs}" # of another kind than what is trained on
: "${OOD_CONFIG:=hi_in}"
: "${OOD_TEXT_COLUMN:=transcription}"

: "${LONG_DATASET:=distil-whisper/tedlium-long-form}"
: "${LONG_SPLIT:=validation}"
: "${LONG_LANGUAGE_CODE:=en}"

# The names of these folders are also those of the repositories that --push_to_hub makes.
: "${LABELLED:=outputs/hindi/common_voice_hi_pseudo_labelled}"
: "${STUDENT_INIT:=outputs/hindi/distil-large-v2-init}"
: "${STUDENT:=outputs/hindi/distil-whisper-large-v2-hi}"
: "${EVALUATION:=outputs/hindi/evaluation}"

: "${BATCH_SIZE:=64}"
: "${WORKERS:=16}"
: "${MAX_STEPS:=5000}"
: "${EVAL_STEPS:=1000}"
: "${DTYPE:=bfloat16}"
: "${ENCODER_LAYERS:=32}"
: "${DECODER_LAYERS:=2}"
: "${CHUNK_LENGTH_S:=30}"
: "${REPORT_TO:=wandb}"
