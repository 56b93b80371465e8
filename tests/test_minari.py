"""Datasets from and to Minari."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import collect_data
import common

if sys.version_info < (3, 11) or not os.environ.get("CI"):  # Minari with images needs Python 3.11
    pytest.importorskip("minari")
    pytest.importorskip("h5py")
import minari
from minari.data_collector import EpisodeBuffer

import minari_io

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")  # about fields that an upload needs


@pytest.fixture(autouse=True)
def minari_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def convert(**flags):
    return collect_data.collect(collect_data.Args(**flags))


def arrays_of(path):
    return {file.stem: np.load(file) for file in path.glob("*.npy")}


def assert_equal(one, two, names):
    for name in names:
        assert one[name].dtype == two[name].dtype and np.array_equal(one[name], two[name]), name


def make_minari(name, lengths=(4, 2, 5), infos=None, observation_space=None, action_space=None, rewards=None):
    """Observation (episode, step), action (episode + step / 10); the second episode terminates."""
    buffers = []
    for e, n in enumerate(lengths):
        end = np.arange(1, n + 1) == n
        buffers.append(
            EpisodeBuffer(
                observations=np.stack([np.full(n + 1, e), np.arange(n + 1)], 1).astype(np.float64),
                actions=np.array(e + np.arange(n) / 10)[:, None],
                rewards=rewards[e] if rewards else np.arange(n, dtype=np.float64),
                terminations=end & (e == 1),
                truncations=end & (e != 1),
                infos=infos[e] if infos else {},
            )
        )
    minari.create_dataset_from_buffers(
        name,
        buffers,
        observation_space=observation_space or gym.spaces.Box(-9, 9, (2,), np.float64),
        action_space=action_space or gym.spaces.Box(-5, 5, (1,), np.float64),
    )


# ---------------------------------------------------------------------------------------------------------- round trips


def test_state_data_come_back_from_minari_to_the_bit(reach_dataset, tmp_path, capsys):
    convert(to_minari="laeo/reach-v0", output=reach_dataset)
    metadata = convert(from_minari="laeo/reach-v0", output=tmp_path / "back",
                       success_examples=reach_dataset / "success_examples.npy")  # fmt: skip
    one, two = arrays_of(reach_dataset), arrays_of(tmp_path / "back")
    assert_equal(one, two, ("observations", "actions", "lengths", "success_examples"))
    assert not two["terminals"].any() and not two["rewards"].any()
    assert metadata == common.read_metadata(tmp_path / "back")
    assert metadata["env_id"] == "FetchReach" and metadata["num_episodes"] == 40
    assert metadata["action_bounds"] == [[-1.0] * 4, [1.0] * 4]
    assert metadata["versions"] == common.read_metadata(reach_dataset)["versions"]
    data = common.load_dataset(tmp_path / "back", "FetchReach", verify=True)
    assert len(data.success_examples) == len(one["success_examples"])
    assert {path.name for path in tmp_path.iterdir()} == {"back", "minari"}
    assert "40 episodes" in capsys.readouterr().out


def test_exported_dataset_is_an_ordinary_one_of_minari(reach_dataset):
    convert(to_minari="laeo/reach-v0", output=reach_dataset)
    dataset, arrays = minari.load_dataset("laeo/reach-v0"), arrays_of(reach_dataset)
    assert dataset.total_episodes == 40 and dataset.total_steps == 40 * 50
    assert "mujoco==3.3.0" in dataset.storage.metadata["requirements"]
    env = dataset.recover_environment()
    assert env.spec.id == "laeo/FetchReach-v0"
    assert env.observation_space == dataset.observation_space and env.action_space == dataset.action_space
    observation, _ = env.reset(seed=common.episode_seed(0, "dataset", 7))
    assert np.array_equal(observation, dataset[7].observations[0])
    assert np.array_equal(dataset[7].infos["success"], arrays["successes"][7])
    assert dataset[7].truncations.tolist() == [False] * 49 + [True] and not dataset[7].terminations.any()


def test_infos_of_success_give_the_last_observations_of_the_episodes_that_end_in_it(reach_dataset, tmp_path):
    convert(to_minari="reach-v0", output=reach_dataset)
    convert(from_minari="reach-v0", output=tmp_path / "back")
    arrays, back = arrays_of(reach_dataset), arrays_of(tmp_path / "back")
    expected = arrays["observations"][arrays["successes"][:, -1], -1]
    assert 0 < len(expected) < 40
    assert sorted(map(bytes, back["success_examples"])) == sorted(map(bytes, expected))
    assert not np.array_equal(back["success_examples"], expected)  # in random order: a method takes the first of them


def test_image_data_come_back_from_minari_to_the_bit(tmp_path):
    """Noise, of which JPEG, Minari's default, would leave nothing."""
    rng = np.random.default_rng(0)
    lengths = (3, 5, 2)
    observations = [rng.integers(0, 256, (n + 1, 64, 64, 3), dtype=np.uint8) for n in lengths]
    actions = [rng.uniform(-1, 1, (n, 4)).astype(np.float32) for n in lengths]
    rewards = [rng.normal(size=n).astype(np.float32) for n in lengths]
    examples = rng.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    common.save_dataset(tmp_path / "images", observations, actions, examples, [False, True, False], rewards)
    convert(to_minari="images-v0", output=tmp_path / "images")
    convert(from_minari="images-v0", output=tmp_path / "back",
            success_examples=tmp_path / "images" / "success_examples.npy")  # fmt: skip
    one, two = arrays_of(tmp_path / "images"), arrays_of(tmp_path / "back")
    assert set(one) == set(two)
    assert_equal(one, two, one)
    assert one["observations"].dtype == np.uint8 and one["terminals"].tolist() == [False, True, False]
    assert "env_id" not in common.read_metadata(tmp_path / "back")
    dataset = minari.load_dataset("images-v0")
    assert dataset[1].terminations.tolist() == [False] * 4 + [True] and not dataset[1].truncations.any()


def test_episodes_are_read_and_written_one_by_one(tmp_path, monkeypatch):
    """So that memory does not grow with their number."""
    from minari.dataset._storages.hdf5_storage import HDF5Storage

    common.save_dataset(tmp_path / "data", np.arange(54.0).reshape(9, 3, 2), np.zeros((9, 2, 1)), np.zeros((1, 2)))
    update_episodes, get_episodes, asked = HDF5Storage.update_episodes, HDF5Storage.get_episodes, []

    def update(self, episodes):
        assert not hasattr(episodes, "__len__")  # not a list of all of them
        update_episodes(self, episodes)

    def get(self, indices):
        asked.append(len(indices))
        return get_episodes(self, indices)

    monkeypatch.setattr(HDF5Storage, "update_episodes", update)
    monkeypatch.setattr(HDF5Storage, "get_episodes", get)
    convert(to_minari="small-v0", output=tmp_path / "data")
    convert(from_minari="small-v0", output=tmp_path / "back", success_examples=tmp_path / "data/success_examples.npy")
    assert len(asked) >= 9 and set(asked) == {1}
    assert np.load(tmp_path / "back" / "lengths.npy").tolist() == [2] * 9


# ----------------------------------------------------------------------------------------- from other people's datasets


def test_foreign_dataset_becomes_float32_arrays_padded_with_zeros(tmp_path):
    make_minari("their/data-v3", infos=[{"success": np.array([0.0] * n + [s])} for n, s in zip((4, 2, 5), (1, 0, 1))])
    metadata = convert(from_minari="their/data-v3", output=tmp_path / "data")
    arrays = arrays_of(tmp_path / "data")
    assert arrays["lengths"].tolist() == [4, 2, 5] and arrays["terminals"].tolist() == [False, True, False]
    assert arrays["observations"].shape == (3, 6, 2) and arrays["observations"].dtype == np.float32
    assert arrays["observations"][1].tolist() == [[1, 0], [1, 1], [1, 2], [0, 0], [0, 0], [0, 0]]
    assert arrays["actions"][2, :, 0] == pytest.approx([2, 2.1, 2.2, 2.3, 2.4])
    assert arrays["rewards"][0].tolist() == [0, 1, 2, 3, 0]
    assert sorted(arrays["success_examples"].tolist()) == [[0, 4], [2, 5]]
    assert metadata["minari"] == "their/data-v3" and metadata["action_bounds"] == [[-5.0], [5.0]]
    assert "env_id" not in metadata and metadata["versions"] == {}
    common.load_dataset(tmp_path / "data", None, verify=True)


def test_is_success_counts_as_well(tmp_path):
    make_minari("data-v0", infos=[{"is_success": np.array([False] * n + [e == 1])} for e, n in enumerate((4, 2, 5))])
    convert(from_minari="data-v0", output=tmp_path / "data")
    assert np.load(tmp_path / "data" / "success_examples.npy").tolist() == [[1, 2]]


def test_success_reward_takes_the_observations_after_the_actions(tmp_path):
    make_minari("data-v0")  # the reward of step t is t
    convert(from_minari="data-v0", output=tmp_path / "data", success_reward=3.0)
    examples = np.load(tmp_path / "data" / "success_examples.npy")
    assert sorted(examples.tolist()) == [[0, 4], [2, 4], [2, 5]]


def test_environment_of_the_dataset_is_named(tmp_path):
    env = gym.make("Pendulum-v1")
    buffers = []
    for seed in range(2):
        observations, actions = [env.reset(seed=seed)[0]], []
        for _ in range(3):
            actions.append(env.action_space.sample())
            observations.append(env.step(actions[-1])[0])
        flags = np.zeros(3, bool)
        buffers.append(EpisodeBuffer(observations=np.stack(observations), actions=np.stack(actions),
                                     rewards=np.ones(3), terminations=flags, truncations=flags))  # fmt: skip
    minari.create_dataset_from_buffers("pendulum-v0", buffers, env="Pendulum-v1")
    metadata = convert(from_minari="pendulum-v0", output=tmp_path / "data", success_reward=0.0)
    assert metadata["env_id"] == "Pendulum-v1" and metadata["action_bounds"] == [[-2.0], [2.0]]
    common.load_dataset(tmp_path / "data", "Pendulum-v1", verify=True)


def test_default_output_is_named_after_the_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_minari("their/data-v3")
    convert(from_minari="their/data-v3", success_reward=1.0)
    assert (tmp_path / "datasets" / "their-data-v3" / "metadata.json").exists()
    with pytest.raises(common.UserError, match="datasets/their-data-v3 exists; add --overwrite"):
        convert(from_minari="their/data-v3", success_reward=1.0)
    convert(from_minari="their/data-v3", success_reward=4.0, overwrite=True)
    assert len(np.load(tmp_path / "datasets" / "their-data-v3" / "success_examples.npy")) == 1


# ------------------------------------------------------------------------------------------------------------- mistakes


def refused(match, **flags):
    with pytest.raises(common.UserError, match=match) as caught:
        convert(**flags)
    assert "\n" not in str(caught.value)


def test_without_success_examples_the_three_ways_are_named(tmp_path):
    make_minari("data-v0", infos=[{"success": np.zeros(n + 1)} for n in (4, 2, 5)])
    ways = "--success-examples FILE.npy.*--success-reward R.*infos hold 'success' or 'is_success'"
    refused(ways, from_minari="data-v0", output=tmp_path / "data")
    refused(ways, from_minari="data-v0", output=tmp_path / "data", success_reward=99.0)
    np.save(tmp_path / "none.npy", np.zeros((0, 2)))
    for name in ("none", "missing"):
        refused(
            f"--success-examples .*{name}.npy cannot be used",
            from_minari="data-v0", output=tmp_path / "data", success_examples=tmp_path / f"{name}.npy",
        )  # fmt: skip
    np.save(tmp_path / "none.npy", np.zeros((5, 3)))
    refused(r"one or more observations \[2\]", from_minari="data-v0", output=tmp_path / "data",
            success_examples=tmp_path / "none.npy")  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"minari", "none.npy"}


def test_dictionaries_are_refused_with_the_wrapper_that_mends_them(tmp_path):
    space = gym.spaces.Dict({"position": gym.spaces.Box(-9, 9, (2,))})
    flags = np.array([False, True])
    buffer = EpisodeBuffer(observations={"position": np.zeros((3, 2), np.float32)}, actions=np.zeros((2, 1)),
                           rewards=np.zeros(2), terminations=flags, truncations=~flags)  # fmt: skip
    actions = gym.spaces.Box(-5, 5, (1,))
    minari.create_dataset_from_buffers("dict-v0", [buffer], observation_space=space, action_space=actions)
    refused("Dict space; .*gymnasium.wrappers.FlattenObservation", from_minari="dict-v0", output=tmp_path / "data")


def test_discrete_actions_are_refused(tmp_path):
    make_minari("data-v0", action_space=gym.spaces.Discrete(3))
    refused(r"the actions of data-v0 are Discrete\(3\)", from_minari="data-v0", output=tmp_path / "data")


def test_value_that_is_not_finite_leaves_nothing_behind(tmp_path):
    make_minari("data-v0", rewards=[np.array([1.0, np.nan, 1, 1]), np.ones(2), np.ones(5)])
    refused("rewards of episode 0: the value at .1. is not finite", from_minari="data-v0", output=tmp_path / "data",
            success_reward=1.0)  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["minari"]


def test_dataset_that_is_not_there_gets_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("there is no Minari dataset D4RL/pen/human-v2 here; get it with: minari download D4RL/pen/human-v2",
            from_minari="D4RL/pen/human-v2")  # fmt: skip
    refused("there is no dataset datasets/FetchPush-hard; make it with: python collect_data.py --env-id FetchPush "
            "--quality hard", env_id="FetchPush", quality="hard", to_minari="push-v0")  # fmt: skip
    refused("two commands", from_minari="a-v0", to_minari="b-v0")


def test_name_that_minari_does_not_take_is_refused(reach_dataset, minari_home):
    for name in ("reach", "../reach-v0", "/reach-v0"):
        refused(f"--to-minari is {name}; Minari's names are NAME-v0 or NAMESPACE/NAME-v0", to_minari=name,
                output=reach_dataset)  # fmt: skip
    convert(to_minari="reach-v0", output=reach_dataset)
    refused("reach-v0 exists; choose another name, or: minari delete reach-v0", to_minari="reach-v0",
            output=reach_dataset)  # fmt: skip
    assert minari.load_dataset("reach-v0").total_episodes == 40


def test_export_that_fails_leaves_nothing_behind(reach_dataset, minari_home, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(minari.dataset.minari_storage.MinariStorage, "update_metadata", fail)
    refused("cannot write .*reach-v0: No space left on device; free some space", to_minari="reach-v0",
            output=reach_dataset)  # fmt: skip
    assert list(minari_home.iterdir()) == []


def test_damaged_dataset_gets_one_sentence(tmp_path, minari_home):
    make_minari("data-v0")
    metadata = minari_home / "data-v0" / "data" / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"minari_version": "9.9.9"}))
    refused("the Minari dataset data-v0 cannot be read .*9.9.9", from_minari="data-v0", output=tmp_path / "data")


@pytest.mark.parametrize("missing", ["minari", "h5py", "PIL"])
def test_missing_package_gets_one_sentence(tmp_path, missing):
    """In a process of its own, where the package cannot be imported."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None; import minari_io\n"
        "try: minari_io.import_minari()\n"
        "except ValueError as error: print(error)"
    )
    root = Path(minari_io.__file__).parent
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert process.stdout.startswith("Minari cannot be imported (ModuleNotFoundError: ")
    assert process.stdout.endswith("pip install -r requirements-optional.txt\n") and process.stdout.count("\n") == 1


def test_requirements_name_what_is_imported():
    lines = (Path(minari_io.__file__).parent / "requirements-optional.txt").read_text().splitlines()
    names = {line.split("#")[0].split(";")[0].split(">=")[0].strip() for line in lines if not line.startswith("#")}
    assert names == {"minari[hdf5]", "pillow", "wandb", "ray"}
