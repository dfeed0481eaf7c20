#!/usr/bin/env bash
# LLaMA-3.1 405B from 128K to 256K on 64 nodes of eight GPUs.
#
#     export HF_MODEL=... DATA=... RUN=... VENV=...      (docs/cluster.md)
#     sbatch slurm/extend_405b.sh [key=value ...]
#
#   RECIPE             [recipes/llama31_405b_256k.yaml]
#SBATCH --job-name=extend_405b
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@2400
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -euo pipefail
HOME_OF_PROJECT="${ENDPROMPT_HOME:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}}"
if [ ! -f "$HOME_OF_PROJECT/slurm/extend.sh" ]; then
    echo "error: $HOME_OF_PROJECT is not the repository: submit from there, or export ENDPROMPT_HOME" >&2
    exit 2
fi
NODES="${NODES:-64}"
RECIPE="${RECIPE:-recipes/llama31_405b_256k.yaml}"
# shellcheck source=slurm/extend.sh
source "$HOME_OF_PROJECT/slurm/extend.sh"
extend "${BASH_SOURCE[0]}" "$@"
