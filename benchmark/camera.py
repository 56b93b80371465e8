"""Measure what each of the camera's measures is worth:  OMP_NUM_THREADS=1 python benchmark/camera.py

Speed with it divided by speed without it: of environment steps with a picture each, and of pictures alone. Both take
turns, an episode each, in one process (for LP_NUM_THREADS, which Mesa reads once, in two); the medians go to
benchmark/results/camera.json. Nothing else should run on the machine.
"""

import atexit
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from made import made

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import robot_tasks  # noqa: E402

ROUNDS, STEPS, THREADS = 15, 49, "LP_NUM_THREADS=0 against one thread for each core"
IMAGE_TASKS = [env_id for env_id, task in common.TASKS.items() if task.state_task]


def speeds(env, seed: int) -> np.ndarray:
    """Return environment steps a second with random actions, and pictures a second of the last state."""
    actions = np.random.default_rng(seed).uniform(-1, 1, (STEPS, 4)).astype(np.float32)
    env.reset(seed=seed)
    start = time.perf_counter()
    for action in actions:
        env.step(action)
    middle = time.perf_counter()
    for _ in range(STEPS):
        env.unwrapped.camera.picture()
    return STEPS / np.array([middle - start, time.perf_counter() - middle])


def one_sample(task) -> None:
    """Render 64 x 64 pixels, as for a picture of 32 x 32."""
    task.camera.close()
    task.camera = robot_tasks.Camera(task.inner, robot_tasks.VIEWS[task.spec.kwargs["view"]], 32)


def four_samples(task) -> None:
    """Render 64 x 64 pixels with OpenGL's antialiasing, which MuJoCo's models have by default."""
    one_sample(task)
    task.inner.model.vis.quality.offsamples = 4
    task.camera._renderer = robot_tasks.import_mujoco().Renderer(task.inner.model, 64, 64)
    atexit.register(task.camera._renderer.close)


def links_drawn(task) -> None:
    for name in ("robot0:estop_link", "robot0:laser_link"):
        task.inner.model.geom_group[task.inner.model.geom_bodyid == task.inner.model.body(name).id] = 1


def numpy_sum(task) -> None:
    camera = task.camera

    def picture() -> np.ndarray:
        camera._renderer.update_scene(camera._data, camera._camera, camera._option)
        total = camera._renderer.render().reshape(64, 2, 64, 2, 3).sum((1, 3), dtype=np.uint16)
        return ((total + 2) >> 2).astype(np.uint8)

    camera.picture = picture


WITHOUT = {
    "2x supersampling by hand against 4 samples of MuJoCo": four_samples,
    "2x supersampling by hand against no antialiasing": one_sample,
    "two links that cannot be seen are not drawn": links_drawn,
    "means by PIL's reduce against a sum by numpy": numpy_sum,
}


def ratios(env_id: str) -> dict[str, list]:
    """Return the ratios of each round, [rounds, 2], by measure."""
    envs, found = {name: common.make_env(env_id) for name in ["", *WITHOUT]}, {name: [] for name in [*WITHOUT, THREADS]}
    for name, change in WITHOUT.items():
        change(envs[name].unwrapped)
    for seed in range(ROUNDS):
        order = -1 if seed % 2 else 1
        measured = {name: speeds(envs[name], seed) for name in list(envs)[::order]}
        for threads in ["0", str(os.cpu_count())][::order]:
            command, environment = [sys.executable, __file__, env_id], os.environ | {"LP_NUM_THREADS": threads}
            output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            measured[f"{threads} threads"] = np.array(json.loads(output))
        for name in WITHOUT:
            found[name].append(measured[""] / measured[name])
        found[THREADS].append(measured["0 threads"] / measured[f"{os.cpu_count()} threads"])
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:  # one of the two processes
        env = common.make_env(sys.argv[1])
        sys.exit(print(np.median([speeds(env, seed) for seed in range(5)], axis=0).tolist()))
    path = ROOT / "benchmark" / "results" / "camera.json"
    how = f"medians of {ROUNDS} rounds, {robot_tasks.gl_name()}, {os.cpu_count()} cores, {time.strftime('%B %Y')}"
    content = json.loads(path.read_text()) | {
        "how": how,
        "ratios": {},
        "made": made(),
    }  # what was removed from the camera stays there
    for env_id in IMAGE_TASKS:
        for name, values in ratios(env_id).items():
            medians = dict(zip(("steps", "pictures"), np.median(values, axis=0).round(2).tolist()))
            content["ratios"].setdefault(name, {})[env_id] = medians
            print(env_id, name, medians, flush=True)
    with common.write_file(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")
