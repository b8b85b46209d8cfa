"""A worker process of the local runner: Beam's own, but quiet, and gone when the main process is.

python -m flair_jax.data.prepare.worker PID_OF_THE_MAIN_PROCESS
"""

import logging
import os
import sys
import threading
import time

logging.disable(logging.WARNING)  # a page for each worker and stage

from apache_beam.runners.worker import sdk_worker_main  # noqa: E402  (importing it logs, too)


def _follow(main: int) -> None:
    """Ends this process when the main one has ended. Beam's worker may wait forever for one that was killed."""
    while True:
        try:
            os.kill(main, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(0.5)


if __name__ == "__main__":
    threading.Thread(target=_follow, args=(int(sys.argv[1]),), daemon=True).start()
    sdk_worker_main.main(sys.argv)
