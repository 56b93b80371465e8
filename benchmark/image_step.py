"""Measure LAEO's training step on images, before and after one encoder was shared:  python benchmark/image_step.py

A step is laeo.sample and laeo.update, one after the other, on one thread of a CPU; images are random numbers of
FetchPushImage's shape, with 200 success examples. `before` is the code of the commit BEFORE, with the batch and the
random shift that images had then; `after` is the present code with its image defaults, and also with the objective
`weighted`, which laeo.py offers for states alone: it needs no features of success examples.

Rows take turns. Each measurement is a process of its own, which imports the laeo.py of that row, takes steps for some
seconds, and then multiplies float32 matrices of 1024 x 1024 for a second: the matrix rate, measured beside the steps.
CPU seconds are those of the process, which other work on the machine changes little; wall seconds it changes much.
A step's floating-point operations, forward and backward, are those of matrix products and convolutions, counted by
PyTorch's FlopCounterMode; an addition and a multiplication count as two. The results, a number for each round, go to
benchmark/results/image_step.json; the share of the matrix rate that the table has is of CPU seconds in both.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # behind the directory whose code is measured
import common  # noqa: E402
import laeo  # noqa: E402

BEFORE = "5b9d6fe"
SHAPE, ACTIONS, EPISODES, STEPS = (64, 64, 3), 4, 40, 50  # of FetchPushImage, but for the number of episodes
MATRIX, MATRIX_SECONDS = 1024, 1.0
MEASURE = "import image_step, json, sys; print(json.dumps(image_step.measure(**json.loads(sys.argv[1]))))"


@dataclass
class Args:
    rounds: int = 5  # how often each row is measured
    seconds: float = 5.0  # how long each measurement is
    output: Path = Path(__file__).parent / "results" / "image_step.json"


def random_data(rng: np.random.Generator) -> laeo.Data:
    """Return transitions between random images."""
    images = torch.from_numpy(rng.integers(256, size=(EPISODES * (STEPS + 1), *SHAPE), dtype=np.uint8))
    t = np.tile(np.arange(STEPS), EPISODES)
    action = rng.uniform(-1, 1, (len(t), ACTIONS)).astype(np.float32)
    row = np.repeat(np.arange(EPISODES), STEPS) * (STEPS + 1) + t
    transitions = common.Transitions(row, STEPS - t, np.zeros(len(t), np.float32), action)
    log_ratio = rng.standard_normal(len(images), np.float32)
    return laeo.Data(images, transitions, transitions, transitions, torch.device("cpu"), log_ratio)


def prepare(args: laeo.Args, encoders: int) -> tuple[Callable[[int], laeo.Batch], Callable[[laeo.Batch], None]]:
    """Return a function that draws batch i and one that takes a step with a batch, of the laeo.py that is imported."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    data, mean, std = random_data(rng), torch.full(SHAPE, 128.0), torch.full(SHAPE, 74.0)
    examples = torch.from_numpy(rng.integers(256, size=(args.num_success, *SHAPE), dtype=np.uint8))
    encoders = [laeo.Encoder(mean, std, args, generator) for _ in range(encoders)]
    actor = laeo.Actor(encoders[0], torch.tensor([[-1.0] * ACTIONS, [1.0] * ACTIONS]), args.hidden_dim, generator)
    critic = laeo.Critic(encoders[-1], ACTIONS, args.hidden_dim, args.repr_dim, generator)
    learned = torch.nn.ModuleList([actor, critic]).parameters()  # those of a shared encoder once
    optimizer = torch.optim.Adam(learned, args.learning_rate, eps=1e-7, fused=True)
    return lambda i: laeo.sample(data, args, i), lambda batch: laeo.update(
        batch, examples, actor, critic, optimizer, args
    )


def repeat(step: Callable[[int], None], seconds: float) -> dict[str, float]:
    """Return CPU and wall seconds of a step, over at least `seconds` and one step, after one that is not counted."""
    step(0)
    cpu, wall, steps = time.process_time(), time.perf_counter(), 0
    while not steps or time.perf_counter() - wall < seconds:
        steps += 1
        step(steps)
    return {"cpu": (time.process_time() - cpu) / steps, "wall": (time.perf_counter() - wall) / steps}


def matrix_rate(seconds: float) -> float:
    """Return the GFLOP/s of products of two large float32 matrices, by CPU seconds."""
    a, b = torch.randn(2, MATRIX, MATRIX, generator=torch.Generator().manual_seed(0))
    product = torch.empty(MATRIX, MATRIX)
    return 2 * MATRIX**3 / 1e9 / repeat(lambda _: torch.mm(a, b, out=product), seconds)["cpu"]


def measure(encoders: int, objective: str, batch_size: int, random_shift: int, seconds: float) -> dict[str, float]:
    """Return a step's CPU and wall seconds and its GFLOP, and the matrix rate in GFLOP/s, all on one thread."""
    torch.set_num_threads(1)
    args = laeo.Args("FetchPushImage", batch_size=batch_size, random_shift=random_shift, policy_objective=objective)
    draw, update = prepare(args, encoders)
    batch = draw(0)
    with FlopCounterMode(display=False) as counter:
        update(batch)
    times = repeat(lambda i: update(draw(i)), seconds)
    return times | {"gflop": counter.get_total_flops() / 1e9, "matrix": matrix_rate(min(seconds, MATRIX_SECONDS))}


@contextmanager
def code_before():
    """Give a directory with the code of the commit BEFORE. Raises common.UserError without the history."""
    from run import extract

    with tempfile.TemporaryDirectory(prefix="benchmark-before-") as directory:
        extract(BEFORE, directory, "the row `before`", ROOT)
        yield Path(directory)


def measure_apart(directory: Path, settings: dict) -> dict[str, float]:
    """Return what `measure` finds in a process of its own that imports the code in `directory`."""
    path = os.pathsep.join([str(directory), str(Path(__file__).parent)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", MEASURE, json.dumps(settings)]
    process = subprocess.run(command, cwd=directory, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def main(args: Args) -> dict:
    """Measure, write the results and return them."""
    from made import machine, made

    rows = [{"code": "before", "encoders": 2, "objective": "log_exp_f", "batch_size": 128, "random_shift": 2}]
    defaults = {name: laeo.DEFAULTS[name][1] for name in ("batch_size", "random_shift")}
    rows += [{"code": "after", "encoders": 1, "objective": x} | defaults for x in ("log_exp_f", "weighted")]
    settings = [{name: x for name, x in row.items() if name != "code"} | {"seconds": args.seconds} for row in rows]
    with code_before() as before:
        for _ in range(args.rounds):
            for row, given in zip(rows, settings):
                found = measure_apart(before if row["code"] == "before" else ROOT, given)
                row["gflop"] = found.pop("gflop")
                for name, x in found.items():
                    row.setdefault(name, []).append(x)
                times = f"{1e3 * found['cpu']:.1f} ms CPU, {1e3 * found['wall']:.1f} ms wall"
                rates = f"{row['gflop']:.2f} GFLOP; matrices {found['matrix']:.1f} GFLOP/s"
                print(f"{row['code']}, {row['objective']}: {times}, {rates}", flush=True)
    result = {
        "made": made(),
        "machine": machine(),
        "before": BEFORE,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "rows": rows,
    }
    with common.write_file(args.output) as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
    return result


if __name__ == "__main__":
    with common.user_errors():
        main(tyro.cli(Args))
