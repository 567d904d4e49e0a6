#!/usr/bin/env bash
# NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a ./scripts/launch/torchrun_multi_node.sh configs/run.yaml [--flag value ...]
# Run the same command on every node, each with its own NODE_RANK. One node needs no variables at all.
#
# SIGTERM or SIGUSR1 to this script (pre-emption) goes to the training processes, not to torchrun: they finish their
# step, save and exit 0, and so does this script. Failures exit 1 after MAX_RESTARTS restarts.
set -euo pipefail

REPOSITORY=${REPOSITORY:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
PYTHON=${PYTHON:-python}
NNODES=${NNODES:-1}             # a number, or MIN:MAX for elastic runs
NODE_RANK=${NODE_RANK:-0}       # 0 on the node of MASTER_ADDR, which holds the rendezvous
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29400}
GPUS_PER_NODE=${GPUS_PER_NODE:-gpu} # gpu: all of this node; or a number
RUN_ID=${RUN_ID:-echo4o}        # the same on all nodes
MAX_RESTARTS=${MAX_RESTARTS:-3} # a restart continues from the newest checkpoint
STOP_GRACE=${STOP_GRACE:-600}   # seconds that saving after a stop signal may take
STOPPED_FILE=${STOPPED_FILE:-}  # stopped.json of results_dir: if it is there at the end, exit 75 instead of 0

cd "$REPOSITORY"
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # lost connections are told by the training itself

is_host=false
[[ $NODE_RANK == 0 ]] && is_host=true

# In a session of its own: a scheduler that signals the whole process group would make torchrun kill the training.
setsid "$PYTHON" -m torch.distributed.run \
    --nnodes "$NNODES" --nproc-per-node "$GPUS_PER_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$RUN_ID" \
    --rdzv-conf "is_host=$is_host,join_timeout=1800" \
    --max-restarts "$MAX_RESTARTS" --shutdown-timeout "$((STOP_GRACE + 30))" \
    scripts/train.py "$@" --auto_resume True --stop_grace "$STOP_GRACE" &
torchrun=$!

to_the_ranks() {
    kill -s "$1" $(cat /proc/"$torchrun"/task/*/children) 2>/dev/null || true
}
trap 'to_the_ranks USR1' TERM USR1
trap 'to_the_ranks INT' INT

# `wait` returns at every signal too; bash keeps the status of a child that has ended.
while kill -0 "$torchrun" 2>/dev/null; do
    wait "$torchrun" || true
done
status=0
wait "$torchrun" || status=$?
if [[ $status == 0 && -n $STOPPED_FILE && -e $STOPPED_FILE ]]; then
    exit 75 # stopped, not finished
fi
exit "$status"
