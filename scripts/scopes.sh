#!/usr/bin/env bash
# The runs behind results/measurements/scope.md. They go on where they were stopped; tasks of short inputs come first:
#   DART_EVAL=dart-eval scripts/scopes.sh MODEL DATA OUTPUT
set -u
model=$1 data=$2 output=$3
tool=${DART_EVAL:-dart-eval}

cells() { # TASKS SCOPE METHODS
  $tool run --model "$model" --data-dir "$data" --dtype bfloat16 --output "$output" --tasks "$1" --limit 100 --sparsity 0.5 \
    --scope "$2" --method "$3" && return
  local status=$?
  [ "$status" -ge 128 ] && exit "$status" # Ctrl-C
  echo "ended with status $status: $*" >&2
}

for tasks in arc_easy,winogrande,openbookqa,piqa,arc_challenge boolq hellaswag; do
  cells $tasks scored dense,griffin,dart-plus
  for scope in last last-50 all continuation last-99; do cells $tasks $scope griffin,dart-plus; done
  for scope in scored last last-50 all continuation last-99; do cells $tasks $scope teal,m-countdown; done
  cells $tasks decode griffin,dart-plus,teal,m-countdown
done
