#!/usr/bin/env bash
# Run the trials of a study as an array, one task per trial; without STUDY_CELLS, compare the finished trials.
# tools/study.py STUDY.yaml --slurm submits both; by hand:
#
#     export STUDY=study.yaml STUDY_CELLS=short-seed1:pose-seed1
#     sbatch --array=0-1 slurm/study.sh
#
# A task checkpoints before its time limit and requeues itself; finished trials are not repeated.
#
#   STUDY              the study.yaml
#   STUDY_CELLS        names of trials separated by colons; the task's number picks one []
#   STUDY_OUT          where logs go, into slurm/ [the directory of STUDY]
#   STUDY_MARKDOWN     where the comparison is also written, as Markdown []
#SBATCH --job-name=study
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --time=06:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --output=slurm-%x-%j.log
set -euo pipefail
HOME_OF_PROJECT="${ENDPROMPT_HOME:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}}"
if [ ! -f "$HOME_OF_PROJECT/slurm/common.sh" ]; then
    echo "error: $HOME_OF_PROJECT is not the repository: submit from there, or export ENDPROMPT_HOME" >&2
    exit 2
fi
# shellcheck source=slurm/common.sh
source "$HOME_OF_PROJECT/slurm/common.sh"
begin "${BASH_SOURCE[0]}" "$@"
need_path STUDY "a study.yaml"
container_options "$(dirname "$STUDY")"
logs "${STUDY_OUT:-$(dirname "$STUDY")}"
if [ -n "${STUDY_CELLS:-}" ]; then
    IFS=: read -r -a trials <<<"$STUDY_CELLS"
    trial="${trials[${SLURM_ARRAY_TASK_ID:-0}]:-}"
    if [ -z "$trial" ]; then fail "STUDY_CELLS names ${#trials[@]} trials, but this is task ${SLURM_ARRAY_TASK_ID:-0}"; fi
    # The step is named train so that a signal asks it to write a checkpoint (on_signal in common.sh).
    step train --nodes=1 --ntasks=1 -- "$PYTHON" tools/study.py "$STUDY" --only "$trial" --no-report
    if [ "${CODE:-0}" = 75 ] || { [ "${CODE:-0}" != 0 ] && [ -n "$SIGNAL" ]; }; then requeue "stopped in $trial"; fi
    if [ "${CODE:-0}" != 0 ]; then
        show_errors train
        exit "$CODE"
    fi
else
    options=(--report-only)
    if [ -n "${STUDY_MARKDOWN:-}" ]; then options+=(--markdown "$STUDY_MARKDOWN"); fi
    on_first_node report "$PYTHON" tools/study.py "$STUDY" "${options[@]}"
fi
