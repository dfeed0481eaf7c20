#!/usr/bin/env bash
# Checks the machines, converts the weights if that is not done yet, trains, exports to RUN/hf and submits the
# evaluation.  Before its time limit the job checkpoints and requeues itself; if it is killed, it resumes from the
# newest checkpoint.
#
#   HF_MODEL           the model to extend, a Hugging Face directory
#   DATA               PREFIX of the prepared training data
#   RUN                the run's directory, on a file system that all nodes see
#   MEGATRON_MODEL     the converted weights [HF_MODEL-megatron]; HF_MODEL: start without converting
#   EXPORT             the extended model [RUN/hf]
#   MAX_FAILURES       consecutive starts without a new checkpoint after which the job gives up [3]
#   SKIP_PREFLIGHT     1: do not check the machines first
#   SKIP_EVALUATION    1: no evaluation; its own variables are in slurm/evaluate.sh

# Sourced by the extend_*.sh, which set what differs: the job's nodes and the recipe.
set -euo pipefail
# shellcheck source=slurm/common.sh
source "$HOME_OF_PROJECT/slurm/common.sh"
HELP_FILES=("$HOME_OF_PROJECT/slurm/extend.sh" "${HELP_FILES[@]}")
MAX_FAILURES="${MAX_FAILURES:-3}"

# train: run training and act on its outcome.  Returns when training is done.
train() {
    local before
    before="$(newest_checkpoint)"
    on_ranks train tools/extend.py "$RECIPE" ${RECIPE_KEYS[@]+"${RECIPE_KEYS[@]}"}
    if [ "$DRY_RUN" = 1 ]; then return; fi
    if any_rank_left 2; then
        show_errors train
        exit 2
    elif any_rank_left 1; then
        show_errors train # starting again would not help, for example where the loss is not finite
        exit 1
    elif any_rank_left 70 || [ "$CODE" != 0 ]; then
        show_errors train
        give_up_without_progress "$before"
        requeue "ranks were lost"
    elif any_rank_left 75; then
        give_up_without_progress "$before"
        requeue "stopped with a checkpoint"
    fi
}

newest_checkpoint() { cat "$RUN/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }

# give_up_without_progress STEP: end the job after MAX_FAILURES consecutive starts that wrote no checkpoint after
# STEP.  A node may fail every time, or the time limit may be too short to reach a checkpoint.
give_up_without_progress() {
    if [ "$(newest_checkpoint)" != "$1" ]; then
        rm -f -- "$LOGS/failures"
        return
    fi
    echo "$RESTART" >>"$LOGS/failures"
    if [ "$(wc -l <"$LOGS/failures")" -ge "$MAX_FAILURES" ]; then
        printf 'error: %s consecutive starts wrote no checkpoint after step %s: see %s\n' "$MAX_FAILURES" "$1" "$LOGS" >&2
        exit 1
    fi
}

# export_run: convert the newest checkpoint to EXPORT, unless that has been done.
export_run() {
    local newest held="$RUN/slurm/exported"
    newest="$EXPORT $(newest_checkpoint)"
    if [ "$DRY_RUN" = 0 ] && [ -e "$EXPORT" ]; then
        if [ "$(cat "$held" 2>/dev/null || true)" = "$newest" ]; then return; fi
        fail "EXPORT=$EXPORT exists and is not this run's newest checkpoint: remove it, or set EXPORT to another directory"
    fi
    on_first_node export "$PYTHON" tools/convert_megatron_to_hf.py --megatron "$RUN/checkpoints" --out "$EXPORT"
    if [ "$DRY_RUN" = 0 ]; then printf '%s\n' "$newest" >"$held"; fi
}

# extend SCRIPT [ARGUMENT...]: a complete run of RECIPE, from preflight to the submitted evaluation.
extend() {
    begin "$@"
    need_path HF_MODEL "a Hugging Face directory, the model to extend"
    need DATA "the PREFIX that slurm/prepare_data.sh wrote"
    need RUN "the run's directory: metrics, checkpoints, logs and the exported model"
    if [ "$DRY_RUN" = 0 ] && [ ! -f "$DATA.idx" ]; then fail "DATA=$DATA: $DATA.idx does not exist; see slurm/prepare_data.sh"; fi
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
        if [ -n "$SIGNAL" ]; then requeue "stopped in preflight"; fi
        if [ "$DRY_RUN" = 0 ] && { [ "$CODE" != 0 ] || any_rank_left 2 || any_rank_left 1 || any_rank_left 70; }; then
            show_errors preflight
            exit 2
        fi
    fi
    # From the Hugging Face directory itself every rank reads its own slices: nothing is converted.
    if [ "$MEGATRON_MODEL" != "$HF_MODEL" ] &&
        { [ "$DRY_RUN" = 1 ] || [ ! -f "$MEGATRON_MODEL/latest_checkpointed_iteration.txt" ]; }; then
        on_first_node convert "$PYTHON" tools/convert_hf_to_megatron.py --hf "$HF_MODEL" --out "$MEGATRON_MODEL"
    fi
    train
    export_run
    if [ "${SKIP_EVALUATION:-0}" != 1 ]; then
        # A job of its own, after this one: a failed evaluation does not affect the run.
        run sbatch "--dependency=afterok:${SLURM_JOB_ID:-JOB}" --kill-on-invalid-dep=yes \
            "--output=$LOGS/evaluate-%j.log" "$HOME_OF_PROJECT/slurm/evaluate.sh"
    fi
    PHASE="end"
    if [ "$DRY_RUN" = 0 ]; then say "done: $EXPORT"; fi
}
