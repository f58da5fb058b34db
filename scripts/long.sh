#!/usr/bin/env bash
# The runs behind results/long.md: what a detector does, and what pruning costs, over hundreds of new tokens. It wants a model with
# a chat template, goes on where it was stopped, and runs a method on both tasks before the next one:
#   DART_EVAL=dart-eval scripts/long.sh MODEL DATA OUTPUT [LIMIT]
#   dart-eval tables OUTPUT --view detector
set -u
model=$1 data=$2 output=$3 limit=${4:-32}
tool=${DART_EVAL:-dart-eval}
ask="Summarise the article above in a long and detailed report of at least 300 words, in several paragraphs."

cells() { # OPTIONS: one run; what is finished is kept and skipped
  $tool run --model "$model" --data-dir "$data" --dtype bfloat16 --output "$output" --batch-size 16 --chat-template \
    --sparsity 0.5 "$@" && return
  local status=$?
  [ "$status" -ge 128 ] && exit "$status" # Ctrl-C
  echo "ended with status $status: $*" >&2
}

both() { # METHODS
  cells --method "$1" --tasks gsm8k_cot_zeroshot --limit "$limit" --gen-kwargs max_gen_toks=512
  # Paragraphs end no answer here, as they do in the task's own settings.
  cells --method "$1" --tasks cnn_dailymail --limit "$(((limit + 1) / 2))" --cue "$ask" \
    --gen-kwargs "until=[],max_gen_toks=640"
}

both dense,dart
both griffin,dart-plus
both dart:remask=never
