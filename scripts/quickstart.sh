#!/usr/bin/env bash
# ./scripts/quickstart.sh [--flag value ...]: install, fine-tune a tiny BAGEL on multi-reference data, show the result.
# Takes a few minutes on two CPU cores, needs no GPU and downloads no weights. Extra flags go to `echo4o train`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh

out=runs/quickstart
model=$out/tiny_bagel
if [[ ! -f $model/llm_config.json ]]; then
    echo "== building a tiny BAGEL in $model"
    "$PYTHON" scripts/make_tiny_bagel.py --out "$model"
fi

# A finished run of an earlier call would leave nothing to train.
rm -rf "$out/train"
echo "== training: configs/tiny_cpu.yaml"
"$PYTHON" -m echo4o.cli train configs/tiny_cpu.yaml --init_from "$model" \
    --results_dir "$out/train" --checkpoint_dir "$out/train/checkpoints" "$@"

checkpoint=$(find "$out/train/checkpoints" -mindepth 1 -maxdepth 1 -type d -name '[0-9]*' | sort | tail -n 1)
echo
echo "checkpoint  $checkpoint"
echo "metrics     $out/train/metrics.jsonl"
echo "loss plot   $out/train/loss.png"
