"""Tasks of images: what the pictures show, that they change nothing, their datasets, and training from them."""

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gl
import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import bc
import collect_data
import common
import evaluate
import laeo
import oril
import purl
import robot_tasks
import tailo
from episodes import scripted_action

ROOT = Path(common.__file__).parent
IMAGE_TASKS = [env_id for env_id, task in common.TASKS.items() if task.state_task]
SCRIPTS = {"laeo": laeo, "bc": bc, "oril": oril, "purl": purl, "tailo": tailo}
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_env(env_id, **kwargs):
    gl.require_gl()
    return common.make_env(env_id, **kwargs)


def run_python(code, **environment):
    """Run code in a new process, in which nothing has chosen yet how to render."""
    unset = ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM", "LP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def push(env, steps=50, seed=0):
    """Push the block with the scripted controller; yield the picture after each step."""
    observation, _ = env.reset(seed=seed)
    for step in range(steps + 1):
        yield observation
        goal = np.array(common.TASKS["FetchPush"].desired_goal)
        if step < steps:
            observation, _, _, _, _ = env.step(
                scripted_action("FetchPush", env.unwrapped.state, goal).astype(np.float32)
            )


def drawn_geoms(camera):
    """Return which geom each rendered pixel [128, 128] shows, by MuJoCo's segmentation; four make one of a picture."""
    camera._renderer.enable_segmentation_rendering()
    camera._renderer.update_scene(camera._data, camera._camera, camera._option)
    geoms = camera._renderer.render()[..., 0]
    camera._renderer.disable_segmentation_rendering()
    return geoms


def geoms_of(env, *bodies):
    model = env.unwrapped.inner.model
    return [geom for geom in range(model.ngeom) if model.body(model.geom_bodyid[geom]).name in bodies]


def visible_pixels(env, *bodies):
    """Return which share [64, 64] of each pixel of the present picture shows these bodies."""
    geoms = drawn_geoms(env.unwrapped.camera)
    return np.isin(geoms, geoms_of(env, *bodies)).reshape(64, 2, 64, 2).mean((1, 3))


def is_red(picture):
    return (picture[..., 0] > 100) & (picture[..., 1:].max(-1) < 60)


GRIPPER = [f"robot0:{part}" for part in ("gripper_link", "r_gripper_finger_link", "l_gripper_finger_link")]


# ------------------------------------------------------------------------------------------------------------ pictures


def test_block_and_gripper_are_in_the_pictures_of_push():
    """Where the block is the picture is dark, and when it is gone the white table is to be seen there."""
    env, seen, blocks = make_env("FetchPushImage"), 0, []
    for seed in range(5):
        picture = next(push(env, 0, seed))
        share, gripper = visible_pixels(env, "object0"), visible_pixels(env, *GRIPPER) == 1
        block = share == 1
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        assert gripper.sum() > 30 and picture[gripper].mean() > 100
        if block.sum() > 20:  # the paper's camera misses the block in a tenth of the starts
            seen += 1
            assert picture[block].max() < 110
            blocks.append(block)
            inner = env.unwrapped.inner
            inner.data.joint("object0:joint").qpos[2] -= 1.0  # under the table
            mujoco.mj_forward(inner.model, inner.data)
            uncovered = env.unwrapped.camera.picture()
            assert (uncovered[block].astype(int).sum(-1) - picture[block].astype(int).sum(-1)).mean() > 200
            assert np.array_equal(uncovered[share == 0], picture[share == 0])
    env.close()
    assert seen >= 4 and not np.array_equal(blocks[0], blocks[1])


def test_the_gripper_of_reach_goes_to_the_left_of_the_picture():
    env, middle = make_env("FetchReachImage"), []
    env.reset(seed=0)
    for _ in range(15):
        gripper = visible_pixels(env, *GRIPPER) == 1
        assert gripper.sum() > 30
        middle.append(np.nonzero(gripper)[1].mean())
        action = scripted_action("FetchReach", env.unwrapped.state, np.array((1.3, 0.3, 0.9)))
        env.step(action.astype(np.float32))
    env.close()
    assert middle[-1] < middle[0] - 10


def test_occluded_camera_hides_the_block_when_the_gripper_touches_it_and_the_other_does_not():
    """Hidden: less than a tenth of the pixels that the block would have without the robot are to be seen."""
    gl.require_gl()
    env, env_ids = common.make_env("FetchPush"), ("FetchPushImage", "FetchPushImageOccluded")
    inner, (block,) = env.unwrapped.inner, geoms_of(env, "object0")
    cameras = {env_id: robot_tasks.Camera(inner, robot_tasks.VIEWS[env_id]) for env_id in env_ids}
    robot = [inner.model.body(body).name.startswith("robot0:") for body in inner.model.geom_bodyid]
    shares, groups = (
        {(env_id, touching): [] for env_id in env_ids for touching in (True, False)},
        inner.model.geom_group,
    )
    drawn = groups.copy()
    for step, _ in enumerate(state for seed in range(16) for state in push(env, 50, seed)):
        touching = any(block in pair and any(robot[g] for g in pair) for pair in inner.data.contact.geom)
        for env_id in env_ids if touching or step % 4 == 0 else ():
            seen = (drawn_geoms(cameras[env_id]) == block).sum()
            groups[robot] = mujoco.mjNGROUP - 1
            alone = (drawn_geoms(cameras[env_id]) == block).sum()
            groups[:] = drawn
            if alone:
                shares[env_id, touching].append(seen / alone)
    for camera in cameras.values():
        camera.close()
    env.close()
    for env_id in env_ids:
        assert len(shares[env_id, True]) > 40 and len(shares[env_id, False]) > 100
        assert np.mean(shares[env_id, False]) > 0.4  # it is there to be seen before and after
    hidden = [np.mean(np.array(shares[env_id, True]) < 0.1) for env_id in env_ids]
    assert hidden[0] < 0.3 and hidden[1] > 0.5


@pytest.mark.parametrize("env_id", IMAGE_TASKS)
def test_no_goal_and_no_axes_are_in_the_pictures(env_id):
    """The ball at the goal is red, the axes of the point that drags the gripper cross the whole picture."""
    env = make_env(env_id)
    env.reset(seed=0)
    camera = env.unwrapped.camera
    picture = camera.picture()
    assert not is_red(picture).any() and not visible_pixels(env, "robot0:mocap").any()
    view = robot_tasks.VIEWS[common.TASKS[env_id].kwargs["name"]]
    outside = robot_tasks.Camera(env.unwrapped.inner, view, show_goal=True)
    assert is_red(outside.picture()).any()
    assert np.array_equal(camera.picture(), picture)  # for people only
    outside.close()
    env.close()


@pytest.mark.parametrize("env_id", IMAGE_TASKS)
def test_the_two_links_that_are_left_out_are_not_to_be_seen(env_id):
    """They are inside the robot's base, wherever the arm is."""
    env = make_env(env_id)
    camera, model = env.unwrapped.camera, env.unwrapped.inner.model
    inside, groups = geoms_of(env, "robot0:estop_link", "robot0:laser_link"), model.geom_group.copy()
    for seed in range(8):
        env.reset(seed=seed)
        action = np.random.default_rng(seed).choice([-1.0, 1.0], 4).astype(np.float32)
        for _ in range(15):
            picture, *_ = env.step(action)
        drawn = camera._renderer.scene.ngeom
        model.geom_group[inside] = 0
        assert np.array_equal(camera.picture(), picture)
        assert camera._renderer.scene.ngeom == drawn + len(inside) >= drawn + 2
        model.geom_group[:] = groups
    env.close()


@pytest.mark.parametrize("env_id", IMAGE_TASKS)
def test_rendering_moves_nothing(env_id):
    """The image task and its state twin are one trajectory to the bit, however many pictures are taken."""
    images, states = make_env(env_id, render_mode="rgb_array"), common.make_env(common.TASKS[env_id].state_task)
    assert images.observation_space == gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    for seed in (0, 1):
        _, image_info = images.reset(seed=seed)
        state, state_info = states.reset(seed=seed)
        for step, action in enumerate(np.random.default_rng(seed).uniform(-1, 1, (50, 4)).astype(np.float32)):
            assert images.unwrapped.state.tobytes() == state.tobytes() and image_info == state_info
            for _ in range(step % 3 if step < 20 else 0):
                images.render()
            _, _, _, _, image_info = images.step(action)
            state, _, _, _, state_info = states.step(action)
        for name in ("qpos", "qvel", "qacc_warmstart", "mocap_pos"):
            one, other = (getattr(env.unwrapped.inner.data, name) for env in (images, states))
            assert one.tobytes() == other.tobytes(), name
    images.close()
    states.close()


@pytest.mark.parametrize("env_id", common.TASKS)
def test_a_task_can_be_recorded_by_gymnasiums_wrapper(env_id, tmp_path, monkeypatch):
    """From outside, with the goal; where the policy sees a picture, beside that picture."""
    gl.require_gl()
    videos, module = [], ModuleType("moviepy.video.io.ImageSequenceClip")

    class ImageSequenceClip:  # moviepy, which this project does not need, encodes the video
        def __init__(self, frames, fps):
            videos.append((np.array(frames), fps))

        def write_videofile(self, path, **kwargs):
            pass

    module.ImageSequenceClip = ImageSequenceClip
    for name in ("moviepy", "moviepy.video", "moviepy.video.io"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    env = gym.make(f"laeo/{env_id}-v0", render_mode="rgb_array")
    assert env.render_mode == "rgb_array"
    env = gym.wrappers.RecordVideo(env, str(tmp_path / "videos"), episode_trigger=lambda episode: True)
    observation, _ = env.reset(seed=0)
    for _ in range(3):
        observation, *_ = env.step(np.ones(4, np.float32))
    env.close()
    ((frames, fps),) = videos
    images = bool(common.TASKS[env_id].state_task)
    assert frames.shape == (4, 240, 480 if images else 240, 3) and frames.dtype == np.uint8 and fps == 25
    assert frames[0, :, :240].std() > 20 and not np.array_equal(frames[0], frames[-1])
    if "Fetch" in env_id:
        assert is_red(frames[:, :, :240]).any((1, 2)).all()
    if images:
        places = np.arange(64) * 240 // 64 + 2
        assert np.array_equal(frames[-1, :, 240:][places][:, places], observation)


def test_egl_osmesa_and_what_is_chosen_make_the_same_pictures():
    """Whatever the number of Mesa's threads, and nothing is left in the environment variables."""
    gl.require_gl("egl", "osmesa")
    code = """if True:
        import hashlib, os, common
        before, pictures, names = dict(os.environ), [], []
        for env_id in ("FetchReachImage", "FetchPushImage"):
            env = common.make_env(env_id)
            pictures += [env.reset(seed=3)[0], env.step(env.action_space.high)[0]]
            names.append(env.unwrapped.camera.name)
            env.close()
        assert len(set(names)) == 1 and min(picture.std() for picture in pictures) > 20
        for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "LP_NUM_THREADS"):
            assert before.get(name) == os.environ.get(name), name
        print(hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest(), names[0])
    """
    variants = [
        ({}, "egl"),
        ({"MUJOCO_GL": "egl", "LP_NUM_THREADS": "2"}, "egl"),
        ({"MUJOCO_GL": "osmesa", "LP_NUM_THREADS": "1"}, "osmesa"),
        ({"MUJOCO_EGL_DEVICE_ID": "99"}, "osmesa"),
        ({"PYOPENGL_PLATFORM": "osmesa"}, "osmesa"),
    ]
    checksums = set()
    for environment, name in variants:
        result = run_python(code, **environment)
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
        checksum, drawn_by = result.stdout.strip().split(" ", 1)
        assert re.fullmatch(f"{name}: .+", drawn_by), (environment, drawn_by)
        checksums.add(checksum)
    assert len(checksums) == 1


@pytest.mark.parametrize("name", ["egl", "osmesa"])
def test_a_camera_that_goes_leaves_the_others_as_they_are(name):
    """Whether it is closed or dropped; and one that is still there at the end goes without a word."""
    gl.require_gl(name)
    code = (
        "import common; envs = [common.make_env('FetchPushImage') for _ in range(3)]\n"
        "before = [env.reset(seed=1)[0] for env in envs]; envs[0].close(); envs[0].close()\n"
        "first = envs[2].unwrapped.camera.picture(); del envs[1]\n"
        "print(*((before[2] == x).all() for x in (before[0], first, envs[1].unwrapped.camera.picture())))"
    )
    result = run_python(code, MUJOCO_GL=name)
    assert (result.stdout, result.stderr, result.returncode) == ("True True True\n", "", 0)


@pytest.mark.parametrize("name", ["egl", "osmesa"])
def test_a_policy_can_be_exported_after_something_was_rendered(name):
    """Triton and Mesa each bring an LLVM: loaded after Mesa's, Triton's crashes."""
    gl.require_gl(name)
    code = (
        "import common, torch; env = common.make_env('FetchReachImage'); env.reset(seed=0)\n"
        "batch = torch.export.Dim('batch')\n"
        "program = torch.export.export(torch.nn.Linear(5, 2), (torch.zeros(2, 5),), dynamic_shapes=({0: batch},))\n"
        "print(tuple(program.module()(torch.zeros(7, 5)).shape))\n"
    )
    result = run_python(code, MUJOCO_GL=name)
    assert (result.stdout, result.returncode) == ("(7, 2)\n", 0), result.stderr


# ----------------------------------------------------------------------------------------------------- no GL, no image


@pytest.fixture(scope="module")
def hide(tmp_path_factory):
    """Return a function that makes the environment variables under which a process cannot load some libraries.

    Nor can its child processes. The libraries' names are still found if `found`, as those of broken ones are.
    """
    directory = tmp_path_factory.mktemp("hidden")
    (directory / "sitecustomize.py").write_text(
        "import ctypes, ctypes.util, os\n"
        "hidden, load, find = os.environ['HIDDEN'].split(), ctypes.CDLL.__init__, ctypes.util.find_library\n"
        "def refuse(self, name, *args, **kwargs):\n"
        "    if any(part in str(name) for part in hidden):\n"
        "        raise OSError(f'{name}: cannot open shared object file: No such file or directory')\n"
        "    load(self, name, *args, **kwargs)\n"
        "def find_library(name):\n"
        "    found = f'lib{name}.so' if 'FOUND' in os.environ else None\n"
        "    return found if any(part in name for part in hidden) else find(name)\n"
        "ctypes.CDLL.__init__, ctypes.util.find_library = refuse, find_library\n"
    )
    found_names = {True: {"FOUND": "1"}, False: {}}
    return lambda *names, found=False: {"HIDDEN": " ".join(names), "PYTHONPATH": str(directory), **found_names[found]}


STATE_THEN_IMAGE = (
    "import common\n"
    "with common.user_errors():\n"
    "    for env_id in ('FetchPush', 'FetchPushImage'):\n"
    "        env = common.make_env(env_id); env.reset(seed=0); env.step(env.action_space.high); env.close()\n"
    "        print(env_id)\n"
)


NO_LIBRARY = (
    r"error: pictures cannot be rendered here \(egl: \w+: [^;]+; osmesa: \w+: [^;]+\); "
    r"on Debian or Ubuntu, apt install libegl1 libgl1 \(or libosmesa6\)\.\n"
)


def test_machine_without_gl_gets_one_sentence(hide, random_images):
    code = f"import runpy, sys; sys.argv = ['laeo.py', '--env-id', 'FetchReachImage', '--dataset', '{random_images}']\n"
    result = run_python(code + "runpy.run_path('laeo.py', run_name='__main__')", **hide("GL", "OSMesa"))
    assert result.returncode == 1 and re.fullmatch(NO_LIBRARY, result.stderr), result.stderr


def test_machine_with_broken_gl_gets_one_sentence_and_plays_tasks_of_states(hide):
    result = run_python(STATE_THEN_IMAGE, **hide("GL", "OSMesa", found=True))
    assert (result.stdout, result.returncode) == ("FetchPush\n", 1), result.stderr
    assert re.fullmatch(NO_LIBRARY, result.stderr), result.stderr


def test_osmesa_that_is_named_and_missing_matters_to_tasks_of_images_only(hide):
    result = run_python(STATE_THEN_IMAGE, MUJOCO_GL="osmesa", **hide("OSMesa"))
    assert (result.stdout, result.returncode) == ("FetchPush\n", 1), result.stderr
    assert re.fullmatch(
        r"error: pictures cannot be rendered here \(osmesa: [^;]+\); "
        r"on Debian or Ubuntu, apt install libosmesa6, or change or unset MUJOCO_GL=osmesa\.\n",
        result.stderr,
    ), result.stderr


def test_renderer_that_mujoco_does_not_know_matters_to_tasks_of_images_only():
    result = run_python(STATE_THEN_IMAGE, MUJOCO_GL="foo")
    assert (result.stdout, result.returncode) == ("FetchPush\n", 1), result.stderr
    assert re.fullmatch(
        r"error: pictures cannot be rendered here \(foo: [^;]+\); change or unset MUJOCO_GL=foo\.\n", result.stderr
    ), result.stderr


@pytest.mark.parametrize(
    "libraries, settings",
    [
        (["egl"], {"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "99"}),
        (["egl"], {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "osmesa"}),
        (["osmesa"], {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "egl"}),
        (["egl", "osmesa"], {"PYOPENGL_PLATFORM": "foo"}),
    ],
)
def test_setting_that_keeps_a_library_from_working_is_named(libraries, settings, monkeypatch):
    """And nothing is to be installed, since it is there."""
    gl.require_gl(*libraries)
    for name in ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(common.UserError) as caught:
        robot_tasks.gl_name.__wrapped__()  # the function without its cache
    message, hint = str(caught.value), " and ".join(f"{name}={value}" for name, value in settings.items())
    assert message.startswith("pictures cannot be rendered here (") and message.endswith(f"; change or unset {hint}.")
    assert "apt" not in message and "\n" not in message
    assert all(f"{library}: " in message for library in libraries)


def test_tests_are_skipped_without_gl_and_fail_in_ci(monkeypatch):
    monkeypatch.setattr(gl, "why_not", functools.cache(gl.why_not.__wrapped__))
    monkeypatch.setenv("PYOPENGL_PLATFORM", "foo")
    monkeypatch.setattr(sys, "platform", "linux")
    for names, package in (
        (("osmesa",), "apt install libosmesa6 "),
        ((), r"apt install libegl1 libgl1 \(or libosmesa6\) "),
    ):
        monkeypatch.setenv("CI", "false")
        with pytest.raises(pytest.skip.Exception, match=package):
            gl.require_gl(*names)
        monkeypatch.setenv("CI", "true")
        with pytest.raises(pytest.fail.Exception, match=package):
            gl.require_gl(*names)
    monkeypatch.setattr(sys, "platform", "darwin")  # which has neither library
    with pytest.raises(pytest.skip.Exception):
        gl.require_gl("osmesa")


# ------------------------------------------------------------------------------------------------------------ datasets


@pytest.fixture(scope="module")
def image_dataset(tmp_path_factory):
    gl.require_gl()
    output = tmp_path_factory.mktemp("images") / "FetchReachImage-medium"
    collect_data.collect(collect_data.Args(env_id="FetchReachImage", num_episodes=24, num_workers=1, output=output))
    return output


@pytest.fixture(scope="module")
def random_images(tmp_path_factory):
    """Episodes of 3 to 8 steps with images of 16 x 16 random pixels, and examples from each of them."""
    output, rng = tmp_path_factory.mktemp("random") / "images", np.random.default_rng(0)
    lengths = rng.integers(3, 9, 30)
    observations = [rng.integers(0, 256, (n + 1, 16, 16, 3), dtype=np.uint8) for n in lengths]
    actions = [rng.uniform(-1, 1, (n, 2)) for n in lengths]
    common.save_dataset(output, observations, actions, [images[-1] for images in observations])
    return output


def small_args(script, dataset, run_dir=None, **kwargs):
    settings = {"gradient_steps": 12, "batch_size": 16, "hidden_dim": 32, "repr_dim": 8, "num_success": 10}
    settings |= {"classifier_steps": 5}
    settings |= {"channels": 4, "log_interval": 4, "eval_interval": 0, "eval_episodes": 0, "device": "cpu"} | kwargs
    settings = {name: value for name, value in settings.items() if hasattr(script.Args, name)}
    return script.Args(dataset=dataset, run_dir=run_dir, **settings)


def test_images_are_those_of_the_state_datasets_episodes(image_dataset, reach_dataset):
    images, states = (
        {name: np.load(path / f"{name}.npy") for name in ("observations", "actions", "successes", "success_examples")}
        for path in (image_dataset, reach_dataset)
    )
    assert images["observations"].shape == (24, 51, 64, 64, 3) and images["observations"].dtype == np.uint8
    assert images["success_examples"].dtype == np.uint8
    assert np.array_equal(images["actions"], states["actions"][:24])
    assert np.array_equal(images["successes"], states["successes"][:24])
    solved = {picture.tobytes() for picture in images["observations"][:, 1:][images["successes"][:, 1:]]}
    assert {picture.tobytes() for picture in images["success_examples"]} <= solved
    env = common.make_env("FetchReachImage")
    picture, _ = env.reset(seed=common.episode_seed(0, "dataset", 7))
    for step, action in enumerate(images["actions"][7]):
        assert np.array_equal(picture, images["observations"][7, step])
        picture, _, _, _, _ = env.step(action)
    metadata = common.read_metadata(image_dataset)
    assert metadata["env_id"] == "FetchReachImage" and metadata["behavior"]["file"] == "FetchReach.pt"
    assert metadata["renderer"] == env.unwrapped.camera.name
    assert "renderer" not in common.read_metadata(reach_dataset)
    env.close()


def test_disk_space_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    gl.require_gl()
    monkeypatch.setattr(collect_data.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    args = collect_data.Args(env_id="FetchPushImage", output=tmp_path / "a" / "data")
    with pytest.raises(common.UserError, match=r"data takes 2\.52GB, 1\.52GB more than .* has left; free some space"):
        collect_data.collect(args)
    assert not (tmp_path / "a").exists() or not any((tmp_path / "a").iterdir())


@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("images", [True, False])
def test_observations_stay_in_their_file_on_a_cpu(method, images, random_images, reach_dataset):
    """What the batches are drawn from is the file, mapped into memory, and no copy of it."""
    args, path = small_args(SCRIPTS[method], random_images if images else reach_dataset), random_images
    path = (random_images if images else reach_dataset) / "observations.npy"
    dataset, data = SCRIPTS[method].load_data(args, CPU)[:2]
    assert isinstance(dataset.observations, np.memmap) and Path(dataset.observations.filename) == path
    assert np.shares_memory(data.observations.numpy(), dataset.observations)
    assert data.observations.data_ptr() == dataset.observations.ctypes.data
    assert data.observations.shape == (np.prod(dataset.observations.shape[:2]), *dataset.observations.shape[2:])
    assert data.observations.dtype == (torch.uint8 if images else torch.float32)


@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("shift", [0, 3])
def test_batches_are_the_files_bytes(method, shift, random_images):
    """Also with the random shift, which is the encoder's: pictures are moved after they were standardised."""
    script, args = SCRIPTS[method], small_args(SCRIPTS[method], random_images, batch_size=64, random_shift=shift)
    dataset, data = script.load_data(args, CPU)[:2]
    images, actions, lengths = (
        np.load(random_images / f"{name}.npy") for name in ("observations", "actions", "lengths")
    )
    place = {images[e, t].tobytes(): (e, t) for e in range(len(lengths)) for t in range(lengths[e] + 1)}
    low, high = dataset.action_bounds
    seen = {"batches": set(), "heldout": set()}
    for step, use in enumerate(["batches"] * 40 + ["heldout"] * 5):
        batch = script.sample(data, args, step, use)
        following = getattr(batch, "future", getattr(batch, "next_observation", None))
        assert batch.observation.dtype == torch.uint8 and batch.observation.shape == (64, 16, 16, 3)
        for i, image in enumerate(batch.observation.numpy()):
            e, t = place[image.tobytes()]
            seen[use].add((e, t))
            expected = 2 * (actions[e, t] - low) / (high - low) - 1
            np.testing.assert_allclose(batch.action[i], expected, rtol=0, atol=1e-6)
            if following is not None:
                other, later = place[following[i].numpy().tobytes()]
                assert other == e and (t < later if method == "laeo" else later == t + 1)
    training, heldout = ({e for e, _ in seen[use]} for use in seen)
    assert not training & heldout and len(training | heldout) == len(lengths)
    assert seen["batches"] | seen["heldout"] == {(e, t) for e in range(len(lengths)) for t in range(lengths[e])}


def test_images_are_standardised_by_all_steps_of_the_episodes(tmp_path):
    """By a mean of each pixel and one deviation; not by the first states, say, or by the padding behind the ends."""
    lengths, rng = np.arange(300) % 50 + 1, np.random.default_rng(0)
    images = [  # the later in an episode and the shorter the episode, the brighter
        (np.eye(8)[..., None] * 100 + 50 - n + np.arange(n + 1)[:, None, None, None]).astype(np.uint8) for n in lengths
    ]
    actions = [rng.uniform(-1, 1, (n, 1)) for n in lengths]
    common.save_dataset(tmp_path / "data", images, actions, np.zeros((2, 8, 8, 1), np.uint8))
    mean, std = laeo.load_data(small_args(laeo, tmp_path / "data", num_success=2), CPU)[2:4]
    every = np.concatenate(images).astype(float)
    assert mean.shape == std.shape == (8, 8, 1)
    np.testing.assert_allclose(mean, every.mean(0), rtol=0, atol=1)
    np.testing.assert_allclose(std, every[:, 0, 1].std(), rtol=0, atol=0.5)


@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("color", [0, 200])
def test_images_that_are_all_the_same_get_one_sentence(method, color, tmp_path):
    images, rng = [np.full((5, 16, 16, 3), color, np.uint8)] * 6, np.random.default_rng(0)
    common.save_dataset(tmp_path / "dark", images, [rng.uniform(-1, 1, (4, 2)) for _ in range(6)], images[0])
    args = small_args(SCRIPTS[method], tmp_path / "dark", tmp_path / "run", num_success=2)
    with pytest.raises(common.UserError, match="^all observations of .*/dark are the same; there is nothing to learn "):
        SCRIPTS[method].train(args)
    assert not (tmp_path / "run").exists()


def test_flags_for_images_are_refused_where_there_are_none(reach_dataset, tmp_path):
    args = small_args(laeo, reach_dataset, tmp_path / "run", random_shift=4)
    message = "--random-shift is for images, and .*/FetchReach-medium has none; leave it out"
    with pytest.raises(common.UserError, match=message):
        laeo.train(args)


# ------------------------------------------------------------------------------------------------------------ networks


def test_random_shift_moves_each_image_by_itself_and_repeats_its_edge(random_images):
    """By up to two pixels, all 25 ways alike; what never moves drops out, for images are standardised first."""
    args = small_args(laeo, random_images, batch_size=200, num_success=20, random_shift=2)
    _, data, *_ = laeo.load_data(args, CPU)
    both, of_examples = laeo.sample(data, args, 0).shifts
    assert [tuple(shift.shape) for shift in (both, of_examples)] == [(200 + 200, 2), (20, 2)]
    shifts = both.split(200)  # of states, and of their futures
    assert not torch.equal(*shifts)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 9, 9, 3), dtype=np.uint8)
    encoder = laeo.Encoder(torch.zeros(9, 9, 3), torch.ones(9, 9, 3), args, torch.Generator())
    encoder.net = nn.Identity()
    shifted = encoder(torch.from_numpy(images), shifts[0]).movedim(1, -1).numpy()
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    found = set()
    for pad, image, shift in zip(padded, shifted, shifts[0].tolist()):
        places = [(y, x) for y in range(5) for x in range(5) if np.array_equal(pad[y : y + 9, x : x + 9], image)]
        assert places == [tuple(shift)]
        found |= set(places)
    assert len(found) == 25
    encoder.observation_mean = torch.from_numpy(images[0]).float()
    assert not encoder(torch.from_numpy(images[:1]).expand(200, 9, 9, 3), shifts[0]).any()


@pytest.mark.parametrize("method", SCRIPTS)
def test_training_shifts_all_images_and_metrics_none(method, random_images, tmp_path, monkeypatch):
    """The success examples too: else a classifier could tell them from the data by the edge of the table."""
    script, now, sizes = SCRIPTS[method], [""], {"update": set(), "measure": set(), "fit_weights": set()}

    def watch(name):
        function = getattr(script, name)

        def watched(*args):
            now[0] = name
            result = function(*args)
            now[0] = ""
            return result

        monkeypatch.setattr(script, name, watched)

    forward = script.Encoder.forward

    def encode(self, observation, shift=None):
        shifted = now[0] == "update" or (now[0] == "fit_weights" and torch.is_grad_enabled())  # not all its logits
        assert len(shift) == len(observation) if shifted else shift is None
        if now[0]:  # not in an evaluation, and not when the policy is exported
            sizes[now[0]].add(len(observation))
        return forward(self, observation, shift)

    watch("update")
    watch("measure")
    if method == "tailo":
        watch("fit_weights")
    monkeypatch.setattr(script.Encoder, "forward", encode)
    args = small_args(script, random_images, tmp_path / "run", random_shift=3, gradient_steps=2, log_interval=1)
    script.train(args)
    used = {16} if method in ("bc", "tailo") else {16, 10}  # a batch, and the success examples
    assert sizes["measure"] >= used  # these also of states by label
    assert sizes["update"] == ({2 * 16, 10} if method == "laeo" else used)  # states and futures in one pass
    assert sizes["fit_weights"] >= {16 + 10} if method == "tailo" else not sizes["fit_weights"]


def test_encoder_is_standardisation_three_convolutions_and_a_normalised_linear_layer():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8, generator=generator)
    mean, std, args = images.float().mean(0), torch.full((64, 64, 3), 70.0), laeo.Args(channels=4)
    encoder = laeo.Encoder(mean, std, args, generator)
    with torch.no_grad():
        features = encoder(images)
        x = ((images.double() - mean) / 70).permute(0, 3, 1, 2)
        for layer, (stride, padding) in zip(encoder.net[:6:2], ((4, 2), (2, 1), (1, 1))):
            weight = layer.weight.double()
            size, kernel = (x.shape[-1] + 2 * padding - weight.shape[-1]) // stride + 1, weight.shape[-1]
            patches = nn.functional.unfold(x, kernel, padding=padding, stride=stride)
            x = (weight.flatten(1) @ patches).unflatten(-1, (size, size)).clamp(min=0)  # the biases begin at zero
        assert x.shape == (5, 8, 8, 8)
        x = x.flatten(1) @ encoder.net[7].weight.double().T
        x = ((x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()).tanh()
        torch.testing.assert_close(features.double(), x, atol=1e-4, rtol=1e-4)
        assert features.shape == (5, encoder.dim) == (5, 8 * 4)
    assert laeo.Encoder(torch.zeros(6), torch.ones(6), args, generator).dim == 6


@pytest.mark.parametrize("images", [True, False])
def test_actions_weigh_as_much_as_all_features_of_an_image(images):
    """In what the first layer adds up; among the numbers of a state an action weighs as much as one of them."""
    generator, shape = torch.Generator().manual_seed(0), (64, 64, 3) if images else (25,)
    encoder = laeo.Encoder(torch.zeros(shape), torch.ones(shape), laeo.Args(channels=4), generator)
    critic = laeo.Critic(encoder, 4, 256, 16, generator)
    features, actions = (torch.randn(2000, size, generator=generator) for size in (encoder.dim, 4))
    heard = []
    for net in critic.phi_nets:
        net[0].register_forward_hook(lambda layer, inputs, output: heard.append(output.var(0).mean()))
    with torch.no_grad():
        critic.phi(features, torch.zeros_like(actions)), critic.phi(torch.zeros_like(features), actions)
    by_features, by_actions = torch.stack(heard).view(2, 2).mean(1).tolist()
    assert encoder.dim == (32 if images else 25)
    assert by_actions / by_features == pytest.approx(1.0 if images else 4 / 25, rel=0.15)


# ------------------------------------------------------------------------------------------------------------ training


def final_weights(run_dir):
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    parts = [part for part in ("actor", "critic", "networks") if part in checkpoint]
    return {f"{part}.{name}": value for part in parts for name, value in checkpoint[part].items()}


@pytest.mark.parametrize("method", SCRIPTS)
def test_run_on_images_is_resumed_to_the_bit(method, random_images, tmp_path, monkeypatch):
    """Batches that were drawn ahead and never used are drawn again."""
    script = SCRIPTS[method]
    args = small_args(script, random_images, random_shift=2, checkpoint_minutes=0.0)
    script.train(replace(args, run_dir=tmp_path / "whole"))
    update, calls = script.update, []

    def update_then_interrupt(*args):
        update(*args)
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(script, "update", update_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        script.train(replace(args, run_dir=tmp_path / "parts"))
    script.train(script.Args(resume=tmp_path / "parts"))
    assert len(calls) == 7 + 6  # the seventh step is in no checkpoint
    one, other = (final_weights(tmp_path / name) for name in ("whole", "parts"))
    assert len(one) >= 8 and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", SCRIPTS)
def test_error_in_the_thread_reaches_the_training(method, random_images, tmp_path, monkeypatch):
    script, sample = SCRIPTS[method], SCRIPTS[method].sample

    def sample_or_fail(data, args, step, use="batches"):
        if step == 3:
            raise IndexError("not in the file")
        return sample(data, args, step, use)

    monkeypatch.setattr(script, "sample", sample_or_fail)
    with pytest.raises(IndexError, match="not in the file"):
        script.train(small_args(script, random_images, tmp_path / "run"))


def test_learns_from_images_and_writes_a_video_that_changes_nothing(image_dataset, tmp_path):
    """On a toy budget: the loss falls, also on held-out episodes, and reaching beats random actions, which never do."""
    settings = {"gradient_steps": 200, "batch_size": 48, "hidden_dim": 64, "repr_dim": 32, "log_interval": 10}
    settings |= {"num_success": 50, "eval_episodes": 1, "channels": 8, "holdout_fraction": 0.25}
    args = replace(small_args(laeo, image_dataset, tmp_path / "run", **settings), env_id="FetchReachImage")
    result = laeo.train(args)
    assert result["success_rate"] == 1.0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("train/critic_loss", "heldout/critic_loss"):
        losses = [line[name] for line in lines if name in line]
        assert np.mean(losses[-3:]) < 0.85 * losses[0], name
    assert len(result["episodes"]["seed"]) == 1
    settings = {"run_dir": tmp_path / "run", "episodes": 2, "seed": 0}
    filmed, played = (
        evaluate.evaluate(evaluate.Args(**settings, video=video)) for video in (tmp_path / "video.gif", None)
    )
    assert filmed == played and filmed["episodes"]["seed"][0] == result["episodes"]["seed"][0]
    assert filmed["episodes"]["success"][0]
    video = Image.open(tmp_path / "video.gif")
    assert video.size == (480, 240) and video.n_frames >= 2 * 5
    generator = torch.Generator().manual_seed(0)
    actor = lambda observation: torch.rand(len(observation), 4, generator=generator) * 2 - 1  # noqa: E731
    assert not any(laeo.evaluate(actor, "FetchReachImage", 5, 0, CPU)["episodes"]["success"])


@needs_gpu
@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("free", [10**12, 1000])
def test_batches_of_a_gpu_are_those_of_a_cpu(method, free, random_images, monkeypatch):
    """Whether the observations fit there or stay in their file."""
    script, args = SCRIPTS[method], small_args(SCRIPTS[method], random_images, random_shift=2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *args: (free, 10**12))
    (one, mean, std), (other, *statistics) = (
        script.load_data(args, torch.device(device))[1:4] for device in ("cpu", "cuda")
    )
    assert other.observations.device.type == ("cuda" if free > 1000 else "cpu")
    assert torch.equal(mean, statistics[0].cpu()) and torch.equal(std, statistics[1].cpu())
    for step in range(5):
        for name, value in script.sample(one, args, step)._asdict().items():
            values, same = value, getattr(script.sample(other, args, step), name)
            for a, b in zip(values, same) if isinstance(values, list) else [(values, same)]:
                assert b.device.type == "cuda" and torch.equal(a, b.cpu()) and a.dtype == b.dtype, name


@needs_gpu
@pytest.mark.parametrize("method", SCRIPTS)
@pytest.mark.parametrize("free", [10**12, 1000])
def test_training_on_a_gpu(method, free, random_images, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *args: (free, 10**12))
    args = small_args(SCRIPTS[method], random_images, tmp_path / "run", random_shift=2, device="cuda")
    result = SCRIPTS[method].train(args)
    assert result["peak_gpu_bytes"] > 0 and (tmp_path / "run" / "policy.pt2").exists()
    assert all(torch.isfinite(value).all() for value in final_weights(tmp_path / "run").values())
