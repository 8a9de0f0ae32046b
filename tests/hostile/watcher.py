"""A second client in a process of its own: asks a service's `/healthz` all the time, and tells how long it waited.

    python watcher.py PORT PID

It prints a line of JSON for each long wait, and one with the number of its requests when its standard input ends. Time in
which the machine had no core free for the service or for this process is no wait: tests run beside others.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from pathlib import Path

REQUEST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
LONG = 0.05  # seconds
PAUSE = 0.002


def without_a_core(pid: int | str) -> float:
    """Seconds that the first thread of a process wanted to run and could not."""
    schedule = Path(f"/proc/{pid}/schedstat")
    return int(schedule.read_text().split()[1]) / 1e9 if schedule.exists() else 0.0


def tell(**what: float) -> None:
    """Prints a line."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main(port: int, pid: int) -> None:
    """Watches until the standard input ends."""
    asked = 0
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        while not select.select([sys.stdin], [], [], PAUSE)[0]:
            before, start, answer = without_a_core(pid) + without_a_core("self"), time.monotonic(), b""
            connection.sendall(REQUEST)
            while not answer.endswith(b'{"status":"ready"}'):
                answer += connection.recv(4096)
            end, asked = time.monotonic(), asked + 1
            waited = end - start - (without_a_core(pid) + without_a_core("self") - before)
            if waited > LONG:
                tell(start=start, end=end, waited=waited)
    tell(asked=asked)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
