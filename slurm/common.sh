#!/usr/bin/env bash
# What all batch scripts share: sourced by extend_*.sh, convert.sh, prepare_data.sh and evaluate.sh.
#
# Every path is an environment variable (docs/cluster.md has the table); sbatch passes the environment on.
#   ENDPROMPT_HOME     this repository on a file system that all nodes see [where sbatch was called]
#   VENV               a virtual environment with the requirements, or
#   CONTAINER_IMAGE    an image for pyxis/enroot, such as nvcr.io#nvidia/pytorch:25.12-py3
#   CONTAINER_MOUNTS   what the container sees, from:to,... [the repository and the directories of all paths]
#   PROCESSES_PER_NODE ranks of a node [its GPUs, 8]
#   MAX_FAILURES       starts in a row without a new checkpoint after which a job gives up [3]
#   SKIP_PREFLIGHT     1: do not check the machines first
# Options of every script: --help, --dry-run (print every command instead of running it).

DRY_RUN=0
OVERRIDES=()
RESTART="${SLURM_RESTART_COUNT:-0}"
PROCESSES_PER_NODE="${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
MAX_FAILURES="${MAX_FAILURES:-3}"
PHASE="start" STEP="" ASKED="" FINISH=0

say() { printf '%s %s\n' "$(date '+%F %T')" "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# begin SCRIPT "$@": options, then recipe overrides (key=value) or a script's own words, into OVERRIDES.
begin() {
    local script="$1" argument
    shift
    for argument in "$@"; do
        case "$argument" in
            --dry-run) DRY_RUN=1 ;;
            -h | --help)
                # The comment at the top of the script, and the one at the top of this file.
                sed -n '/^# /,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$script" | grep -v -e '^SBATCH' -e '^shellcheck'
                sed -n '2,/^$/{/^#/s/^# \{0,1\}//p;}' "$HOME_OF_PROJECT/slurm/common.sh"
                exit 0
                ;;
            -*) fail "$argument: not an option; there are --dry-run and --help, and key=value for the recipe" ;;
            *) OVERRIDES+=("$argument") ;;
        esac
    done
    cd "$HOME_OF_PROJECT" || exit 2
    if [ "$DRY_RUN" = 0 ] && [ -z "${SLURM_JOB_ID:-}" ]; then
        fail "this is a batch script: start it with sbatch, or look at it with --dry-run"
    fi
    choose_python
    environment
}

# need NAME WHAT: the variable is set.  In a dry run one that is not stands for itself.
need() {
    local name="$1"
    if [ -n "${!name:-}" ]; then return; fi
    if [ "$DRY_RUN" = 1 ]; then
        printf -v "$name" '%s' "\$$name"
        export "${name?}"
    else
        fail "$name is not set: export $name=$2"
    fi
}

# need_path NAME WHAT: the variable is set and names something that is there.
need_path() {
    need "$1" "$2"
    if [ "$DRY_RUN" = 0 ] && [ ! -e "${!1}" ]; then fail "$1=${!1}: not there; it should be $2"; fi
}

# run COMMAND...: run it, or print it in a dry run.
run() {
    if [ "$DRY_RUN" = 1 ]; then
        local word line=""
        for word in "$@"; do
            if [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+#\$-]+$ ]]; then line+=" $word"; else line+=" '$word'"; fi
        done
        printf '%s\n' "${line# }"
        return
    fi
    "$@"
}

choose_python() {
    if [ -n "${CONTAINER_IMAGE:-}" ]; then
        PYTHON="python3"
    elif [ -n "${VENV:-}" ]; then
        PYTHON="$VENV/bin/python"
        if [ "$DRY_RUN" = 0 ] && [ ! -x "$PYTHON" ]; then fail "VENV=$VENV: $PYTHON is not there"; fi
    elif [ "$DRY_RUN" = 1 ]; then
        PYTHON="\$VENV/bin/python"
    else
        fail "neither VENV nor CONTAINER_IMAGE is set: export the one that holds the requirements"
    fi
    export PYTHON
}

environment() {
    NODES="${SLURM_JOB_NUM_NODES:-${NODES:-1}}"
    if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
        MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    fi
    MASTER_ADDR="${RENDEZVOUS_ADDRESS:-${MASTER_ADDR:-127.0.0.1}}"
    # A port of the job's own: jobs that share a node do not meet, and a requeued one does not wait for the last.
    MASTER_PORT="$((20000 + (${SLURM_JOB_ID:-0} * 7 + RESTART) % 20000))"
    export NODES PROCESSES_PER_NODE MASTER_ADDR MASTER_PORT
    # Kernels start in the order they were launched in, so that communication goes on under computation.
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    # Segments that grow: without them long runs fragment by gigabytes.
    export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
    # Tensors in flight are kept by reference and not by stream, which holds memory longer.
    export TORCH_NCCL_AVOID_RECORD_STREAMS="${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}"
    # A rank that is lost ends the collectives of the others instead of leaving them waiting.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
    export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
}

# container_options PATH...: the container and its mounts, each directory once.
container_options() {
    CONTAINER=()
    if [ -z "${CONTAINER_IMAGE:-}" ]; then return; fi
    local path mounts="${CONTAINER_MOUNTS:-}"
    if [ -z "$mounts" ]; then
        for path in "$HOME_OF_PROJECT" "$@"; do
            path="$(dirname "$path/.")"
            if [[ "$path" != [/\$]* ]]; then path="$HOME_OF_PROJECT/$path"; fi
            if [[ ",$mounts," != *",$path:$path,"* ]]; then mounts+="${mounts:+,}$path:$path"; fi
        done
    fi
    CONTAINER=(
        "--container-image=$CONTAINER_IMAGE" "--container-mounts=$mounts" "--container-workdir=$HOME_OF_PROJECT"
    )
}

# logs DIRECTORY: where the steps of this job write, a file a node and restart.
logs() {
    LOGS="$1/slurm/job-${SLURM_JOB_ID:-0}"
    if [ "$DRY_RUN" = 0 ]; then mkdir -p "$LOGS"; fi
    trap 'asked USR2' USR2
    trap 'FINISH=1; asked USR1' USR1
}

# Slurm's warning before the time limit, or `scancel --batch --signal`: training checkpoints, all else starts anew.
asked() {
    ASKED="$1"
    say "signal $ASKED in phase $PHASE"
    if [ "$PHASE" = train ] && [ -n "$STEP" ]; then
        kill -USR2 "$STEP" 2>/dev/null || true
    elif [ -n "$STEP" ]; then
        kill -TERM "$STEP" 2>/dev/null || true
    fi
}

# step NAME SRUN_OPTION... -- COMMAND...: run it as a step of the job and wait; its exit code is in CODE.
step() {
    local name="$1" options=()
    shift
    while [ "$1" != "--" ]; do options+=("$1") && shift; done
    shift
    PHASE="$name" CODE=0
    local command=(
        # A step does not inherit the job's cores, and gets one a task without being told.
        srun "--job-name=$name" --kill-on-bad-exit=1 "--cpus-per-task=${SLURM_CPUS_ON_NODE:-1}" --cpu-bind=none
        "--output=${LOGS}/${name}.${RESTART}.node%n.log"
        ${options[@]+"${options[@]}"} ${CONTAINER[@]+"${CONTAINER[@]}"} "$@"
    )
    if [ "$DRY_RUN" = 1 ]; then
        run "${command[@]}"
        return
    fi
    say "$name: $LOGS/$name.$RESTART.*.log"
    "${command[@]}" &
    STEP=$!
    # A signal that this script traps ends `wait`, not the step.
    while kill -0 "$STEP" 2>/dev/null; do
        CODE=0
        wait "$STEP" || CODE=$?
    done
    STEP=""
}

# alone NAME COMMAND...: one process on the first node; on failure the job ends with its code.
alone() {
    local name="$1"
    shift
    step "$name" --nodes=1 --ntasks=1 -- "$@"
    if [ "$CODE" = 0 ]; then return; fi
    if [ -n "$ASKED" ]; then again "stopped in $name"; fi
    complain "$name"
    exit "$CODE"
}

# on_ranks NAME TOOL [ARGUMENT...]: one torchrun a node (node.sh), PROCESSES_PER_NODE ranks each.
# CODES_SEEN has the exit codes that the ranks left, without repetition: torchrun has only 1 for all of them.
on_ranks() {
    local name="$1"
    shift
    local codes="$LOGS/codes-$name-$RESTART"
    if [ "$DRY_RUN" = 0 ]; then rm -rf -- "$codes" && mkdir -p "$codes"; fi
    step "$name" "--nodes=$NODES" "--ntasks=$NODES" --ntasks-per-node=1 -- \
        bash "$HOME_OF_PROJECT/slurm/node.sh" "$codes" "$@"
    CODES_SEEN=""
    if [ "$DRY_RUN" = 0 ]; then
        # A node that was lost leaves no file: as 70, no code.
        if [ "$(find "$codes" -name 'node-*' | wc -l)" -lt "$NODES" ]; then echo 70 >"$codes/node-lost"; fi
        CODES_SEEN="$(cat "$codes"/node-* | tr ' ' '\n' | sort -un | tr '\n' ' ')"
        say "$name: srun ended with $CODE, the ranks with ${CODES_SEEN% }"
    fi
}

left() { [[ " $CODES_SEEN" == *" $1 "* ]]; }

# The line that says what is wrong, out of a step's logs into the job's.
complain() {
    local line
    line="$(grep -hE '^(error:|watchdog:|preflight: )' "$LOGS/$1.$RESTART."*.log 2>/dev/null | sort -u | tail -n 5 || true)"
    if [ -z "$line" ]; then line="$(tail -qn 3 "$LOGS/$1.$RESTART."*.log 2>/dev/null | tail -n 12 || true)"; fi
    printf '%s failed; see %s\n%s\n' "$1" "$LOGS/$1.$RESTART.*.log" "$line" >&2
}

# again REASON: the same job, from the beginning of this script; what is done already is skipped or resumed.
again() {
    if [ "$FINISH" = 1 ]; then
        say "$1; asked to finish: not requeued (submit again to go on)"
        exit 75
    fi
    say "$1; requeueing job $SLURM_JOB_ID"
    trap '' USR1 USR2
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        printf 'error: job %s cannot be requeued (sbatch --requeue): submit it again to go on\n' "$SLURM_JOB_ID" >&2
        exit 75
    fi
    sleep 300 # Slurm ends this script
    exit 75
}

# train: outcomes of the training step.  Returns when training is done.
train() {
    local before
    before="$(newest_checkpoint)"
    on_ranks train tools/extend.py "$RECIPE" ${RECIPE_KEYS[@]+"${RECIPE_KEYS[@]}"}
    if [ "$DRY_RUN" = 1 ]; then return; fi
    if left 2; then
        complain train
        exit 2
    elif left 1; then
        complain train # a run that starting again will not help, such as one whose loss is not finite
        exit 1
    elif left 70 || [ "$CODE" != 0 ]; then
        complain train
        no_further_than "$before"
        again "ranks were lost"
    elif left 75; then
        no_further_than "$before"
        again "stopped with a checkpoint"
    fi
}

newest_checkpoint() { cat "$RUN/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }

# no_further_than STEP: a start is tried again, but not for ever.  MAX_FAILURES starts in a row that made no new
# checkpoint end the job: a node that always fails, or a time limit in which nothing gets done.
no_further_than() {
    if [ "$(newest_checkpoint)" != "$1" ]; then
        rm -f -- "$LOGS/failures"
        return
    fi
    echo "$RESTART" >>"$LOGS/failures"
    if [ "$(wc -l <"$LOGS/failures")" -ge "$MAX_FAILURES" ]; then
        printf 'error: %s starts in a row made no checkpoint after step %s: see %s\n' "$MAX_FAILURES" "$1" "$LOGS" >&2
        exit 1
    fi
}

# export_run: the newest checkpoint to EXPORT, unless it is there already.
export_run() {
    local newest held="$RUN/slurm/exported"
    newest="$EXPORT $(newest_checkpoint)"
    if [ "$DRY_RUN" = 0 ] && [ -e "$EXPORT" ]; then
        if [ "$(cat "$held" 2>/dev/null || true)" = "$newest" ]; then return; fi
        fail "EXPORT=$EXPORT is there and not this run's newest checkpoint: remove it, or export another EXPORT"
    fi
    alone export "$PYTHON" tools/convert_megatron_to_hf.py --megatron "$RUN/checkpoints" --out "$EXPORT"
    if [ "$DRY_RUN" = 0 ]; then printf '%s\n' "$newest" >"$held"; fi
}

# extend: the whole of a run.  HF_MODEL, DATA and RUN say from what, on what, to where.
extend() {
    need_path HF_MODEL "a Hugging Face directory, the model to extend"
    need DATA "the PREFIX that slurm/prepare_data.sh wrote"
    need RUN "the run's directory: metrics, checkpoints, logs and the exported model"
    if [ "$DRY_RUN" = 0 ] && [ ! -f "$DATA.idx" ]; then fail "DATA=$DATA: $DATA.idx is not there; see slurm/prepare_data.sh"; fi
    if [ ! -f "$RECIPE" ]; then fail "RECIPE=$RECIPE: no such recipe"; fi
    MEGATRON_MODEL="${MEGATRON_MODEL:-$HF_MODEL-megatron}"
    EXPORT="${EXPORT:-$RUN/hf}"
    export HF_MODEL DATA RUN RECIPE MEGATRON_MODEL EXPORT
    RECIPE_KEYS=(
        "model.hf=$HF_MODEL" "model.init_from=$MEGATRON_MODEL" "data.train=$DATA" "checkpoint.dir=$RUN"
        ${OVERRIDES[@]+"${OVERRIDES[@]}"}
    )
    container_options "$HF_MODEL" "$(dirname "$MEGATRON_MODEL")" "$(dirname "$DATA")" "$(dirname "$RUN")"
    logs "$RUN"
    if [ "${SKIP_PREFLIGHT:-0}" != 1 ]; then
        on_ranks preflight tools/preflight.py "$RECIPE" "${RECIPE_KEYS[@]}" --export "$EXPORT"
        if [ -n "$ASKED" ]; then again "stopped in preflight"; fi
        if [ "$DRY_RUN" = 0 ] && { [ "$CODE" != 0 ] || left 2 || left 1 || left 70; }; then
            complain preflight
            exit 2
        fi
    fi
    # With the Hugging Face directory itself every rank reads its own slices of it: nothing to convert.
    if [ "$MEGATRON_MODEL" != "$HF_MODEL" ] &&
        { [ "$DRY_RUN" = 1 ] || [ ! -f "$MEGATRON_MODEL/latest_checkpointed_iteration.txt" ]; }; then
        alone convert "$PYTHON" tools/convert_hf_to_megatron.py --hf "$HF_MODEL" --out "$MEGATRON_MODEL"
    fi
    train
    export_run
    if [ "${SKIP_EVALUATION:-0}" != 1 ]; then
        # After this job, on a node of its own: a failed evaluation does not touch the run.
        run sbatch "--dependency=afterok:${SLURM_JOB_ID:-JOB}" --kill-on-invalid-dep=yes \
            "--output=$LOGS/evaluate-%j.log" "$HOME_OF_PROJECT/slurm/evaluate.sh"
    fi
    PHASE="end"
    if [ "$DRY_RUN" = 0 ]; then say "done: $EXPORT"; fi
}
