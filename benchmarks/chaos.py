"""Kills at random times: python benchmarks/chaos.py --minutes 5 [--seed 0]

SIGKILL to a training, a save, a quantization, and one worker of two under torchrun, over and over.
After each kill:

- training: the checkpoint is whole and has no epoch less than before, the metrics are whole lines;
  when the run ends at last, its checkpoint has the weights of the unbroken run, to the bit;
- save: the file is the old or the new one, whole; the next save leaves nothing beside it;
- quantize: the file is not there or whole; the next one gives the network of the unbroken one;
- worker: torchrun starts the run again, and its weights are those of the unbroken run, to the bit.

Appends a line to results/reliability.jsonl; exit code 1 if anything else was found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoints
import specimens
import torch
from common import ROOT, append, revision

from subbyte import CoRa, SubbyteError, save, storage
from subbyte.commands.quantize import Request, convert
from subbyte.core.atomic import write_atomically
from subbyte.models import build
from subbyte.train import train
from subbyte.train.checkpoint import read_checkpoint
from subbyte.train.loop import CHECKPOINT, METRICS

EPOCHS = 5
WORKER_S = 240.0  # that a run of two workers may take
CONFIG = """
out = '{out}'
[model]
name = 'digitsnet'
[data]
source = 'digits'
[train]
epochs = 6
lr = 0.05
batch_size = 64
limit_batches = 8
threads = 1
[method]
name = 'lowres'
levels = 3
"""


@dataclass
class Found:
    """kills and ends: by kind. faults: in words."""

    kills: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def end(self, kind: str, killed: bool) -> bool:
        counts = self.kills if killed else self.ends
        counts[kind] = counts.get(kind, 0) + 1
        return killed

    def check(self, good: bool, what: str) -> None:
        if not good:
            self.faults.append(what)
            print(what, flush=True)


def killed(work: Callable[[], object], after: float) -> bool:
    """The work in a child that is killed after so many seconds; False if it ended before."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    end = time.monotonic() + after
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"a child ended with status {status} before it was killed")
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def timed(work: Callable[[], object]) -> float:
    """Seconds of the second call; the first one imports and allocates."""
    work()
    started = time.monotonic()
    work()
    return time.monotonic() - started


def same(a: Any, b: Any) -> bool:
    """Equal to the bit: dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def weights(folder: Path) -> dict[str, Any]:
    """What of a checkpoint is of the run and not of the clock."""
    content = read_checkpoint(folder / CHECKPOINT)
    return {key: content[key] for key in ("model", "optimizer", "epoch", "histograms")}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return storage.read(path).tensors


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".subbyte-*")]


# ---------------------------------------------------------------- the four kinds


def training(found: Found, draw: random.Random, whole: dict[str, Any], seconds: float) -> None:
    """One run, killed and resumed until it ends by itself."""
    with tempfile.TemporaryDirectory() as name:
        folder, epoch, again = Path(name), 0, True
        while again:
            resume = (folder / CHECKPOINT).is_file()
            run = lambda r=resume: train(checkpoints.config(folder, EPOCHS), resume=r)  # noqa: E731
            # some kills would come after the end, so that a run ends some time
            again = found.end("training", killed(run, draw.uniform(0, 1.3 * seconds)))
            try:
                now = weights(folder)["epoch"] if (folder / CHECKPOINT).is_file() else 0
                text = (folder / METRICS).read_text() if (folder / METRICS).is_file() else ""
                lines = [json.loads(line) for line in text.splitlines()]
            except (SubbyteError, ValueError) as error:
                found.check(False, f"training: {error}")
                return
            found.check(now >= epoch, f"training: epoch {now} after epoch {epoch}")
            found.check(now - 1 <= len(lines) <= now, f"training: {len(lines)} lines of {now}")
            epoch = now
        found.check(same(weights(folder), whole), "training: other weights than the unbroken run")
        write_atomically(folder / METRICS, b"")
        found.check(not leftovers(folder), f"training: left {leftovers(folder)}")


def saving(found: Found, draw: random.Random, nets: list[Any], wanted: list[Any]) -> None:
    """A file that is replaced over and over, and killed once."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "net.safetensors"
        save(nets[0], path)

        def work() -> None:
            while True:
                for net in nets:
                    save(net, path)

        found.end("save", killed(work, draw.uniform(0, 0.15)))
        try:
            content = tensors(path)
            found.check(any(same(content, w) for w in wanted), "save: neither the old nor the new")
        except SubbyteError as error:
            found.check(False, f"save: {error}")
        save(nets[0], path)
        left = [p.name for p in Path(name).iterdir() if p != path]
        found.check(not left, f"save: left {left}")


def quantizing(
    found: Found, draw: random.Random, work: Callable[[Path], object], seconds: float, whole: Any
) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "net.safetensors"
        if found.end("quantize", killed(lambda: work(path), draw.uniform(0, seconds))):
            try:
                found.check(not path.exists() or same(tensors(path), whole), "quantize: not whole")
            except SubbyteError as error:
                found.check(False, f"quantize: {error}")
            if draw.random() < 0.3:
                work(path)
                found.check(same(tensors(path), whole), "quantize: another network")
                found.check(not leftovers(Path(name)), f"quantize: left {leftovers(Path(name))}")


def worker(found: Found, draw: random.Random, whole: Any, seconds: float) -> None:
    """One worker of two is killed while both train; torchrun starts them again."""
    with tempfile.TemporaryDirectory() as name:
        process = torchrun(Path(name))
        end = time.monotonic() + draw.uniform(0.3, 0.95) * seconds
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        victims = workers_of(process.pid) if process.poll() is None else []
        if victims:
            os.kill(draw.choice(victims), signal.SIGKILL)
        ended(process)
        found.end("worker", bool(victims))
        good = process.returncode == 0 and same(weights(Path(name) / "on"), whole)
        found.check(good, f"worker: exit code {process.returncode}, or other weights")


def torchrun(folder: Path) -> subprocess.Popen[bytes]:
    """`subbyte train` in two processes, restarted up to three times."""
    (folder / "run.toml").write_text(CONFIG.format(out=folder / "on"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--max-restarts", "3", "--master-port", str(port), "-m", "subbyte", "train",
               str(folder / "run.toml")]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment, **quiet)


def ended(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(WORKER_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        process.wait()


def workers_of(pid: int) -> list[int]:
    """The processes that a process has started and that run (Linux); none if it has ended."""
    place = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(x) for x in place.read_text().split()] if place.exists() else []


# ---------------------------------------------------------------- all of them


def prepared(folder: Path) -> dict[str, Any]:
    """Unbroken runs: what they give and how long they take."""
    with tempfile.TemporaryDirectory() as name:
        config = checkpoints.config(Path(name), EPOCHS)
        train_s = timed(lambda: train(config, fresh=True))
        trained = weights(Path(name))
    torch.manual_seed(0)
    nets = [specimens.trained(build("digitsnet"), levels) for levels in (3, 5)]
    kept = []
    for net in nets:
        save(net, folder / "net.safetensors")
        kept.append({k: v.clone() for k, v in tensors(folder / "net.safetensors").items()})
    storage.write_safetensors(build("digitsnet").state_dict(), {}, folder / "float.safetensors")

    def quantize(path: Path) -> None:
        request = Request("digitsnet", "digits", path, folder / "float.safetensors", 64, score=None)
        convert(request, CoRa(bits=3, tune=0))

    quantize_s = timed(lambda: quantize(folder / "q.safetensors"))
    return {
        "train": (trained, train_s), "save": (nets, kept),
        "quantize": (quantize, quantize_s, tensors(folder / "q.safetensors")),
    }  # fmt: skip


def unbroken_pair() -> tuple[dict[str, Any], float]:
    with tempfile.TemporaryDirectory() as name:
        started = time.monotonic()
        ended(torchrun(Path(name)))
        return weights(Path(name) / "on"), time.monotonic() - started


def run(minutes: float, draw: random.Random, workers: bool) -> Found:
    """Kills for so long, once it is known what unbroken runs give; a third of it of workers."""
    found = Found()
    with tempfile.TemporaryDirectory() as name:
        ready = prepared(Path(name))
        end = time.monotonic() + 60 * minutes * (2 / 3 if workers else 1)
        while time.monotonic() < end:
            training(found, draw, *ready["train"])
            for _ in range(12):
                saving(found, draw, *ready["save"])
            for _ in range(4):
                work, seconds, whole = ready["quantize"]
                quantizing(found, draw, work, seconds, whole)
    if workers:
        whole, seconds = unbroken_pair()
        end = time.monotonic() + 20 * minutes
        while time.monotonic() < end:
            worker(found, draw, whole, seconds)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-workers", action="store_true", help="no runs under torchrun")
    options = parser.parse_args()
    started, draw = time.monotonic(), random.Random(options.seed)
    found = run(options.minutes, draw, not options.no_workers)
    seconds = round(time.monotonic() - started, 1)
    head = {"case": "chaos", "commit": revision(), "seed": options.seed, "seconds": seconds}
    append("reliability", {**head, "kills": found.kills, "ends": found.ends,
                           "faults": found.faults})  # fmt: skip
    print(f"{found.kills} kills, {found.ends} ends, {len(found.faults)} faults, {seconds:.0f} s")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
