"""What plain TCP does between two peers of a laboratory: the line rate and the delay that everything else is held to.

python -I -S tcp.py receive PORT
python -I -S tcp.py send ADDRESS PORT SECONDS    ->  {"bits_per_s": ..., "round_trip_s": ...}
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

PORT = 7007
# The start of a connection is slower than what it comes to.
WARM_UP_S = 2.0


def receive(port: int) -> None:
    """Count what comes, and after the warm-up answer with the rate once the sender has finished."""
    with socket.create_server(("", port)) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(3):
            connection.sendall(connection.recv(1))
        started = time.monotonic()
        warm_at, count, last = 0.0, 0, started
        while data := connection.recv(1 << 18):
            last = time.monotonic()
            if last - started > WARM_UP_S:
                count, warm_at = (count + len(data), warm_at) if warm_at else (0, last)
        connection.sendall(json.dumps({"bits_per_s": 8 * count / max(1e-9, last - warm_at)}).encode())
        connection.close()


def send(address: str, port: int, seconds: float) -> None:
    with socket.create_connection((address, port), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(3):
            started = time.monotonic()
            connection.sendall(b".")
            connection.recv(1)
            trips.append(time.monotonic() - started)
        until, block = time.monotonic() + WARM_UP_S + seconds, bytes(1 << 16)
        while time.monotonic() < until:
            connection.sendall(block)
        connection.shutdown(socket.SHUT_WR)
        answer = json.loads(connection.recv(4096))
    print(json.dumps({**answer, "round_trip_s": min(trips)}))


def measure(inside_sender: list[str], inside_receiver: list[str], address: str, seconds: float) -> dict[str, float]:
    """Rate and round trip from one namespace to another (`Lab.inside`)."""
    python = [sys.executable, "-I", "-S", __file__]
    receiving = [*inside_receiver, *python, "receive", str(PORT)]
    with subprocess.Popen(receiving, stdout=subprocess.PIPE, text=True) as receiver:
        try:
            if receiver.stdout is None or not receiver.stdout.readline():
                raise RuntimeError("the receiver did not start")
            sending = [*inside_sender, *python, "send", address, str(PORT), str(seconds)]
            done = subprocess.run(sending, capture_output=True, text=True, timeout=60 + seconds, check=True)
        finally:
            receiver.kill()
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(int(sys.argv[2]))
    else:
        send(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
