#!/usr/bin/env bash
# Common Voice as its archive holds it (train.tsv, dev.tsv, test.tsv, clips/) as a folder with the splits train, validation
# and test. The clips are linked, not copied:
#   bash scripts/hindi/0_common_voice.sh cv-corpus/hi
archive=$(realpath "${1:?give the unpacked folder of a language, which holds train.tsv and clips}")
source "$(dirname "$0")/settings.sh"

mkdir -p "$DATASET"
ln -sfn "$archive/clips" "$DATASET/clips"
for split in train:train dev:validation test:test; do
    # A column audio before the others: where the clip is, seen from the folder.
    awk -F'\t' -v OFS='\t' '
        NR == 1 { for (i = 1; i <= NF; i++) if ($i == "path") path = i; print "audio", $0; next }
        { print "clips/" $path, $0 }
    ' "$archive/${split%:*}.tsv" > "$DATASET/${split#*:}.tsv"
    echo "$DATASET/${split#*:}.tsv: $(($(wc -l < "$DATASET/${split#*:}.tsv") - 1)) rows"
done
