#!/usr/bin/env bash
# Evaluate an extended model beside its base and write the report.  The extend_*.sh submit this job; by hand:
#
#     export HF_MODEL=... RUN=...
#     sbatch slurm/evaluate.sh
#
# Many requests take long: the eight tasks of this array share them, each on its own GPU, and the last one to finish
# writes the tables:
#
#     export EVALUATE_SUITE=ruler,longbench EVALUATE_LENGTHS=4096,8192,16384,32768,65536
#     export EVALUATE_OPTIONS="--haystack PaulGrahamEssays.json --longbench-data data.zip"
#     sbatch --array=0-7 slurm/evaluate.sh
#
# A job that was killed or requeued resumes where it stopped.
#
#   HF_MODEL           the base model, measured beside the extended one
#   RUN                the run's directory; results go to RUN/evaluation
#   EXPORT             the extended model [RUN/hf]
#   EVALUATE_SUITE     perplexity, needle, virtual, ruler, longbench, short [perplexity,needle,virtual]
#   EVALUATE_LENGTHS   tokens [8192,16384,32768,65536]
#   EVALUATE_TEXT      held-out text: a file, or PREFIX of prepared data [DATA]
#   EVALUATE_OPTIONS   further options of tools/evaluate.py, separated by spaces []
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --time=06:00:00
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
need_path HF_MODEL "the base model, a Hugging Face directory"
need_path RUN "the run's directory"
EXPORT="${EXPORT:-$RUN/hf}"
need_path EXPORT "the extended model, a Hugging Face directory"
EVALUATE_TEXT="${EVALUATE_TEXT:-${DATA:-}}"
need EVALUATE_TEXT "held-out text: a file, or PREFIX of prepared data"
read -r -a options <<<"${EVALUATE_OPTIONS:-}"
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then options+=(--part array); fi
container_options "$HF_MODEL" "$(dirname "$EXPORT")" "$(dirname "$RUN")" "$(dirname "$EVALUATE_TEXT")"
logs "$RUN"
on_first_node evaluate "$PYTHON" tools/evaluate.py --hf "$EXPORT" --baseline "$HF_MODEL" \
    --suite "${EVALUATE_SUITE:-perplexity,needle,virtual}" --lengths "${EVALUATE_LENGTHS:-8192,16384,32768,65536}" \
    --text "$EVALUATE_TEXT" --out "$RUN/evaluation" --beyond-window ${options[@]+"${options[@]}"}
if [ "$DRY_RUN" = 1 ] || [ -f "$RUN/evaluation/results.json" ]; then # not while other tasks of an array still run
    on_first_node report "$PYTHON" tools/report.py "$RUN"
fi
