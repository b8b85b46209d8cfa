"""A worker process of the local runner: Beam's own, which otherwise logs a page for each worker and stage."""

import logging
import sys

logging.disable(logging.WARNING)

from apache_beam.runners.worker import sdk_worker_main  # noqa: E402  (importing it logs, too)

if __name__ == "__main__":
    sdk_worker_main.main(sys.argv)
