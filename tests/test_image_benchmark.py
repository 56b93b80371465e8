"""What is measured on images: the time of a step, the settings that were tried, the runs and their tables."""

import functools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import laeo

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
import heads
import image_search
import image_step
import nearest
import plots
import report
import run as benchmark
import values


def rows(text):
    """The cells of a table's rows, without its caption and heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [line.strip("| ").split(" | ") for line in lines]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# --------------------------------------------------------------------------------------------------------- image_step


@pytest.mark.parametrize("objective", ["log_exp_f", "weighted"])
def test_operations_of_a_step_are_those_of_the_networks(objective, monkeypatch):
    """Counted by hand: a product costs as much again for each of the two gradients that it has."""
    monkeypatch.setattr(image_step, "MATRIX", 16)
    found = image_step.measure(1, objective, batch_size=4, random_shift=2, seconds=0.0)
    b, n, r, h = 4, 4, 64, 256  # batch, examples used, repr_dim, hidden_dim
    convolutions = [2 * 16**2 * 8**2 * 3 * 16, 2 * 8**2 * 4**2 * 16 * 32, 2 * 8**2 * 3**2 * 32 * 32]
    rest = convolutions[1] + convolutions[2] + 2 * 8**2 * 32 * 128
    phi, psi, actor = (2 * (d * h + h * h + h * out) for d, out in ((128 + 4, r), (128, r), (128, 8)))
    encoder = 2 * b * (2 * convolutions[0] + 3 * rest)  # states and futures; images have no gradient
    networks = b * (2 * 3 * phi + 2 * 3 * psi + 3 * actor + 2 * 2 * phi)  # the last: the value, whose weights have none
    products = 2 * 2 * b * b * r * 3 + 2 * 2 * b * n * r * 2  # the critic's logits, and those of the policy's value
    if objective == "weighted":
        products += 2 * 2 * b * b * r  # the advantage
    else:
        networks += n * (convolutions[0] + rest + 2 * psi)  # the examples
    assert found["gflop"] * 1e9 == encoder + networks + products
    assert found["cpu"] > 0 and found["wall"] > 0 and found["matrix"] > 0


def test_seconds_of_a_step_are_means_without_the_first():
    clock = iter(range(100))
    steps = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(image_step.time, "perf_counter", lambda: next(clock))
        patched.setattr(image_step.time, "process_time", functools.partial(next, iter([10.0, 16.0])))
        times = image_step.repeat(steps.append, 2.5)
    assert steps == [0, 1, 2, 3] and times == {"cpu": 2.0, "wall": 4 / 3}  # the clock goes on with each look at it


def test_rows_are_measured_in_turn_and_before_is_the_code_of_its_commit(monkeypatch, tmp_path, capsys):
    if subprocess.run(["git", "cat-file", "-e", image_step.BEFORE], cwd=image_step.ROOT).returncode:
        pytest.skip("a clone without the history")
    calls = []

    def measure_apart(directory, settings):
        text = (directory / "laeo.py").read_text()
        assert ("for _ in " + '"acr"' in text) == (settings["encoders"] == 2)  # an encoder for each network
        assert all((directory / name).exists() for name in ("laeo.py", "common.py", "robot_tasks.py"))
        calls.append((settings["objective"], directory))
        return {"cpu": len(calls) / 10, "wall": len(calls), "gflop": 2.5, "matrix": 50.0}

    monkeypatch.setattr(image_step, "measure_apart", measure_apart)
    args = image_step.Args(rounds=2, seconds=0.5, output=tmp_path / "image_step.json")
    result = image_step.main(args)
    assert (
        json.loads(args.output.read_text()) == result and result["machine"]["torch"] == torch.__version__.split("+")[0]
    )
    assert [objective for objective, _ in calls] == ["log_exp_f", "log_exp_f", "weighted"] * 2
    assert not calls[0][1].exists() and {directory for _, directory in calls[1:3]} == {image_step.ROOT}
    assert [row["cpu"] for row in result["rows"]] == [[0.1, 0.4], [0.2, 0.5], [0.3, 0.6]]
    settings = [(row["code"], row["batch_size"], row["random_shift"]) for row in result["rows"]]
    assert settings[0] == ("before", 128, 2)
    assert settings[1:] == [("after", laeo.DEFAULTS["batch_size"][1], laeo.DEFAULTS["random_shift"][1])] * 2
    assert "before, log_exp_f: 100.0 ms CPU, 1000.0 ms wall, 2.50 GFLOP" in capsys.readouterr().out


def test_code_of_the_commit_takes_steps_in_a_process_of_its_own():
    """With two encoders, each of which sees states, and all examples: more operations than with one."""
    if subprocess.run(["git", "cat-file", "-e", image_step.BEFORE], cwd=image_step.ROOT).returncode:
        pytest.skip("a clone without the history")
    settings = {"encoders": 2, "objective": "log_exp_f", "batch_size": 2, "random_shift": 2, "seconds": 0.0}
    with image_step.code_before() as directory:
        found = image_step.measure_apart(directory, settings)
    assert set(found) == {"cpu", "wall", "gflop", "matrix"} and found["matrix"] > 0
    here = image_step.measure(1, "log_exp_f", batch_size=2, random_shift=2, seconds=0.0)
    assert found["gflop"] > 1.5 * here["gflop"]


def test_without_history_there_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(image_step, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(common.UserError, match=f"needs git and commit {image_step.BEFORE}; use a clone"):
        image_step.main(image_step.Args(rounds=1, output=tmp_path / "x.json"))
    assert not (tmp_path / "x.json").exists()


def test_table_of_a_step_has_the_share_of_the_matrix_rate(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.image_step_table().startswith("Not measured yet") and rows(report.image_step_table()) == []
    row = {"code": "before", "encoders": 2, "objective": "log_exp_f", "batch_size": 128, "random_shift": 2}
    row |= {"gflop": 8.0, "cpu": [0.2, 0.1, 0.4], "wall": [0.3, 0.3, 0.5], "matrix": [80.0, 80.0, 70.0]}
    after = row | {"code": "after", "objective": "weighted", "gflop": 4.0, "cpu": [0.08, 0.08, 0.09]}
    machine = {"cores": 2, "cpu": "a processor", "torch": "2"}
    content = {"machine": machine, "before": "abc", "rounds": 3, "seconds": 5.0, "rows": [row, after]}
    write(tmp_path / "image_step.json", content)
    first, second = rows(report.TABLES["image_step"]())
    assert first[:5] == ["before", "log_exp_f", "128", "2", "8.00"]
    assert first[5:7] == ["200.0 (100.0 to 400.0)", "300.0 (300.0 to 500.0)"]
    assert first[7:] == ["1.00", "0.50"]  # 8 / 0.2 / 80
    assert second[7:] == ["2.50", "0.62"]  # 4 / 0.08 / 80 = 0.625
    caption = " ".join(report.image_step_table().split("\n\n")[0].split())
    assert "medians of 3 rounds of 5 s" in caption and "80.0 GFLOP/s" in caption and "commit abc" in caption


# ------------------------------------------------------------------------------------------------------- image_search

ARGS = {"batch_size": 4, "num_success": 6, "hidden_dim": 16, "repr_dim": 8, "gradient_steps": 2}


def networks(setting, shift, objective):
    """Flags, batches and examples of random images, and actor, critic and optimiser of a setting, or of laeo.py."""
    args = laeo.Args("FetchPushImage", random_shift=shift, policy_objective=objective, **ARGS)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    data, mean, std = image_step.random_data(rng), torch.full((64, 64, 3), 128.0), torch.full((64, 64, 3), 74.0)
    examples = torch.from_numpy(rng.integers(256, size=(6, 64, 64, 3), dtype=np.uint8))
    bounds = torch.tensor([[-1.0] * 4, [1.0] * 4])
    if setting is None:
        encoder = laeo.Encoder(mean, std, args, generator)
        actor = laeo.Actor(encoder, bounds, args.hidden_dim, generator)
        critic = laeo.Critic(encoder, bounds.shape[1], args.hidden_dim, args.repr_dim, generator)
    else:
        actor, critic = image_search.build(mean, std, bounds, args, generator, setting)
    optimizer = torch.optim.Adam(torch.nn.ModuleList([actor, critic]).parameters(), args.learning_rate, eps=1e-7)
    return args, [laeo.sample(data, args, step) for step in range(2)], examples, actor, critic, optimizer


def trained(setting, shift=2, objective="log_exp_f"):
    """Networks after two updates, by laeo.update where there is no setting, and what the last gradients were."""
    args, batches, examples, actor, critic, optimizer = networks(setting, shift, objective)
    for batch in batches:
        if setting is None:
            laeo.update(batch, examples, actor, critic, optimizer, args)
        else:
            image_search.update(batch, examples, actor, critic, optimizer, args, setting)
    return actor, critic


@pytest.mark.parametrize("shift, objective", [(2, "weighted"), (0, "weighted"), (2, "log_exp_f")])
def test_base_setting_makes_the_update_of_laeo_to_the_bit(shift, objective):
    for mine, theirs in zip(trained(image_search.Setting(), shift, objective), trained(None, shift, objective)):
        state, expected = mine.state_dict(), theirs.state_dict()
        assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)


def gradients(**differs):
    """Whether the encoders, the policy's head and the critic's have a gradient after an update with this setting."""
    actor, critic = trained(image_search.Setting(**differs))
    parts = actor.encoder, critic.encoder, actor.net, critic.psi_nets
    return [next(part.parameters()).grad is not None for part in parts], actor, critic


def test_settings_do_what_their_names_say():
    found, actor, critic = gradients(separate=True)
    assert found == [True] * 4 and actor.encoder is not critic.encoder
    found, *_ = gradients(method="bc")
    assert found == [True, True, True, False]
    found, *_ = gradients(separate=True, detach="actor")
    assert found == [False, True, True, True]
    found, *_ = gradients(separate=True, detach="critic")
    assert found == [True, False, True, True]
    _, actor, critic = gradients(action_scale=3.0, dense=0, stem="fine", channels=4)
    assert critic.action_scale == 3 and actor.encoder is critic.encoder
    assert critic.encoder.dim == 8 * 8 * 8  # 64 pixels, halved three times, and twice the channels
    assert [layer.stride[0] for layer in critic.encoder.net if isinstance(layer, torch.nn.Conv2d)] == [2, 2, 2]
    _, actor, _ = gradients(norm=False, dense=2)
    assert isinstance(actor.encoder.net[-1], torch.nn.ReLU) and actor.encoder.dim == 32


def test_queue_keeps_the_last_futures_and_two_of_them_stand_for_success(monkeypatch):
    chosen, value = [], laeo.policy_value
    monkeypatch.setattr(laeo, "policy_value", lambda *given: chosen.append(given[1:]) or value(*given))
    args, batches, examples, *networks_ = networks(image_search.Setting(), 2, "log_exp_f")
    queue, setting = torch.zeros(2, 8, 8), image_search.Setting(objective="nearest", queue=8, nearest=2)
    kept = []
    for step in range(5):
        image_search.update(batches[step % 2], examples, *networks_, args, setting, queue, step)
        kept.append(queue.clone())
        psi, log_ratio, size, objective = chosen.pop()
        assert torch.equal(psi, queue[:, : 4 * (step + 1)]) and (size, objective) == (4, "nearest") and not chosen
        assert sorted(log_ratio.tolist()) == [-np.inf] * (psi.shape[1] - 2) + [0.0] * 2
    for step in range(1, 5):
        new, old = (slice(4 * (i % 2), 4 * (i % 2) + 4) for i in (step, step + 1))
        assert torch.equal(kept[step][:, old], kept[step - 1][:, old])
        assert not torch.equal(kept[step][:, new], kept[step - 1][:, new])


def test_state_and_future_can_be_shifted_alike(monkeypatch):
    shifts, forward = [], laeo.Encoder.forward

    def watched(self, observation, shift=None):
        shifts.append(shift)
        return forward(self, observation, shift)

    monkeypatch.setattr(laeo.Encoder, "forward", watched)
    trained(image_search.Setting(same_shift=True), objective="weighted")  # which sees no examples
    assert all(torch.equal(shift[:4], shift[4:]) for shift in shifts) and shifts[0].unique().numel() > 1
    shifts.clear()
    trained(image_search.Setting(), objective="weighted")
    assert not torch.equal(shifts[0][:4], shifts[0][4:])


def test_ratio_of_images_is_learned_wherever_they_are_shifted():
    """Bright squares are the examples, and one state in five of the data; the ratio is 5 there and 0 elsewhere."""
    args = laeo.Args("FetchPushImage", random_shift=image_search.RATIO_SHIFT, batch_size=32, channels=2)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    images = rng.integers(40, size=(100, 16, 16, 3), dtype=np.uint8)
    bright = np.arange(100) % 5 == 0
    images[bright, 4:12, 4:12] += 200
    numbers = np.arange(100).clip(max=98), np.ones(100, int), np.zeros(100, np.float32), np.zeros((100, 4), np.float32)
    uses = [common.Transitions(*numbers)] * 3
    data = laeo.Data(torch.from_numpy(images), *uses, torch.device("cpu"), np.zeros(100, np.float32))
    encoder = laeo.Encoder(torch.full((16, 16, 3), 40.0), torch.full((16, 16, 3), 60.0), args, generator)
    log_ratio = image_search.fit_log_ratio(encoder, data, torch.from_numpy(images[bright]), args, generator)
    assert log_ratio.shape == (100,) and log_ratio[~bright].max() < -3
    assert np.exp(log_ratio[bright]).mean() == pytest.approx(5, rel=0.3)


def test_settings_are_read_and_mistakes_named(tmp_path):
    settings = image_search.read_settings()
    assert settings["base"] == image_search.Setting()
    differs = {name: image_search.differences(setting) for name, setting in settings.items()}
    assert differs == json.loads(image_search.SETTINGS.read_text())  # none repeats a default
    assert len({json.dumps(x, sort_keys=True) for x in differs.values()}) == len(differs)
    for content, message in (({"a": {"bc": 1}}, "'a' has bc 1;"), ({"a": {"stem": "big"}}, "'a' has stem big")):
        write(tmp_path / "x.json", content)
        with pytest.raises(common.UserError, match=message):
            image_search.read_settings(tmp_path / "x.json")


def test_a_setting_is_trained_played_and_written_once(monkeypatch, tmp_path, capsys):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(4, 6, 16, 16, 3), dtype=np.uint8)
    common.save_dataset(tmp_path / "data", list(images), list(rng.uniform(-1, 1, (4, 5, 4))), images[:, -1])
    played = []

    def evaluate(actor, env_id, episodes, seed, device):
        with torch.no_grad():
            assert actor(torch.from_numpy(images[:1, 0])).shape == (1, 4)
        played.append((env_id, episodes, seed))
        lists = {"episode": [0, 1], "success": [True, True], "final_success": [False, True]}
        return common.summarise(lists) | {"episodes": lists}

    small = {"steps": 2, "batch_size": 4, "num_success": 2, "channels": 2}
    settings = {"base": small, "cloned": small | {"method": "bc"}, "apart": small | {"separate": True}}
    settings["weighted"] = small | {"objective": "weighted"}
    write(tmp_path / "settings.json", settings)
    read = functools.partial(image_search.read_settings, tmp_path / "settings.json")
    monkeypatch.setattr(image_search, "read_settings", read)
    monkeypatch.setattr(image_search.laeo, "evaluate", evaluate)
    monkeypatch.setattr(image_search, "RATIO_STEPS", 2)
    monkeypatch.setattr(image_search, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(1))
    given = image_search.Args(dataset=tmp_path / "data", output=tmp_path / "image_search", device="cpu")
    image_search.main(given)
    assert played == [("FetchPushImage", 200, 100)] * 4
    assert "base-100: 1.000 / 0.500" in capsys.readouterr().out
    results = {path.stem: json.loads(path.read_text()) for path in given.output.iterdir()}
    assert set(results) == {f"{name}-100" for name in settings}
    assert results["cloned-100"]["differs"] == small | {"method": "bc"} and results["base-100"]["steps"] == 2
    assert results["base-100"]["settings"]["bc_coef"] == 0.5 and results["base-100"]["device"]
    assert set(results["base-100"]["metrics"]["heldout"]) > {"critic_loss", "bc_loss"}
    assert set(results["apart-100"]["metrics"]["train"]) == {"bc_loss", "policy_std"}
    assert set(results["base-100"]["seconds"]) == {"data", "training"}
    given.only = "base"
    given.seeds = (100, 101)
    image_search.main(given)  # what is done stays done
    assert played[4:] == [("FetchPushImage", 200, 101)]

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    table = {row[0]: row for row in rows(report.image_search_table())}
    assert table["base"][1:3] == ["num_success 2, steps 2, batch_size 4, channels 2", "2"]
    assert table["base"][-2:] == ["100, 101", "1.00 / 0.50, 1.00 / 0.50"]
    assert table["cloned"][-2:] == ["100", "1.00 / 0.50"] and "separate" in table["apart"][1].split(", ")


def test_an_interrupted_search_leaves_no_process():
    """Neither the job that runs, for ten minutes, nor those that have not begun."""
    context = multiprocessing.get_context("spawn")
    with pytest.raises(KeyboardInterrupt), ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            pid = pool.submit(os.getpid).result()
            futures = [pool.submit(time.sleep, 600) for _ in range(9)]
            raise KeyboardInterrupt
        finally:
            image_search.stop(pool)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises((CancelledError, BrokenProcessPool)):
        futures[-1].result(60)


@pytest.mark.parametrize(
    "flags, message",
    [({"seeds": (0,)}, "--seeds 100 or more"), ({"seeds": ()}, "--seeds 100"), ({"jobs": 0}, "--jobs must be 1 or")],
)
def test_search_flags_are_checked(flags, message, tmp_path):
    with pytest.raises(common.UserError, match=message):
        image_search.main(image_search.Args(dataset=tmp_path, **flags))
    with pytest.raises(common.UserError, match="there is no dataset .*; python benchmark/run.py data makes it"):
        image_search.main(image_search.Args(dataset=tmp_path / "none"))


def search_run(name, seed, steps, device, schedule, success, final):
    episodes = {"episode": [0, 1], "success": success, "final_success": final}
    run = {"name": name, "differs": {"shift": 4} if name == "bc" else {}, "steps": steps, "device": device}
    run |= {"settings": {"steps": 28_000}, "schedule": schedule, "args": {"env_id": "FetchPushImage", "seed": seed}}
    return run | {"episodes": episodes}


def test_search_table_has_a_row_for_each_setting_and_device(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert rows(report.image_search_table()) == []
    for run in (
        search_run("base", 101, 11_000, "a GPU", "by time", [True, True], [True, False]),
        search_run("base", 100, 10_950, "a GPU", "by time", [True, False], [False, False]),
        search_run("base", 102, 28_000, "a CPU", "steps", [True, True], [True, True]),
        search_run("bc", 100, 11_000, "a GPU", "by time", [False, False], [False, False]),
        search_run("another", 100, 28_000, "a CPU", "steps", [True, False], [True, False]),
    ):
        write(tmp_path / "image_search" / f"{run['name']}-{run['args']['seed']}-{run['device'][2:]}.json", run)
    cpu, gpu, shifted, another = rows(report.TABLES["image_search"]())
    assert [row[0] for row in (cpu, gpu, shifted, another)] == [
        "base",
        "base",
        "bc",
        "another",
    ]  # of image_search.json first
    assert gpu[2:4] == ["10,950 to 11,000 of 28,000", "a GPU"] and cpu[2:4] == ["28,000", "a CPU"]
    assert gpu[4].startswith("0.750 [") and gpu[5].startswith("0.250 [")
    assert gpu[6:] == ["100, 101", "0.50 / 0.00, 1.00 / 0.50"]
    assert shifted[1:3] == ["shift 4", "11,000 of 28,000"] and another[2] == "28,000"


def test_results_of_the_search_are_of_its_settings():
    settings = image_search.read_settings()
    for name, run in report.load("image_search").items():
        assert name == f"{run['name']}-{run['args']['seed']}" and run["args"]["seed"] >= image_search.FIRST_SEED
        assert image_search.Setting(**run["settings"]) == image_search.Setting(**run["differs"])
        assert settings[run["name"]] == image_search.Setting(**run["settings"])


# ----------------------------------------------------------------------------------------------- runs, tables, figures


def test_runs_on_images():
    commands = benchmark.experiments()
    counts = {name: len(commands[name]) for name in ("images", "image_examples", "image_sizes", "gpu")}
    assert counts == {"images": 3 * 5 * 3 + 5 * 2, "image_examples": 2 * 3 * 3, "image_sizes": 4, "gpu": 10}
    curves = ["--eval-interval", "4000"]
    assert commands["images"]["laeo-FetchPushImage-2"] == "laeo.py --env-id FetchPushImage --seed 2".split() + curves
    expected = "bc.py --env-id FetchReachImage --seed 1 --quality hard --gradient-steps 6000".split()
    assert commands["images"]["bc-FetchReachImage_hard-1"] == expected
    expected = "tailo.py --env-id FetchPushImageOccluded --seed 1".split()
    assert commands["images"]["tailo-FetchPushImageOccluded-1"] == expected
    expected = "oril.py --env-id FetchPushImage --num-success 1 --seed 0".split()
    assert commands["image_examples"]["oril-1-0"] == expected
    needed = {name: benchmark.needed(command).name for name, command in commands["images"].items()}
    assert needed["bc-FetchReachImage_hard-1"] == "FetchReachImage-hard"
    assert needed["bc-FetchReachImage-1"] == "FetchReachImage-medium"
    made = {benchmark.dataset(name).name for name in commands["data"]}
    for experiment in ("images", "image_examples", "image_sizes"):
        assert {benchmark.needed(command).name for command in commands[experiment].values()} <= made
    on_gpu = commands["gpu"]
    collected = {benchmark.dataset(name).name for name, command in on_gpu.items() if command[0] == "collect_data.py"}
    assert {benchmark.needed(x).name for x in on_gpu.values() if x[0] != "collect_data.py"} == collected
    assert all(benchmark.GPU in " ".join(x) for x in on_gpu.values() if x[0] != "collect_data.py")
    assert all(benchmark.GPU_SIZES in " ".join(x) for x in commands["gpu_speed"].values())
    assert benchmark.GPU.startswith(benchmark.GPU_SIZES) and set(benchmark.ON_GPU) == {"gpu", "gpu_speed"}


def image_run(task, any_step, last, minutes=10):
    """A result of ten episodes with these numbers of successes."""
    episodes = {"episode": list(range(10)), "success": [i < any_step for i in range(10)]}
    episodes["final_success"] = [i < last for i in range(10)]
    points = [(0, 0.0, 0.0), (2000, any_step / 10, last / 10)]
    curve = [{"step": step, "success_rate": x, "final_success_rate": y} for step, x, y in points]
    args = {"env_id": task, "gradient_steps": 28_000, "policy_objective": ""}
    return {"args": args, "episodes": episodes, "seconds": {"training": 60 * minutes}, "curve": curve}


@pytest.fixture
def image_results(monkeypatch, tmp_path):
    """LAEO and others on four cases, with fewer examples, and with more episodes."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for name in ("FetchPushImageOccluded", "FetchPushImage", "FetchReachImage_hard", "FetchReachImage"):
        for seed in (0, 1):
            write(tmp_path / f"images/laeo-{name}-{seed}.json", image_run(name.removesuffix("_hard"), 8 + seed, 6))
    for method, successes in (("bc", 5), ("oril", 7), ("purl", 6), ("tailo", 7)):
        write(tmp_path / f"images/{method}-FetchPushImage-0.json", image_run("FetchPushImage", successes, 4))
    for method, n in (("laeo", 10), ("oril", 10), ("laeo", 1)):
        write(tmp_path / f"image_examples/{method}-{n}-0.json", image_run("FetchPushImage", 5, 3))
    for method, successes in (("laeo", 9), ("bc", 6)):
        write(tmp_path / f"image_sizes/{method}-12000-0.json", image_run("FetchPushImage", successes, 5, 20))
    return tmp_path


def test_tables_of_images(image_results):
    table = rows(report.TABLES["images"]())
    push = [["FetchPushImage", method] for method in ("LAEO", "ORIL", "PURL", "BC", "TAILO")]
    reach = [["FetchReachImage", "LAEO"], ["FetchReachImage, hard data", "LAEO"]]
    assert [row[:2] for row in table] == [*reach, *push, ["FetchPushImageOccluded", "LAEO"]]
    laeo_row = table[2]
    assert laeo_row[2].startswith("**0.850 [") and laeo_row[3].startswith("0.600 [")
    assert laeo_row[4:] == ["0.80 / 0.60, 0.90 / 0.60", "28,000", "10.0"]
    assert rows(report.TABLES["images_of_push"]()) == table[2:]
    table = rows(report.TABLES["image_examples"]())
    cases = [["200", "LAEO"], ["200", "ORIL"], ["200", "PURL"], ["10", "LAEO"], ["10", "ORIL"], ["1", "LAEO"]]
    assert [row[:2] for row in table] == cases and table[3][2].startswith("**0.500 [")
    table = rows(report.TABLES["image_sizes"]())
    assert [row[:2] for row in table] == [["12,000", "LAEO"], ["12,000", "BC"], ["4,000", "LAEO"], ["4,000", "BC"]]
    assert table[0][6] == "20.0" and table[3][2].startswith("**0.500 [")


def test_minutes_are_of_runs_on_a_cpu_if_there_are_any(image_results):
    write(image_results / "images/bc-FetchPushImage-1.json", image_run("FetchPushImage", 5, 4, 2) | {"gpu": "a GPU"})
    write(image_results / "images/tailo-FetchPushImage-0.json", image_run("FetchPushImage", 7, 4, 3) | {"gpu": "a GPU"})
    minutes = {row[1]: row[6] for row in rows(report.TABLES["images"]()) if row[0] == "FetchPushImage"}
    assert minutes == {"LAEO": "10.0", "ORIL": "10.0", "PURL": "10.0", "BC": "10.0", "TAILO": "3.0 on a GPU"}


def test_speed_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    result = {"gpu": "a GPU", "peak_gpu_bytes": 3_140_000_000, "args": {"gradient_steps": 3000}}
    write(tmp_path / "gpu_speed/laeo.json", result | {"seconds": {"training": 30.0}})
    assert rows(report.TABLES["gpu_speed"]()) == [["LAEO", "a GPU", "3,000", "100", "3.14", "42"]]


def test_objectives_with_few_examples_are_the_default_and_another(image_results):
    found = (("image_examples/laeo", 10, "log_exp_f"), ("image_examples/laeo", 1, "nearest"))
    found += ("image_objectives/nearest", 10, "nearest"), ("image_objectives/log_exp_f", 1, "log_exp_f")
    found += (("image_objectives/nearest-0.05", 1, "nearest"),)
    for successes, (name, n, objective) in enumerate(found, 3):
        run = image_run("FetchPushImage", successes, 2)
        run["args"] |= {"policy_objective": objective, "nearest_share": 0.05 if "0.05" in name else 0.2}
        write(image_results / f"{name}-{n}-0.json", run)
    table = [row[:3] for row in rows(report.TABLES["image_objectives"]())]
    cases = [("10", "`log_exp_f`"), ("10", "`nearest`, 20%"), ("1", "`log_exp_f`"), ("1", "`nearest`, 20%")]
    assert [tuple(row[:2]) for row in table] == [*cases, ("1", "`nearest`, 5%")]
    assert [row[2][2:7] for row in table] == ["0.300", "0.500", "0.600", "0.400", "0.700"]


def test_differences_on_images(image_results):
    table = {(row[0], row[1]): row[2:] for row in rows(report.TABLES["image_differences"]())}
    push = [("FetchPushImage", f"LAEO - {method}") for method in ("ORIL", "PURL", "BC", "TAILO")]
    fewer = ("FetchPushImage, success examples: 10", "LAEO - ORIL")
    more = ("FetchPushImage, episodes: 12,000", "LAEO - BC")
    assert list(table) == [*push, fewer, more]  # what has 200 examples or 4,000 episodes is there once
    assert table[push[0]][0].startswith("+0.150 [") and table[push[2]][1].startswith("+0.200 [")
    assert table[fewer][0].startswith("+0.000 [") and table[more][0].startswith("+0.300 [")


def test_tables_of_states_do_not_change_with_images(image_results):
    assert rows(report.TABLES["differences"]()) == rows(report.TABLES["state"]()) == []


def test_tables_without_results_have_no_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    names = [name for name in report.TABLES if name.startswith("image")]
    assert len(names) == 9 and all(rows(report.TABLES[name]()) == [] for name in names)


def test_curves_on_images_are_of_laeo_and_oril(image_results, monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "FIGURES", tmp_path / "figures")
    plots.main()
    assert (tmp_path / "figures" / "image_curves.png").stat().st_size > 1000
    figure, axes = plots.plt.subplots(1, 2)
    assert plots.curves(dict(zip(plots.LABELS, axes)), "images", "FetchPushImage", ("laeo", "oril"))
    any_step, last = ([line.get_xydata().tolist() for line in ax.lines] for ax in axes)
    assert any_step == [[[0, 0], [2000, 0.8]], [[0, 0], [2000, 0.9]], [[0, 0], [2000, 0.7]]]
    assert last == [[[0, 0], [2000, 0.6]], [[0, 0], [2000, 0.6]], [[0, 0], [2000, 0.4]]]
    plots.plt.close(figure)
    for path in (tmp_path / "images").glob("*-FetchPushImage-*"):
        path.unlink()
    (tmp_path / "figures" / "image_curves.png").unlink()
    plots.main()
    assert not (tmp_path / "figures" / "image_curves.png").exists()


# ------------------------------------------------------------------------------------------------------------ nearest


def test_correlation_is_over_actions():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 3))
    expected = [np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(3)]
    assert nearest.correlation(*map(torch.from_numpy, (a, b))).tolist() == pytest.approx(expected)


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """A run of laeo.py on random images, which become solved at a random step."""
    monkeypatch.setattr(laeo, "QUEUE", 60)
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(10, 31, 16, 16, 3), dtype=np.uint8)
    common.save_dataset(tmp_path / "data", list(images), list(rng.uniform(-1, 1, (10, 30, 4))), images[:, 30])
    np.save(tmp_path / "data" / "successes.npy", np.arange(31) > rng.integers(31, size=(10, 1)))
    flags = {"gradient_steps": 5, "batch_size": 4, "num_success": 1, "eval_episodes": 0, "holdout_fraction": 0.3}
    flags |= {"dataset": tmp_path / "data", "run_dir": tmp_path / "run", "channels": 2, "hidden_dim": 8}
    laeo.train(laeo.Args("FetchPushImage", **flags))
    return tmp_path / "run"


def test_table_of_nearest_states(small_run, monkeypatch, capsys):
    """Of random images: numbers of examples, and shares. With a share of one every action has the value 0."""
    for name, x in {"ALL": 4, "NUM_SUCCESS": (4, 1), "STATES": 40, "POOL": 80, "SHARES": (0.1, 1.0)}.items():
        monkeypatch.setattr(nearest, name, x)
    nearest.main(small_run)
    title, *rows = capsys.readouterr().out.splitlines()[-3:]
    assert title.split() == ["examples", "log_exp_f", "nearest", "10.0%", "nearest", "100.0%"]
    numbers = np.array([[float(x) for x in row.replace("/", " ").split()] for row in rows])
    assert numbers[:, 0].tolist() == [4, 1] and (numbers[:, 5:] == 0).all()
    assert (np.abs(numbers[:, 1:5]) <= 1).all() and (numbers[:, 1:5] != 0).any(0).all()
    with pytest.raises(common.UserError, match="is a run on FetchPush; values are shown for FetchPushImage"):
        monkeypatch.setattr(nearest.values.laeo, "load_checkpoint", lambda args: ({}, laeo.Args("FetchPush")))
        nearest.main(small_run)


# -------------------------------------------------------------------------------------------------------------- heads


@pytest.fixture
def short_heads(small_run, monkeypatch):
    """Settings of heads.py for the small run."""
    settings = {"log_exp_f-2": ("log_exp_f", 2, 1.0, 0.0, False), "nearest-0.2-1": ("nearest", 1, 0.2, 0.5, True)}
    for name, x in {"SETTINGS": settings, "STEPS": 100, "BATCH_SIZE": 16}.items():
        monkeypatch.setattr(heads, name, x)
    path = small_run / "features.npy"
    heads.encode(small_run, path)
    return np.load(path, allow_pickle=False)


def test_features_are_those_of_shifted_images(small_run, short_heads):
    _, _, data, _, actor, _ = values.load(small_run, ("FetchPushImage",))
    assert short_heads.shape == (3, 310, 16) and len({version.tobytes() for version in short_heads}) == 3
    images, ways = data.observations[:5], [[i, j] for i in range(5) for j in range(5)]
    with torch.no_grad():
        each = [actor.encoder(images, torch.tensor([way] * 5)).half().numpy() for way in ways]
    for version in short_heads[:, :5]:
        distance = np.abs(np.stack(each) - version).max(-1).min(0)
        assert (distance < 2e-3).all()


def test_policies_learn_on_a_critic_that_stays_as_it_is(small_run, short_heads, monkeypatch):
    """Without cloning a policy's value goes above that of the uniform distribution, for the examples it was given."""
    loaded = []
    monkeypatch.setattr(heads.values, "load", lambda *x, load=values.load: loaded.append(load(*x)) or loaded[-1])
    actor, args = heads.train(short_heads, heads.SETTINGS["log_exp_f-2"], 100, small_run)
    _, _, _, _, examples = laeo.load_data(args, values.CPU)
    (_, _, data, _, _, critic), (*_, saved) = loaded[0], values.load(small_run, ("FetchPushImage",))
    assert all(map(torch.equal, critic.state_dict().values(), saved.state_dict().values())) and len(examples) == 2
    with torch.no_grad():
        x, psi = critic.encoder(data.observations[:64]), critic.psi(critic.encoder(examples))
        of_policy, *of_random = (
            laeo.policy_value(critic.phi(x, action), psi, torch.zeros(2), 16, "log_exp_f").mean().item()
            for action in (actor.mode(x), *(2 * torch.rand(20, 64, 4) - 1))
        )
    assert of_policy > max(of_random)


def test_heads_write_a_result_of_each_setting_and_seed(small_run, short_heads, monkeypatch, capsys):
    outcome = {"success_rate": 0.5, "final_success_rate": 0.0}
    outcome["episodes"] = {"episode": [0, 1], "success": [True, False], "final_success": [False, False]}
    monkeypatch.setattr(laeo, "evaluate", lambda *_: dict(outcome))
    monkeypatch.setattr(image_search, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(1))
    output = small_run.parent / "results" / "image_heads"
    heads.main(heads.Args(small_run, seeds=(100, 101), output=output))
    printed = {f"{name}-{seed}: 0.500 / 0.000" for name in heads.SETTINGS for seed in (100, 101)}
    assert set(capsys.readouterr().out.splitlines()[-4:]) == printed
    monkeypatch.setattr(report, "RESULTS", output.parent)
    table = rows(report.TABLES["image_heads"]())
    assert [row[:4] for row in table] == [
        ["2", "`log_exp_f`", "0", "all alike"],
        ["1", "`nearest`, 20%", "0.5", "by value"],
    ]
    assert all(row[4].startswith("0.500 [") and row[6] == "0.50 / 0.00, 0.50 / 0.00" for row in table)
    monkeypatch.setattr(heads, "run", None)  # what is done stays done
    heads.main(heads.Args(small_run, seeds=(100, 101), output=output))
    for flags in ({"seeds": (99,)}, {"seeds": ()}, {"jobs": 0}):
        with pytest.raises(common.UserError, match="--jobs must be 1 or more, and --seeds 100 or more"):
            heads.main(heads.Args(small_run, **flags))


def test_results_of_heads_are_of_its_settings():
    for name, run in report.load("image_heads").items():
        args = run["args"]
        keys = "policy_objective", "num_success", "nearest_share", "bc_coef", "clone_by_value"
        assert tuple(args[key] for key in keys) == heads.SETTINGS[name.rsplit("-", 1)[0]]
        assert name.endswith(f"-{args['seed']}") and args["seed"] >= heads.FIRST_SEED
