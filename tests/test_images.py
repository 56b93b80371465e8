"""Tasks of images: what the pictures show, that they change nothing, their datasets, and training from them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_training
import torch
from PIL import Image

import collect_data
import common
import laeo

sys.path.insert(0, str(Path(common.__file__).parent / "benchmark"))
import occlusion

ROOT = Path(common.__file__).parent
IMAGE_TASKS = list(common.VIEWS)
SCRIPTS = test_training.SCRIPTS
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run_python(code, **environment):
    """Run code in a new process, in which MuJoCo has not chosen yet how to render."""
    unset = ("MUJOCO_GL", "PYOPENGL_PLATFORM")  # the latter is set by MuJoCo in this process
    environment = {name: value for name, value in os.environ.items() if name not in unset} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def push(env, steps=50, seed=0):
    """Push the block with the scripted controller; yield the picture, the gripper and the block after each step."""
    observation, _ = env.reset(seed=seed)
    for step in range(steps + 1):
        state = env.unwrapped.state
        yield observation, state[:3], state[3:6]
        action = collect_data.scripted_action("FetchPush", state, np.array(common.TASKS["FetchPush"].desired_goal))
        if step < steps:
            observation, _, _, _, _ = env.step(action.astype(np.float32))


def visible_pixels(env, *bodies):
    """Return which share [64, 64] of each pixel of the present picture shows these bodies, by MuJoCo's segmentation."""
    model, geoms = env.unwrapped.inner.model, occlusion.drawn_geoms(env.unwrapped.camera)
    wanted = [geom for geom in range(model.ngeom) if model.body(model.geom_bodyid[geom]).name in bodies]
    return np.isin(geoms, wanted).reshape(64, 2, 64, 2).mean((1, 3))  # the camera makes a pixel of four


GRIPPER = [f"robot0:{part}" for part in ("gripper_link", "r_gripper_finger_link", "l_gripper_finger_link")]


# ------------------------------------------------------------------------------------------------------------ pictures


def test_block_and_gripper_are_in_the_pictures_of_push():
    """Where the block is the picture is dark, and where it was a step ago the white table is to be seen again."""
    env, seen, blocks = common.make_env("FetchPushImage"), 0, []
    for seed in range(5):
        picture, _, _ = next(push(env, 0, seed))
        share, gripper = visible_pixels(env, "object0"), visible_pixels(env, *GRIPPER) == 1
        block = share == 1
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        assert gripper.sum() > 30 and picture[gripper].mean() > 100
        if block.sum() > 20:  # the paper's camera misses the block in a tenth of the starts
            seen += 1
            assert picture[block].max() < 110
            blocks.append(block)
            data = env.unwrapped.inner.data
            data.joint("object0:joint").qpos[2] -= 1.0  # under the table
            env.unwrapped.inner._mujoco.mj_forward(env.unwrapped.inner.model, data)
            uncovered = env.unwrapped.camera.picture()
            assert (uncovered[block].astype(int).sum(-1) - picture[block].astype(int).sum(-1)).mean() > 200
            assert np.array_equal(uncovered[share == 0], picture[share == 0])
    env.close()
    assert seen >= 4 and not np.array_equal(blocks[0], blocks[1])


def test_the_gripper_of_reach_goes_to_the_left_of_the_picture():
    env, middle = common.make_env("FetchReachImage"), []
    env.reset(seed=0)
    for _ in range(15):
        gripper = visible_pixels(env, *GRIPPER) == 1
        assert gripper.sum() > 30
        middle.append(np.nonzero(gripper)[1].mean())
        action = collect_data.scripted_action("FetchReach", env.unwrapped.state, np.array((1.3, 0.3, 0.9)))
        env.step(action.astype(np.float32))
    env.close()
    assert middle[-1] < middle[0] - 10


def test_occluded_camera_hides_the_block_when_the_gripper_touches_it_and_the_other_does_not():
    hidden = {}
    for env_id in ("FetchPushImage", "FetchPushImageOccluded"):
        env = common.make_env(env_id)
        touching, away = occlusion.shares(env, (state for seed in range(16) for state in push(env, 50, seed)))
        env.close()
        assert len(touching) > 40 and len(away) > 100
        hidden[env_id] = np.mean(np.array(touching) < 0.1)
        assert np.mean(away) > 0.4  # it is there to be seen before and after
    assert hidden["FetchPushImageOccluded"] > 0.5 and hidden["FetchPushImage"] < 0.3


@pytest.mark.parametrize("env_id", IMAGE_TASKS)
def test_no_goal_and_no_axes_are_in_the_pictures(env_id):
    """The ball at the goal is red, the axes of the point that drags the gripper cross the whole picture."""
    env = common.make_env(env_id)
    env.reset(seed=0)
    camera = env.unwrapped.camera
    picture = camera.picture()
    red = (picture[..., 0] > 100) & (picture[..., 1:].max(-1) < 60)
    assert not red.any() and not visible_pixels(env, "robot0:mocap").any()
    outside = common.Camera(env, common.OUTSIDE_VIEWS[common.TASKS[env_id].state_task], 64, show_goal=True)
    with_goal = outside.picture()
    assert ((with_goal[..., 0] > 100) & (with_goal[..., 1:].max(-1) < 60)).any()
    outside.close()
    env.close()


@pytest.mark.parametrize("env_id", IMAGE_TASKS)
def test_what_is_left_out_for_speed_is_not_to_be_seen(env_id):
    """Neither two links inside the robot's base, nor, wherever the arm is, what lies outside of the camera's view."""
    env = common.make_env(env_id)
    camera, model = env.unwrapped.camera, env.unwrapped.inner.model
    inside = [f"robot0:{name}_link" for name in ("estop", "laser")]
    inside = [geom for geom in range(model.ngeom) if model.body(model.geom_bodyid[geom]).name in inside]
    groups, normals = model.geom_group.copy(), camera._normals.copy()
    fewer = 0
    for seed in range(8):
        env.reset(seed=seed)
        action = np.random.default_rng(seed).choice([-1.0, 1.0], 4).astype(np.float32)
        for _ in range(15):
            picture, *_ = env.step(action)
        assert np.array_equal(model.geom_group, groups)  # as it was: another camera looks elsewhere
        drawn = camera._renderer.scene.ngeom
        model.geom_group[inside], camera._normals[:] = 0, 0
        assert np.array_equal(camera.picture(), picture)
        fewer += camera._renderer.scene.ngeom - drawn - len(inside)
        model.geom_group[:], camera._normals[:] = groups, normals
    env.close()
    assert fewer > 8


@pytest.mark.parametrize("env_id", IMAGE_TASKS)
def test_rendering_moves_nothing(env_id):
    """The image task and its state twin are one trajectory to the bit, however many pictures are taken."""
    state_task = common.TASKS[env_id].state_task
    images, states = common.make_env(env_id), common.make_env(state_task)
    outside = common.Camera(images, common.OUTSIDE_VIEWS[state_task], 64, show_goal=True)
    assert images.observation_space == common.gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    for seed in (0, 1):
        _, image_info = images.reset(seed=seed)
        state, state_info = states.reset(seed=seed)
        for step, action in enumerate(np.random.default_rng(seed).uniform(-1, 1, (50, 4)).astype(np.float32)):
            assert images.unwrapped.state.tobytes() == state.tobytes() and image_info == state_info
            for _ in range(step % 3):
                outside.picture()
            _, _, _, _, image_info = images.step(action)
            state, _, _, _, state_info = states.step(action)
        for name in ("qpos", "qvel", "qacc_warmstart", "mocap_pos"):
            one, other = (getattr(env.unwrapped.inner.data, name) for env in (images, states))
            assert one.tobytes() == other.tobytes(), name
    outside.close()
    images.close()
    states.close()


def test_egl_and_osmesa_make_the_same_pictures():
    code = (
        "import hashlib, common; env = common.make_env('FetchPushImage'); picture, _ = env.reset(seed=3); env.close();"
        "print(hashlib.sha256(picture.tobytes()).hexdigest(), picture.std() > 20)"
    )
    results = [run_python(code, MUJOCO_GL=name, LP_NUM_THREADS="1") for name in ("egl", "osmesa", "")]
    assert [result.returncode for result in results] == [0, 0, 0], results
    assert len({result.stdout for result in results}) == 1 and results[0].stdout.endswith(" True\n")


@pytest.mark.parametrize("name", ["egl", "osmesa"])
def test_a_camera_that_goes_leaves_the_others_as_they_are(name):
    """Whether it is closed or dropped; and one that is still there at the end goes without a word."""
    code = (
        "import common; envs = [common.make_env('FetchPushImage') for _ in range(3)]\n"
        "before = [env.reset(seed=1)[0] for env in envs]; envs[0].close()\n"
        "first = envs[2].unwrapped.camera.picture(); del envs[1]\n"
        "print(*((before[2] == x).all() for x in (before[0], first, envs[1].unwrapped.camera.picture())))"
    )
    result = run_python(code, MUJOCO_GL=name, LP_NUM_THREADS="1")
    assert (result.stdout, result.stderr, result.returncode) == ("True True True\n", "", 0)


NO_GL = """
import ctypes, ctypes.util, runpy, sys
load = ctypes.CDLL.__init__
def refuse(self, name, *args, **kwargs):
    if name and ("GL" in str(name) or "OSMesa" in str(name)):
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")
    load(self, name, *args, **kwargs)
ctypes.CDLL.__init__ = refuse
"""


@pytest.mark.parametrize("found", [True, False])
def test_machine_without_gl_gets_one_sentence(found, image_dataset):
    """Whether there is something of that name or not; the state tasks need neither."""
    code = NO_GL + "find = ctypes.util.find_library\n"
    code += f"ctypes.util.find_library = lambda name: {found} and f'lib{{name}}.so' if 'GL' in name else find(name)\n"
    code += "import common; common.make_env('FetchPush').close()\n"
    code += f"sys.argv = ['laeo.py', '--env-id', 'FetchReachImage', '--dataset', '{image_dataset}']\n"
    result = run_python(code + "runpy.run_path('laeo.py', run_name='__main__')")
    message = result.stderr.strip().splitlines()
    assert result.returncode == 1 and len(message) == 1, result.stderr
    assert message[0].startswith(f"error: pictures cannot be rendered here with {'egl' if found else 'osmesa'} (")
    assert "apt install libegl1 libgl1" in message[0] and "libosmesa6" in message[0]


def test_unknown_renderer_gets_one_sentence():
    result = run_python("import common; common.make_env('FetchReach')", MUJOCO_GL="foo")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: MUJOCO_GL is foo, which MuJoCo does not know; egl and osmesa")


# ------------------------------------------------------------------------------------------------------------ datasets


@pytest.fixture(scope="module")
def image_dataset(tmp_path_factory):
    output = tmp_path_factory.mktemp("images") / "FetchReachImage-medium"
    collect_data.collect(collect_data.Args(env_id="FetchReachImage", num_episodes=40, output=output))
    return output


def test_images_are_those_of_the_state_datasets_episodes(image_dataset, reach_dataset):
    images, states = (
        {name: np.load(path / f"{name}.npy") for name in ("observations", "actions", "successes", "success_examples")}
        for path in (image_dataset, reach_dataset)
    )
    assert images["observations"].shape == (40, 51, 64, 64, 3) and images["observations"].dtype == np.uint8
    assert images["success_examples"].dtype == np.uint8
    assert np.array_equal(images["actions"], states["actions"])
    assert np.array_equal(images["successes"], states["successes"])
    solved = {picture.tobytes() for picture in images["observations"][:, 1:][images["successes"][:, 1:]]}
    assert {picture.tobytes() for picture in images["success_examples"]} <= solved
    env = common.make_env("FetchReachImage")
    picture, _ = env.reset(seed=common.episode_seed("dataset", 0, 7))
    for step, action in enumerate(images["actions"][7]):
        assert np.array_equal(picture, images["observations"][7, step])
        picture, _, _, _, _ = env.step(action)
    env.close()
    metadata = common.read_metadata(image_dataset)
    assert metadata["env_id"] == "FetchReachImage" and metadata["behavior"]["file"] == "FetchReach.pt"


def test_disk_space_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(common.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    args = collect_data.Args(env_id="FetchPushImage", output=tmp_path / "a" / "data")
    with pytest.raises(common.UserError, match=r"data takes 2\.5 GB and .* has 1\.0 GB left; free some space"):
        collect_data.collect(args)
    assert not (tmp_path / "a").exists() or not any((tmp_path / "a").iterdir())


def test_image_task_has_no_policies_of_its_own(tmp_path):
    args = collect_data.Args(env_id="FetchPushImage", train=True, output=tmp_path / "data")
    with pytest.raises(common.UserError, match="python collect_data.py --env-id FetchPush --train"):
        collect_data.collect(args)


def test_random_shift_moves_each_image_by_itself_and_repeats_its_edge():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 9, 9, 3), dtype=np.uint8)
    shifted = common.random_shift(torch.from_numpy(images), 2, torch.Generator().manual_seed(0)).numpy()
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    found = set()
    for pad, image in zip(padded, shifted):
        places = [(y, x) for y in range(5) for x in range(5) if np.array_equal(pad[y : y + 9, x : x + 9], image)]
        assert len(places) == 1
        found |= set(places)
    assert len(found) == 25 and shifted.dtype == np.uint8


def test_images_are_standardised_by_all_steps_of_the_episodes():
    """2,000 episodes of 51 states: every so-manieth state would be the first one of an episode."""
    steps = np.broadcast_to(np.arange(51, dtype=np.uint8)[:, None, None, None], (2_000, 51, 4, 4, 3))
    lengths = np.full(2_000, 50, np.int32)
    data = common.Dataset(steps, np.zeros((2_000, 50, 1), np.float32), lengths, steps[:1, 0])
    mean, std = common.Transitions(data, np.arange(2_000), CPU).statistics()
    assert mean.shape == std.shape == (4, 4, 3)
    assert abs(mean.mean() - 25) < 1 and abs(std.mean() - np.arange(51).std()) < 0.5


def test_memory_within_a_containers_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "CONTROL_GROUP", tmp_path)
    without = common.free_memory(CPU)
    assert without > 10**8
    for name, text in (("max", "90000000"), ("current", "50000000"), ("stat", "anon 20000000\nfile 30000000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert common.free_memory(CPU) == 70_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert common.free_memory(CPU) > 10**8


# ------------------------------------------------------------------------------------------------------------ training


def image_args(script, dataset, run_dir, **kwargs):
    args = test_training.small_args(script, dataset, run_dir, **{"batch_size": 16, "gradient_steps": 12, **kwargs})
    return dataclasses.replace(args, env_id="FetchReachImage", channels=4)


@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_batches_are_the_same_from_memory_and_from_the_file(method, shift, device, image_dataset, monkeypatch, capsys):
    script, device = SCRIPTS[method], torch.device(device)
    args = dataclasses.replace(image_args(script, image_dataset, None), random_shift=shift, batch_size=64)
    data = common.load_dataset(image_dataset, "FetchReachImage", 5, np.random.default_rng(0))
    examples = (torch.from_numpy(data.success_examples).to(device),) if method in ("oril", "purl") else ()
    drawn, episodes = {}, np.array([3, 1, 30])
    for place, memory in (("memory", 10**12), ("file", 1000)):
        monkeypatch.setattr(common, "free_memory", lambda device, memory=memory: memory)
        generator = torch.Generator(device).manual_seed(0)
        transitions = common.Transitions(data, episodes, device)
        assert isinstance(transitions.states, torch.Tensor) == (place == "memory")
        assert ("their file" in capsys.readouterr().out) == (place == "file")
        batches = common.Batches(
            lambda t=transitions, g=generator: script.sample(t, *examples, args, g), generator, transitions.states
        )
        drawn[place] = [next(batches) for _ in range(7)], transitions.statistics()
    for one, other in zip(*(drawn[place][0] for place in drawn)):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other))
    assert all(torch.equal(a, b) for a, b in zip(drawn["memory"][1], drawn["file"][1]))
    batch = drawn["file"][0][0]
    known = {picture.tobytes() for picture in np.array(data.observations[episodes]).reshape(-1, 64, 64, 3)}
    same = [picture.cpu().numpy().tobytes() in known for picture in batch.observation]
    assert batch.observation.dtype == torch.uint8 and (all(same) if shift == 0 else sum(same) < 32)


@pytest.mark.parametrize("method", ["oril", "purl"])
def test_shift_moves_the_success_examples_too(method, image_dataset):
    """Otherwise a classifier could tell them from the data by the edge of the table."""
    script = SCRIPTS[method]
    data = common.load_dataset(image_dataset, "FetchReachImage", 5, np.random.default_rng(0))
    transitions, examples = common.Transitions(data, np.array([3]), CPU), torch.from_numpy(data.success_examples)
    for shift, as_they_are in ((0, 5), (3, 0)):
        args = dataclasses.replace(image_args(script, image_dataset, None), random_shift=shift)
        batch = script.sample(transitions, examples, args, torch.Generator().manual_seed(1))
        assert (batch.examples == examples).flatten(1).all(1).sum() == as_they_are


def test_states_that_do_not_fit_are_left_in_their_file_too(reach_dataset, tmp_path, monkeypatch, capsys):
    results = []
    for memory in (10**12, 1000):
        monkeypatch.setattr(common, "free_memory", lambda device, memory=memory: memory)
        args = test_training.small_args(laeo, reach_dataset, tmp_path / str(memory))
        results.append(laeo.train(args)["success_rate"])
        assert ("left in their file" in capsys.readouterr().out) == (memory == 1000)
    assert all(0 <= rate <= 1 for rate in results)
    data = common.load_dataset(reach_dataset, "FetchReach", 5, np.random.default_rng(0))
    mapped = common.Transitions(data, np.arange(40), CPU)
    states = torch.from_numpy(np.array(data.observations)).flatten(0, 1)
    assert isinstance(mapped.states, common.MappedStates) and torch.equal(mapped.states[torch.arange(2040)], states)
    mean, std = mapped.statistics()
    torch.testing.assert_close(mean, states.mean(0), rtol=0, atol=0.1 * states.std())
    torch.testing.assert_close(std, states.std(0).clamp(min=1e-3), rtol=0.1, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("memory", [10**12, 1000])
def test_training_on_a_gpu(method, memory, image_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "free_memory", lambda device: memory)
    args = image_args(SCRIPTS[method], image_dataset, tmp_path / "run", random_shift=2)
    result = SCRIPTS[method].train(dataclasses.replace(args, device="cuda"))
    assert 0 <= result["success_rate"] <= 1 and result["peak_gpu_bytes"] > 0


@pytest.mark.parametrize("method", SCRIPTS)
def test_run_from_the_file_is_resumed_to_the_bit(method, image_dataset, tmp_path, monkeypatch):
    """Batches that were drawn ahead and never used are drawn again; and memory or file makes no difference."""
    script = SCRIPTS[method]
    script.train(image_args(script, image_dataset, tmp_path / "whole"))
    monkeypatch.setattr(common, "free_memory", lambda device: 1000)
    update, calls = script.update, []

    def update_then_interrupt(*args):
        update(*args)
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), 2)

    monkeypatch.setattr(script, "update", update_then_interrupt)
    with pytest.raises(common.UserError, match="interrupted at step 7"):
        script.train(image_args(script, image_dataset, tmp_path / "parts"))
    script.train(script.Args(resume=tmp_path / "parts"))
    assert len(calls) == 12
    one, other = (test_training.final_weights(tmp_path / name) for name in ("whole", "parts"))
    test_training.assert_same_bits(one, other)


def test_error_in_the_thread_reaches_the_training(image_dataset, monkeypatch):
    monkeypatch.setattr(common, "free_memory", lambda device: 1000)
    data = common.load_dataset(image_dataset, "FetchReachImage", 5, np.random.default_rng(0))
    transitions = common.Transitions(data, np.arange(3), CPU)
    batches = common.Batches(lambda: transitions.states[torch.tensor([10**6])], torch.Generator(), transitions.states)
    with pytest.raises(IndexError):
        next(batches)


def test_encoder_is_standardisation_and_three_convolutions_and_takes_single_images():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8, generator=generator)
    mean, std = images.float().mean(0), torch.full((64, 64, 3), 70.0)
    encoder = laeo.Encoder(mean, std, 4, generator)
    with torch.no_grad():
        features = encoder(images)
        x = ((images.double() - mean) / 70).permute(0, 3, 1, 2)
        for layer, (stride, padding) in zip(encoder.net[:6:2], ((4, 2), (2, 1), (1, 1))):
            weight = layer.weight.double()
            size, kernel = (x.shape[-1] + 2 * padding - weight.shape[-1]) // stride + 1, weight.shape[-1]
            patches = torch.nn.functional.unfold(x, kernel, padding=padding, stride=stride)
            x = (weight.flatten(1) @ patches).unflatten(-1, (size, size)).clamp(min=0)  # the biases begin at zero
        torch.testing.assert_close(features.double(), x.flatten(1), atol=1e-4, rtol=1e-4)
        assert features.shape == (5, encoder.dim) == (5, 8 * 8 * 8)
        torch.testing.assert_close(encoder(images[0]), features[0])
    assert laeo.Encoder(torch.zeros(6), torch.ones(6), 4, generator).dim == 6


def test_learns_from_images_and_writes_a_video_that_changes_nothing(image_dataset, tmp_path):
    """On a toy budget: the loss falls, also on held-out episodes, and reaching beats random actions, which never do."""
    settings = {"gradient_steps": 300, "batch_size": 48, "hidden_dim": 64, "repr_dim": 32, "log_interval": 10}
    settings |= {"num_success": 50, "eval_episodes": 1, "capture_video": True}
    args = dataclasses.replace(image_args(laeo, image_dataset, tmp_path / "run", **settings), channels=8)
    result = laeo.train(args)
    assert result["success_rate"] == 1.0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("train/critic_loss", "heldout/critic_loss"):
        losses = [line[name] for line in lines if name in line]
        assert np.mean(losses[-3:]) < 0.85 * losses[0], name
    assert len(result["episodes"]["seed"]) == 1  # those of the video are not counted
    video = Image.open(tmp_path / "run" / "video.gif")
    assert video.size == (480, 240) and video.n_frames >= 4 * 5
    generator = torch.Generator().manual_seed(0)
    actor = SimpleNamespace(mode=lambda observation: torch.rand(4, generator=generator) * 2 - 1)
    assert not any(laeo.evaluate(actor, "FetchReachImage", 5, 0, CPU)["success"])


def test_flags_for_images_are_refused_where_there_are_none(reach_dataset, tmp_path):
    args = dataclasses.replace(test_training.small_args(laeo, reach_dataset, tmp_path / "run"), random_shift=4)
    with pytest.raises(common.UserError, match="--random-shift is for images, and FetchReach has none; leave it out"):
        laeo.train(args)


@pytest.mark.parametrize("images", [True, False])
def test_actions_weigh_as_much_as_all_features_of_an_image(images):
    """In what the first layer adds up; among the numbers of a state an action weighs as much as one of them."""
    generator = torch.Generator().manual_seed(0)
    shape = (64, 64, 3) if images else (25,)
    encoder = laeo.Encoder(torch.zeros(shape), torch.ones(shape), 4, generator)
    critic = laeo.Critic(encoder, 4, 256, 16, generator)
    features, actions = (torch.randn(2000, size, generator=generator) for size in (encoder.dim, 4))
    heard = []
    for net in critic.phi_nets:
        net[0].register_forward_hook(lambda layer, inputs, output: heard.append(output.var(0).mean()))
    with torch.no_grad():
        critic.phi(features, torch.zeros_like(actions)), critic.phi(torch.zeros_like(features), actions)
    by_features, by_actions = torch.stack(heard).view(2, 2).mean(1).tolist()
    assert encoder.dim == (512 if images else 25)
    assert by_actions / by_features == pytest.approx(1.0 if images else 4 / 25, rel=0.15)
