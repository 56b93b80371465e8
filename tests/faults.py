"""Faults at random moments: kill -9, a full disk, damaged files, traps in pickles. docs/faults.md has results.

    python tests/faults.py
    python tests/faults.py --only kill_training damaged_checkpoint --tries 5
    pytest -m slow -n0 tests/faults.py

A try depends on its seed: `--only NAME --tries 1 --seed SEED`, which a failure prints, makes the same one. A try in
which the fault did not happen, because the disk was large enough or the process had ended before, does not count. Of
some faults there are several kinds, in turn by the seed; each has as many tries.

All scripts are imported once; a try runs them as `__main__` in forked processes, which need not import them again. The
workers of a collection are processes of their own as always. A moment is given in seconds of processor time of the
processes that it is about, and so depends on the machine a little. A full or a read-only disk is a tmpfs, which needs
root.
"""

import atexit
import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import pickle
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import tqdm
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import collect_data  # noqa: E402
import common  # noqa: E402
import evaluate  # noqa: E402, F401
import laeo  # noqa: E402

TRIES = 20
STEPS = 60
FORK = multiprocessing.get_context("fork")
SMALL = {"gradient_steps": STEPS, "batch_size": 16, "hidden_dim": 16, "log_interval": 7, "eval_episodes": 0}
SMALL |= {"device": "cpu", "checkpoint_minutes": 0}  # a checkpoint after each step
METHODS: dict[str, dict[str, Any]] = {  # LAEO without its thousand steps of p*/p
    "laeo": {"num_success": 5, "policy_objective": "log_exp_f"},
    "oril": {"num_success": 5},
    "purl": {"num_success": 5},
    "tailo": {"num_success": 5, "classifier_steps": 20},
    "bc": {},
    "cvl": {},
}
DAY = 86_400


# ------------------------------------------------------------------------------------------------ starting and stopping


class Run:
    """A script that runs in a forked process, in a process group of its own; `before` is called first in it."""

    def __init__(self, directory: Path, script: str, *flags: object, before: Callable[[], object] = lambda: None):
        directory.mkdir(exist_ok=True)
        handle, log = tempfile.mkstemp(".log", f"{script}-", directory.parent)
        os.close(handle)
        self.log = Path(log)
        self.process = FORK.Process(target=self.main, args=(directory, script, [str(x) for x in flags], before))
        self.process.start()

    def main(self, directory: Path, script: str, flags: list[str], before: Callable[[], object]) -> None:
        os.setpgid(0, 0)
        os.chdir(directory)
        with open(self.log, "wb") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = [str(ROOT / f"{script}.py"), *flags]
        before()
        runpy.run_path(sys.argv[0], run_name="__main__")

    def processes(self) -> list[psutil.Process]:
        """Return the processes that live in the run's group: itself, its workers, and helpers."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def wait_until(self, cpu_seconds: float, with_workers: bool = False) -> bool:
        """Wait until it has used so much processor time; return whether it still runs."""
        while self.process.is_alive():
            used = 0.0
            with contextlib.suppress(psutil.Error):
                for process in self.processes() if with_workers else [psutil.Process(self.process.pid)]:
                    used += sum(process.cpu_times()[:2])
            if used >= cpu_seconds:
                return True
            time.sleep(0.05 if with_workers else 0.002)
        return False

    def wait(self, seconds: float = 3600) -> int:
        """Return its exit status when it has ended by itself; nothing of it may be left then."""
        self.process.join(seconds)
        try:
            assert self.process.exitcode is not None, f"it hangs: {self.text()[-2000:]}"
            gone = time.monotonic() + 60
            while left := self.processes():
                assert time.monotonic() < gone, f"processes are left over: {left}"
                time.sleep(0.1)
        finally:
            for process in self.processes():
                process.kill()
        return self.process.exitcode

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def refuses(self, *words: str) -> str:
        """It must end with one sentence (a progress bar may follow), which holds one of these words, and status 1."""
        status, text = self.wait(), self.text()
        lines = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("error: ")]
        wrong = [word for word in ("Traceback", "Exception in thread", "Exception ignored", "panic") if word in text]
        assert status == 1 and len(lines) == 1 and not wrong, f"status {status}, {wrong}: {text[-3000:]}"
        behind = [line for line in text[text.index(lines[0]) + len(lines[0]) :].split("\n") if line.strip()]
        assert all("|" in line and "it/s]" in line for line in behind), f"there is more behind the sentence: {behind}"
        assert not words or any(word in lines[0] for word in words), f"{words} not in: {lines[0]}"
        return lines[0]

    def succeeds(self) -> None:
        status = self.wait()
        assert status == 0, f"status {status}: {self.text()[-3000:]}"


def flags(**values: object) -> list[str]:
    """Return command-line flags; True is a flag without a value."""
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in values.items()]
    return [str(x) for name, value in pairs for x in ((name,) if value is True else (name, value))]


@functools.cache
def home() -> Path:
    """Return a directory with `data`, 40 episodes of FetchReach, and `run-METHOD`, runs that were never stopped."""
    path = Path(tempfile.mkdtemp(prefix="faults-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)  # forked processes end without this
    collect_data.collect(collect_data.Args(env_id="FetchReach", num_episodes=40, output=path / "data", num_workers=1))
    tqdm.tqdm.monitor_interval = 0  # no thread of tqdm: a fork would not have it, and might have its lock
    laeo.train(laeo.Args(dataset=path / "data", run_dir=path / "warm", **SMALL | METHODS["laeo"]))  # imports the rest
    return path


def train(directory: Path, script: str, dataset: Path, run_dir: Path, before=lambda: None, **changes: object) -> Run:
    values = {"env_id": "FetchReach", "dataset": dataset, "run_dir": run_dir} | SMALL | METHODS[script] | changes
    return Run(directory, script, *flags(**{name: x for name, x in values.items() if x is not None}), before=before)


@functools.cache
def reference(script: str) -> tuple[Path, float]:
    """Return the directory of a run that was never stopped, and the processor time that it took."""
    path, before = home() / f"run-{script}", resource.getrusage(resource.RUSAGE_CHILDREN)
    train(home(), script, home() / "data", path).succeeds()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return path, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def load_checkpoint(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def tensors(value: Any, name: str = "") -> dict[str, Any]:
    """Return all that is in nested dictionaries and lists, by path."""
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: x for key, part in pairs for path, x in tensors(part, f"{name}/{key}").items()}
    return {name: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value}


def assert_same_bits(run_dir: Path, other: Path) -> None:
    """Two finished runs have the same networks, moments, metrics and exported policy."""
    one, two = ({**load_checkpoint(path), "args": 0, "seconds": 0} for path in (run_dir, other))
    assert tensors(one) == tensors(two), f"the last checkpoint of {run_dir} differs"
    one, two = (dict(torch.export.load(path / "policy.pt2").state_dict) for path in (run_dir, other))
    assert one and tensors(one) == tensors(two), f"the policy of {run_dir} differs"
    one, two = ((path / "metrics.jsonl").read_text() for path in (run_dir, other))
    assert one == two, f"the metrics of {run_dir} differ"


def assert_whole(run_dir: Path, leftovers: bool = False) -> None:
    """Each file that a run has written under its final name is whole; `leftovers`: hidden ones may be there too."""
    for path in run_dir.iterdir() if run_dir.exists() else ():
        if path.name == "checkpoint.pt":
            load_checkpoint(run_dir)
        elif path.name == "policy.pt2":
            torch.export.load(path)
        elif path.name == "result.json":
            assert {"checkpoint.pt", "policy.pt2"} <= {file.name for file in run_dir.iterdir()}
            json.loads(path.read_text())
        else:
            expected = path.name == "metrics.jsonl" or path.name.startswith("events.out.tfevents.")
            assert expected or (leftovers and path.name.startswith(".")), f"{path} should not be there"


def resume(directory: Path, script: str, run_dir: Path, **changes: Any) -> Run:
    return Run(directory, script, "--resume", run_dir, **changes)


def finish(directory: Path, script: str, run_dir: Path) -> str:
    """Go on with a run that was stopped: it ends with the bits of the reference, or says that it has to start anew."""
    if (run_dir / "checkpoint.pt").exists():
        resume(directory, script, run_dir).succeeds()
        assert_same_bits(run_dir, reference(script)[0])
        return "resumed"
    resume(directory, script, run_dir).refuses("start anew")
    return "stopped before its first checkpoint"


@contextlib.contextmanager
def disk(path: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes (whole pages)."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)


def any_method(rng: np.random.Generator) -> str:
    return str(rng.choice(list(METHODS)))


# ---------------------------------------------------------------------------------------------------- killed processes


def stop_training(rng: np.random.Generator, directory: Path, number: int) -> str:
    """Stop a run up to three times, then let it end."""
    script, run_dir, stopped = any_method(rng), directory / "run", 0
    seconds = reference(script)[1]
    run = train(directory, script, home() / "data", run_dir)
    for _ in range(rng.integers(1, 4)):
        alive = run.wait_until(rng.uniform(0.1, 0.9) * seconds)  # SIGTERM needs a handler, which the first line sets
        if alive:
            os.kill(run.process.pid, number)
        if run.wait() == 0:  # it had ended already
            break
        if number == signal.SIGKILL:
            assert run.wait() == -number, run.text()[-2000:]
        else:
            run.refuses("interrupted")
        stopped += 1
        assert_whole(run_dir, leftovers=number == signal.SIGKILL)
        if not (run_dir / "checkpoint.pt").exists():
            break
        run = resume(directory, script, run_dir)
    else:
        run.succeeds()
    if (run_dir / "result.json").exists():
        assert_same_bits(run_dir, reference(script)[0])
        return f"stopped {stopped}x, same bits"
    return finish(directory, script, run_dir)


def kill_training(rng: np.random.Generator, directory: Path) -> str:
    """kill -9 of training, up to three times: files whole, resumed to the same bits"""
    return stop_training(rng, directory, signal.SIGKILL)


def terminate_training(rng: np.random.Generator, directory: Path) -> str:
    """SIGTERM of training, up to three times: one sentence, files whole, none hidden, resumed to the same bits"""
    return stop_training(rng, directory, signal.SIGTERM)


@functools.cache
def collection_seconds() -> float:
    """Return the processor time of the collection of 40 episodes with one worker."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    Run(home() / "cost", "collect_data", *flags(num_episodes=40, num_workers=1, output="data")).succeeds()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def stop_collection(rng: np.random.Generator, directory: Path, number: int, run: Run, output: Path) -> str:
    """Stop a process that collects; the dataset is there whole or not at all, and the next collection cleans up."""
    moment = rng.uniform(0.1, 0.95) * collection_seconds()
    if run.wait_until(moment, with_workers=True):
        os.kill(run.process.pid, number)
    if run.wait() != 0 and number == signal.SIGKILL:
        assert run.wait() == -number, run.text()[-2000:]
    elif run.wait() != 0:
        run.refuses("nothing was written to", "interrupted")
    return what_is_there(output, leftovers=number == signal.SIGKILL)


def what_is_there(output: Path, leftovers: bool) -> str:
    hidden = list(output.parent.glob(".*")) if output.parent.exists() else []
    assert leftovers or not hidden, f"{hidden} are left over"
    if output.exists():
        common.load_dataset(output, None, verify=True)
        return "ended before"
    if output.parent.exists():
        with common.write_directory(output):
            pass
        assert sorted(output.parent.glob(".*")) == [], "the next collection does not remove what is left"
    return f"nothing written, {len(hidden)} hidden"


def collect(directory: Path, workers: int = 1, before=lambda: None, **changes: object) -> Run:
    values = {"num_episodes": 40, "num_workers": workers, "output": "data"} | changes
    return Run(directory, "collect_data", *flags(**values), before=before)


def kill_collection(rng: np.random.Generator, directory: Path) -> str:
    """kill -9 of a collection: its workers end, no dataset or a whole one, the next one cleans up"""
    place = directory / "place"
    return stop_collection(rng, directory, signal.SIGKILL, collect(place), place / "data")


def terminate_collection(rng: np.random.Generator, directory: Path) -> str:
    """SIGTERM of a collection: one sentence, no process and no file left, no dataset or a whole one"""
    place = directory / "place"
    return stop_collection(rng, directory, signal.SIGTERM, collect(place), place / "data")


def stop_collection_worker(rng: np.random.Generator, directory: Path, number: int) -> str:
    place = directory / "place"
    run = collect(place, workers=2)
    alive = run.wait_until(rng.uniform(0, 1.5) * collection_seconds(), with_workers=True)
    workers = []
    while alive and not workers and run.process.is_alive():
        for process in run.processes():
            with contextlib.suppress(psutil.Error):
                workers += [process] if any("spawn_main" in word for word in process.cmdline()) else []
        time.sleep(0.02)
    if workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            workers[rng.integers(len(workers))].send_signal(number)
    if run.wait() == 0:
        return what_is_there(place / "data", leftovers=False)
    run.refuses("a worker process has ended")
    assert not (place / "data").exists()
    return what_is_there(place / "data", leftovers=False)


def kill_collection_worker(rng: np.random.Generator, directory: Path) -> str:
    """kill -9 of one of two workers: one sentence, no process and no file left"""
    return stop_collection_worker(rng, directory, signal.SIGKILL)


def terminate_collection_worker(rng: np.random.Generator, directory: Path) -> str:
    """SIGTERM of one of two workers: one sentence, no process and no file left"""
    return stop_collection_worker(rng, directory, signal.SIGTERM)


def stop_making_data(rng: np.random.Generator, directory: Path, number: int) -> str:
    place = directory / "place"
    run = train(place, any_method(rng), None, None)
    result = stop_collection(rng, directory, number, run, place / "datasets" / "FetchReach-medium")
    assert not (place / "runs").exists()
    return result


def kill_making_data(rng: np.random.Generator, directory: Path) -> str:
    """kill -9 of a run that makes its data: the workers end, nothing under a final name, the next one cleans up"""
    return stop_making_data(rng, directory, signal.SIGKILL)


def terminate_making_data(rng: np.random.Generator, directory: Path) -> str:
    """SIGTERM of a run that makes its data: one sentence, no process and no file left"""
    return stop_making_data(rng, directory, signal.SIGTERM)


# ------------------------------------------------------------------------------------------- disks, clocks, two at once


def full_disk_training(rng: np.random.Generator, directory: Path) -> str:
    """training on a full tmpfs: one sentence, files whole; with more space, resumed to the same bits"""
    script = any_method(rng)
    size = sum(path.stat().st_size for path in reference(script)[0].iterdir())
    with disk(directory / "disk", 4096 * int(rng.integers(1, 2 + size // 4096))) as place:
        run = train(directory, script, home() / "data", place / "run")
        if run.wait() == 0:
            assert_same_bits(place / "run", reference(script)[0])
            return "fits"
        run.refuses("No space left on device")
        assert_whole(place / "run")
        if not (place / "run").exists():
            return "refused at once"
        remount(place, "size=100m")
        return finish(directory, script, place / "run")


def full_disk_saving(rng: np.random.Generator, directory: Path) -> str:
    """common.save_dataset on a full tmpfs: UserError, nothing left; what was there before stays"""
    episodes, steps = int(rng.integers(2, 30)), int(rng.integers(1, 50))
    observations = rng.normal(size=(episodes, steps + 1, 10))
    arguments = observations, rng.uniform(-1, 1, (episodes, steps, 4)), observations[:, 0], [False] * episodes
    common.save_dataset(directory / "whole", *arguments)
    pages = sum(-(-path.stat().st_size // 4096) for path in (directory / "whole").iterdir())
    with disk(directory / "disk", 4096 * int(rng.integers(1, pages + 4))) as place:

        def main() -> None:
            with common.user_errors():
                common.save_dataset(place / "data", *arguments)

        process = FORK.Process(target=into, args=(directory / "log", main))  # SIGBUS would end it
        process.start(), process.join()
        check_sentence(process, directory / "log")
        if process.exitcode == 0:
            common.load_dataset(place / "data", None, verify=True)
            return "fits"
        assert list(place.iterdir()) == [], "something is left"
        return "refused"


def into(log: Path, function: Callable[[], object]) -> None:
    """Call a function whose messages go to a file."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    function()


def check_sentence(process: multiprocessing.Process, log: Path) -> None:
    """It must have ended well, or with one sentence and status 1."""
    text = log.read_text()
    right = text.startswith("error: ") and text.count("\n") == 1 if process.exitcode == 1 else process.exitcode == 0
    assert right, f"exit status {process.exitcode}: {text}"


def full_disk_collection(rng: np.random.Generator, directory: Path) -> str:
    """a disk that something else fills while data are collected: one sentence, no process and no file left"""
    size = sum(path.stat().st_size for path in (home() / "data").iterdir())
    with disk(directory / "disk", size + 4096 * int(rng.integers(0, 20))) as place:
        run = collect(directory, output=place / "data")
        if run.wait_until(rng.uniform(0, 0.9) * collection_seconds(), with_workers=True):
            fill(place)
        status = run.wait()
        (place / "other").unlink(missing_ok=True)
        if status == 0:
            return what_is_there(place / "data", leftovers=False)
        sentence = run.refuses("No space left on device", "more than")
        assert list(place.iterdir()) == [], f"left over: {list(place.iterdir())}"
        return "refused at the end" if "device" in sentence else "refused at once"


def read_only(rng: np.random.Generator, directory: Path, number: int) -> str:
    """read-only tmpfs for a run, a resumed run, a collection, a film: one sentence, no file"""
    kind, script = ["new run", "resume", "collection", "film"][number], any_method(rng)
    with disk(directory / "disk", 10**7) as place:
        shutil.copytree(reference(script)[0], place / "run")
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        remount(place, "ro")
        if kind == "new run":
            run = train(directory, script, home() / "data", place / "new")
        elif kind == "resume":
            run = resume(directory, script, place / "run")
        elif kind == "collection":
            run = collect(directory, output=place / "data")
        else:
            run = Run(directory, "evaluate", place / "run", *flags(episodes=1, video=place / "film.gif"))
        run.refuses("Read-only file system")
        assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    return kind


def full_disk_film(rng: np.random.Generator, directory: Path) -> str:
    """a film on a full tmpfs: one sentence, nothing left"""
    run_dir = reference("bc")[0]
    with disk(directory / "disk", 4096 * int(rng.integers(1, 60))) as place:
        run = Run(directory, "evaluate", run_dir, *flags(episodes=1, video=place / "film.gif"))
        if run.wait() == 0:
            assert (place / "film.gif").read_bytes()[-1:] == b";"  # a GIF's last byte
            return "fits"
        run.refuses("No space left on device")
        assert list(place.iterdir()) == [], f"left over: {list(place.iterdir())}"
    return "refused"


def fill(place: Path) -> None:
    """Write a file, `other`, until the disk is full."""
    with contextlib.suppress(OSError), open(place / "other", "wb") as file:
        while True:
            file.write(bytes(4096)), file.flush()


def disk_fills_while_training(rng: np.random.Generator, directory: Path) -> str:
    """something else fills the disk in mid-run: one sentence, files whole; with more space, resumed to the same bits"""
    script = any_method(rng)
    with disk(directory / "disk", 4 * 10**6) as place:
        run = train(directory, script, home() / "data", place / "run")
        run.wait_until(rng.uniform(0.1, 0.9) * reference(script)[1])
        fill(place)
        if run.wait() != 0:
            run.refuses("No space left on device")
        (place / "other").unlink(missing_ok=True)
        assert_whole(place / "run")
        if (place / "run" / "result.json").exists():
            assert_same_bits(place / "run", reference(script)[0])
            return "ended before"
        return finish(directory, script, place / "run") if (place / "run").exists() else "refused at once"


def together(rng: np.random.Generator, directory: Path, number: int) -> str:
    """two runs that start in the same second: a directory each; with one --run-dir, one of them is refused"""
    script, same = any_method(rng), bool(number)
    place, run_dir = directory / "place", directory / "place" / "run" if same else None
    runs = [train(place, script, home() / "data", run_dir) for _ in "12"]
    statuses = sorted(run.wait() for run in runs)
    if same:
        assert statuses == [0, 1], f"statuses {statuses}: {[run.text()[-1000:] for run in runs]}"
        for run in runs:
            if run.process.exitcode:
                run.refuses("holds a run; choose another --run-dir", "File exists")
        directories = [run_dir]
    else:
        assert statuses == [0, 0], f"statuses {statuses}: {[run.text()[-1000:] for run in runs]}"
        directories = list((place / "runs").iterdir())
        assert len(directories) == 2
    for path in directories:
        assert_whole(path)
        assert_same_bits(path, reference(script)[0])
    return "one --run-dir" if same else "two directories"


def together_collecting(rng: np.random.Generator, directory: Path) -> str:
    """two processes that write one dataset at once, many times: it is whole and nothing is left"""
    observations = rng.normal(size=(4, 6, 10))

    def main(k: int) -> None:
        for _ in range(20):
            with common.user_errors(), common.write_directory(directory / "data") as temporary:
                common.save_dataset(temporary / "x", observations + k, np.full((4, 5, 4), k / 2), observations[0] + k)
                for file in (temporary / "x").iterdir():
                    file.rename(temporary / file.name)
                (temporary / "x").rmdir()

    logs = [directory.with_suffix(f".{k}") for k in (0, 1)]
    processes = [FORK.Process(target=into, args=(log, functools.partial(main, k))) for k, log in enumerate(logs)]
    [process.start() for process in processes], [process.join() for process in processes]
    for process, log in zip(processes, logs):
        check_sentence(process, log)
    dataset = common.load_dataset(directory / "data", None, verify=True)
    assert dataset.actions.min() == dataset.actions.max()
    with common.write_directory(directory / "data"):
        pass
    assert [path.name for path in directory.iterdir()] == ["data"], list(directory.iterdir())
    return f"statuses {sorted(process.exitcode for process in processes)}"


def replaced_while_training(rng: np.random.Generator, directory: Path) -> str:
    """a dataset that is replaced during training: the same bits, or one sentence"""
    script = any_method(rng)
    shutil.copytree(home() / "data", directory / "data")
    run = train(directory, script, directory / "data", directory / "run")
    running = run.wait_until(rng.uniform(0, 0.9) * reference(script)[1])
    replace_dataset(directory / "data", other_dataset())
    if run.wait() != 0:
        return "refused: " + run.refuses()[:40]
    used = load_checkpoint(directory / "run")["dataset"]
    if used == load_checkpoint(reference(script)[0])["dataset"]:
        assert_same_bits(directory / "run", reference(script)[0])
        return "same bits" if running else "ended before"
    assert used == common.load_dataset(other_dataset(), None).checksum, "it was trained on a mixture of two datasets"
    return "trained on the new one"


@functools.cache
def other_dataset() -> Path:
    """Return a dataset of the same shapes with the episodes in reverse order."""
    path = home() / "other"
    shutil.copytree(home() / "data", path)
    for file in path.glob("*.npy"):
        np.save(file, np.load(file)[::-1])
    metadata = common.read_metadata(path)
    common.write_metadata(path, {name: x for name, x in metadata.items() if name not in ("versions", "sha256")})
    return path


def replace_dataset(path: Path, content: Path, number: int = 0) -> None:
    """Put the files of another dataset there, with metadata that nothing before had."""
    with common.write_directory(path) as temporary:
        for file in content.iterdir():
            shutil.copyfile(file, temporary / file.name)
        metadata = json.dumps(common.read_metadata(content) | {"number": number})
        (temporary / "metadata.json").write_text(metadata)


def replaced_while_loaded(rng: np.random.Generator, directory: Path) -> str:
    """a dataset that is replaced many times while it is loaded, with --verify and without: never a mixture of two"""
    shutil.copytree(home() / "data", directory / "data")
    known = {common.load_dataset(path, None).checksum for path in (home() / "data", other_dataset())}
    verify, result = bool(rng.integers(2)), FORK.SimpleQueue()

    def main() -> None:
        outcomes = Counter()
        for _ in range(60):
            try:
                dataset = common.load_dataset(directory / "data", None, verify=verify)
                outcomes["loaded" if dataset.checksum in known else "mixture"] += 1
            except (common.UserError, OSError):  # of both of which common.user_errors makes one sentence
                outcomes["refused"] += 1
        result.put(outcomes)

    process, numbers = FORK.Process(target=main), itertools.count(1)
    process.start()
    while process.is_alive():
        replace_dataset(directory / "data", (home() / "data", other_dataset())[rng.integers(2)], next(numbers))
        time.sleep(rng.uniform(0, 0.01))
    process.join()
    assert process.exitcode == 0
    outcomes = result.get()
    assert not outcomes["mixture"], f"{outcomes} with verify={verify}"
    return "never a mixture"


def clock_set_back(rng: np.random.Generator, directory: Path) -> str:
    """a clock that goes back by up to a day, again and again, in training, kill -9 and resume: the same bits"""
    script, run_dir = any_method(rng), directory / "run"
    moments = np.sort(rng.uniform(0, 2, 5))
    steps = rng.uniform(0, DAY, 5)

    def before() -> None:  # time.time and what is made of it; the monotonic clock is not set by anyone
        real, began = time.time, time.monotonic()
        shifted = lambda: real() - steps[: np.searchsorted(moments, time.monotonic() - began)].sum()  # noqa: E731
        time.time, time.time_ns = shifted, lambda: int(shifted() * 1e9)
        tqdm.std.time = shifted

    run = train(directory, script, home() / "data", run_dir, before, checkpoint_minutes=1e-4)
    if run.wait_until(rng.uniform(0, 0.9) * reference(script)[1]):
        run.process.kill()
        run.wait()
        if not (run_dir / "checkpoint.pt").exists():
            return finish(directory, script, run_dir)
        run = resume(directory, script, run_dir, before=before)
    run.succeeds()
    assert_same_bits(run_dir, reference(script)[0])
    seconds = json.loads((run_dir / "result.json").read_text())["seconds"]
    assert all(0 <= value < 3600 for value in seconds.values()), seconds
    return "same bits"


# ------------------------------------------------------------------------------------------------------- damaged files


def damage(rng: np.random.Generator, path: Path, number: int) -> str:
    """Cut a file off at a random byte, or flip one random bit; return which."""
    content = bytearray(path.read_bytes())
    place = int(rng.integers(len(content)))
    if number == 0:
        path.write_bytes(content[:place])
        return "truncated"
    content[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    return "bit flipped"


def damaged_checkpoint(rng: np.random.Generator, directory: Path, number: int) -> str:
    """a truncated or bit-flipped checkpoint: one sentence and nothing written, or the same bits"""
    script = any_method(rng)
    run_dir = shutil.copytree(reference(script)[0], directory / "run")
    kind = damage(rng, run_dir / "checkpoint.pt", number)
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    run = resume(directory, script, run_dir)
    if run.wait() == 0:
        assert_same_bits(run_dir, reference(script)[0])
        return f"{kind}: same bits"
    run.refuses("cannot be resumed")
    assert before == {path: path.read_bytes() for path in run_dir.iterdir()}
    return f"{kind}: refused"


def damaged_policy(rng: np.random.Generator, directory: Path, number: int) -> str:
    """a truncated or bit-flipped policy: evaluate.py ends with one sentence, or plays the same policy"""
    script = any_method(rng)
    run_dir = shutil.copytree(reference(script)[0], directory / "run")
    kind = damage(rng, run_dir / "policy.pt2", number)
    run = Run(directory, "evaluate", run_dir, "--episodes", 1)
    if run.wait() == 0:
        assert_same_bits(run_dir, reference(script)[0])
        return f"{kind}: same policy"
    run.refuses("is not a finished run")
    return f"{kind}: refused"


def damaged_result(rng: np.random.Generator, directory: Path, number: int) -> str:
    """a truncated or bit-flipped result.json: evaluate.py ends with one sentence, or plays"""
    run_dir = shutil.copytree(reference("bc")[0], directory / "run")
    kind = damage(rng, run_dir / "result.json", number)
    run = Run(directory, "evaluate", run_dir, "--episodes", 1)
    if run.wait() == 0:
        return f"{kind}: played"
    run.refuses(str(run_dir), "there is no environment")
    return f"{kind}: refused"


def damaged_array(rng: np.random.Generator, directory: Path, number: int) -> str:
    """a truncated or bit-flipped array: with --verify always one sentence, no run; without, no traceback"""
    script, verify = any_method(rng), bool(rng.integers(2))
    data = shutil.copytree(home() / "data", directory / "data")
    kind = damage(rng, rng.choice(sorted(data.glob("*.npy"))), number)
    run = train(directory, script, data, directory / "run", **({"verify": True} if verify else {}))
    if run.wait() == 0:
        assert not verify, "the damage was not found"
        assert_whole(directory / "run")
        return f"{kind}: taken without --verify"
    run.refuses(str(data), "try a smaller --learning-rate")
    assert not verify or not (directory / "run").exists()
    return f"{kind}: refused"


def damaged_metadata(rng: np.random.Generator, directory: Path, number: int) -> str:
    """a truncated or bit-flipped metadata.json: one sentence and no run, or a run on the same arrays"""
    script = any_method(rng)
    data = shutil.copytree(home() / "data", directory / "data")
    kind = damage(rng, data / "metadata.json", number)
    run = train(directory, script, data, directory / "run", **({"verify": True} if rng.integers(2) else {}))
    if run.wait() == 0:
        one, two = (load_checkpoint(path) for path in (directory / "run", reference(script)[0]))
        assert one["dataset"] == two["dataset"]
        return f"{kind}: taken"
    run.refuses(str(data))
    assert not (directory / "run").exists()
    return f"{kind}: refused"


# -------------------------------------------------------------------------------------------------- traps and bad edits


class Trap:
    """A value that creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def trap(rng: np.random.Generator, path: Path, marker: Path) -> str:
    """Put a pickle that creates the marker in place of a file, or of an exported policy's inputs; return which."""
    kinds = ["pickle", "torch.save", "object array", "npz"]
    kind = str(rng.choice(kinds + ["inputs"] * 4 * (path.suffix == ".pt2")))
    buffer = io.BytesIO()
    if kind == "pickle":
        pickle.dump(Trap(marker), buffer)
    elif kind == "torch.save":
        torch.save({"checkpoint": Trap(marker)}, buffer)
    elif kind == "object array":
        np.save(buffer, np.array([Trap(marker)] * 40, object), allow_pickle=True)
    elif kind == "inputs":
        torch.save((Trap(marker),), inputs := io.BytesIO())
        with zipfile.ZipFile(path) as whole, zipfile.ZipFile(buffer, "w") as changed:
            for name in whole.namelist():
                changed.writestr(name, inputs.getvalue() if "inputs" in name else whole.read(name))
    else:
        np.savez(buffer, np.array([Trap(marker)], object))
    path.write_bytes(buffer.getvalue())
    return kind


def code_in_pickles(rng: np.random.Generator, directory: Path) -> str:
    """a pickle that would run code, in place of each file that is read: one sentence, and no code runs"""
    marker, script = directory / "marker", any_method(rng)
    data, run_dir = shutil.copytree(home() / "data", directory / "data"), directory / "run"
    shutil.copytree(reference(script)[0], run_dir)
    shutil.copytree(ROOT / "behavior", directory / "behavior")
    np.save(data / "rewards.npy", np.zeros((40, 50), np.float32))
    names = ["checkpoint.pt", "policy.pt2", "result.json", "behavior", "metadata.json", "observations.npy"]
    names += ["actions.npy", "lengths.npy", "success_examples.npy", "successes.npy", "terminals.npy", "rewards.npy"]
    names += ["critic"]
    for name in names:
        if name in ("checkpoint.pt", "policy.pt2", "result.json"):
            path = run_dir / name
            start = functools.partial(resume, directory, script, run_dir)
            if name != "checkpoint.pt":
                start = functools.partial(Run, directory, "evaluate", run_dir, "--episodes", 1)
        elif name == "critic":
            path = directory / "other" / "checkpoint.pt"
            path.parent.mkdir()
            start = functools.partial(train, directory, "cvl", home() / "data", directory / "new", critic=path.parent)
        elif name == "behavior":
            path = directory / "behavior" / "FetchReach.pt"
            start = functools.partial(collect, directory, output=directory / "d", behavior_dir=path.parent)
        else:
            path = data / name
            reads = {"successes.npy": ("oril", {"reward": "true"}), "rewards.npy": ("cvl", {"reward": "rewards"})}
            reader, changes = reads.get(name, (script, {}))
            start = functools.partial(train, directory, reader, data, directory / "new", **changes)
        before = path.read_bytes() if path.exists() else None
        kind = trap(rng, path, marker)
        words = {"checkpoint.pt": "cannot be resumed", "critic": "--critic", "behavior": "FetchReach.pt"}
        words |= dict.fromkeys(("policy.pt2", "result.json"), "is not a finished run")
        try:
            start().refuses(words.get(name, name))
        except AssertionError as error:
            raise AssertionError(f"{kind} in place of {name}: {error}") from None
        assert not marker.exists(), f"{kind} in place of {name} has run code"
        assert not (directory / "new").exists() and not (directory / "d").exists()
        path.unlink() if before is None else path.write_bytes(before)
    pickle.loads(pickle.dumps(Trap(marker)))
    assert marker.exists()  # the trap is a real one
    return f"{len(names)} files"


EDITS = 500  # of each try: 20 tries make 10,000
FORBIDDEN = ("pickle.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "socket.", "os.remove")
FORBIDDEN += ("os.rename", "os.kill", "shutil.", "ctypes.dlopen")
WEIRD = [None, True, -1, 0, 1e308, 2**63, 10**400, "", "\0", "x" * 10_000, [], {}, [[]], [[[0]]], {"a": {}}, "NaN"]
DTYPES = "|O <f4 >f4 <f8 |u1 <i4 |V4 <U999999999 |S0 <M8[ns] <c16 |b1 bad <f4,<f4".split()


def edit_bytes(rng: np.random.Generator, content: bytes, most: int) -> bytes:
    """Change, remove, insert or repeat bytes, one to four times, among the first ones."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        i, n = int(rng.integers(min(most, len(content)) + 1)), int(rng.integers(1, 9))
        new = rng.bytes(n) if rng.integers(2) else bytes(rng.choice(list(b"0123456789,()[]{}'\":-eO<>|"), n))
        which = rng.integers(4)
        content[i : i + n * (which != 2)] = (new, b"", new, content[i : i + n] * 2)[which]
    return bytes(content)


def edit_metadata(rng: np.random.Generator, content: bytes) -> bytes:
    """Edit bytes, or give a random entry a strange value, or nest deeply."""
    which = rng.integers(8)
    if which < 3:
        return edit_bytes(rng, content, len(content))
    if which == 3:
        return (b'{"a":', b"[")[rng.integers(2)] * int(rng.integers(1, 100_000))
    metadata = json.loads(content)
    place, name = metadata, str(rng.choice(list(metadata)))
    if isinstance(metadata[name], dict) and metadata[name] and rng.integers(2):
        place, name = metadata[name], str(rng.choice(list(metadata[name])))
    place[name] = WEIRD[rng.integers(len(WEIRD))]
    return json.dumps(place if rng.integers(10) == 0 else metadata).encode()


def edit_header(rng: np.random.Generator, content: bytes) -> bytes:
    """Edit bytes, or write a well-formed header of another type, order or shape."""
    if rng.integers(2):
        return edit_bytes(rng, content, 130)
    array = np.load(io.BytesIO(content))
    sizes = [0, 1, -1, 2, 3, 5, 2**31, 2**40, 2**63 - 1, 2**64, 10**30, *array.shape]
    shape = [sizes[i] for i in rng.integers(len(sizes), size=rng.integers(0, 5))]
    shape = shape if rng.integers(3) else list(array.shape)
    dtype = DTYPES[rng.integers(len(DTYPES))] if rng.integers(2) else array.dtype.str
    header = {"descr": dtype, "fortran_order": bool(rng.integers(2)), "shape": tuple(map(int, shape))}
    text = (str(header).ljust(117) + "\n").encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content[128:]


def random_edits(rng: np.random.Generator, directory: Path) -> str:
    """500 edits of metadata.json and .npy headers: refused, or right shapes; no hang, crash, code or huge memory"""
    observations = rng.normal(size=(3, 5, 10))
    arguments = observations, rng.uniform(-1, 1, (3, 4, 4)), observations[:, 0], [False] * 3, np.zeros((3, 4))
    common.save_dataset(directory / "data", *arguments)
    files = {path: path.read_bytes() for path in sorted((directory / "data").iterdir())}
    metadata = directory / "data" / "metadata.json"
    values = json.loads(files[metadata]) | {"env_id": "FetchReach", "quality": "medium"}
    files[metadata] = json.dumps(values | {"action_bounds": [[-1.0] * 4, [1.0] * 4]}).encode()
    result = FORK.SimpleQueue()

    def main() -> None:
        os.dup2(os.open(directory.with_suffix(".log"), os.O_WRONLY | os.O_CREAT), 2)
        soft = psutil.Process().memory_info().vms + 2**28
        resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
        loading, seen = [], []

        def audit(event: str, arguments: tuple) -> None:
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if loading and (writes or event.startswith(FORBIDDEN)):
                seen.append((event, str(arguments)[:200]))

        def too_long(*_: object) -> None:
            raise TimeoutError("it hangs")

        sys.addaudithook(audit)
        signal.signal(signal.SIGPROF, too_long)
        outcomes: Counter = Counter()
        for number in range(EDITS):
            path = metadata if rng.integers(3) == 0 else list(files)[rng.integers(len(files))]
            content = (edit_metadata if path == metadata else edit_header)(rng, files[path])
            (directory / "data").mkdir(exist_ok=True)
            for file, original in files.items():
                file.write_bytes(original if file != path else content)
            signal.setitimer(signal.ITIMER_PROF, 5)  # seconds of processor time
            loading.append(1)
            try:
                dataset = common.load_dataset(directory / "data", None, verify=bool(rng.integers(2)))
                shapes = dataset.observations.shape[:2], dataset.actions.shape[:2], dataset.lengths.shape
                assert shapes == ((3, 5), (3, 4), (3,)) and dataset.action_bounds.shape == (2, dataset.actions.shape[2])
                outcomes["taken"] += 1
            except common.UserError as error:
                assert "MemoryError" not in str(error) and "it hangs" not in str(error), (str(error), content[:200])
                assert "\n" not in str(error), (str(error), content[:200])
                outcomes["refused"] += 1
            except Exception as error:
                raise AssertionError(f"edit {number} of {path.name}, {content[:300]}: {error!r}") from error
            finally:
                loading.clear()
                signal.setitimer(signal.ITIMER_PROF, 0)
            assert not seen, f"edit {number} of {path.name}, {content[:300]}: {seen}"
        result.put(dict(outcomes))

    process = FORK.Process(target=main)
    process.start(), process.join(3600)
    hangs = process.is_alive()
    process.kill()
    log = directory.with_suffix(".log").read_text(errors="replace")
    assert not hangs and process.exitcode == 0, f"exit status {process.exitcode}: {log[-3000:]}"
    outcomes = result.get()
    assert sum(outcomes.values()) == EDITS and min(outcomes.get("taken", 0), outcomes.get("refused", 0)) > 0, outcomes
    return f"{EDITS} edits"


FAULTS: dict[str, Callable[[np.random.Generator, Path], str]] = {
    fault.__name__: fault
    for fault in (
        kill_training, terminate_training, kill_collection, terminate_collection, kill_collection_worker,
        terminate_collection_worker, kill_making_data, terminate_making_data, full_disk_training, full_disk_saving,
        full_disk_collection, full_disk_film, disk_fills_while_training, read_only, together, together_collecting,
        damaged_checkpoint, damaged_policy, damaged_result, damaged_array, damaged_metadata, code_in_pickles,
        random_edits, replaced_while_training, replaced_while_loaded, clock_set_back,
    )
}  # fmt: skip
KINDS = {"read_only": 4, "together": 2, "damaged_checkpoint": 2, "damaged_policy": 2, "damaged_result": 2}
KINDS |= {"damaged_array": 2, "damaged_metadata": 2}  # of a fault, which is given the number of one
NOTHING = "fits", "ended before", "stopped 0x"  # how outcomes begin in which the fault did not happen


# ------------------------------------------------------------------------------------------------------------- running


def attempt(name: str, seed: int) -> str:
    """Make one try of a fault; its seed decides all that is random."""
    rng = np.random.default_rng([seed, *name.encode()])
    home()
    with tempfile.TemporaryDirectory(prefix="fault-") as directory:
        (Path(directory) / "try").mkdir()
        return FAULTS[name](rng, Path(directory) / "try", *((seed % KINDS[name],) if name in KINDS else ()))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_fault(name):
    for seed in range(TRIES * KINDS.get(name, 1)):
        attempt(name, seed)


@pytest.mark.parametrize("seed", [0, 3])
def test_a_damaged_checkpoint_is_refused(seed):
    """One try of each kind; `python tests/faults.py` makes the others."""
    assert attempt("damaged_checkpoint", seed).endswith("refused")


@dataclass
class Args:
    only: tuple[str, ...] = ()
    """names of faults; all if not given"""
    tries: int = TRIES
    """of each fault, or of each kind of it, in which it happened"""
    seed: int = 0
    """of the first try; the next one's is one more"""


def main(args: Args) -> bool:
    """Try faults; print each failure and, at the end, the table of docs/faults.md; return whether all held."""
    if unknown := set(args.only) - set(FAULTS):
        raise common.UserError(f"--only is {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}.")
    rows, began, failed = [], time.monotonic(), 0
    for name in args.only or FAULTS:
        outcomes, failures, seeds, tries = Counter(), 0, itertools.count(args.seed), 0
        while tries < args.tries * KINDS.get(name, 1):
            seed = next(seeds)
            try:
                outcome = attempt(name, seed)
            except pytest.skip.Exception as reason:
                outcome = f"skipped: {reason}"
            except Exception as error:
                failures, tries = failures + 1, tries + 1
                shown = error if isinstance(error, AssertionError) else "".join(traceback.format_exception(error))
                print(f"FAILED: --only {name} --tries 1 --seed {seed}: {shown}", flush=True)
                continue
            outcomes[outcome] += 1
            tries += not outcome.startswith(NOTHING)
        happened = ", ".join(f"{outcome} ({count})" for outcome, count in sorted(outcomes.items()))
        rows.append(f"| `{name}` | {FAULTS[name].__doc__} | {tries} | {happened} | {failures} |")
        print(f"{time.monotonic() - began:.0f} s: {name}: {happened}; {failures} failures", flush=True)
        failed += failures
    print("\n| fault | what is tried and must hold | tries | what happened | failures |\n|---|---|---|---|---|")
    print("\n".join(rows))
    return not failed


if __name__ == "__main__":
    with common.user_errors():
        sys.exit(0 if main(tyro.cli(Args)) else 1)
