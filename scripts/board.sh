#!/usr/bin/env bash
# The runs behind results/board.md: a grid that was fixed before its first cell, and what reviewers asked for since
# (beside). Run again, it goes on where it stopped.
#   DART_EVAL=dart-eval WORKERS=1 scripts/board.sh MODEL DATA OUTPUT [demo|second|third|beside|speed]
# A method that is beyond 3x dense's perplexity after a switch of topic at one read is not run at a lower one.
set -u
model=$1 data=$2 output=$3 grid=${4:-demo}
tool=${DART_EVAL:-dart-eval}

one() { # COMMAND OPTIONS
  $tool "$@" && return
  local status=$?
  [ "$status" -ge 128 ] && exit "$status" # Ctrl-C
  echo "ended with status $status: $*" >&2
}
cells() { # TASKS LIMIT OTHER-OPTIONS: one run
  local tasks=$1 limit=$2
  shift 2
  one run --model "$model" --data-dir "$data" --dtype bfloat16 --output "$output" --workers "${WORKERS:-1}" \
    --tasks "$tasks" --limit "$limit" "$@"
}

drift="drift_xsum,drift_cnn_dailymail"
choice="arc_easy,arc_challenge,boolq,winogrande,openbookqa,rte,hellaswag"

demo() { # TASKS LIMIT
  cells "$1" "$2" --method dense,noise
  cells "$1" "$2" --method grinqh,graded-both --sparsity 0.5,0.7,0.84,0.9
  cells "$1" "$2" --method dense --ffn-bits 8:128,q4_k,q4_k+imatrix,gptq4:32,gptq4:32+down5:128,gptq3:32,gptq2:32
  cells "$1" "$2" --method griffin,dart,dart-code,cats,m-countdown,flap,wanda-sp,static,magnitude,random --sparsity 0.5
  cells "$1" "$2" --method teal,wina,teal:allocation=greedy,wina:allocation=greedy,larosa,rsparse --sparsity 0.5,0.7
  cells "$1" "$2" --method griffin,dart --sparsity 0.7 # beyond 3x at 50 %, but these are the paper's own reads
  cells "$1" "$2" --method oracle-token --sparsity 0.5,0.7
  cells "$1" "$2" --method decdec --sparsity 0.7
  cells "$1" "$2" --method rounding
  cells "$1" "$2" --method dense --ffn-bits 4,gptq4:128,3,q3_k+imatrix,6:128
}
second() { # TASKS LIMIT OTHER-OPTIONS
  cells "$@" --method dense,noise
  cells "$@" --method grinqh,graded-both --sparsity 0.7
  cells "$@" --method dense --ffn-bits 8:128,q4_k,gptq4:32+down5:128,gptq2:32
  cells "$@" --method griffin,dart,cats,teal --sparsity 0.5
  cells "$@" --method grinqh,graded-both --sparsity 0.5,0.84
  cells "$@" --method griffin,dart,teal --sparsity 0.7
}

case $grid in
  demo | second)
    $grid "$drift" 32
    $grid "$choice" 200
    $grid wikitext 8
    [ "$grid" = demo ] || $grid gsm8k_cot_zeroshot 128 --chat-template --batch-size 64 --gen-kwargs max_gen_toks=512
    ;;
  third)
    cells drift_xsum 32 --method dense,noise
    cells drift_xsum 32 --method grinqh,graded-both,dart --sparsity 0.7
    cells drift_xsum 32 --method dense --ffn-bits gptq4:32+down5:128,q4_k+imatrix,q4_k
    cells drift_xsum 32 --method grinqh,graded-both --sparsity 0.84
    ;;
  beside) # grinqh in as many lines of memory as graded-both, calibrated rounding to more bits, the same texts unswitched
    cells "$drift" 32 --method grinqh --sparsity 0.63,0.78
    cells "$drift" 32 --method dart:remask=never,oracle --sparsity 0.5
    cells "$drift" 32 --method dense --ffn-bits q4_k+imatrix,gptq3:32,q5_k+imatrix,gptq5:32+down6:128,gptq6:128,6:128,4:128
    drift="drift_xsum_same,drift_cnn_dailymail_same"
    cells "$drift" 32 --method dense,noise
    cells "$drift" 32 --method griffin,dart,dart:remask=never,teal,oracle --sparsity 0.5
    cells "$drift" 32 --method grinqh,graded-both --sparsity 0.7
    cells "$drift" 32 --method dense --ffn-bits q4_k+imatrix
    ;;
  speed) # where a kernel makes bytes into time; the machine should have nothing else to do
    speeds() { # OPTIONS
      one bench decode --model "$model" --dtype bfloat16 --output "$output" --steps 12 --rounds 3 "$@"
    }
    speeds --sparsity 0.7 --method griffin,flap,grinqh,dart,static,oracle-token
    speeds --sparsity 0.5 --method griffin,grinqh,cats,m-countdown,teal,wina --ffn-bits 8:128,q4_k,4,3,2
    speeds --sparsity 0.84 --method grinqh
    speeds --sparsity 0.9 --method grinqh
    ;;
  *) echo "no grid $grid: demo, second, third, beside or speed" >&2 && exit 2 ;;
esac
