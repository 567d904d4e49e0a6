#!/usr/bin/env bash
# ./scripts/quickstart.sh [--flag value ...]: install, fine-tune a tiny BAGEL on multi-reference data, draw with it.
# Takes a few minutes on two CPU cores, needs no GPU and downloads no weights. Extra flags go to `echo4o train`.
#
# The tiny model in data_examples composes pictures from references, on English instructions. Here it learns German ones.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/install.sh

out=runs/quickstart
model=data_examples/tiny_bagel
rm -rf "$out" # a finished run of an earlier call would leave nothing to train
"$PYTHON" scripts/german_instructions.py --out "$out/data"

echo "== before: what the model draws from German instructions"
"$PYTHON" -m echo4o.cli generate "$model" --requests "$out/data/requests.jsonl" --out "$out/before"

echo "== training: configs/tiny_cpu.yaml"
"$PYTHON" -m echo4o.cli train configs/tiny_cpu.yaml --dataset_config_file "$out/data/dataset.yaml" \
    --eval_requests "$out/data/requests.jsonl" \
    --results_dir "$out/train" --checkpoint_dir "$out/train/checkpoints" "$@"

checkpoint=$out/train/checkpoints/latest
echo "== after: the same requests"
"$PYTHON" -m echo4o.cli generate "$checkpoint" --requests "$out/data/requests.jsonl" --out "$out/after"
"$PYTHON" scripts/german_instructions.py --out "$out/data" --sheet "$out/before_after.png" \
    --before "$out/before" --after "$out/after"
echo
echo "contact sheet   $out/before_after.png"
echo "on the way      $out/train/samples/index.html"
echo "checkpoint      $checkpoint"
echo "metrics         $out/train/metrics.jsonl"
echo "loss plot       $out/train/loss.png"
