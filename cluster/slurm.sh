#!/usr/bin/env bash
# Any of the project's commands on Slurm, with a Ray cluster of its own on the allocated nodes.
#
#   sbatch cluster/slurm.sh python -m pipeline prepare --source digits --output /shared/digits --address auto
#   sbatch --nodes 2 --gpus-per-node 2 cluster/slurm.sh python -m cluster.training --replicas 2 -- \
#       python -m trainer train --config configs/paper.toml --data /shared/imagenet --run /shared/runs/paper --resume auto
#
# Slurm's state and exit code are the command's own; job-result-JOBID.json beside Slurm's log says how it ended.
#SBATCH --job-name=twotower
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=twotower-%j.log
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "error: no command; expected: sbatch cluster/slurm.sh python -m pipeline prepare ..." >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-$PWD}"
export PATH="$PWD/.venv/bin:$PATH"

# A token of this job, readable for its owner only, on the file system that all nodes see.
umask 077
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

export TWOTOWER_RESULT="$PWD/job-result-$SLURM_JOB_ID.json"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${hosts%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 10000))   # two jobs may share a node

# One `ray symmetric-run` a node: the first becomes the head and runs the command, the others wait for its end.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=1 \
    ray symmetric-run --address "$head_node:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --disable-usage-stats \
    -- python -m cluster.entry -- "$@"
