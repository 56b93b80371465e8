"""Measure LAEO's gradient steps per second with one and with two PyTorch threads:  python benchmark/threads.py

States: FetchPush, batch 256; images: FetchPushImage, batch 128; from datasets/, or from random numbers of the
same shapes where there is none. Each alone, and beside one other busy process; with two threads also with
OMP_WAIT_POLICY=passive, so that threads that wait for each other sleep instead of spinning. Only laeo.update is timed:
batches are drawn before. Settings take turns, alone and beside the other process; the results, a number for each
round, go to benchmark/results/threads.json. Nothing else should run on the machine.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import tyro
from made import machine, made

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import laeo  # noqa: E402

BATCH_SIZES = {"FetchPush": 256, "FetchPushImage": 128}
SETTINGS = [(1, ""), (2, ""), (2, "passive")]  # PyTorch threads, OMP_WAIT_POLICY
SHAPES = {"FetchPush": (25,), "FetchPushImage": (64, 64, 3)}
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    pass"  # as long as this program lives


@dataclass
class Args:
    rounds: int = 5  # how often each setting is measured
    seconds: float = 5.0  # how long each measurement is
    datasets: Path = ROOT / "datasets"  # where the datasets are looked for
    output: Path = Path(__file__).parent / "results" / "threads.json"


@cache
def prepare(env_id: str, path: Path | None, batch_size: int) -> Callable[[int], None]:
    """Return a function that takes gradient step i of LAEO, on data in `path` or, where it is None, random numbers."""
    args, device = laeo.Args(env_id, dataset=path, batch_size=batch_size, random_shift=0), torch.device("cpu")
    args.policy_objective = "log_exp_f" if len(SHAPES[env_id]) == 3 else "weighted"
    if path:
        dataset, data, mean, std, examples = laeo.load_data(args, device)
        bounds, batches = torch.from_numpy(dataset.action_bounds), [laeo.sample(data, args, step) for step in range(8)]
    else:
        rng, (n, shape) = np.random.default_rng(0), (args.batch_size, SHAPES[env_id])
        mean, std = torch.full(shape, 128.0 * (len(shape) == 3)), torch.full(shape, 74.0 if len(shape) == 3 else 1.0)

        def observations(count: int) -> torch.Tensor:
            if len(shape) == 3:
                return torch.from_numpy(rng.integers(256, size=(count, *shape), dtype=np.uint8))
            return torch.from_numpy(rng.standard_normal((count, *shape), np.float32))

        def actions() -> torch.Tensor:
            return torch.from_numpy(rng.uniform(-1, 1, (n, 4)).astype(np.float32))

        bounds, examples = torch.tensor([[-1.0] * 4, [1.0] * 4]), observations(args.num_success)
        rest = torch.zeros(n), torch.randn(n, 4), torch.arange(min(n, args.num_success)), [None] * 2
        batches = [laeo.Batch(observations(n), actions(), observations(n), *rest) for _ in range(8)]
    generator = torch.Generator().manual_seed(0)
    encoder = laeo.Encoder(mean, std, args, generator)
    actor = laeo.Actor(encoder, bounds, args.hidden_dim, generator)
    critic = laeo.Critic(encoder, bounds.shape[1], args.hidden_dim, args.repr_dim, generator)
    learned = torch.nn.ModuleList([actor, critic]).parameters()  # those of the encoder once
    optimizer = torch.optim.Adam(learned, args.learning_rate, eps=1e-7, fused=True)
    return lambda i: laeo.update(batches[i % len(batches)], examples, actor, critic, optimizer, args)


def measure(env_id: str, path: Path | None, batch_size: int, threads: int, seconds: float) -> float:
    """Return gradient steps per second, over at least `seconds` and one step, after one that is not counted."""
    torch.set_num_threads(threads)
    step = prepare(env_id, path, batch_size)
    step(0)
    start, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - start < seconds:
        step(steps)
        steps += 1
    return steps / (time.perf_counter() - start)


@contextmanager
def busy_process() -> Iterator[None]:
    """Run a loop in Python that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def start_worker(policy: str) -> ProcessPoolExecutor:
    """Return a process with this OMP_WAIT_POLICY, which is read when PyTorch is loaded and never again."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_"))}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    worker = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with patch.dict(os.environ, environment, clear=True):
        worker.submit(os.getpid).result()  # starts it
    return worker


def main(args: Args) -> dict:
    """Measure, write the results and return them."""
    rows = []
    for env_id, batch_size in BATCH_SIZES.items():
        path = args.datasets / f"{env_id}-medium"
        data = path.name if path.exists() else "random"
        row = {"env_id": env_id, "batch_size": batch_size, "data": data}
        rows += [row | {"threads": n, "wait_policy": policy, "alone": [], "beside": []} for n, policy in SETTINGS]
        if data == "random":
            print(f"{path} is not there: {env_id} is measured with random numbers")
    with ExitStack() as stack:
        workers = {policy: stack.enter_context(start_worker(policy)) for policy in {policy for _, policy in SETTINGS}}
        for _ in range(args.rounds):
            for row in rows:
                path = None if row["data"] == "random" else args.datasets / row["data"]
                job = measure, row["env_id"], path, row["batch_size"], row["threads"], args.seconds
                row["alone"].append(workers[row["wait_policy"]].submit(*job).result())
                with busy_process():
                    row["beside"].append(workers[row["wait_policy"]].submit(*job).result())
                speeds = f"{row['alone'][-1]:.1f} steps/s alone, {row['beside'][-1]:.1f} beside a busy process"
                print(f"{row['env_id']}, {row['threads']} threads {row['wait_policy']}: {speeds}", flush=True)
    result = {"made": made(), "machine": machine(), "rounds": args.rounds, "seconds": args.seconds, "rows": rows}
    with common.write_file(args.output) as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
    return result


if __name__ == "__main__":
    with common.user_errors():
        main(tyro.cli(Args))
