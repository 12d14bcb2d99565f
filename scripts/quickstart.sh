#!/usr/bin/env bash
# The whole pipeline on a fresh machine, no GPU and no download of data or models: speech is synthesised, a toy teacher is
# trained from scratch on it, labels it, is distilled into a student, and both are evaluated. Finished stages are kept:
# a second run reuses them.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore

out=outputs/quickstart
mkdir -p "$out/finished" "$out/seconds"

# Figures of stages that different scripts ran do not belong in one table.
version=$(cat scripts/quickstart* scripts/speech.py scripts/toy_whisper.py | cksum)
if [ -n "$(ls "$out/finished")" ] && [ "$(cat "$out/version" 2>/dev/null)" != "$version" ]; then
    echo "$out was made by another version of the quickstart: remove that folder (rm -r $out) to run this one" >&2
    exit 1
fi
echo "$version" > "$out/version"

# stage NAME COMMAND...: run the command unless it was finished before, and keep the seconds that it took; those before
# an error or Ctrl-C count too
stage() {
    local name=$1 seconds
    shift
    if [ -e "$out/finished/$name" ]; then
        echo "== $name: finished before, in $(cat "$out/finished/$name") s"
        return
    fi
    echo "== $name"
    SECONDS=$(cat "$out/seconds/$name" 2>/dev/null || echo 0)
    trap "echo \"\$SECONDS\" > '$out/seconds/$name'" EXIT  # the name is not known any more when it is run
    "$@"
    trap - EXIT
    seconds=$SECONDS
    rm -f "$out/seconds/$name"
    echo "$seconds" > "$out/finished/$name"
    echo "== $name took $seconds s"
}

common=(--language en --report_to none)
# What a person would answer to accelerate config; by itself it gives a process one thread.
launch=(accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
    --num_cpu_threads_per_process "$(python -c 'import os; print(os.cpu_count())')")
train=("${launch[@]}" run_distillation.py "${common[@]}" --do_train --adam_beta2 0.98 --warmup_steps 50 --logging_steps 100 --save_steps 500
    --save_total_limit 1 --per_device_train_batch_size 12 --per_device_eval_batch_size 50)
augment=(--noise_probability 0.5 --noise_snr_db 5 25 --speed_perturbation 0.9 1.1)

stage data python scripts/quickstart_data.py --data_dir "$out/data" --model_dir "$out/teacher_init"

stage teacher "${train[@]}" --model_name_or_path "$out/teacher_init" --kl_weight 0 \
    --train_dataset_name "$out/data" --train_dataset_config_name windows \
    --timestamp_probability 0.5 --condition_on_prev_probability 0.1 "${augment[@]}" \
    --learning_rate 2e-3 --max_steps 4000 --output_dir "$out/teacher"

stage labelled "${launch[@]}" run_pseudo_labelling.py "${common[@]}" --model_name_or_path "$out/teacher" --dataset_name "$out/data" \
    --concatenate_audio --recording_id_column_name recording --id_column_name id --speaker_id_column_name speaker \
    --return_timestamps --max_label_length 64 --per_device_eval_batch_size 32 --output_dir "$out/labelled"

stage student_init python create_student_model.py --teacher_checkpoint "$out/teacher" --decoder_layers 2 \
    --save_dir "$out/student_init"

distil=(--model_name_or_path "$out/student_init" --train_dataset_name "$out/labelled" --freeze_encoder
    --eval_dataset_name "$out/data" --eval_dataset_config_name default --eval_split_name test --do_eval
    --predict_with_generate --generation_max_length 32 --learning_rate 1e-3 --max_steps 2400 "${augment[@]}")

stage student "${train[@]}" "${distil[@]}" --teacher_model_name_or_path "$out/teacher" --wer_threshold 20 \
    --timestamp_probability 0.5 --condition_on_prev_probability 0.1 --output_dir "$out/student"

stage student_without_distillation "${train[@]}" "${distil[@]}" --kl_weight 0 --use_pseudo_labels False \
    --output_dir "$out/student_without_distillation"

for model in teacher student student_without_distillation; do
    evaluate=("${common[@]}" --model_name_or_path "$out/$model" --dataset_name "$out/data"
        --dataset_config_name default --per_device_eval_batch_size 32)
    stage "eval_short_$model" python run_short_form_eval.py "${evaluate[@]}" --dataset_split_name test+test_ood \
        --generation_max_length 32 --output_dir "$out/eval/$model/short"
    stage "eval_chunked_$model" python run_long_form_eval.py "${evaluate[@]}" --dataset_split_name long \
        --chunk_length_s 4 --return_timestamps --output_dir "$out/eval/$model/long_chunked"
    stage "eval_sequential_$model" python run_long_form_eval.py "${evaluate[@]}" --dataset_split_name long \
        --return_timestamps --output_dir "$out/eval/$model/long_sequential"
done

python scripts/quickstart_summary.py "$out"
