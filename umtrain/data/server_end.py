"""Imported by the fork server of `umtrain.data.isolated`: it takes away what would be left behind.

The server's socket lies in a temporary folder that the process which started it removes when it
ends. A killed one removes nothing; the server, which ends right after it, does.
"""

import atexit
import contextlib
from multiprocessing import forkserver
from pathlib import Path


def _remove_socket() -> None:
    # Children end by os._exit: this runs in the server alone.
    address = vars(forkserver)["_forkserver"]._forkserver_address
    with contextlib.suppress(OSError):
        Path(address).unlink(missing_ok=True)
        Path(address).parent.rmdir()


atexit.register(_remove_socket)
