#!/usr/bin/env bash
# Everything that wants a GPU, unattended, in stages of under ten minutes each.
#   benchmarks/gpu/run_all.sh OUT [STAGE...]      all stages, or those named; OUT gets logs, results and environment.txt
# Every stage stands for itself: one that fails or runs out of time is noted in OUT/stages.txt and the next begins.
# PYTHON is the interpreter (python3). Needs a prepared data/digits for convergence: nemo-pre data demo.
set -uo pipefail
out=$(realpath -m "${1:?usage: $0 OUT [STAGE...]}")
shift
cd "$(dirname "$0")/../.." || exit 1
python=${PYTHON:-python3}
limit=${LIMIT_SECONDS:-570}
mkdir -p "$out"

declare -A command=(
  [tests]="env NEMO_PRE_TEST_PLATFORM=gpu $python -m pytest -q tests/gpu"
  [kernels]="$python -m benchmarks.mixed_attention && $python -m benchmarks.losses --compile && $python -m benchmarks.teacher_update"
  [pre]="$python -m benchmarks.pre_overhead --model llava15_7b --layers 8 --precision bf16 --micro-batch-size 4"
  [laver]="$python -m benchmarks.laver_overhead --model siglip2_qwen25_7b --layers 4 --precision bf16 --micro-batch-size 2"
  [parts]="$python -m benchmarks.step_anatomy parts --model llava15_7b --layers 2 --precision bf16 --micro-batch-size 4"
  [shares]="$python -m benchmarks.step_shares --model llava15_7b --layers 2 --precision bf16 --micro-batch-size 4 --blocks 4"
  [precision]="$python -m benchmarks.step_anatomy precision --model llava15_7b --layers 4 --micro-batch-size 4"
  [convergence]="$python -m benchmarks.fp8_convergence --steps 200"
  [peers]="$python -m benchmarks.hf_peer --model llava15_7b --layers 4 --precision bf16 --micro-batch-size 4"
  [memory]="$python -m benchmarks.planned_memory"
)
order=(tests kernels pre laver parts shares precision convergence peers memory)
stages=("$@")
((${#stages[@]})) || stages=("${order[@]}")
for stage in "${stages[@]}"; do
  [ -n "${command[$stage]:-}" ] || { echo "$stage is not a stage: choose from ${order[*]}." >&2; exit 2; }
done

{
  date -u +%FT%TZ
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv 2>&1
  "$python" - <<'PY'
import importlib.metadata as metadata
import platform

print("python", platform.python_version())
for name in ("torch", "transformer-engine", "megatron-core", "nemo_toolkit", "transformers", "lightning"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "not installed")
PY
  git log -1 --format='commit %H' 2>/dev/null
} > "$out/environment.txt"

started=$(mktemp)
for stage in "${stages[@]}"; do
  begin=$SECONDS
  timeout --kill-after=15 "$limit" bash -c "${command[$stage]}" > "$out/$stage.log" 2>&1
  code=$?
  printf '%s %s: exit code %s after %s s\n' "$(date -u +%T)" "$stage" "$code" $((SECONDS - begin)) | tee -a "$out/stages.txt"
  find benchmarks/results -name '*.json' -newer "$started" -exec cp {} "$out/" \;
done
rm -f "$started"
