#!/usr/bin/env bash
# Convert weights from the Hugging Face format for training, or a run's newest checkpoint back.
#
#     export HF_MODEL=...            sbatch slurm/convert.sh
#     export RUN=...                 sbatch slurm/convert.sh to-hf
#
#   HF_MODEL           the model, a Hugging Face directory
#   MEGATRON_MODEL     the converted weights [HF_MODEL-megatron]
#   RUN                (to-hf) the run whose newest checkpoint is exported
#   EXPORT             (to-hf) the directory to write [RUN/hf]
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
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
case "${OVERRIDES[*]:-to-megatron}" in
    to-megatron)
        need_path HF_MODEL "a Hugging Face directory"
        MEGATRON_MODEL="${MEGATRON_MODEL:-$HF_MODEL-megatron}"
        container_options "$HF_MODEL" "$(dirname "$MEGATRON_MODEL")"
        logs "$(dirname "$MEGATRON_MODEL")"
        on_first_node convert "$PYTHON" tools/convert_hf_to_megatron.py --hf "$HF_MODEL" --out "$MEGATRON_MODEL"
        ;;
    to-hf)
        need_path RUN "the run whose newest checkpoint is exported"
        EXPORT="${EXPORT:-$RUN/hf}"
        container_options "$RUN" "$(dirname "$EXPORT")"
        logs "$RUN"
        on_first_node convert "$PYTHON" tools/convert_megatron_to_hf.py --megatron "$RUN/checkpoints" --out "$EXPORT"
        ;;
    *) fail "${OVERRIDES[*]}: expected to-megatron or to-hf" ;;
esac
