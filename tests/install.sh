#!/usr/bin/env bash
# What tests need of the distribution's packages, where it is missing: Slurm and munge (tests/slurm starts them on one
# host), Chromium and pdftotext (they open and print the report).  `make test` calls it.
# Where it cannot install, it says so and those tests are skipped (in CI those of Slurm fail).
set -euo pipefail

# want FOR "COMMANDS" "PACKAGES": install the packages unless all commands are there
want() {
    local tests=$1 commands=$2 packages=$3 command missing=""
    for command in $commands; do  # one by one: of several names `command -v` is content with any
        command -v "$command" >/dev/null || missing+=" $command"
    done
    if [ -z "$missing" ]; then return; fi
    if ! command -v apt-get >/dev/null; then
        echo "$tests: no${missing} here, and no apt-get to install with: its tests are skipped" >&2
        return
    fi
    local as_root=()
    if [ "$(id -u)" != 0 ]; then
        if ! sudo -n true 2>/dev/null; then
            echo "$tests: no${missing} here, and no right to install it (apt-get install $packages)" >&2
            return
        fi
        as_root=(sudo -n)
    fi
    echo "Installing $packages for $tests"
    # Packages would start services of their own; the tests start theirs.
    ${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 bash -c "
        apt-get -qq update || true
        apt-get -qq install --no-install-recommends -y -o DPkg::Lock::Timeout=300 $packages >/dev/null" ||
        echo "$tests: apt-get could not install $packages" >&2
}

want tests/slurm "slurmctld slurmd munged sbatch" "slurm-wlm slurm-wlm-basic-plugins munge"
want tests/unit/test_report_browser.py "chromium pdftotext" "chromium poppler-utils fonts-dejavu-core"
