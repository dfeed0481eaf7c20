import os
import shutil
import tempfile
from pathlib import Path

import pytest
from slurm.cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster():
    """A Slurm of two nodes.  Skipped where it is not installed and cannot be; in CI that is a failure."""
    missing = missing_programs()
    if missing:
        reason = f"no Slurm here: {', '.join(missing)} missing (tests/install.sh says why)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    place = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: paths of sockets are limited
    made = Cluster(place)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(place, ignore_errors=True)
