#!/usr/bin/env bash
# What a GPU shows of this project in one call of less than eight minutes, on a machine without a network.
#   PACKS=FOLDER benchmarks/gpu/first_contact.sh OUT [--on-cpu] [--deadline SECONDS] [--only STEP,STEP]
# PACKS holds *.tar.xz and *.whl that go onto PYTHONPATH, each into a folder of its own; without it python3 has it all.
# OUT gets summary.txt (one screen), results.jsonl and steps.log, from the first second on. PYTHON: the interpreter.
set -uo pipefail
began=$(date +%s.%N)
out=$(realpath -m "${1:?usage: PACKS=FOLDER $0 OUT [--on-cpu] [--deadline SECONDS] [--only STEP,STEP]}")
shift
packs=${PACKS:+$(realpath "$PACKS")} || exit 2
cd "$(dirname "$0")/../.." || exit 1
python=${PYTHON:-python3}
# Byte code halves the time NeMo takes to import, and its twelve processes share it.
unset PYTHONDONTWRITEBYTECODE
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m benchmarks.gpu.first_contact "$out" --began "$began" ${packs:+--packs "$packs"} "$@"
