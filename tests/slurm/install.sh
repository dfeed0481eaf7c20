#!/usr/bin/env bash
# Slurm and munge from the distribution's packages, where they are missing: what tests/slurm starts on one host.
# `make test` calls it.  Where it cannot install, it says so and the tests are skipped (in CI they fail).
set -euo pipefail

if command -v slurmctld slurmd munged sbatch >/dev/null; then exit 0; fi
if ! command -v apt-get >/dev/null; then
    echo "tests/slurm: no Slurm here, and no apt-get to install it with: its tests are skipped" >&2
    exit 0
fi
as_root=()
if [ "$(id -u)" != 0 ]; then
    if ! sudo -n true 2>/dev/null; then
        echo "tests/slurm: no Slurm here, and no right to install it (apt-get install slurm-wlm munge)" >&2
        exit 0
    fi
    as_root=(sudo -n)
fi
echo "Installing Slurm and munge for tests/slurm"
# The packages would start services of their own; the tests start theirs.
${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 bash -c '
    apt-get -qq update || true
    apt-get -qq install --no-install-recommends -y -o DPkg::Lock::Timeout=300 \
        slurm-wlm slurm-wlm-basic-plugins munge >/dev/null' ||
    echo "tests/slurm: apt-get could not install slurm-wlm and munge" >&2
