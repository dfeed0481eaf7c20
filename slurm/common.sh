#!/usr/bin/env bash
# What all batch scripts share: sourced by extend.sh, convert.sh, prepare_data.sh, evaluate.sh and study.sh.
#
# Every path is an environment variable (docs/cluster.md has the table); sbatch passes the environment on.
#   ENDPROMPT_HOME     this repository on a file system that all nodes see [where sbatch was called]
#   VENV               a virtual environment with the requirements, or
#   CONTAINER_IMAGE    an image for pyxis/enroot, such as nvcr.io#nvidia/pytorch:25.12-py3
#   CONTAINER_MOUNTS   what the container sees, from:to,... [the repository and the directories of all paths]
#   PROCESSES_PER_NODE ranks of a node [its GPUs, 8]
# Options of every script: --help, --dry-run (print every command instead of running it).

DRY_RUN=0
OVERRIDES=()
RESTART="${SLURM_RESTART_COUNT:-0}"
PROCESSES_PER_NODE="${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
HELP_FILES=("$HOME_OF_PROJECT/slurm/common.sh") # whose opening comments --help prints after the script's own
PHASE="start" STEP="" SIGNAL="" FINISH=0

say() { printf '%s %s\n' "$(date '+%F %T')" "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# begin SCRIPT "$@": read the options; all other arguments (key=value for the recipe, or files) go into OVERRIDES.
begin() {
    local script="$1" argument
    shift
    for argument in "$@"; do
        case "$argument" in
            --dry-run) DRY_RUN=1 ;;
            -h | --help)
                local file
                for file in "$script" "${HELP_FILES[@]}"; do
                    if [ "$file" != "$script" ]; then echo; fi
                    sed -n '1d; /^#/!q; /^#SBATCH/d; s/^# \{0,1\}//p' "$file"
                done
                exit 0
                ;;
            -*) fail "$argument: not an option; the options are --dry-run and --help, and recipe keys are set by key=value" ;;
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

# need NAME WHAT: the variable is set.  In a dry run, one that is not set is printed as $NAME.
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

# need_path NAME WHAT: the variable is set and names an existing file or directory.
need_path() {
    need "$1" "$2"
    if [ "$DRY_RUN" = 0 ] && [ ! -e "${!1}" ]; then fail "$1=${!1} does not exist; it should be $2"; fi
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
        if [ "$DRY_RUN" = 0 ] && [ ! -x "$PYTHON" ]; then fail "VENV=$VENV: $PYTHON does not exist"; fi
    elif [ "$DRY_RUN" = 1 ]; then
        PYTHON="\$VENV/bin/python"
    else
        fail "neither VENV nor CONTAINER_IMAGE is set: export the one that has the requirements installed"
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
    # Kernels start in the order in which they were launched, so that communication overlaps computation.
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    # Segments that grow: without them long runs fragment by gigabytes.
    export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
    # Tensors in flight are kept by reference and not by stream, which holds memory longer.
    export TORCH_NCCL_AVOID_RECORD_STREAMS="${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
    export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
}

# container_options PATH...: srun's options for the container, with each directory mounted once.
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

# logs DIRECTORY: where the steps of this job write their logs, one file per node and restart.
logs() {
    LOGS="$1/slurm/job-${SLURM_JOB_ID:-0}"
    if [ "$DRY_RUN" = 0 ]; then mkdir -p "$LOGS"; fi
    trap 'on_signal USR2' USR2
    trap 'FINISH=1; on_signal USR1' USR1
}

# Slurm's warning before the time limit, or `scancel --batch --signal`: training writes a checkpoint, any other step
# is ended and starts over after the requeue.
on_signal() {
    SIGNAL="$1"
    say "signal $SIGNAL in phase $PHASE"
    if [ "$PHASE" = train ] && [ -n "$STEP" ]; then
        kill -USR2 "$STEP" 2>/dev/null || true
    elif [ -n "$STEP" ]; then
        kill -TERM "$STEP" 2>/dev/null || true
    fi
}

# step NAME SRUN_OPTION... -- COMMAND...: run COMMAND as a step of the job and wait; its exit code is in CODE.
step() {
    local name="$1" options=()
    shift
    while [ "$1" != "--" ]; do options+=("$1") && shift; done
    shift
    PHASE="$name" CODE=0
    local command=(
        # A step does not inherit the job's cores: by default it gets one per task.
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

# on_first_node NAME COMMAND...: one process; on failure the job ends with its code.
on_first_node() {
    local name="$1"
    shift
    step "$name" --nodes=1 --ntasks=1 -- "$@"
    if [ "$CODE" = 0 ]; then return; fi
    if [ -n "$SIGNAL" ]; then requeue "stopped in $name"; fi
    show_errors "$name"
    exit "$CODE"
}

# on_ranks NAME TOOL [ARGUMENT...]: one torchrun per node (node.sh), PROCESSES_PER_NODE ranks each.
# CODES_SEEN has the distinct exit codes of the ranks: torchrun itself turns all but 0 into 1.
on_ranks() {
    local name="$1"
    shift
    local codes="$LOGS/codes-$name-$RESTART"
    if [ "$DRY_RUN" = 0 ]; then rm -rf -- "$codes" && mkdir -p "$codes"; fi
    step "$name" "--nodes=$NODES" "--ntasks=$NODES" --ntasks-per-node=1 -- \
        bash "$HOME_OF_PROJECT/slurm/node.sh" "$codes" "$@"
    CODES_SEEN=""
    if [ "$DRY_RUN" = 0 ]; then
        # A node that was lost leaves no file: counted as 70, like a rank without an exit code.
        if [ "$(find "$codes" -name 'node-*' | wc -l)" -lt "$NODES" ]; then echo 70 >"$codes/node-lost"; fi
        CODES_SEEN="$(cat "$codes"/node-* | tr ' ' '\n' | sort -un | tr '\n' ' ')"
        say "$name: srun ended with $CODE, the ranks with ${CODES_SEEN% }"
    fi
}

# any_rank_left CODE: a rank of the last on_ranks ended with CODE.
any_rank_left() { [[ " $CODES_SEEN" == *" $1 "* ]]; }

# show_errors NAME: copy the lines that say what is wrong from the step's logs into the job's.
show_errors() {
    local line
    line="$(grep -hE '^(error:|watchdog:|preflight: )' "$LOGS/$1.$RESTART."*.log 2>/dev/null | sort -u | tail -n 5 || true)"
    if [ -z "$line" ]; then line="$(tail -qn 3 "$LOGS/$1.$RESTART."*.log 2>/dev/null | tail -n 12 || true)"; fi
    printf '%s failed; see %s\n%s\n' "$1" "$LOGS/$1.$RESTART.*.log" "$line" >&2
}

# requeue REASON: start the same job again from the beginning of its script, which skips or resumes what is done.
requeue() {
    if [ "$FINISH" = 1 ]; then
        say "$1; asked to finish: not requeued (submit again to resume)"
        exit 75
    fi
    say "$1; requeueing job $SLURM_JOB_ID"
    trap '' USR1 USR2
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        printf 'error: job %s cannot be requeued (sbatch --requeue): submit it again to resume\n' "$SLURM_JOB_ID" >&2
        exit 75
    fi
    sleep 300 # Slurm ends this script
    exit 75
}
