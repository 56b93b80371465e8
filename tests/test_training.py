"""What all training scripts promise: seeds, resuming, evaluation, one sentence for a mistake; and shared blocks."""

import ast
import difflib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bc
import common
import laeo
import oril
import purl

SCRIPTS = {"laeo": laeo, "bc": bc, "oril": oril, "purl": purl}
METRICS = {
    "laeo": {
        "critic_loss", "categorical_accuracy", "logits_positive", "logits_negative", "bc_loss", "value_data",
        "value_policy", "policy_std",
    },
    "bc": {"bc_loss", "action_error", "policy_std"},
    "oril": {"reward_loss", "critic_loss", "bc_error", "reward_examples", "reward_data", "q_data", "q_policy"},
}  # fmt: skip
METRICS["purl"] = METRICS["oril"]
LABELLED = {"heldout/reward_success", "heldout/reward_failure", "heldout/q_start"}


@pytest.fixture(params=SCRIPTS)
def script(request):
    return SCRIPTS[request.param]


def small_args(script, dataset, run_dir, **kwargs):
    defaults = {"gradient_steps": 40, "batch_size": 32, "hidden_dim": 32, "repr_dim": 8, "num_success": 10}
    defaults |= {"log_interval": 10, "eval_interval": 0, "eval_episodes": 2, "device": "cpu"}
    defaults = {name: value for name, value in defaults.items() if hasattr(script.Args, name)}
    return script.Args(env_id="FetchReach", dataset=dataset, run_dir=run_dir, **{**defaults, **kwargs})


def final_weights(run_dir):
    checkpoint = common.load_weights(run_dir / "checkpoint.pt")
    parts = [part for part in ("actor", "critic", "networks") if part in checkpoint]
    return {f"{part}.{name}": value for part in parts for name, value in checkpoint[part].items()}


def assert_same_bits(one, other):
    assert len(one) >= 8 and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------- determinism


def test_same_seed_gives_the_same_bits_whatever_is_evaluated_or_logged(script, reach_dataset, tmp_path):
    script.train(small_args(script, reach_dataset, tmp_path / "often", eval_interval=10, log_interval=1))
    script.train(small_args(script, reach_dataset, tmp_path / "never", eval_interval=0, log_interval=1000))
    script.train(small_args(script, reach_dataset, tmp_path / "other", seed=1))
    assert_same_bits(final_weights(tmp_path / "often"), final_weights(tmp_path / "never"))
    one, other = final_weights(tmp_path / "often"), final_weights(tmp_path / "other")
    name = next(name for name in one if name.endswith("actor.net.0.weight"))
    assert not torch.equal(one[name], other[name])


def test_global_random_state_changes_nothing(script, reach_dataset, tmp_path):
    """Every draw comes from a generator of the run's own seed, and none of the training's from a global one."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
        script.train(small_args(script, reach_dataset, tmp_path / str(seed)))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (str(np.random.get_state()), random.getstate()) == before[1:]  # noqa: NPY002
    assert_same_bits(final_weights(tmp_path / "0"), final_weights(tmp_path / "1"))


def test_interrupted_and_resumed_run_gives_the_same_bits(script, reach_dataset, tmp_path, monkeypatch):
    """Interrupted after an odd number of steps: what happens in every second step must not shift."""
    script.train(small_args(script, reach_dataset, tmp_path / "whole", eval_interval=15))
    update, calls = script.update, []

    def update_then_interrupt(*args):
        update(*args)
        calls.append(1)
        if len(calls) == 17:
            os.kill(os.getpid(), signal.SIGINT)  # what Ctrl-C sends

    monkeypatch.setattr(script, "update", update_then_interrupt)
    name = script.__name__
    with pytest.raises(common.UserError, match=f"interrupted at step 17; go on with: python {name}.py --resume"):
        script.train(small_args(script, reach_dataset, tmp_path / "parts", eval_interval=15))
    assert not (tmp_path / "parts" / "result.json").exists()
    result = script.train(script.Args(resume=tmp_path / "parts"))
    assert len(calls) == 40
    assert_same_bits(final_weights(tmp_path / "whole"), final_weights(tmp_path / "parts"))
    whole, parts = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts"))
    assert whole == parts
    assert result["args"]["gradient_steps"] == 40 and result["gradient_steps"] == 40


def test_clocks_go_on_after_a_resume(script, reach_dataset, tmp_path):
    """From a checkpoint in the middle, whose clocks are set to times that no test takes."""
    interrupted = common.Run.end_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "end_step", lambda run, step, _: interrupted(run, step, [1] if step == 3 else []))
        with pytest.raises(common.UserError, match="interrupted at step 3"):
            script.train(small_args(script, reach_dataset, tmp_path / "run", gradient_steps=6))
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint = common.load_weights(path)
    assert min(checkpoint["seconds"][name] for name in ("data", "training")) > 0
    before = {"data": 1e4, "training": 2e4, "evaluation": 3e4}
    common.save_weights(path, {**checkpoint, "seconds": dict(before)})
    seconds = script.train(script.Args(resume=tmp_path / "run"))["seconds"]
    assert seconds.keys() == before.keys()
    assert all(0 < seconds[name] - before[name] < 1000 for name in before)


@pytest.mark.parametrize("name, uses", [("laeo", 5 + 10 + 2), ("bc", 1 + 10 + 2), ("oril", 4 + 10 + 2)])
def test_weights_batches_and_metrics_draw_from_different_streams(name, uses, reach_dataset, tmp_path, monkeypatch):
    """PyTorch's generator on the CPU reads 32 bits of a seed, so that seeds 0 and 2**32 would be one stream."""
    script, draws = SCRIPTS[name], []  # what each generator would draw next, at every use

    def remember(function):
        def remembering(*args, **kwargs):
            draws.append(tuple(torch.rand(4, generator=args[-1].clone_state()).tolist()))
            return function(*args, **kwargs)

        return remembering

    for function in ("mlp", "sample"):
        monkeypatch.setattr(script, function, remember(getattr(script, function)))
    script.train(small_args(script, reach_dataset, tmp_path / "run", gradient_steps=10))
    assert len(draws) == uses  # networks; training batches; batches of metrics
    assert len(set(draws)) == len(draws)


# -------------------------------------------------------------------------------------------- evaluation and results


def test_evaluation_is_the_same_every_time_and_its_starts_are_its_own():
    generator = torch.Generator().manual_seed(0)
    actor = bc.Actor(bc.Encoder(torch.zeros(6), torch.ones(6), 4, generator), 4, 32, generator)
    one = bc.evaluate(actor, "SawyerWindowOpen", 12, 0, torch.device("cpu"))
    assert one == bc.evaluate(actor, "SawyerWindowOpen", 12, 0, torch.device("cpu"))
    env, starts = common.make_env("SawyerWindowOpen"), []
    for episode, seed in enumerate(one["seed"]):
        assert seed == common.episode_seed("evaluation", 0, episode)
        observation, info = env.reset(seed=seed)
        starts.append(observation[3])
        assert info["success"] == one["initial_success"][episode]
    assert len(set(starts)) == 12
    other = {
        common.episode_seed(stream, 0, i) for stream in ("training", "dataset", "calibration") for i in range(1000)
    }
    assert not other & set(one["seed"])


def test_evaluation_counts_success_as_documented(monkeypatch):
    """Against an environment that is solved at known times: before the first action, and after actions 1 and 3 of 4."""

    class Scripted:
        def reset(self, seed):
            self.t = 0
            return np.zeros(6, np.float32), {"success": True}

        def step(self, action):
            self.t += 1
            return np.zeros(6, np.float32), 0.0, False, self.t == 4, {"success": self.t in (1, 3)}

        def close(self):
            pass

    monkeypatch.setattr(common, "make_env", lambda _: Scripted())
    generator = torch.Generator().manual_seed(0)
    actor = bc.Actor(bc.Encoder(torch.zeros(6), torch.ones(6), 4, generator), 4, 32, generator)
    results = bc.evaluate(actor, "any", 2, 0, torch.device("cpu"))
    assert results["success"] == [True, True] and results["final_success"] == [False, False]
    assert results["initial_success"] == [True, True]
    assert results["discounted_return"] == pytest.approx([1 + 0.99**2] * 2)


def test_result_and_metrics_hold_what_the_readme_promises(script, reach_dataset, tmp_path):
    result = script.train(small_args(script, reach_dataset, tmp_path / "run", eval_interval=20, holdout_fraction=0.5))
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["success_rate"] == np.mean(result["episodes"]["success"])
    assert result["final_success_rate"] == np.mean(result["episodes"]["final_success"])
    assert len(set(result["episodes"]["seed"])) == 2
    assert set(result["seconds"]) == {"data", "training", "evaluation"} and min(result["seconds"].values()) > 0
    assert result["versions"]["mujoco"] == "3.3.0" and result["method"] == script.__name__
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sorted({line["step"] for line in lines}) == [0, 10, 20, 30, 40]
    names = {name for line in lines for name in line} - {"step"}
    expected = {f"{part}/{kind}" for part in ("train", "heldout") for kind in METRICS[script.__name__]}
    expected |= {"eval/success_rate", "eval/final_success_rate", "eval/discounted_return"}
    assert names == expected | (LABELLED if script in (oril, purl) else set())
    assert any("tfevents" in path.name for path in (tmp_path / "run").iterdir())


# ------------------------------------------------------------------------------------ what a method may and may not see


def test_heldout_episodes_are_never_trained_on_and_the_same_for_all_methods(reach_dataset, tmp_path, monkeypatch):
    splits = []
    for name, script in SCRIPTS.items():
        made, original = [], common.Transitions.__init__

        def remember(self, data, episodes, device, made=made, original=original):
            made.append(frozenset(episodes.tolist()))
            original(self, data, episodes, device)

        with monkeypatch.context() as patch:
            patch.setattr(common.Transitions, "__init__", remember)
            script.train(small_args(script, reach_dataset, tmp_path / name, gradient_steps=1, holdout_fraction=0.25))
        trained, heldout = made
        assert not trained & heldout and len(heldout) == 10 and len(trained | heldout) == 40
        splits.append((trained, heldout))
    assert len(set(splits)) == 1


def test_all_methods_standardise_alike(reach_dataset, tmp_path):
    buffers = []
    for name, script in SCRIPTS.items():
        script.train(small_args(script, reach_dataset, tmp_path / name, gradient_steps=1))
        weights = final_weights(tmp_path / name)
        buffers += [value for key, value in weights.items() if key.endswith("observation_mean")]
    assert len(buffers) == 2 + 1 + 5 + 5 and all(torch.equal(buffers[0], other) for other in buffers)


def test_a_method_cannot_reach_rewards_or_success_flags():
    """The line that the project holds: only the choice of examples and the evaluation look at success."""
    assert common.Dataset._fields == ("observations", "actions", "lengths", "success_examples")
    for script in SCRIPTS.values():
        assert "successes.npy" not in Path(script.__file__).read_text()
    for script in (oril, purl):
        nodes = list(ast.walk(ast.parse(Path(script.__file__).read_text())))
        uses = [node for node in nodes if isinstance(node, ast.Name) and node.id == "labelled"]
        calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "measure_labelled"]
        assert len(uses) == 2 and calls[0].args[0] is uses[1]  # where it is made, and where the metrics are
    for script in (laeo, bc):
        assert "labelled" not in Path(script.__file__).read_text()


@pytest.mark.parametrize("script", [oril, purl])
def test_success_flags_change_metrics_and_no_weight(script, reach_dataset, tmp_path):
    """The held-out metrics read the dataset's flags: turned round, they turn the metrics round and nothing else."""
    shutil.copytree(reach_dataset, tmp_path / "data")
    flags = np.load(tmp_path / "data" / "successes.npy")
    np.save(tmp_path / "data" / "successes.npy", ~flags)
    metadata = common.read_metadata(tmp_path / "data")
    metadata["sha256"]["successes"] = common.sha256(tmp_path / "data" / "successes.npy")
    (tmp_path / "data" / "metadata.json").write_text(json.dumps(metadata))
    lines = []
    for name, data in (("true", reach_dataset), ("turned", tmp_path / "data")):
        script.train(small_args(script, data, tmp_path / name, holdout_fraction=0.5, reward_learning_rate=1e-2))
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        lines.append([row for row in rows if "heldout/reward_success" in row][-1])
    assert_same_bits(final_weights(tmp_path / "true"), final_weights(tmp_path / "turned"))
    true, turned = lines
    assert true["heldout/reward_success"] == pytest.approx(turned["heldout/reward_failure"], rel=1e-5)
    assert true["heldout/reward_success"] > true["heldout/reward_failure"] + 0.1
    assert true["heldout/q_start"] == turned["heldout/q_start"]


def test_labelled_states_are_what_the_flags_say(reach_dataset, tmp_path):
    run = common.Run("oril", small_args(oril, reach_dataset, tmp_path / "run", holdout_fraction=0.5))
    data, _, heldout = run.load_data(10)
    states, flags = run.load_labelled(data, heldout), np.load(reach_dataset / "successes.npy")
    examples = {example.tobytes() for example in data.success_examples}
    solved = [state for state in data.observations[heldout][flags[heldout]] if state.tobytes() not in examples]
    assert flags[heldout].sum() > len(solved) > 0
    assert {state.tobytes() for state in states["success"]} == {state.tobytes() for state in solved}
    assert len(states["failure"]) == min(1000, (~flags[heldout]).sum())
    goal = common.TASKS["FetchReach"].desired_goal
    distance = {name: np.linalg.norm(states[name][:, :3] - goal, axis=1) for name in ("success", "failure")}
    assert distance["success"].max() < 0.05 <= distance["failure"].min()
    assert np.array_equal(states["start"], data.observations[heldout, 0])


# ---------------------------------------------------------------------------------------------------- one sentence each


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"gradient_steps": -5}, "--gradient-steps is -5; it must be 1 or more"),
        ({"batch_size": 1}, "--batch-size is 1"),
        ({"eval_episodes": 0}, "--eval-episodes is 0"),
        ({"quality": "easy"}, "there is no quality 'easy'"),
        ({"env_id": "FetchPsh"}, "did you mean FetchPush"),
        ({"env_id": "FetchPush"}, "is a dataset of FetchReach, not of FetchPush"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan; it must be from 0 to 1"),
        ({"gradient_steps": float("inf")}, "--gradient-steps is inf; it must be 1 or more"),
        (
            {"resume": Path("nowhere")},
            "--resume takes all other flags from nowhere; leave out --batch-size, --dataset, ",
        ),
    ],
)
def test_mistakes_get_one_sentence(script, reach_dataset, tmp_path, flags, message):
    refuse(script, small_args(script, reach_dataset, tmp_path / "run"), flags, message)


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("laeo", {"bc_coef": 1.5}, "--bc-coef is 1.5; it must be from 0 to 1"),
        ("laeo", {"repr_dim": 0}, "--repr-dim is 0; it must be 1 or more"),
        ("laeo", {"discount": 1.0}, "--discount is 1.0"),
        ("laeo", {"num_success": 0}, "--num-success is 0; it must be 1 or more"),
        ("laeo", {"num_success": 10**6}, "--num-success is 1000000; .* success examples"),
        ("oril", {"discount": 1.0}, "--discount is 1.0"),
        ("oril", {"num_success": 0}, "--num-success is 0"),
        ("oril", {"alpha": -1.0}, "--alpha is -1.0; it must be 0 or more"),
        ("oril", {"tau": 2.0}, "--tau is 2.0; it must be from 0 to 1"),
        ("oril", {"policy_noise": -0.1}, "--policy-noise is -0.1"),
        ("oril", {"noise_clip": -0.1}, "--noise-clip is -0.1"),
        ("oril", {"reward_learning_rate": 2.0}, "--reward-learning-rate is 2.0"),
        ("purl", {"eta": 1.5}, "--eta is 1.5; it must be from 0 to 1"),
    ],
)
def test_mistakes_in_a_methods_own_flags_get_one_sentence(name, reach_dataset, tmp_path, flags, message):
    refuse(SCRIPTS[name], small_args(SCRIPTS[name], reach_dataset, tmp_path / "run"), flags, message)


def refuse(script, args, flags, message):
    for name, value in flags.items():
        setattr(args, name, value)
    with pytest.raises(common.UserError, match=message) as caught:
        script.train(args)
    assert "\n" not in str(caught.value)
    assert not args.run_dir.exists()


def test_data_without_success_flags_have_no_metrics_of_them(reach_dataset, tmp_path):
    shutil.copytree(reach_dataset, tmp_path / "data")
    (tmp_path / "data" / "successes.npy").unlink()
    metadata = json.loads((tmp_path / "data" / "metadata.json").read_text())
    del metadata["sha256"]["successes"]
    (tmp_path / "data" / "metadata.json").write_text(json.dumps(metadata))
    for name, data in (("with", reach_dataset), ("without", tmp_path / "data")):
        oril.train(small_args(oril, data, tmp_path / name))
    text = (tmp_path / "without" / "metrics.jsonl").read_text()
    assert "heldout/q_start" in text and "heldout/reward_success" not in text and "heldout/reward_failure" not in text
    assert_same_bits(final_weights(tmp_path / "with"), final_weights(tmp_path / "without"))


def test_damaged_success_flags_get_one_sentence(reach_dataset, tmp_path):
    shutil.copytree(reach_dataset, tmp_path / "data")
    (tmp_path / "data" / "successes.npy").unlink()
    refuse(oril, small_args(oril, tmp_path / "data", tmp_path / "run"), {}, "successes.npy is damaged or missing")


def test_full_disk_while_writing_a_checkpoint_gets_one_sentence(script, reach_dataset, tmp_path):
    """A limit on the size of files stands for a full disk: metrics fit, a checkpoint does not."""
    command = [sys.executable, script.__file__, "--env-id", "FetchReach", "--dataset", str(reach_dataset)]
    command += ["--gradient-steps", "5", "--eval-interval", "0", "--eval-episodes", "1"]
    command += ["--run-dir", str(tmp_path / "run")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))  # noqa: E731
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True, preexec_fn=limit, timeout=120)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith(f"error: cannot write {tmp_path / 'run' / 'checkpoint.pt'}: ")
    assert "Traceback" not in process.stderr
    assert not [path for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name]


def test_run_directory_is_not_used_twice(reach_dataset, tmp_path):
    args = small_args(bc, reach_dataset, tmp_path / "run", gradient_steps=2)
    bc.train(args)
    before = (tmp_path / "run" / "result.json").read_bytes()
    with pytest.raises(common.UserError, match="run holds a run already"):
        bc.train(args)
    assert (tmp_path / "run" / "result.json").read_bytes() == before


def test_run_is_not_resumed_on_other_data_or_by_another_method(reach_dataset, tmp_path):
    shutil.copytree(reach_dataset, tmp_path / "data")
    oril.train(small_args(oril, tmp_path / "data", tmp_path / "run", gradient_steps=2))
    with pytest.raises(common.UserError, match=r"is a run of oril.py, not of purl.py; resume it there"):
        purl.train(purl.Args(resume=tmp_path / "run"))
    checkpoint = common.load_weights(tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(common.UserError, match=r"--resume takes all other flags from .*run; leave out --seed\."):
        oril.train(oril.Args(resume=tmp_path / "run", seed=1))
    networks, name = checkpoint["networks"], "actor.net.0.weight"
    for change in (
        {"args": {**checkpoint["args"], "a_flag_that_is_gone": 1}},
        {"seconds": None},
        {"networks": {"other" if key == name else key: value for key, value in networks.items()}},
        {"networks": {**networks, name: networks[name][:, :-1]}},
        {"optimizer": {}},
    ):
        older = {key: value for key, value in {**checkpoint, **change}.items() if value is not None}
        common.save_weights(tmp_path / "older" / "checkpoint.pt", older)
        with pytest.raises(common.UserError, match="older/checkpoint.pt was written by another version of this script"):
            oril.train(oril.Args(resume=tmp_path / "older"))
    common.save_weights(
        tmp_path / "gpu" / "checkpoint.pt", {**checkpoint, "args": {**checkpoint["args"], "device": "cuda"}}
    )
    if not torch.cuda.is_available():
        with pytest.raises(common.UserError, match="gpu was trained on a GPU, .* finds none here; resume it where"):
            oril.train(oril.Args(resume=tmp_path / "gpu"))
    metadata = json.loads((tmp_path / "data" / "metadata.json").read_text())
    metadata["sha256"]["actions"] = "0" * 64
    (tmp_path / "data" / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(common.UserError, match="no longer the dataset"):
        oril.train(oril.Args(resume=tmp_path / "run"))


def test_training_that_diverges_says_so(script, reach_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "measure", lambda *_: {"some_loss": float("nan")})
    with pytest.raises(common.UserError, match="train/some_loss is nan at step 10; try a smaller --learning-rate"):
        script.train(small_args(script, reach_dataset, tmp_path / "run"))


def test_network_that_diverges_after_the_last_metrics_says_so(script, reach_dataset, tmp_path):
    args = small_args(script, reach_dataset, tmp_path / "run", learning_rate=1.0, log_interval=1000)
    original, calls = script.update, []

    def update(*args):
        original(*args)
        calls.append(1)
        if len(calls) == 40:
            network = next(x for x in args if isinstance(x, torch.nn.Module))
            next(network.parameters()).data.fill_(float("nan"))

    script.update = update
    try:
        with pytest.raises(common.UserError, match="(actor|networks) is not finite at step 40; try a smaller --learn"):
            script.train(args)
    finally:
        script.update = original
    assert not (tmp_path / "run" / "checkpoint.pt").exists() and not (tmp_path / "run" / "result.json").exists()


def test_at_least_one_episode_is_trained_on_and_one_held_out(script, reach_dataset, tmp_path):
    result = script.train(small_args(script, reach_dataset, tmp_path / "run", gradient_steps=1, holdout_fraction=0.0))
    assert result["gradient_steps"] == 1


def test_at_least_one_of_two_episodes_is_trained_on(script, reach_dataset, tmp_path, monkeypatch):
    """Of two episodes a share of 0.9 would round to both."""
    shutil.copytree(reach_dataset, tmp_path / "data")
    metadata = common.read_metadata(tmp_path / "data")
    for name in ("observations", "actions", "lengths", "successes"):
        path = tmp_path / "data" / f"{name}.npy"
        np.save(path, np.load(path)[:2])
        metadata["sha256"][name] = common.sha256(path)
    (tmp_path / "data" / "metadata.json").write_text(json.dumps(metadata))
    made, original = [], common.Transitions.__init__

    def remember(self, data, episodes, device):
        made.append(episodes.tolist())
        original(self, data, episodes, device)

    monkeypatch.setattr(common.Transitions, "__init__", remember)
    script.train(small_args(script, tmp_path / "data", tmp_path / "run", gradient_steps=1, holdout_fraction=0.9))
    assert sorted(made) == [[0], [1]]


def test_unwritable_run_directory_gets_one_sentence(script, reach_dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(common.UserError, match="cannot write .*file/run"):
        script.train(small_args(script, reach_dataset, tmp_path / "file" / "run"))


# ----------------------------------------------------------------------------------------------------- shared blocks

# Definitions of the same name are the same in every script, but for these, which are equal within each group.
MAY_DIFFER = {
    "Args": [["laeo"], ["bc"], ["oril"], ["purl"]],  # each method's own flags
    "mlp": [["laeo", "bc"], ["oril", "purl"]],  # layer normalisation, for the critic of TD3
    "Actor": [["laeo", "bc"], ["oril", "purl"]],  # tanh-normal, and TD3's deterministic policy
    "Critic": [["laeo"], ["oril", "purl"]],  # contrastive, and Q-functions
    "reward_loss": [["oril"], ["purl"]],  # the difference between the two
    "critic_loss": [["laeo"], ["oril", "purl"]],
    "policy_loss": [["laeo"], ["oril", "purl"]],
    "Batch": [["laeo"], ["bc"], ["oril", "purl"]],  # what a method's losses need
    "sample": [["laeo"], ["bc"], ["oril", "purl"]],
    "update": [["laeo"], ["bc"], ["oril"], ["purl"]],  # purl hands eta to its loss
    "measure": [["laeo"], ["bc"], ["oril"], ["purl"]],
    "train": [["laeo"], ["bc"], ["oril"], ["purl"]],  # see the next test
}


def definitions(name):
    """Return {name: syntax tree as text} of a script's top-level functions and classes; comments are not part of it."""
    tree = ast.parse(Path(SCRIPTS[name].__file__).read_text())
    return {node.name: ast.dump(node) for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_blocks_of_the_same_name_are_the_same_in_all_scripts():
    trees = {name: definitions(name) for name in SCRIPTS}
    names = {block for tree in trees.values() for block in tree}
    shared = {block for block in names if sum(block in tree for tree in trees.values()) > 1}
    assert {"Actor", "evaluate", "train"} <= shared and set(MAY_DIFFER) <= shared
    for block in shared:
        groups = MAY_DIFFER.get(block, [list(SCRIPTS)])
        holders = {name for name in SCRIPTS if block in trees[name]}
        assert block not in MAY_DIFFER or {name for group in groups for name in group} == holders
        for group in groups:
            assert len({trees[name][block] for name in group if name in holders}) == 1, (block, group)


def statements(name):
    """Return the statements of a script's `train`, each loop and function taken apart, as text."""
    tree = ast.parse(Path(SCRIPTS[name].__file__).read_text())
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    found = []
    for node in ast.walk(train):
        if isinstance(node, ast.stmt) and node is not train:
            text = ast.unparse(node)
            found.append(text.splitlines()[0] if hasattr(node, "body") else text)
    return found


def test_the_training_loops_differ_in_what_a_method_needs_only():
    """All of bc.py's loop is in the others, but for the lines that build, update and measure its networks."""
    own = {
        "laeo": {
            "encoder = ", "actor = ", "optimizer = ", "parts = ", "data, training", "update(",
            "run.log(step",
        },
        "oril": {
            "encoder = ", "actor = ", "optimizer = ", "parts = ", "data, training", "update(", "run.log(step",
            "batches = ", "batch = sample(", "return run.log_eval", "return run.finish(", "group[", "for group",
        },
    }  # fmt: skip
    own["purl"] = own["oril"]
    for name, prefixes in own.items():
        missing = [text for text in statements("bc") if text not in statements(name)]
        assert {text for text in missing if not text.startswith(tuple(prefixes))} == set(), name
        for prefix in prefixes:  # nothing on the list that is not needed
            assert any(text.startswith(prefix) for text in missing), (name, prefix)


def test_diff_of_oril_and_purl_is_the_docstring_the_loss_and_its_flag():
    lines = [Path(SCRIPTS[name].__file__).read_text().split('"""', 2)[2].splitlines() for name in ("oril", "purl")]
    changed = [line for line in difflib.ndiff(*lines) if line[0] in "+-"]
    removed, added = ([line[2:].strip() for line in changed if line[0] == sign] for sign in "-+")
    assert (len(removed), len(added)) == (6, 10)
    assert sum("eta" in line for line in added) >= 7 and not any("eta" in line.split() for line in removed)
    other = [line for line in removed + added if "reward_loss(" not in line and "eta" not in line]
    assert len(other) <= 8


def test_purl_without_eta_and_with_orils_loss_is_oril():
    """All of the file, statement by statement; docstrings of the modules apart."""

    class WithoutEta(ast.NodeTransformer):
        def visit_Call(self, node):
            self.generic_visit(node)
            node.args = [arg for arg in node.args if ast.unparse(arg) not in ("args.eta", "'eta'")]
            return node

    bodies = {name: ast.parse(Path(SCRIPTS[name].__file__).read_text()).body[1:] for name in ("oril", "purl")}
    blocks = {name: {getattr(node, "name", ""): node for node in body} for name, body in bodies.items()}
    fields = blocks["purl"]["Args"].body
    eta = next(i for i, field in enumerate(fields) if ast.unparse(field).startswith("eta: "))
    del fields[eta : eta + 2]  # with its help
    blocks["purl"]["reward_loss"].__dict__.update(blocks["oril"]["reward_loss"].__dict__)
    purls = [ast.unparse(WithoutEta().visit(node)) for node in bodies["purl"]]
    assert purls == [ast.unparse(node) for node in bodies["oril"]]


def test_scripts_are_short():
    for name, limit in (("laeo", 350), ("bc", 220), ("oril", 350), ("purl", 350)):
        assert len(Path(SCRIPTS[name].__file__).read_text().splitlines()) <= limit, name
