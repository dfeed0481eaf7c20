"""The one way to lock a file: flock, which the kernel frees when the last holder of the open file ends in any way.

distributed/run_lock.py builds more on it, since a run's lock has to hold between hosts.
"""

import fcntl
from typing import IO


def lock_file(file: IO | int, *, wait: bool = False) -> bool:
    """Lock an open file or descriptor; False if another process has it locked.  `wait` until it is free.

    True as well on a file system without locks: there nothing keeps two processes apart.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
