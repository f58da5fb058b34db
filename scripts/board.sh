#!/usr/bin/env bash
# The runs behind results/board.md. It goes on where it was stopped, and its order makes the board useful at every moment:
#   DART_EVAL=dart-eval scripts/board.sh MODEL DATA OUTPUT [FIRST-STEP]
set -u
model=$1 data=$2 output=$3 first=${4:-1}
tool=${DART_EVAL:-dart-eval}

step=0
one() { # COMMAND OPTIONS: the next step
  step=$((step + 1))
  [ "$step" -lt "$first" ] && return
  $tool "$@" || echo "step $step ended with status $?: $*" >&2
}
cells() { # TASKS LIMIT OTHER-OPTIONS: one run; what is finished is kept and skipped
  local tasks=$1 limit=$2
  shift 2
  one run --model "$model" --data-dir "$data" --dtype bfloat16 --output "$output" --tasks "$tasks" --limit "$limit" "$@"
}

drift="drift_xsum,drift_cnn_dailymail"
choice="arc_easy,arc_challenge,hellaswag,boolq,winogrande,openbookqa,rte"
summaries="xsum,cnn_dailymail"
everywhere() { # OPTIONS: on all tasks
  cells $drift 32 "$@"
  cells $choice 100 "$@"
  cells $summaries 40 "$@"
}

# What the goals ask for: .30 of the bytes, rounding alone, and .157 and .10 of the bytes.
for tasks in "$drift 32" "$choice 100" "$summaries 40" "wikitext 8"; do
  # shellcheck disable=SC2086
  set -- $tasks
  cells "$1" "$2" --method dense,griffin,dart-plus --sparsity 0.7
  cells "$1" "$2" --method dense --ffn-bits q4_k,4,3,2
  cells "$1" "$2" --method dart-plus --sparsity 0.843,0.9
  cells "$1" "$2" --method griffin,dart-plus --sparsity 0.5
  cells "$1" "$2" --method dense --ffn-bits 6,5
  cells "$1" "$2" --method griffin --ffn-bits 4 --sparsity 0.442
  cells "$1" "$2" --method dart-plus --sparsity 0.719
  cells "$1" "$2" --method rounding,rounding:entries.bits=5
done
# The rivals, those first that change something for each token.
everywhere --method dart-choice,dart,oracle-token --sparsity 0.7
everywhere --method preview,preview:image=copy --sparsity 0.7
everywhere --method cats,m-countdown,prox,pop,dart-choice,dart --sparsity 0.5
everywhere --method prox,pop,flap --sparsity 0.7
everywhere --method griffin --ffn-bits 4 --sparsity 0.5
everywhere --method griffin,pop --ffn-bits 4 --sparsity 0.644
everywhere --method griffin,cats,prox --sparsity 0.3
everywhere --method wanda-sp,static,glass,coreinfer,probe --sparsity 0.7,0.5
everywhere --method teal,wina --sparsity 0.7,0.5
everywhere --method wanda,wanda:entries.pattern=2:4 --sparsity 0.5
everywhere --method griffin:draw=sample,griffin:draw=sample:draw.best=0.5 --sparsity 0.5
everywhere --method magnitude,mag-sp --sparsity 0.7
everywhere --method dense --ffn-bits 8

# Speed, where a kernel makes bytes into time; the machine should have nothing else to do.
speeds() { # OPTIONS
  one bench decode --model "$model" --dtype bfloat16 --output "$output" --steps 12 --rounds 3 "$@"
}
speeds --sparsity 0.7 --method griffin,prox,pop,flap,dart-plus,dart,dart-choice,static,wanda-sp,glass,coreinfer,oracle-token
speeds --sparsity 0.7 --method preview,preview:image=copy,probe,magnitude,mag-sp
speeds --sparsity 0.3 --method griffin,prox
speeds --sparsity 0.719 --method dart-plus
speeds --sparsity 0.843 --method dart-plus
speeds --sparsity 0.9 --method dart-plus
# On rounded weights torch's packed product takes dense on 4 bits, and all else is counted. What these lines time again on
# 16-bit weights takes the place of what was timed before.
speeds --sparsity 0.442 --method griffin --ffn-bits 4
speeds --sparsity 0.644 --method griffin --ffn-bits 4
speeds --sparsity 0.5 --method griffin,prox,pop,cats,m-countdown,dart-plus,teal,wina,wanda,oracle-token --ffn-bits 8,4,3,2
