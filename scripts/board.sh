#!/usr/bin/env bash
# The runs behind results/board.md. It goes on where it was stopped, and its order makes the board useful at every moment:
#   DART_EVAL=dart-eval WORKERS=1 scripts/board.sh MODEL DATA OUTPUT [FIRST-STEP]
# A model that follows instructions may have GENERATE=1, for a long generation.
set -u
model=$1 data=$2 output=$3 first=${4:-1}
tool=${DART_EVAL:-dart-eval}

step=0
one() { # COMMAND OPTIONS: the next step
  step=$((step + 1))
  [ "$step" -lt "$first" ] && return
  $tool "$@" && return
  local status=$?
  [ "$status" -ge 128 ] && exit "$status" # Ctrl-C
  echo "step $step ended with status $status: $*" >&2
}
cells() { # TASKS LIMIT OTHER-OPTIONS: one run; what is finished is kept and skipped
  local tasks=$1 limit=$2
  shift 2
  one run --model "$model" --data-dir "$data" --dtype bfloat16 --output "$output" --workers "${WORKERS:-1}" \
    --tasks "$tasks" --limit "$limit" "$@"
}

drift="drift_xsum,drift_cnn_dailymail"
choice="arc_easy,arc_challenge,boolq,winogrande,openbookqa,rte,hellaswag"
graded="grinqh,graded-both"

# .30 and .16 of the bytes and rounding, then .50 and .10: what each method claims for itself.
first() { # TASKS LIMIT
  cells "$1" "$2" --method dense,griffin,dart --sparsity 0.7
  cells "$1" "$2" --method dense --ffn-bits q4_k,4,3,4:128,8:128
  cells "$1" "$2" --method $graded --sparsity 0.843
  cells "$1" "$2" --method $graded --sparsity 0.7
}
second() { # TASKS LIMIT
  cells "$1" "$2" --method griffin,grinqh --sparsity 0.5
  cells "$1" "$2" --method dense --ffn-bits 5,6,2,8,6:128,5:128
  cells "$1" "$2" --method $graded --sparsity 0.9
  cells "$1" "$2" --method griffin --ffn-bits 4 --sparsity 0.442
}
# All rivals at .30 and .50, those first that choose for each token.
rivals() { # TASKS LIMIT
  cells "$1" "$2" --method oracle-token --sparsity 0.7,0.5
  cells "$1" "$2" --method cats,m-countdown,teal,wina --sparsity 0.5
  cells "$1" "$2" --method decdec --sparsity 0.7
  cells "$1" "$2" --method teal --ffn-bits 4 --sparsity 0.5
  cells "$1" "$2" --method dart,flap --sparsity 0.7,0.5
  cells "$1" "$2" --method wanda-sp,static --sparsity 0.7,0.5
  cells "$1" "$2" --method rounding,rounding:entries.bits=5
  cells "$1" "$2" --method griffin,cats --sparsity 0.3
  cells "$1" "$2" --method griffin:draw=sample,griffin:draw=sample:draw.best=0.5 --sparsity 0.5
  cells "$1" "$2" --method magnitude --sparsity 0.7
}

first "$drift" 32
second "$drift" 32
first "$choice" 200
rivals "$drift" 32
second "$choice" 200
for tasks in "wikitext 8" "medmcqa 200" "mmlu 4" "xsum,cnn_dailymail 40"; do
  # shellcheck disable=SC2086
  set -- $tasks
  first "$1" "$2"
  second "$1" "$2"
done
[ "${GENERATE:-0}" = 0 ] ||
  cells gsm8k 64 --chat-template --method dense,grinqh,griffin --sparsity 0.7,0.5
rivals "$choice" 200

# Speed, where a kernel makes bytes into time; the machine should have nothing else to do.
speeds() { # OPTIONS
  one bench decode --model "$model" --dtype bfloat16 --output "$output" --steps 12 --rounds 3 "$@"
}
speeds --sparsity 0.7 --method griffin,flap,grinqh,dart,static,oracle-token
speeds --sparsity 0.5 --method griffin,grinqh,cats,m-countdown,teal,wina --ffn-bits 8,4,3,2
speeds --sparsity 0.843 --method grinqh
speeds --sparsity 0.9 --method grinqh
speeds --sparsity 0.442 --method griffin --ffn-bits 4
