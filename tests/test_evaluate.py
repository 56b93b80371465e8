"""What evaluate.py does with a finished run: the numbers of its own evaluation, films, and one sentence for faults."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gl
import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import bc
import common
import evaluate
import laeo

ROOT = Path(common.__file__).parent
DOTS = '''
"""A dot that moves along a line of 20, to the goal at its right end. Pictures show the dot and a bar of the time."""

import gymnasium as gym
import numpy as np


class Dots(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, image=False, render_mode=None):
        self.image, self.render_mode = image, render_mode
        self.observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        if image:
            self.observation_space = gym.spaces.Box(0, 255, (48, 64, 3), np.uint8)
        self.action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def observe(self):
        return self.render() if self.image else np.array([self.place / 10 - 1, self.time / 20], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = self.np_random.uniform(8, 18), 0
        return self.observe(), {"is_success": self.place >= 19}

    def step(self, action):
        self.place, self.time = float(np.clip(self.place + action[0], 0, 19)), self.time + 1
        return self.observe(), self.place, False, False, {"is_success": self.place >= 19}

    def render(self):
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[:16, : 3 * self.time + 3] = (255, 0, 0)
        picture[24:, int(3 * self.place) : int(3 * self.place) + 5] = (0, 255, 255)
        return picture


class Blind(Dots):
    """Takes no render_mode, and cannot render."""

    metadata = {"render_modes": []}

    def __init__(self):
        super().__init__()


class Dark(Dots):
    """Takes a render_mode that it does not know, and renders nothing."""

    metadata = {"render_modes": ["human"]}

    def render(self):
        return None


for name, options in (("Dots", {}), ("DotsImage", {"image": True})):
    gym.register(f"{name}-v0", Dots, max_episode_steps=20, kwargs=options)
gym.register("Blind-v0", Blind, max_episode_steps=20)
gym.register("Dark-v0", Dark, max_episode_steps=20)
'''


@pytest.fixture(scope="module")
def dots(tmp_path_factory):
    """A directory with the module `dots`, which can be imported, and with the datasets `Dots` and `DotsImage`."""
    directory = tmp_path_factory.mktemp("dots")
    (directory / "dots.py").write_text(DOTS)
    sys.path.insert(0, str(directory))
    rng = np.random.default_rng(0)
    for name in ("Dots", "DotsImage"):
        env, observations, actions = gym.make(f"dots:{name}-v0"), [], []
        for episode in range(8):
            states, actions_played = [env.reset(seed=episode)[0]], rng.uniform(-2, 2, (12, 1)).astype(np.float32)
            states += [env.step(action)[0] for action in actions_played]
            observations.append(np.array(states))
            actions.append(actions_played)
        common.save_dataset(directory / name, observations, actions, [states[-1] for states in observations])
    yield directory
    sys.path.remove(str(directory))


def train(script, env_id: str, dataset: Path, run_dir: Path, **kwargs) -> dict:
    settings = {"gradient_steps": 6, "batch_size": 16, "hidden_dim": 16, "repr_dim": 8, "num_success": 4, "channels": 3}
    settings |= {"log_interval": 6, "eval_interval": 0, "eval_episodes": 7, "device": "cpu", "seed": 3, **kwargs}
    settings = {name: value for name, value in settings.items() if hasattr(script.Args, name)}
    return script.train(script.Args(env_id=env_id, dataset=dataset, run_dir=run_dir, **settings))


@pytest.fixture(scope="module")
def run(dots, tmp_path_factory):
    """A finished run on the dots."""
    directory = tmp_path_factory.mktemp("runs") / "dots"
    train(bc, "dots:Dots-v0", dots / "Dots", directory)
    return directory


def play_run(run_dir: Path, **kwargs) -> dict:
    return evaluate.evaluate(evaluate.Args(run_dir=run_dir, **kwargs))


def assert_the_same_numbers(found: dict, own: dict) -> None:
    """Of a run's own evaluation."""
    assert found["episodes"] == own["episodes"] and len(own["episodes"]["success"]) > 1
    names = ["return", "discounted_return"] + [
        f"{kind}success_{what}" for kind in ("", "final_", "initial_") for what in ("rate", "interval")
    ]
    assert set(found) == {*names, "episodes"} and {name: found[name] for name in names} == {
        name: own[name] for name in names
    }


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("script", "name"), [(bc, "Dots"), (laeo, "Dots"), (bc, "DotsImage")])
def test_numbers_are_those_of_the_runs_own_evaluation(script, name, dots, tmp_path, capsys):
    """With its seed; with another one the starts are others."""
    result = train(script, f"dots:{name}-v0", dots / name, tmp_path / "run")
    assert_the_same_numbers(play_run(tmp_path / "run", episodes=7, seed=3), result)
    printed = capsys.readouterr().out
    low, high = result["success_interval"]
    assert f"success at any step: {result['success_rate']:.3f} [{low:.3f}, {high:.3f}] of 7 episodes" in printed
    assert f"success at the last step: {result['final_success_rate']:.3f} [" in printed
    assert f"mean return: {result['return']:.3f}" in printed
    other = play_run(tmp_path / "run", episodes=9, seed=4)["episodes"]
    assert len(other["seed"]) == 9 and not set(other["seed"]) & set(result["episodes"]["seed"])
    assert other["return"][:7] != result["episodes"]["return"]
    assert name == "DotsImage" or len(set(other["success"] + other["final_success"])) == 2  # not all the same


def test_numbers_of_a_task_are_those_of_the_runs_own_evaluation(reach_dataset, tmp_path):
    result = train(bc, "FetchReach", reach_dataset, tmp_path / "run", eval_episodes=2)
    found = play_run(tmp_path / "run", episodes=2, seed=3)
    assert_the_same_numbers(found, result)
    assert found["episodes"]["episode"] == [0, 0] and found["success_interval"][1] - found["success_interval"][0] > 0.7


def test_a_script_plays_a_run_whose_project_is_elsewhere(run, dots, tmp_path):
    """From another directory, in a new process: policy.pt2 and result.json are enough."""
    (tmp_path / "copy").mkdir()
    for name in ("policy.pt2", "result.json"):
        shutil.copy(run / name, tmp_path / "copy")
    command = [
        sys.executable,
        str(ROOT / "evaluate.py"),
        "copy",
        "--episodes",
        "7",
        "--seed",
        "3",
        "--video",
        "dots.gif",
    ]
    environment = os.environ | {"PYTHONPATH": str(dots)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    own = json.loads((run / "result.json").read_text())
    assert f"success at any step: {own['success_rate']:.3f} [" in result.stdout
    assert f"mean return: {own['return']:.3f}" in result.stdout and "wrote dots.gif" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "dots.gif"}


def test_success_that_is_not_measured_is_said(run, capsys):
    gym.register("Silent-v0", lambda: Silent(gym.make("dots:Dots-v0")))
    summary = play_run(run, episodes=2, env_id="Silent-v0")
    printed = capsys.readouterr().out
    assert "success was not measured" in printed and f"mean return: {summary['return']:.3f}" in printed
    assert set(summary) == {"return", "episodes"} and set(summary["episodes"]) == {"seed", "episode", "return"}
    del gym.registry["Silent-v0"]


class Silent(gym.Wrapper):
    """Says nothing about success."""

    def reset(self, **kwargs):
        return self.env.reset(**kwargs)[0], {}

    def step(self, action):
        return *self.env.step(action)[:4], {}


# --------------------------------------------------------------------------------------------------------------- films


def expected_pictures(episodes: int, seed: int, action: float) -> list[np.ndarray]:
    """Every second state of each episode, until ten are solved."""
    env, pictures = gym.make("dots:Dots-v0", render_mode="rgb_array"), []
    for episode in range(episodes):
        env.reset(seed=common.episode_seed(seed, "evaluation", episode))
        done, step, solved = False, 0, 0
        while not done:
            if step % 2 == 0 and solved < 10:
                pictures.append(env.render())
            _, _, terminated, truncated, info = env.step(np.array([action], np.float32))
            step, solved, done = step + 1, solved + info["is_success"], terminated or truncated
    return pictures


@pytest.mark.parametrize("action", [-1.0, 2.0])
def test_every_second_state_is_a_picture_until_ten_are_solved(action, dots):
    _, pictures = evaluate.play(lambda _: np.array([action], np.float32), "dots:Dots-v0", 5, 0, filmed=4)
    expected = expected_pictures(4, 0, action)
    assert len(expected) == 40 if action < 0 else 20 <= len(expected) < 40
    assert all(np.array_equal(one, other) for one, other in zip(pictures, expected, strict=True))
    assert evaluate.play(lambda _: np.array([action], np.float32), "dots:Dots-v0", 1, 0)[1] == []


def film(run: Path, path: Path, monkeypatch) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the pictures that were filmed, and the frames of the file."""
    seen, write = [], evaluate.write_video
    monkeypatch.setattr(
        evaluate, "write_video", lambda path, pictures: (seen.extend(pictures), write(path, pictures))[1]
    )
    play_run(run, episodes=3, video=path)
    written = [file for file in path.parent.iterdir() if file.suffix in (".mp4", ".gif")]
    assert len(written) == 1 and list(path.parent.iterdir()) == written
    return seen, imageio.imread(written[0], plugin="FFMPEG" if written[0].suffix == ".mp4" else "pillow")


def assert_frames_are_pictures(frames: np.ndarray, pictures: list[np.ndarray], tolerance: float) -> None:
    assert frames.shape[1:] == (48, 64, 3) and frames.dtype == np.uint8
    assert len(frames) == len(pictures) >= 15
    assert len({frame.tobytes() for frame in frames}) > 10 and frames.std() > 30
    for frame, picture in zip(frames, pictures):
        assert np.abs(frame.astype(int) - picture).mean() < tolerance


def test_a_film_is_an_mp4_with_ffmpegs_plugin(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("imageio_ffmpeg")
    pictures, frames = film(run, tmp_path / "film.mp4", monkeypatch)
    assert f"wrote {tmp_path / 'film.mp4'}" in capsys.readouterr().out
    assert_frames_are_pictures(frames, pictures, tolerance=20)
    assert (tmp_path / "film.mp4").read_bytes()[4:8] == b"ftyp"


@pytest.mark.parametrize("name", ["film.mp4", "film.gif"])
def test_a_film_is_a_gif_without_ffmpegs_plugin(name, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # importing it fails
    pictures, frames = film(run, tmp_path / name, monkeypatch)
    assert f"wrote {tmp_path / 'film.gif'}" in capsys.readouterr().out
    assert_frames_are_pictures(frames, pictures, tolerance=2)
    assert (tmp_path / "film.gif").read_bytes()[:6] == b"GIF89a"


def test_a_gif_is_a_gif_with_ffmpegs_plugin(run, tmp_path, monkeypatch):
    pictures, frames = film(run, tmp_path / "film.gif", monkeypatch)
    assert_frames_are_pictures(frames, pictures, tolerance=2)


def test_a_task_is_filmed(reach_dataset, tmp_path, monkeypatch):
    """Also one of a run that cannot have a camera: the film shows the scene, in which the arm moves."""
    gl.require_gl()
    train(bc, "FetchReach", reach_dataset, tmp_path / "run", eval_episodes=0)
    (tmp_path / "film").mkdir()
    evaluate.evaluate(evaluate.Args(tmp_path / "run", episodes=1, video=tmp_path / "film" / "reach.gif"))
    frames = imageio.imread(tmp_path / "film" / "reach.gif", plugin="pillow")
    assert frames.shape[1:] == (240, 240, 3) and 20 <= len(frames) <= 25 and frames[0].std() > 20
    assert np.abs(frames[0].astype(int) - frames[-1]).max() > 100


# -------------------------------------------------------------------------------------------------------------- faults


def refusal(run_dir: Path, **kwargs) -> str:
    """Return the message of the UserError that evaluate must raise: one line that ends like a sentence."""
    with pytest.raises(common.UserError) as caught:
        play_run(run_dir, **kwargs)
    message = str(caught.value)
    assert not message.startswith("error") and message.endswith(".") and len(message.splitlines()) == 1, message
    return message


def damage(run: Path, copy: Path, name: str, content: bytes | None) -> Path:
    """Return a copy of the run in which one file has this content, or is missing."""
    shutil.copytree(run, copy)
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    return copy


@pytest.mark.parametrize("name", ["result.json", "policy.pt2"])
@pytest.mark.parametrize(
    "content", [None, b"", b"damaged", b"{", b"[]", b"{}", b'{"args": {}}', b"PK\x03\x04"], ids=repr
)
def test_a_missing_or_damaged_file_is_a_sentence(name, content, run, tmp_path):
    assert f"{tmp_path / 'copy'} is not a finished run" in refusal(damage(run, tmp_path / "copy", name, content))


def test_a_policy_that_is_cut_off_is_a_sentence(run, tmp_path):
    content = (run / "policy.pt2").read_bytes()
    copy = damage(run, tmp_path / "copy", "policy.pt2", content[: len(content) // 2])
    assert f"{copy} is not a finished run" in refusal(copy)
    assert f"{tmp_path / 'nowhere'} is not a finished run" in refusal(tmp_path / "nowhere")


def test_a_policy_with_one_wrong_bit_is_a_sentence(run, tmp_path):
    """PyTorch reads it without a word: a weight is another one."""
    content = bytearray((run / "policy.pt2").read_bytes())
    weight = next(iter(torch.export.load(run / "policy.pt2").state_dict.values())).numpy().tobytes()
    assert content.count(weight) == 1
    content[content.index(weight)] ^= 1
    copy = damage(run, tmp_path / "copy", "policy.pt2", bytes(content))
    torch.export.load(copy / "policy.pt2")
    assert f"{copy} is not a finished run (ValueError: the checksum of archive/" in refusal(copy)


@pytest.mark.parametrize("plugin", [True, False])
@pytest.mark.parametrize("name", ["film", "film.txt", "film.mp4.old"])
def test_a_film_with_another_suffix_is_refused_before_anything_is_played(name, plugin, run, tmp_path, monkeypatch):
    if not plugin:
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setattr(evaluate, "play", None)
    message = refusal(run, video=tmp_path / name)
    assert f"--video is {tmp_path / name}" in message and ".mp4 or .gif" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("env_id", ["dots:Blind-v0", "dots:Dark-v0"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium's, about the render mode
def test_an_environment_that_cannot_be_filmed_is_refused(env_id, run, tmp_path):
    assert play_run(run, episodes=1, env_id=env_id)["return"] > 0  # it can be played
    message = refusal(run, episodes=1, env_id=env_id, video=tmp_path / "film.gif")
    assert env_id in message and "render" in message and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [{"episodes": 0}, {"episodes": -1}, {"seed": -1}, {"seed": 2**32}])
def test_numbers_out_of_range_are_refused(settings, run):
    (name, value), message = next(iter(settings.items())), refusal(run, **settings)
    assert f"--{name}" in message and str(value) in message


def test_an_environment_that_is_not_there_is_a_sentence(run):
    assert "did you mean FetchPush" in refusal(run, env_id="FetchPsh")


def test_an_environment_of_other_observations_is_a_sentence(run):
    """The policy was trained on two numbers, and Pendulum has three."""
    message = refusal(run, env_id="Pendulum-v1", episodes=1)
    assert "(3,)" in message and "(2,)" in message


@pytest.mark.parametrize("arguments", [["nowhere"], ["RUN", "--video", "film.txt"], ["OTHER"]])
def test_a_fault_is_one_sentence_and_status_1(arguments, run, dots, tmp_path):
    """OTHER has another file of PyTorch's in place of the policy; of that torch.export logs a traceback."""
    torch.save([], tmp_path / "other")
    other = damage(run, tmp_path / "copy", "policy.pt2", (tmp_path / "other").read_bytes())
    arguments = [{"RUN": str(run), "OTHER": str(other)}.get(argument, argument) for argument in arguments]
    command = [sys.executable, str(ROOT / "evaluate.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(dots)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
