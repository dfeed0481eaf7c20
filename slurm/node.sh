#!/usr/bin/env bash
# What srun starts once on each node (common.sh, `on_ranks`): torchrun with one rank for each GPU.
#
#     slurm/node.sh CODES TOOL [ARGUMENT ...]
#
# It does two things that torchrun does not.  It passes USR2 to the ranks, and not to torchrun, which would end.
# And it keeps the ranks' exit codes: torchrun replaces 2 and 75 by 1, so each rank writes its own to a file
# (endprompt_megatron/common/errors.py).  CODES/node-N gets those of this node in one line: 0 done, 75 stopped with a
# checkpoint, 2 wrong input, 1 cannot continue, 70 no code written: the rank was killed or ended by a traceback.
# After 0 and 75 srun must not kill the other nodes, so this script exits with 0 for both, and with 1 for the others.
# Expects: PYTHON, NODES, PROCESSES_PER_NODE, MASTER_ADDR, MASTER_PORT, and Slurm's SLURM_NODEID, SLURM_JOB_ID.
# shellcheck disable=SC2329  # functions that traps call
set -euo pipefail
# Slurm signals every process of a step.  USR2 is ignored here until torchrun runs, in torchrun always, and in its
# ranks until they listen.
trap '' USR2

codes="$1"
tool="$2"
shift 2
ENDPROMPT_EXIT_CODES="$(mktemp -d)"  # of this node's ranks, on its own disk
export ENDPROMPT_EXIT_CODES
trap 'rm -rf -- "$ENDPROMPT_EXIT_CODES"' EXIT

# The process ids of torchrun's ranks.  Not with pgrep, which some images lack.
ranks() {
    local pid
    for pid in $(awk -v parent="$agent" '/^PPid:/ && $2 == parent { split(FILENAME, part, "/"); print part[3] }' \
        /proc/[0-9]*/status 2>/dev/null || true); do
        # Just forked, a child is still torchrun itself.
        if grep -qsz '^LOCAL_RANK=' "/proc/$pid/environ"; then printf '%s\n' "$pid"; fi
    done
}

# Repeated, because a signal that arrives before a rank listens is lost; a second one does no harm.
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

# Static: node N has the ranks from N * PROCESSES_PER_NODE on, in Slurm's order of nodes, after a restart too.
# No restarts: torchrun would restart on the same nodes, of which one may be gone.  Slurm does that.
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
        70) orderly=0 && printf 'node %s: local rank %s wrote no exit code: it was killed or ended by the traceback above\n' \
            "$SLURM_NODEID" "$rank" ;;
        *) orderly=0 ;;
    esac
done
printf '%s\n' "${left[*]}" >"$codes/node-$SLURM_NODEID"
if [ "$orderly" = 0 ]; then exit 1; fi
