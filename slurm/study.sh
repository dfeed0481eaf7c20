#!/usr/bin/env bash
# Cells of a study as an array, a task a cell; without STUDY_CELLS, the comparison of what is done.
# tools/study.py STUDY.yaml --slurm submits both; by hand:
#
#     export STUDY=study.yaml STUDY_CELLS=short-seed1:pose-seed1
#     sbatch --array=0-1 slurm/study.sh
#
# A task checkpoints before its time limit and requeues itself; what is done is not done again.
#
#   STUDY              the study.yaml
#   STUDY_CELLS        names of cells with colons between them; the task's number picks one []
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
    IFS=: read -r -a cells <<<"$STUDY_CELLS"
    cell="${cells[${SLURM_ARRAY_TASK_ID:-0}]:-}"
    if [ -z "$cell" ]; then fail "STUDY_CELLS has ${#cells[@]} cells, and this is task ${SLURM_ARRAY_TASK_ID:-0}"; fi
    # Named as the training step is, since the signal that it gets asks a training to write a checkpoint.
    step train --nodes=1 --ntasks=1 -- "$PYTHON" tools/study.py "$STUDY" --only "$cell" --no-report
    if [ "${CODE:-0}" = 75 ] || { [ "${CODE:-0}" != 0 ] && [ -n "$ASKED" ]; }; then again "stopped in $cell"; fi
    if [ "${CODE:-0}" != 0 ]; then
        complain train
        exit "$CODE"
    fi
else
    options=(--report-only)
    if [ -n "${STUDY_MARKDOWN:-}" ]; then options+=(--markdown "$STUDY_MARKDOWN"); fi
    alone report "$PYTHON" tools/study.py "$STUDY" "${options[@]}"
fi
