#!/usr/bin/env bash
# Any of the project's commands on Slurm, with a Ray cluster of its own on the allocated nodes.
#
#   sbatch cluster/deploy/slurm.sh python -m pipeline prepare --source digits --output /shared/digits --address auto
#   sbatch --nodes 2 --gpus-per-node 2 cluster/deploy/slurm.sh python -m cluster.training.ray_train --replicas 2 -- \
#       python -m trainer train --config configs/paper.toml --data /shared/imagenet --run /shared/runs/paper --resume auto
#
# Slurm's state and exit code are the command's own; job-result-JOBID.json beside Slurm's log says how it ended.
# Two minutes before the time limit the command is asked to save; to do so earlier: scancel --batch --signal=TERM JOBID
# Nodes are not shared: `ray symmetric-run` starts only where no Ray runs, and ends every Ray process of yours there.
#SBATCH --job-name=twotower
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --output=twotower-%j.log
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "error: no command; expected: sbatch cluster/deploy/slurm.sh python -m pipeline prepare ..." >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-$PWD}"
export PATH="$PWD/.venv/bin:$PATH"

# A token of this job, readable for its owner only, outside of the tree, on a file system that all nodes see: HOME, or
# the folder that TWOTOWER_PRIVATE names.
umask 077
private="${TWOTOWER_PRIVATE:-$HOME/.ray}/twotower-slurm-$SLURM_JOB_ID"
rm -rf "$private"   # of an attempt before a requeue
mkdir -p "${private%/*}"
mkdir "$private"    # not one that somebody else has made meanwhile
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$private/token"
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
export TWOTOWER_RESULT="$PWD/job-result-$SLURM_JOB_ID.json" TWOTOWER_PID="$PWD/.job-pid-$SLURM_JOB_ID"
trap 'rm -rf "$private"; rm -f "$TWOTOWER_PID"' EXIT
rm -f "$TWOTOWER_RESULT" "$TWOTOWER_PID"   # of an attempt before a requeue

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${hosts%%$'\n'*}   # this script runs there, too
port=$((20000 + SLURM_JOB_ID % 10000))

# One `ray symmetric-run` a node: the first becomes the head and runs the command, the others wait for its end.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=1 \
    ray symmetric-run --address "$head_node:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --disable-usage-stats \
    -- python -m cluster.jobs.entry -- "$@" &
step=$!

# Only the command is asked to stop: a signal to all would end Ray before the command has saved.
stopping=
# shellcheck disable=SC2329  # the trap calls it
stop() {
    stopping=yes
    if [ -e "$TWOTOWER_PID" ]; then kill -TERM "$(cat "$TWOTOWER_PID")" || true; fi
}
trap stop TERM
status=0
wait "$step" || status=$?
if [ -n "$stopping" ]; then   # the signal ended `wait`, not the step
    status=0
    wait "$step" || status=$?
fi
if [ "$status" -eq 0 ] && [ ! -e "$TWOTOWER_PID" ]; then   # symmetric-run exits 0 when Ray does not start
    echo "error: the command did not run: Ray did not start, see above" >&2
    status=70
fi
exit "$status"
