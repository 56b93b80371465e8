"""Run a script as a task of a Ray cluster; `benchmark/run.py --ray` does.

The script runs in the worker process itself: nothing of it is left when the worker or the node is killed, and Ray runs
the task again elsewhere. What it wrote is returned, so that nodes need not be able to write to a common place.
"""

import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path

import ray

import common

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes need not find this file as a module


def run_script(command: list[str], directory: str, name: str) -> tuple[int, bytes, dict[str, bytes]]:
    """Run a script with `--run-dir` ending in `name`; return its exit status, what it printed, and its results.

    The process can run nothing else afterwards.
    """
    script = Path(directory, command[0])
    if not script.exists():
        return 1, f"error: there is no {script} on the node {socket.gethostname()}.\n".encode(), {}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with Ray's handler the script would end as if it had failed
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(directory)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary, tempfile.TemporaryFile() as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        run_dir = Path(temporary, name)
        sys.argv = [*command, *([] if command[0] == "collect_data.py" else ["--run-dir", str(run_dir)])]
        sys.path.insert(0, str(script.parent))
        try:
            runpy.run_path(str(script), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            status = 1
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        log.seek(0)
        results = [file for file in (run_dir / "result.json", run_dir / "metrics.jsonl") if file.exists()]
        return status, log.read(), {file.name: file.read_bytes() for file in results}


class Task:
    """A run on a cluster, with what run_all uses of a process; its results and its log appear beside `run_dir`."""

    def __init__(self, command: list[str], directory: Path, run_dir: Path) -> None:
        # Ray hides GPUs from tasks that ask for none. With max_calls=1 the worker process ends with the task.
        function = ray.remote(num_cpus=1, num_gpus=int("cuda" in command), max_calls=1, max_retries=3)(run_script)
        self.reference, self.run_dir = function.remote(command, str(directory), run_dir.name), run_dir

    def poll(self) -> int | None:
        """Return the exit status of a run that has ended, else None."""
        if not ray.wait([self.reference], timeout=0)[0]:
            return None
        try:
            self.returncode, messages, results = ray.get(self.reference)
        except ray.exceptions.RayError as error:  # its worker was killed every time
            self.returncode, messages, results = 1, f"{error}\n".encode(), {}
        self.run_dir.with_suffix(".log").write_bytes(messages)
        self.run_dir.mkdir()
        for name, content in results.items():
            (self.run_dir / name).write_bytes(content)
        return self.returncode

    def kill(self) -> None:
        """Kill the worker process of the run, or take the run off Ray's queue."""
        ray.cancel(self.reference, force=True)


def reach(address: str) -> None:
    """Raise UserError if nobody listens there."""
    try:
        host, port = address.rsplit(":", 1)
        socket.create_connection((host, int(port)), timeout=20).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = f"the Ray cluster cannot be reached at {address} ({common.first_line(error)})"
        raise common.UserError(f"{reason}; what is done stays done.") from None


class Cluster:
    """The Ray cluster that runs are given to."""

    def __init__(self, address: str) -> None:
        """Connect to it. Raises UserError if there is none, or if this machine is no node of it."""
        if "://" in address:
            raise common.UserError(f"--ray is {address}; it must be HOST:PORT or auto, on a node of the cluster.")
        if address != "auto":
            reach(address)  # Ray itself takes half a minute to say so
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise common.UserError(f"there is no Ray cluster at {address} ({common.first_line(error)}).") from None
        context = ray.get_runtime_context()
        own = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        self.addresses = context.gcs_address, f"{own['NodeManagerAddress']}:{own['NodeManagerPort']}"

    def check(self) -> None:
        """Raise UserError if the head or this node is gone; Ray would end this process a minute later, or never."""
        for address in self.addresses:
            reach(address)

    def stop(self, tasks: list[Task]) -> None:
        """Kill these runs and leave the cluster."""
        for task in tasks:
            task.kill()
        if tasks:
            ray.wait([task.reference for task in tasks], num_returns=len(tasks), timeout=10)
        ray.shutdown()
