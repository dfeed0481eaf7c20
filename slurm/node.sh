#!/usr/bin/env bash
# What srun starts once on each node (common.sh, `on_ranks`): torchrun with one rank for each GPU.
#
#     slurm/node.sh CODES TOOL [ARGUMENT ...]
#
# It does the two things that torchrun does not.  A USR2 reaches the ranks and not torchrun, which it would end.
# And the ranks' exit codes survive: torchrun replaces 2 and 75 by 1, so each rank leaves its own in a file
# (endprompt_megatron/common/errors.py).  CODES/node-N gets those of this node, in one line: 0 done, 75 stopped with a
# checkpoint, 2 input wrong, 1 cannot go on, 70 none left: killed, or ended by a traceback.
# 0 and 75 are orderly ends, for which srun must not kill the other nodes: it sees 0 for both, otherwise 1.
# Expects: PYTHON, NODES, PROCESSES_PER_NODE, MASTER_ADDR, MASTER_PORT, and Slurm's SLURM_NODEID, SLURM_JOB_ID.
# shellcheck disable=SC2329  # functions that traps call
set -euo pipefail
# Ignored here until torchrun runs, in torchrun for good, and in its ranks until they listen: Slurm's signals go
# to every process of a step.
trap '' USR2

codes="$1"
tool="$2"
shift 2
ENDPROMPT_EXIT_CODES="$(mktemp -d)"  # of this node's ranks, on its own disk
export ENDPROMPT_EXIT_CODES
trap 'rm -rf -- "$ENDPROMPT_EXIT_CODES"' EXIT

# The children of torchrun that are ranks.  Without pgrep, which not every image has.
ranks() {
    local pid
    for pid in $(awk -v parent="$agent" '/^PPid:/ && $2 == parent { split(FILENAME, part, "/"); print part[3] }' \
        /proc/[0-9]*/status 2>/dev/null || true); do
        # Just forked, a child is still torchrun itself.
        if grep -qsz '^LOCAL_RANK=' "/proc/$pid/environ"; then printf '%s\n' "$pid"; fi
    done
}

# Again and again: a signal that comes before a rank listens is lost, and one that comes twice does no harm.
forward() {
    trap - EXIT
    trap '' USR2
    local pid
    while kill -0 "$agent" 2>/dev/null; do
        for pid in $(ranks); do kill -USR2 "$pid" 2>/dev/null || true; done
        sleep 3
    done
}

interrupted=0 forwarder=""
stop() {
    interrupted=1
    if [ -n "$forwarder" ]; then return; fi
    forward &
    forwarder=$!
}

printf '%s: node %s of %s, restart %s, %s ranks\n' \
    "$(hostname)" "$SLURM_NODEID" "$NODES" "${SLURM_RESTART_COUNT:-0}" "$PROCESSES_PER_NODE"

# Static: node N has ranks N * PROCESSES_PER_NODE and on, in Slurm's order of nodes, after a restart too.
# No restarts: torchrun would start anew on the same nodes, of which one may be gone; that is Slurm's to do.
"$PYTHON" -m torch.distributed.run --nnodes "$NODES" --node-rank "$SLURM_NODEID" \
    --nproc-per-node "$PROCESSES_PER_NODE" --rdzv-backend static --rdzv-id "$SLURM_JOB_ID" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --max-restarts 0 "$tool" "$@" &
agent=$!
trap stop USR2
while :; do
    interrupted=0
    wait "$agent" || true
    if [ "$interrupted" = 0 ]; then break; fi
done
if [ -n "$forwarder" ]; then kill "$forwarder" 2>/dev/null || true; fi

left=() orderly=1
for ((rank = 0; rank < PROCESSES_PER_NODE; rank++)); do
    code=70
    if [ -s "$ENDPROMPT_EXIT_CODES/$rank" ]; then code="$(<"$ENDPROMPT_EXIT_CODES/$rank")"; fi
    left+=("$code")
    case "$code" in
        0 | 75) ;;
        70) orderly=0 && printf 'node %s: local rank %s left no exit code: killed, or ended by a traceback above\n' \
            "$SLURM_NODEID" "$rank" ;;
        *) orderly=0 ;;
    esac
done
printf '%s\n' "${left[*]}" >"$codes/node-$SLURM_NODEID"
if [ "$orderly" = 0 ]; then exit 1; fi
