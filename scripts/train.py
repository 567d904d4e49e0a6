"""torchrun --nproc_per_node 1 scripts/train.py --dataset_config_file data.yaml --model_path hf/BAGEL-7B-MoT --lr 2e-5

The same start as ``echo4o train``, under the name and with the flags of upstream's training script.
"""

import sys

from echo4o.cli import run_training

if __name__ == "__main__":
    sys.exit(run_training(sys.argv[1:]))
