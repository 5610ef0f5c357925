#!/usr/bin/env bash
# Everything that wants a GPU, unattended, in stages of under ten minutes each.
#   benchmarks/gpu/run_all.sh OUT [STAGE...]      all stages, or those named; OUT gets logs, results and environment.txt
# Every stage stands for itself: one that fails or runs out of time is noted in OUT/stages.txt and the next begins.
# PYTHON is the interpreter (python3). All together take about an hour. OUT.tar.gz has everything in one file.
set -uo pipefail
out=$(realpath -m "${1:?usage: $0 OUT [STAGE...]}")
shift
cd "$(dirname "$0")/../.." || exit 1
python=${PYTHON:-python3}
limit=${LIMIT_SECONDS:-570}
# A stage that is cut off has said what it did, and memory that one side gives back serves another.
export PYTHONUNBUFFERED=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
side_by_side=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 4")
mkdir -p "$out"

declare -A command=(
  [tests]="env NEMO_PRE_TEST_PLATFORM=gpu $python -m pytest -v --tb=short --durations=0 $side_by_side tests/gpu"
  [kernels]="$python -m benchmarks.mixed_attention && $python -m benchmarks.losses --compile --images 64 && $python -m benchmarks.teacher_update"
  [pre]="$python -m benchmarks.pre_overhead --model llava15_7b --layers 8 --precision bf16 --micro-batch-size 4 --blocks 4"
  [laver]="$python -m benchmarks.laver_overhead --model llava15_7b --layers 4 --precision bf16 --micro-batch-size 2 --blocks 4"
  [parts]="$python -m benchmarks.step_anatomy parts --model llava15_7b --layers 2 --precision bf16 --micro-batch-size 4 --blocks 4"
  [spatial]="$python -m benchmarks.step_anatomy spatial --model llava15_7b --layers 2 --precision bf16 --micro-batch-size 4 --blocks 4"
  [shares]="$python -m benchmarks.step_shares --model llava15_7b --layers 2 --precision bf16 --micro-batch-size 4 --blocks 4"
  [precision]="$python -m benchmarks.step_anatomy precision --model llava15_7b --layers 4 --micro-batch-size 2 --blocks 4"
  [convergence]="{ [ -d data/digits ] || $python -m nemo_pre.cli data demo; } && $python -m benchmarks.fp8_convergence --steps 200"
  [peers]="$python -m benchmarks.hf_peer --model llava15_7b --layers 4 --precision bf16 --micro-batch-size 4 --blocks 4"
  [memory]="$python -m benchmarks.planned_memory"
)
order=(kernels pre tests precision laver parts spatial shares memory peers convergence)
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
# Without Transformer Engine's layers a run would be another one, and say nothing.
"$python" -c 'import torch
if torch.cuda.is_available():
    import transformer_engine.pytorch as te
    te.Linear(64, 64).cuda()(torch.ones(16, 64, device="cuda")).sum().backward()
    torch.cuda.synchronize()
    print("Transformer Engine computes")' >> "$out/environment.txt" 2>&1 || { tail -n 5 "$out/environment.txt" >&2; exit 3; }

started=$(mktemp)
for stage in "${stages[@]}"; do
  begin=$SECONDS
  timeout --kill-after=15 "$limit" bash -c "${command[$stage]}" > "$out/$stage.log" 2>&1
  code=$?
  printf '%s %s: exit code %s after %s s\n' "$(date -u +%T)" "$stage" "$code" $((SECONDS - begin)) | tee -a "$out/stages.txt"
  find benchmarks/results -name '*.json' -newer "$started" -exec cp {} "$out/" \;
done
rm -f "$started"
tar -C "$(dirname "$out")" -czf "$out.tar.gz" "$(basename "$out")" # one file to carry away
