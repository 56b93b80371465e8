"""Scripts run from their own metadata, and without what only Linux has."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import common

ROOT = Path(common.__file__).parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.read_text().startswith("# /// script\n"))
HELPERS = {
    "common",
    "robot_tasks",
    "collect_data",
    "episodes",
    "contrastive_rl",
    "minari_io",
    "tracking",
}  # what a script imports of its own
OPTIONAL = {"wandb", "minari", "h5py"}
MODULES = {"gymnasium_robotics": "gymnasium-robotics", "PIL": "pillow", "OpenGL": "mujoco", "triton": "torch"}


def requirements(text: str) -> dict[str, str]:
    """Return {package: bounds} of lines or list entries such as `torch>=2.6`."""
    found = re.findall(r"^\s*\"?([\w-]+)(?:\[\w+\])?((?:[=<>]=?[\d.]+,?)+)", text, re.MULTILINE)
    return dict(found)


def metadata(name: str) -> tuple[str, dict[str, str]]:
    """Return what a script's inline metadata (PEP 723) asks of Python, and {package: bounds}."""
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", (ROOT / f"{name}.py").read_text())
    content = "".join(line[2:] or "\n" for line in block["content"].splitlines(keepends=True))
    python, dependencies = re.fullmatch(r'requires-python = "(.*)"\ndependencies = (\[.*\])\n', content, re.S).groups()
    return python, requirements("\n".join(ast.literal_eval(dependencies)))


def imports(name: str) -> set[str]:
    """Return the modules that a file imports, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.removeprefix("torch.utils.").split(".")[0])  # its tensorboard is a package too
    return found


def test_all_scripts_have_metadata():
    assert set(SCRIPTS) == {
        "laeo", "oril", "purl", "bc", "tailo", "cvl", "contrastive_rl", "collect_data", "evaluate"
    }  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_metadata_have_the_bounds_of_the_requirements_and_all_that_is_imported(name):
    pins = requirements((ROOT / "requirements.txt").read_text())
    python, dependencies = metadata(name)
    assert python == ">=3.10" and dependencies == {package: pins[package] for package in dependencies}
    modules = set().union(*(imports(file) for file in (HELPERS - {name}) | {name})) - set(sys.stdlib_module_names)
    modules -= HELPERS | OPTIONAL | set(SCRIPTS) | {"imageio_ffmpeg"}
    assert {MODULES.get(module, module) for module in modules} == set(dependencies)


def test_metadata_of_another_bound_would_be_found():
    assert requirements('torch>=2.6  # x\n"gymnasium>=1.2,<2"\nimageio[ffmpeg]>=2.34 # y') == {
        "torch": ">=2.6", "gymnasium": ">=1.2,<2", "imageio": ">=2.34"
    }  # fmt: skip


ELSEWHERE = """
import os, signal, sys
for module in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[module] = None
for name in ("sched_getaffinity", "posix_fallocate", "getuid", "geteuid", "fork", "getpgid", "killpg"):
    delattr(os, name)
for name in ("SIGKILL", "SIGUSR1", "SIGHUP", "SIGALRM", "alarm", "pthread_sigmask", "SIG_BLOCK", "SIG_SETMASK"):
    delattr(signal, name)
from pathlib import Path
import collect_data, evaluate, laeo

if __name__ == "__main__":
    data, run = Path(sys.argv[1]) / "data", Path(sys.argv[1]) / "run"
    collect_data.collect(collect_data.Args(env_id="FetchReach", num_episodes=4, output=data, num_workers=2))
    small = dict(gradient_steps=5, num_success=1, hidden_dim=8, batch_size=8, eval_episodes=1)
    laeo.train(laeo.Args(env_id="FetchReach", dataset=data, run_dir=run, **small))
    evaluate.evaluate(evaluate.Args(run_dir=run, episodes=1))
    print("done")
"""


def test_data_and_training_need_nothing_that_only_linux_has(tmp_path):
    """Of macOS and Windows this shows what we call ourselves; the real macOS is in the workflow on GitHub."""
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    environment["HOME"] = str(tmp_path)  # without it Python 3.10 needs pwd
    command = [sys.executable, "elsewhere.py", str(tmp_path)]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout.endswith("done\n"), process.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere.py", "data", "run"}
    assert common.read_metadata(tmp_path / "data")["num_episodes"] == 4
