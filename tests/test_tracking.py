"""--track, with the real Weights & Biases in its offline mode."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from test_training import ROOT, SCRIPTS, refuse, small_args

import contrastive_rl

TRACKED = """
import sys
from pathlib import Path
import laeo

def killed(*args, step=iter(range(40))):
    if next(step) == 25:
        raise KeyboardInterrupt
    return update(*args)

update, laeo.update = laeo.update, killed
dataset, run_dir = map(Path, sys.argv[1:])
args = laeo.Args(
    env_id="FetchReach", dataset=dataset, run_dir=run_dir, gradient_steps=40, batch_size=32, hidden_dim=32,
    num_success=10, log_interval=10, eval_interval=0, eval_episodes=2, checkpoint_minutes=0, device="cpu",
    track=True, wandb_project="pushing", wandb_entity="somebody",
)
try:
    laeo.train(args)
except KeyboardInterrupt:
    laeo.update = update
    laeo.train(laeo.Args(resume=run_dir))
"""


@pytest.fixture
def offline(tmp_path):
    """An environment in which Weights & Biases sends nothing and knows nobody."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return variables | {"WANDB_MODE": "offline", "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}


def test_a_tracked_run_and_its_continuation_are_one_run_with_all_metrics(reach_dataset, tmp_path, offline):
    pytest.importorskip("wandb")
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", TRACKED, str(reach_dataset), str(run_dir)]
    process = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True)
    assert process.returncode == 0, process.stderr.decode()
    files = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # the name holds the run's number
    first, second = (file.read_bytes() for file in files)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {10, 20, 30, 40}
    for line in lines:
        for name, value in line.items():
            if name != "step":
                assert name.encode() in first + second
                assert json.dumps(value).encode() in (first if line["step"] <= 20 else second), (name, value)
    for content in (first, second):
        assert b"pushing" in content and b"somebody" in content and b"bc_coef" in content


@pytest.mark.parametrize("name", [*SCRIPTS, "contrastive_rl"])
def test_without_the_library_tracking_is_one_sentence(name, reach_dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = (
        r"^--track cannot start Weights & Biases \(\w*NotFound\w*: .*wandb.*pip install wandb.*WANDB_MODE=offline\.$"
    )
    if name == "contrastive_rl":
        args = contrastive_rl.Args(env_id="FetchReach", dataset=reach_dataset, run_dir=tmp_path / "run", track=True)
        refuse(contrastive_rl, args, message, after_start=True)
    else:
        args = small_args(SCRIPTS[name], reach_dataset, tmp_path / "run", track=True)
        refuse(SCRIPTS[name], args, message, after_start=True)
    assert list((tmp_path / "run").iterdir()) == []  # so that the same command can be given again


def test_without_an_account_tracking_is_one_sentence(reach_dataset, tmp_path, offline):
    pytest.importorskip("wandb")
    command = [sys.executable, "laeo.py", "--dataset", str(reach_dataset), "--num-success", "10", "--track"]
    command += ["--run-dir", str(tmp_path / "run"), "--eval-episodes", "0"]
    environment = offline | {"WANDB_MODE": "online"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, input="")
    assert process.returncode == 1 and list((tmp_path / "run").iterdir()) == []
    (sentence,) = (line for line in process.stderr.splitlines() if line.startswith("error: "))
    assert sentence.startswith("error: --track cannot start Weights & Biases (UsageError: No API key configured)")
    assert "Traceback" not in process.stderr


def test_a_script_that_was_copied_without_tracking_says_what_is_missing(reach_dataset, tmp_path):
    for name in ("laeo.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "laeo.py", "--dataset", str(reach_dataset), "--num-success", "10", "--track"]
    process = subprocess.run([*command, "--eval-episodes", "0"], cwd=tmp_path, capture_output=True, text=True)
    right = "error: --track needs tracking.py, which is not here; copy it to where the script is."
    assert process.returncode == 1 and process.stderr == f"{right}\n"
    assert not (tmp_path / "runs").exists()  # before anything is read or made
