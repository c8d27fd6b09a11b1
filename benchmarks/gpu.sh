#!/usr/bin/env bash
# Every benchmark on one accelerator at the shapes of the 7B model. Usage: benchmarks/gpu.sh [BACKEND [FOLDER]]
# Tables go to the terminal, the same figures as JSON to FOLDER; run it from the repository's root.
set -euo pipefail

backend=${1:-auto}
folder=${2:-benchmark-results}
python=${PYTHON:-python}
mkdir -p "$folder"

run() {
    local name=$1
    shift
    echo "+ benchmarks/$name $*"
    "$python" "benchmarks/$name.py" --backend "$backend" --json "$folder/$name.json" "$@"
}

run peak --dtype float32 --dtype bfloat16
run moe_layer --dtype bfloat16 --rounds 20 --shape 4096/4096/4/2
run operations --config 7b_moe4
run train_step --dtype bfloat16 --rounds 10 --layers 2 --hidden 4096 --vocab 32000 --seq-len 2048
run finetune --shapes lite --sequence-parallel 1
run collectives --nproc "${NPROC:-1}"

# A slice of the 7B model: as many layers as fit. The log line's mfu counts both experts and causal attention.
"$python" -m portmoe train --backend "$backend" --config 7b_moe4 --set "run.directory=$folder/slice" \
    --set "model.num_layers=${LAYERS:-4}" --set data.total_steps=20 --set data.valid_every=0 \
    --set data.micro_num=8 --set "model.checkpoint=${CHECKPOINT:-false}"
