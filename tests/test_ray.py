"""benchmark/run.py --ray on a cluster of two nodes on this machine: results, failures, and what is killed."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import common

pytest.importorskip("ray")
ROOT = Path(__file__).parent.parent

# Notes its process in a file; runs for ever until that has been so for as many times as the command says.
SCRIPT = """
import json, os, pathlib, sys, time
tries, place = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[-1])
with open(tries, "a") as file:
    file.write(f"{os.getpid()}\\n")
if len(tries.read_text().split()) <= int(sys.argv[2]):
    time.sleep(600)
place.mkdir(parents=True)
(place / "result.json").write_text(json.dumps({"process": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}))
"""


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)
    return value


def free_ports(number):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]


def living(processes):
    """Return those that are there and have not ended."""
    found = set()
    for pid in set(processes) & set(psutil.pids()):
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.add(pid)
    return found


class Cluster:
    """A head and a second node with one CPU each, in a directory of their own, without dashboard and statistics."""

    def __init__(self):
        self.directory = tempfile.mkdtemp(prefix="ray-")  # a short path, since it has sockets
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        place = f"--port={self.address.split(':')[1]}", f"--temp-dir={self.directory}"
        self.nodes, self.log = [], Path(self.directory, "start.log")
        try:
            self.open(place)
        except BaseException:
            self.close()
            raise

    def open(self, place):
        for flags in (("--head", *place, "--include-dashboard=false"), (f"--address={self.address}",)):
            self.nodes.append(self.start(*flags))
            wait_until(self.started)

    def started(self):
        assert all(node.poll() is None for node in self.nodes), self.log.read_text()
        return self.log.read_text().count("Ray runtime started") == len(self.nodes)

    def start(self, *flags):
        # Without ports for them a node waits for its agents, and on a slow machine gives up.
        names = "dashboard-agent-grpc", "dashboard-agent-listen", "metrics-export", "runtime-env-agent"
        ports = [f"--{name}-port={port}" for name, port in zip(names, free_ports(4))]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *flags, *ports]
        command += ["--num-cpus=1", "--object-store-memory=100000000", "--include-log-monitor=false"]
        command += ["--disable-usage-stats"]
        environment = os.environ | {"TMPDIR": self.directory, "RAY_USAGE_STATS_ENABLED": "0"}
        environment.pop("RAY_ADDRESS", None)
        with open(self.log, "a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def processes(self):
        """Return all of both nodes, which are in the nodes' sessions even if their parents are gone."""
        found = set()
        for pid in living(psutil.pids()):
            with contextlib.suppress(OSError):
                if os.getsid(pid) in {node.pid for node in self.nodes}:
                    found.add(pid)
        return found

    def close(self):
        for pid in self.processes():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for node in self.nodes:
            node.wait()
        wait_until(lambda: not self.processes())
        shutil.rmtree(self.directory)


@pytest.fixture(scope="module")
def cluster():
    with contextlib.closing(Cluster()) as cluster:
        yield cluster


@pytest.fixture
def project(tmp_path):
    """A directory with the script, where the runs' results go too."""
    (tmp_path / "method.py").write_text(SCRIPT)
    return tmp_path


def launch(address, project, commands, root=None):
    """Start `benchmark/run.py x --ray ADDRESS` with these commands as experiment x."""
    code = f"import run; run.RESULTS = run.Path({str(project / 'results')!r})"
    code += f"; run.ROOT = run.Path({str(root or project)!r}); run.experiments = lambda: {{'x': {commands!r}}}\n"
    code += "with run.common.user_errors(): run.main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "x", *(["--ray", address] if address else [])], cwd=ROOT / "benchmark",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def results(project):
    """Return what was archived, by name, without where and when."""
    found = {path.stem: json.loads(path.read_text()) for path in (project / "results" / "x").glob("*.json")}
    assert all(set(result.pop("made")) == {"commit", "date", "machine"} for result in found.values())
    return found


def tries(path, number=1):
    """Wait until a run has started so many times; return the processes."""
    return wait_until(
        lambda: path.exists() and len(found := [int(x) for x in path.read_text().split()]) >= number and found
    )


def test_results_are_those_without_ray_and_a_failed_command_is_reported(cluster, tmp_path, monkeypatch):
    """To the last bit. The address `auto` is that of the environment, or of the cluster that this machine is in."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    random = np.random.default_rng(0)
    observations, actions = random.normal(size=(4, 21, 3)), random.uniform(-2, 2, (4, 20, 1))
    common.save_dataset(tmp_path / "swings", observations, actions, observations[0])
    flags = f"--dataset {tmp_path / 'swings'} --gradient-steps 4 --eval-episodes 2 --hidden-dim 16".split()
    commands = {"bad": ["bc.py", "--env-id", "Nope"], "good": ["bc.py", "--env-id", "Pendulum-v1", *flags]}
    found = {}
    for name, address in (("ray", "auto"), ("local", None)):
        process = launch(address, tmp_path / name, commands, ROOT)
        output, messages = process.communicate(timeout=600)
        assert process.returncode == 1, messages
        assert "python bc.py --env-id Nope\n" in output
        assert f"2 of 2 runs ended, 0 {'at Ray' if address else 'running'}, 1 failed\n" in output
        failure = messages.splitlines()[-1]
        assert failure.startswith("failed: python bc.py --env-id Nope (its messages: ")
        log = Path(failure.split("messages: ")[1].removesuffix(")")).read_text()
        assert log.startswith("error: there is no environment 'Nope'") and "Traceback" not in log
        assert list(results(tmp_path / name)) == ["good"]
        found[name] = results(tmp_path / name)["good"]
        del found[name]["seconds"]
    assert found["ray"] == found["local"] and len(found["ray"]["episodes"]["return"]) == 2


def test_a_killed_worker_is_replaced_and_leaves_nothing(cluster, project):
    """Also one that is asked to end, as by `ray stop`, which is not a run that failed."""
    signals = {"killed": signal.SIGKILL, "asked": signal.SIGTERM}
    process = launch(cluster.address, project, {name: ["method.py", str(project / name), "1"] for name in signals})
    for name, number in signals.items():
        os.kill(tries(project / name)[0], number)
    assert process.wait(600) == 0, process.communicate()
    for name in signals:
        first, second = tries(project / name)
        assert results(project)[name] == {"process": second, "threads": "1"}
        wait_until(lambda pids=(first, second): not living(pids), 20)


def test_ctrl_c_ends_the_tasks(cluster, project):
    commands = {name: ["method.py", str(project / name), "1"] for name in ("a", "b", "c")}
    process = launch(cluster.address, project, commands)
    running = wait_until(lambda: len(found := [x for x in map(project.joinpath, "abc") if x.exists()]) == 2 and found)
    pids = {tries(path)[0] for path in running}
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 1
    assert messages.splitlines()[-1] == "error: interrupted; what is done stays done." and "Traceback" not in messages
    wait_until(lambda: not living(pids), 20)
    time.sleep(2)
    assert sum(project.joinpath(name).exists() for name in "abc") == 2 and not results(project)  # the third never ran


def test_a_cluster_that_is_not_there_and_an_address_of_another_kind(project):
    for address, message in (
        (f"127.0.0.1:{free_ports(1)[0]}", "error: the Ray cluster cannot be reached at 127.0.0.1:"),
        ("ray://127.0.0.1:10001", "error: --ray is ray://127.0.0.1:10001; it must be HOST:PORT or auto"),
        ("nonsense", "error: the Ray cluster cannot be reached at nonsense (ValueError: "),
    ):
        process = launch(address, project, {"a": ["method.py", str(project / "a"), "0"]})
        _, messages = process.communicate(timeout=300)
        assert process.returncode == 1 and messages.startswith(message) and messages.count("\n") == 1
        assert not (project / "a").exists()


def test_a_killed_node_is_replaced_by_the_other_one(cluster, project):
    """The cluster has one node left afterwards."""
    commands = {name: ["method.py", str(project / name), "1"] for name in ("a", "b")}
    process = launch(cluster.address, project, commands)
    first = {tries(project / name)[0] for name in commands}
    raylet = next(x for x in psutil.Process(cluster.nodes[1].pid).children(recursive=True) if x.name() == "raylet")
    (lost,) = first & {child.pid for child in raylet.children(recursive=True)}
    raylet.kill()
    wait_until(lambda: not living([lost]), 60)
    (other,) = first - {lost}
    os.kill(other, signal.SIGKILL)  # which leaves its place to both
    assert process.wait(600) == 0, process.communicate()
    assert {name: result["process"] for name, result in results(project).items()} == {
        name: tries(project / name, 2)[1] for name in commands
    }


def test_a_killed_head_ends_the_program_and_the_same_command_goes_on(cluster, project):
    """The last test of the cluster, since it ends it."""
    commands = {"short": ["method.py", str(project / "short"), "0"], "long": ["method.py", str(project / "long"), "1"]}
    process = launch(cluster.address, project, commands)
    (pid,) = tries(project / "long")
    wait_until(lambda: "short" in results(project))
    for server in psutil.Process(cluster.nodes[0].pid).children(recursive=True):
        if server.name() == "gcs_server":
            server.kill()
    _, messages = process.communicate(timeout=100)
    last = messages.splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in messages
    assert last.startswith("error: the Ray cluster cannot be reached at ") and last.endswith("what is done stays done.")
    wait_until(lambda: not living([pid]), 30)
    assert set(results(project)) == {"short"}
    process = launch(None, project, commands)
    assert process.wait(300) == 0, process.communicate()
    assert set(results(project)) == {"short", "long"} and len(tries(project / "short")) == 1
