"""tests/matrix.sh and the workflow of GitHub Actions: their versions of Python, and commands that are the README's."""

import os
import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
README, MATRIX = (ROOT / "README.md").read_text(), (ROOT / "tests" / "matrix.sh").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
JOBS = WORKFLOW["jobs"]
COMMANDS = [step["run"] for step in JOBS["tests"]["steps"] if "run" in step]
SIMULATORS = {"mujoco", "metaworld", "gymnasium-robotics"}


def bash(command, cwd=ROOT, **environment):
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


# ------------------------------------------------------------------------------------------------------------ versions


def test_versions_of_python_are_the_same_everywhere():
    first, last = map(int, re.search(r"Python 3\.(\d+) to 3\.(\d+)", README).groups())
    versions = [f"3.{minor}" for minor in range(first, last + 1)]
    matrix = JOBS["tests"]["strategy"]["matrix"]
    assert matrix["python"] == versions and re.search(r"\{versions:-(.*?)\}", MATRIX)[1].split() == versions
    macos = [job["python"] for job in matrix["include"] if job["os"] == "macos-latest"]
    assert macos == [versions[0], versions[-1]] and len(macos) == len(matrix["include"])
    assert f'target-version = "py3{first}"' in (ROOT / "pyproject.toml").read_text()
    assert (ROOT / "requirements.txt").read_text().startswith(f"# Python 3.{first} to 3.{last}.")


# ------------------------------------------------------------------------------------------------------------ workflow


def test_workflow_runs_on_each_push_and_once_a_week():
    triggers = WORKFLOW[True]  # PyYAML reads `on` as YAML 1.1 does
    assert {"push", "pull_request", "schedule"} <= set(triggers)
    minute, hour, day, month, weekday = triggers["schedule"][0]["cron"].split()
    assert minute.isdigit() and hour.isdigit() and (day, month, weekday) == ("*", "*", "1")
    used = {step["uses"] for job in JOBS.values() for step in job["steps"] if "uses" in step}
    assert used and all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in used)


def test_workflows_commands_are_those_of_the_readme():
    """Each is read from a file when it runs. Here a function that prints stands in for what would run it."""
    block = next(block for block in re.findall(r"^```\n(.*?)^```$", README, re.M | re.S) if "apt install" in block)
    apt, _, test = block.splitlines()
    (install,) = [command for command in COMMANDS if "apt install" in command]
    assert bash(f'sudo() {{ echo "$*"; }}\n{install}').stdout.splitlines() == ["apt-get update", f"{apt} -y"]
    (evaluate,) = [command for command in COMMANDS if command.startswith("eval")]
    assert bash(f'eval() {{ echo "$*"; }}\n{evaluate}').stdout.splitlines() == [test]
    (ruff,) = [step["run"] for step in JOBS["lint"]["steps"] if step.get("run", "").startswith("pip")]
    pin = re.search(r"^ruff==[\d.]+", (ROOT / "requirements.txt").read_text(), re.M)[0]
    assert bash(f'pip() {{ echo "$*"; }}\n{ruff}').stdout == f"install {pin}\n"


def test_each_run_tests_once():
    conditions = [step.get("if") for step in JOBS["tests"]["steps"] if "pytest" in step.get("run", "")]
    assert conditions == ["github.event_name != 'schedule'", "github.event_name == 'schedule'"]


def test_weekly_run_has_no_upper_bounds_but_the_simulators(tmp_path):
    (command,) = [line for text in COMMANDS for line in text.splitlines() if "sed" in line]
    for path in ROOT.glob("requirements*.txt"):
        (tmp_path / path.name).write_text(path.read_text())
    assert bash(command, tmp_path).returncode == 0
    before = "".join(path.read_text() for path in sorted(tmp_path.glob("requirements*.txt"))).splitlines()
    after = (tmp_path / "newest.txt").read_text().splitlines()
    assert len(before) == len(after) and "gymnasium>=1.2,<2" in "\n".join(before)
    for old, new in zip(before, after, strict=True):
        specifier = old.split("#")[0].split(";")[0].strip()
        if re.match(r"[\w-]*", specifier)[0] in SIMULATORS:
            assert new == old and "==" in new
        else:
            lower = re.sub(r"(==|,?<)[\d.]+", "", specifier)
            assert new.split("#")[0].split(";")[0].strip() == lower and not re.search(
                "[=<]=|<", lower.replace(">=", "")
            )


# ----------------------------------------------------------------------------------------------------------- matrix.sh

STUB = """#!/bin/bash
# A Python whose virtual environments print what they are asked for.
if [ "$1" = -V ]; then echo Python VERSION; fi
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "${@: -1}/bin"
    echo 'pip() { echo "pip $*"; }; pytest() { echo "pytest $*"; echo "== OUTCOME in 0.10s =="; return STATUS; }' \\
        > "${@: -1}/bin/activate"
fi
"""


def matrix(tmp_path, arguments, **outcomes):
    """Run matrix.sh where the given versions of Python are, each with the last line and the exit status of pytest."""
    for name, (outcome, status) in outcomes.items():
        minor = name.removeprefix("python3_")
        stub = STUB.replace("VERSION", f"3.{minor}.0").replace("OUTCOME", outcome).replace("STATUS", str(status))
        (tmp_path / f"python3.{minor}").write_text(stub)
        (tmp_path / f"python3.{minor}").chmod(0o755)
    (tmp_path / "tmp dir").mkdir()
    process = bash(f"tests/matrix.sh {arguments}", PATH=f"{tmp_path}:/usr/bin:/bin", TMPDIR=str(tmp_path / "tmp dir"))
    assert not list((tmp_path / "tmp dir").iterdir())  # the environment is gone
    return process


def test_matrix_runs_the_readmes_command_under_each_version(tmp_path):
    process = matrix(tmp_path, "3.97 3.98 -- -n0 'a b'", python3_97=("3 passed", 0), python3_98=("4 passed", 0))
    (test,) = re.findall(r"activate && (pip install .*) && pytest$", README, re.M)
    lines = process.stdout.splitlines()
    assert lines[:2] == [test, "pytest -n0 a b"] and lines.count(test) == 2 and process.returncode == 0
    assert lines[-2:] == ["Python 3.97.0 passed: 3 passed in 0.10s ", "Python 3.98.0 passed: 4 passed in 0.10s "]


def test_matrix_fails_when_a_version_fails_and_goes_on(tmp_path):
    outcomes = dict(python3_97=("1 failed, 2 passed", 1), python3_98=("4 passed", 0))
    process = matrix(tmp_path, "3.96 3.97 3.98", **outcomes)
    assert process.returncode == 1 and process.stdout.splitlines()[-3:] == [
        "3.96 no interpreter",
        "Python 3.97.0 failed: 1 failed, 2 passed in 0.10s ",
        "Python 3.98.0 passed: 4 passed in 0.10s ",
    ]


def test_matrix_passes_when_only_some_versions_are_there_and_fails_when_none_is(tmp_path):
    process = matrix(tmp_path, "3.96 3.98", python3_98=("4 passed", 0))
    assert process.returncode == 0 and "3.96 no interpreter" in process.stdout
    (tmp_path / "tmp dir").rmdir()
    assert matrix(tmp_path, "3.96").returncode == 1


def test_matrix_says_that_arguments_of_pytest_come_after_two_dashes(tmp_path):
    process = matrix(tmp_path, "tests/test_laeo.py")
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr == "tests/test_laeo.py is not like 3.10; arguments for pytest come after --.\n"
