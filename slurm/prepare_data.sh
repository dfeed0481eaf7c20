#!/usr/bin/env bash
# Tokenise a corpus into the format that training reads, on all cores of one node.
#
#     export HF_MODEL=... DATA=...
#     sbatch slurm/prepare_data.sh corpus/*.jsonl.gz
#
#   HF_MODEL           the model whose tokenizer is used, a Hugging Face directory
#   DATA               PREFIX to write: PREFIX.bin and PREFIX.idx
#   WORKERS            processes [the node's cores]
#   OPTIONS            further options of tools/prepare_data.py, such as "--dedup --held-out 0.01" []
#SBATCH --job-name=prepare_data
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
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
need_path HF_MODEL "a Hugging Face directory: its tokenizer is used"
need DATA "the PREFIX to write"
if [ "${#OVERRIDES[@]}" = 0 ]; then
    if [ "$DRY_RUN" = 0 ]; then fail "no input: sbatch slurm/prepare_data.sh FILE ..."; fi
    OVERRIDES=("FILE")
fi
container_options "$HF_MODEL" "$(dirname "$DATA")" "$(dirname "${OVERRIDES[0]}")"
logs "$(dirname "$DATA")"
read -r -a options <<<"${OPTIONS:-}"
on_first_node prepare "$PYTHON" tools/prepare_data.py \
    --input "${OVERRIDES[@]}" --tokenizer "$HF_MODEL" --out "$DATA" --workers "${WORKERS:-${SLURM_CPUS_ON_NODE:-1}}" \
    ${options[@]+"${options[@]}"}
