"""Several processes of one thread on this machine, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import subbyte

SOURCE = Path(subbyte.__file__).resolve().parents[1]
LIMIT_S = 240


def environment(**more: object) -> dict[str, str]:
    """That finds this subbyte and these tests, with one thread for each process."""
    paths = os.pathsep.join([str(SOURCE), str(Path(__file__).parent)])
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return os.environ | own | {name: str(value) for name, value in more.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def together(*arguments: object, size: int = 2) -> list[tuple[int, str]]:
    """Python with these arguments in so many processes; exit code and output of each, by rank."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": size}
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen(command, env=environment(RANK=rank, LOCAL_RANK=rank, **place), **pipes)
        for rank in range(size)
    ]
    try:
        return [(own.wait(LIMIT_S), own.stdout.read()) for own in started]
    finally:
        for own in started:
            own.kill()
            own.communicate()


def torchrun(*arguments: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Two processes under torchrun itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    place = ["--master-port", str(free_port()), "--max-restarts", str(restarts)]
    return subprocess.run(
        [*command, *place, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
