"""Environments, those of our tasks included, and dataset files; nothing else. Every script imports this one.

A dataset is a directory of flat arrays, padded with zeros to the longest episode:

    observations.npy      [episodes, steps + 1, ...]  float32  o_0 ... o_T; uint8 for images [height, width, channels]
    actions.npy           [episodes, steps, A]        float32  a_t, from o_t to o_(t+1), in the environment's bounds
    lengths.npy           [episodes]                  int32    T, the number of actions of each episode
    success_examples.npy  [examples, ...]             as above observations that solve the task, in random order
    terminals.npy         [episodes]                  bool     optional: ended by something other than a step limit
    rewards.npy           [episodes, steps]           float32  optional: of the transitions, for methods that use them
    successes.npy         [episodes, steps + 1]       bool     optional: solved states; for metrics, CVL and oracles
    metadata.json         optional: where the data come from; versions and action_bounds, if there, are used
"""

import contextlib
import dataclasses
import difflib
import errno
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import signal
import sys
import threading
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import filelock
import gymnasium as gym
import numpy as np

try:
    from robot_tasks import TASKS  # which registers them with gymnasium and imports no simulator
except ImportError:  # only this file was copied
    TASKS = {}


class UserError(ValueError):
    """A mistake that the user can mend; its message is one sentence that says how."""


@contextlib.contextmanager
def user_errors(interrupted: str = "interrupted.") -> Iterator[None]:
    """Turn UserError, Ctrl-C or SIGTERM into one sentence on stderr and exit status 1. A script's last lines use it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.excepthook = lambda _: None  # TensorBoard's: what its thread raises, add_scalar raises here
    try:
        yield
    except (UserError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"error: {str(error) or interrupted}")


STREAMS = ("weights", "batches", "metrics", "split", "evaluation", "dataset", "mixture", "calibration", "agent")


def seed_sequence(seed: int, stream: str, index: int = 0) -> np.random.SeedSequence:
    """Return the root of one random stream, by the run's seed, the stream's name and a number, both below 2**32."""
    return np.random.SeedSequence([seed, STREAMS.index(stream), index])


def episode_seed(seed: int, stream: str, episode: int) -> int:
    """Return the 64-bit seed with which an environment is reset. No two streams share their starts."""
    return int(seed_sequence(seed, stream, episode).generate_state(1, np.uint64)[0])


def check_flags(args: Any) -> None:
    """Raise UserError for a flag outside of the bounds or choices of its field's type, or without what it needs."""
    for field in dataclasses.fields(args):
        (least, most), value = getattr(field.type, "__metadata__", (-np.inf, np.inf)), getattr(args, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, (int, float)) and not least <= value <= most:
            raise UserError(f"{flag} is {value}; it must be from {least} to {most}.")
        if get_origin(field.type) is Literal and value not in get_args(field.type):
            raise UserError(f"{flag} is {value}; it must be one of {', '.join(map(str, get_args(field.type)))}.")
    if getattr(args, "track", False) and not importlib.util.find_spec("tracking"):
        raise UserError("--track needs tracking.py, which is not here; copy it to where the script is.")


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first sentence of its message."""
    return f"{type(error).__name__}: {str(error).splitlines()[0].split('. ')[0] if str(error) else 'no message'}"


def versions(*packages: str) -> dict[str, str]:
    """Return the version of each of these packages that is installed."""
    return {x: importlib.metadata.version(x) for x in packages if importlib.util.find_spec(x.replace("-", "_"))}


def is_observation(shape: tuple[int, ...]) -> bool:
    """Return whether methods take observations of this shape: vectors, or images [height, width, channels]."""
    return len(shape) == 1 <= shape[0] or (len(shape) == 3 and min(shape[:2]) >= 8 and 1 <= shape[2] <= 12)


def make_env(env_id: str, **kwargs: Any) -> gym.Env:
    """Return a new environment: one of TASKS, or any that gymnasium knows, also as MODULE:ID.

    Raises UserError if there is none of that name, or if its spaces are not those that the methods take.
    """
    try:
        env = gym.make(f"laeo/{env_id}-v0" if env_id in TASKS else env_id, **kwargs)
    except (gym.error.Error, ImportError) as error:
        near = " or ".join(() if env_id in TASKS else difflib.get_close_matches(env_id, TASKS, n=2, cutoff=0.5))
        near = f"did you mean {near}? The" if near else "the"
        text = f"{near} tasks are {', '.join(TASKS) or 'in robot_tasks.py'}; any Gymnasium id is taken, also MODULE:ID."
        raise UserError(f"there is no environment '{env_id}' ({first_line(error)}); {text}") from None
    if env.spec.max_episode_steps is None:  # an environment that never ends would be evaluated for ever
        env = gym.wrappers.TimeLimit(env, 10_000)
    space, actions = env.observation_space, env.action_space
    if not isinstance(space, gym.spaces.Box) or not is_observation(space.shape):
        right = "a Box of one axis (gymnasium's wrappers FlattenObservation and FilterObservation make one)"
        right += " or of images [height, width, channels], 8 x 8 or more, with 1 to 12 channels"
        raise UserError(f"the observations of {env_id} are {space}; they must be {right}.")
    bounds = np.array([actions.low, actions.high]) if isinstance(actions, gym.spaces.Box) else np.empty(0)
    if bounds.ndim != 2 or not np.isfinite(bounds).all():
        raise UserError(f"the actions of {env_id} are {actions}; they must be a Box of one axis with finite bounds.")
    return env


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or an unwritable place into a UserError that names it."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space or choose another place" if full else "choose a place that can be written"
        raise UserError(f"cannot write {path}: {error.strerror or error}; {advice}.") from None


@contextlib.contextmanager
def write_file(path: Path) -> Iterator[io.BytesIO]:
    """Yield a buffer whose bytes become the file, whole or not at all, when the block ends without an error."""
    temporary, buffer = path.with_name(f".{path.name}.{os.getpid()}.tmp"), io.BytesIO()
    yield buffer
    with explain_os_errors(path), contextlib.ExitStack() as stack:
        stack.callback(temporary.unlink, missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)


@contextlib.contextmanager
def write_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path` that takes its place when the block ends, and vanishes when it fails.

    What a killed process has left there is removed; a living one holds a lock on its own.
    """
    path = path.resolve()
    lock = path.with_name(f".{path.name}.{uuid.uuid4().hex}.lock")

    def clean(lock: Path) -> None:
        if (old := lock.with_suffix(".old")).exists() and not path.exists():
            old.rename(path)
        for directory in (lock.with_suffix(".tmp"), old):
            shutil.rmtree(directory, ignore_errors=True)
        with contextlib.suppress(OSError):  # on Windows, where it goes when it is released
            lock.unlink()

    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 32}.lock"):
            with contextlib.suppress(filelock.Timeout), filelock.FileLock(leftover, timeout=0):  # else it is alive
                clean(leftover)
        with filelock.FileLock(lock):
            try:
                lock.with_suffix(".tmp").mkdir()
                yield lock.with_suffix(".tmp")
                if path.exists():
                    path.rename(lock.with_suffix(".old"))
                lock.with_suffix(".tmp").rename(path)
            finally:
                clean(lock)


def create_array(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap:
    """Create a zeroed `.npy` file, opened for writing through memory. Raises OSError if the disk cannot hold it."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:  # a hole in the file would become a crash (SIGBUS) when the disk fills up
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return array


def sha256(path: Path) -> str:
    """Return the checksum of a file as hexadecimal digits."""
    return hashlib.sha256(np.memmap(path, np.uint8, "r") if path.stat().st_size else b"").hexdigest()


def intact(path: Path) -> Path:
    """Return the path of a zip file of PyTorch's. Raises ValueError for a wrong checksum, which PyTorch ignores."""
    with zipfile.ZipFile(path) as file:
        if damaged := file.testzip():
            raise ValueError(f"the checksum of {damaged} in it is wrong")
    return path


def write_metadata(directory: Path, content: dict[str, Any]) -> None:
    """Write the `metadata.json` of a dataset, with versions and the checksum of every array in the directory."""
    checksums = {file.stem: sha256(file) for file in sorted(directory.glob("*.npy"))}
    content = content | {"versions": versions("numpy", "gymnasium", "mujoco", "gymnasium-robotics", "metaworld")}
    (directory / "metadata.json").write_text(json.dumps(content | {"sha256": checksums}, indent=2) + "\n")


def _array(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError:
        raise UserError(f"{name}: the rows have different lengths.") from None


def _convert(name: str, values: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    array = _array(name, values)
    if array.shape != shape or array.dtype.kind not in "biuf":
        raise UserError(f"{name}: shape {array.shape} and dtype {array.dtype}; it must be numbers of shape {shape}.")
    with np.errstate(over="ignore", invalid="ignore"):  # what is too large for float32 becomes infinite
        converted = array.astype(dtype)
    wrong = ~np.isfinite(converted) if dtype == np.float32 else converted != array
    if wrong.any():
        problem = {"f": "is not finite", "u": "is outside of 0 to 255", "b": "is no flag"}[converted.dtype.kind]
        raise UserError(f"{name}: the value at {np.argwhere(wrong)[0].tolist()} {problem}.")
    return converted


def save_dataset(
    path: str | Path,
    observations: Sequence[np.ndarray],
    actions: Sequence[np.ndarray],
    success_examples: Sequence[np.ndarray],
    terminals: Sequence[bool] | None = None,
    rewards: Sequence[np.ndarray] | None = None,
) -> None:
    """Write episodes as a dataset, whole or not at all.

    `observations`, `actions` and `rewards` have an array for each episode, [T + 1, ...], [T, A] and [T]; actions are in
    the environment's own bounds; `success_examples` [examples, ...] may be empty; `terminals` says of each episode
    whether something other than a step limit ended it. Integer images [height, width, channels] become uint8, all else
    float32. Raises UserError, which names the episode, for a value that is not finite and a shape that does not fit.
    """
    path, episodes = Path(path), len(actions)
    if path.exists():
        raise UserError(f"{path} exists; remove it or choose another path.")
    if episodes < 2 or any(x is not None and len(x) != episodes for x in (observations, terminals, rewards)):
        raise UserError("a dataset needs two or more episodes, and as many of everything else as of actions.")
    actions = [_array(f"actions of episode {e}", a) for e, a in enumerate(actions)]
    for e, a in enumerate(actions):
        if a.ndim != 2 or not a.size:
            raise UserError(f"actions of episode {e}: shape {a.shape}; it must be [T, A], both of them 1 or more.")
    shape = _array("observations of episode 0", observations[0]).shape[1:]
    if not is_observation(shape):
        raise UserError(f"observations of episode 0: states have shape {shape}; it must be one of vectors or images.")
    lengths = np.array([len(a) for a in actions], np.int32)
    image = len(shape) == 3 and all(_array("observations", x).dtype.kind in "iu" for x in observations)
    kinds = {"observations": (observations, 1, shape, np.uint8 if image else np.float32)}
    kinds |= {"actions": (actions, 0, actions[0].shape[1:], np.float32)}
    kinds |= {} if rewards is None else {"rewards": (rewards, 0, (), np.float32)}
    with write_directory(path) as directory:
        for name, (values, extra, one, dtype) in kinds.items():
            size = (episodes, int(lengths.max()) + extra, *one)
            array = create_array(directory / f"{name}.npy", size, dtype)
            for e, n in enumerate(lengths + extra):
                array[e, :n] = _convert(f"{name} of episode {e}", values[e], (n, *one), dtype)
            array.flush()
        examples = success_examples if len(success_examples) else np.empty((0, *shape))
        examples = _convert("success_examples", examples, (len(examples), *shape), kinds["observations"][-1])
        np.save(directory / "success_examples.npy", examples)
        np.save(directory / "lengths.npy", lengths)
        if terminals is not None:
            np.save(directory / "terminals.npy", _convert("terminals", terminals, (episodes,), bool))
        write_metadata(directory, {"num_episodes": episodes})


class Dataset(NamedTuple):
    """All that a method receives: no reward and no success flag is within its reach."""

    observations: np.ndarray  # [episodes, steps + 1, ...] float32 or uint8, mapped from the file
    actions: np.ndarray  # [episodes, steps, actions] float32, likewise
    lengths: np.ndarray  # [episodes] int32, the number of actions before the episode's end
    success_examples: np.ndarray  # [examples, ...], of the observations' type
    terminals: np.ndarray  # [episodes] bool, whether something other than a step limit ended the episode
    action_bounds: np.ndarray  # [2, actions] float32, the smallest and the largest possible action
    checksum: str  # of all but the later observations, which tells datasets apart


def read_metadata(path: Path) -> dict[str, Any]:
    """Return a dataset's metadata, `versions` and `sha256` empty if it has none. Raises UserError if it is damaged."""
    file, metadata = path / "metadata.json", {"versions": {}, "sha256": {}}
    try:
        metadata |= {**json.loads(file.read_text())} if file.exists() else {}
        if not isinstance(metadata["versions"], dict) or not isinstance(metadata["sha256"], dict):
            raise ValueError("its versions and sha256 must be objects")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}).") from None
    return metadata


def load_array(path: Path, types: str) -> np.ndarray:
    """Map a `.npy` file; changes to the array stay in memory. Raises UserError for damage, NaN and infinity."""
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        len(array), array.dtype
    except Exception as error:  # numpy.load raises half a dozen types for a damaged file
        raise UserError(f"{path} is damaged or missing ({first_line(error)}).") from None
    if array.dtype not in [np.dtype(name) for name in types.split()]:
        raise UserError(f"{path} has dtype {array.dtype.str}; it must be {types} (common.save_dataset converts).")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{path} holds a value that is not finite, at {np.argwhere(~np.isfinite(array))[0].tolist()}.")
    return array


def load_dataset(path: Path, env_id: str | None, verify: bool = False, allow_version_mismatch: bool = False) -> Dataset:
    """Map a dataset; raise UserError for wrong types, shapes, numbers, actions, task or version of the simulator.

    The bounds of actions are the environment's; without one (`env_id` None) those in the metadata or else the smallest
    and the largest action. With `verify` the checksums in the metadata are checked too, which reads everything.
    """
    metadata = read_metadata(path)
    env = make_env(env_id) if env_id else None
    if env_id and str(metadata.get("env_id") or env_id).split(":")[-1] != env_id.split(":")[-1]:  # MODULE: may differ
        raise UserError(f"{path} is a dataset of {metadata['env_id']}, not of {env_id}.")
    if env_id in TASKS and not allow_version_mismatch and (problem := TASKS[env_id].mismatch(metadata["versions"])):
        flags = f"--env-id {env_id} --quality {metadata.get('quality', 'medium')} --output {path} --overwrite"
        raise UserError(f"{path} {problem}; run python collect_data.py {flags}, or add --allow-version-mismatch.")
    types = {"observations": "<f4 |u1", "actions": "<f4", "lengths": "<i4"}
    optional = {"success_examples": "<f4 |u1", "terminals": "|b1"}
    types |= {name: optional[name] for name in optional if (path / f"{name}.npy").exists()}
    arrays = {name: load_array(path / f"{name}.npy", kind) for name, kind in types.items()}
    if str(read_metadata(path)) != str(metadata):  # some arrays may be the old ones; as text, NaN equals NaN
        raise UserError(f"{path} was replaced while it was read; start again.")
    for name in (*arrays, *(x for x in ("rewards", "successes") if (path / f"{x}.npy").exists())) if verify else ():
        checksum = metadata["sha256"].get(name, "no checksum")
        if checksum != (found := sha256(path / f"{name}.npy")):
            raise UserError(f"{path}: metadata.json has {checksum} for {name}, whose sha256 is {found}; copy it again.")
    observations, actions, lengths = (arrays[name] for name in ("observations", "actions", "lengths"))
    shape, width, bounds = observations.shape[2:], actions.shape[2:], metadata.get("action_bounds")
    if env:
        shape, width = env.observation_space.shape, env.action_space.shape
        bounds = env.action_space.low, env.action_space.high
        env.close()
    if not is_observation(shape) or actions.ndim != 3 or not actions.shape[2]:
        name, array = ("actions", actions) if is_observation(shape) else ("observations", observations)
        raise UserError(f"{path}/{name}.npy has shape {array.shape}; no method takes that (see the top of common.py).")
    episodes, steps = len(lengths), actions.shape[1]
    arrays.setdefault("success_examples", np.empty((0, *shape), observations.dtype))
    arrays.setdefault("terminals", np.zeros(episodes, bool))
    expected = {"observations": (episodes, steps + 1, *shape), "actions": (episodes, steps, *width)}
    expected |= {"success_examples": (len(arrays["success_examples"]), *shape)}
    for name, array in arrays.items():
        if array.shape != (size := expected.get(name, (episodes,))):
            raise UserError(f"{path}/{name}.npy has shape {array.shape}; {env_id or 'the rest of it'} needs {size}.")
    if arrays["success_examples"].dtype != observations.dtype or (observations.dtype == np.uint8 and len(shape) != 3):
        raise UserError(f"{path}: observations and success_examples must both be float32, or both uint8 images.")
    if episodes < 2 or lengths.min() < 1 or lengths.max() > steps:
        raise UserError(f"{path}/lengths.npy must hold the lengths of two or more episodes, from 1 to {steps}.")
    some = np.arange(0, episodes, -(-episodes // 100))  # three states of each of a hundred episodes
    if (observations[some[:, None], [[0, n // 2, n] for n in lengths[some]]] == observations[0, 0]).all():
        raise UserError(f"all observations of {path} are the same; there is nothing to learn from.")
    inside = np.arange(steps) < lengths[:, None]
    bounds = bounds or (actions[inside].min(0), actions[inside].max(0))
    low, high = bounds = _convert(f"{path}: action_bounds", bounds, (2, actions.shape[2]), np.float32)
    outside = inside & ((actions < low - 1e-5) | (actions > high + 1e-5)).any(-1)
    if outside.any():
        e, t = np.argwhere(outside)[0].tolist()
        wrong = f"{path}/actions.npy: the action at [{e}, {t}] is {actions[e, t].tolist()}, outside of the bounds"
        raise UserError(f"{wrong} {low.tolist()} to {high.tolist()}; the data must have the environment's own actions.")
    parts = lengths, actions, arrays["success_examples"], observations[:, 0]
    checksum = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    return Dataset(**arrays, action_bounds=bounds, checksum=checksum)


def find_dataset(env_id: str, quality: str, path: Path | None = None) -> Path:
    """Return a dataset's directory. A task's standard one is made by collect_data.py if it is not there yet."""
    standard = Path("datasets") / f"{env_id}-{quality}"
    if not (path or standard).exists():
        if not path:
            make_env(env_id).close()  # says what an unknown name is near to
        if path or env_id not in TASKS or not Path(__file__).with_name("collect_data.py").exists():
            raise UserError(f"there is no dataset {path or standard}; --dataset names one (see common.save_dataset).")
        print(f"making {standard}: python collect_data.py --env-id {env_id} --quality {quality}", flush=True)
        import collect_data

        collect_data.collect(collect_data.Args(env_id=env_id, quality=quality))
    return (path or standard).resolve()


def split_dataset(dataset: Dataset, holdout_fraction: float, num_success: int, rng: np.random.Generator) -> tuple:
    """Return the episodes to train on, those to hold out (at least one), and `num_success` success examples.

    An example that occurs in a held-out episode is never drawn, so that no metric of these is about what was trained
    on; fewer examples are a part of more. Raises UserError if there are too few.
    """
    count = min(max(1, round(holdout_fraction * len(dataset.lengths))), len(dataset.lengths) - 1)
    heldout, training = np.split(rng.permutation(len(dataset.lengths)), [count])
    pool, seen = [example.tobytes() for example in dataset.success_examples], set()
    for e in heldout if num_success else ():
        seen |= set(pool).intersection(o.tobytes() for o in dataset.observations[e, : dataset.lengths[e] + 1])
    usable = [i for i in rng.permutation(len(pool)) if pool[i] not in seen]
    if len(usable) < num_success:
        there = f"of {len(pool)} success examples {len(usable)} are not in held-out episodes"
        raise UserError(f"--num-success is {num_success}; {there}; ask for fewer, or for a smaller --holdout-fraction.")
    return training, heldout, np.array(dataset.success_examples[usable[:num_success]])


class Transitions(NamedTuple):
    """The transitions of some episodes."""

    row: np.ndarray  # [N] where the observation is in [episodes * (steps + 1), ...]; the next one is at row + 1
    remaining: np.ndarray  # [N] how many steps of its episode follow the observation
    terminal: np.ndarray  # [N] float32, 1 where something other than a step limit ends the episode, else 0
    action: np.ndarray  # [N, A] float32, scaled from its bounds to [-1, 1]


def transitions(dataset: Dataset, episodes: np.ndarray) -> Transitions:
    """Return the transitions of some episodes, end to end."""
    steps, (low, high) = dataset.actions.shape[1], dataset.action_bounds
    index, t = np.nonzero(np.arange(steps) < dataset.lengths[episodes, None])
    episode = episodes[index]
    remaining = dataset.lengths[episode] - t
    terminal = (dataset.terminals[episode] & (remaining == 1)).astype(np.float32)
    action = 2 * (dataset.actions[episode, t] - low) / np.where(high > low, high - low, 1) - 1
    return Transitions(episode * (steps + 1) + t, remaining, terminal, action.clip(-1, 1))


def load_labelled(path: Path, dataset: Dataset, episodes: np.ndarray) -> dict[str, np.ndarray]:
    """Return states by label for metrics that no training sees: `start`, and by successes.npy `success`, `failure`."""
    states, rng = {"start": dataset.observations[episodes[:1000], 0]}, np.random.default_rng(0)
    inside, flags = np.arange(dataset.observations.shape[1]) <= dataset.lengths[episodes, None], None
    if (path / "successes.npy").exists():
        flags, size = load_array(path / "successes.npy", "|b1"), dataset.observations.shape[:2]
        if flags.shape != size:
            raise UserError(f"{path}/successes.npy has shape {flags.shape}; the observations need {size}.")
    for label in ("success", "failure"):
        wanted = inside & (False if flags is None else flags[episodes] == (label == "success"))
        index, t = rng.permutation(np.argwhere(wanted))[:1000].T
        states[label] = dataset.observations[episodes[index], t]
    return states


def success_lists(solved: Sequence[Sequence[Any]]) -> dict[str, list]:
    """Return docs/training.md's lists of success, by the flags of each episode's T + 1 states; {} if all are None."""
    if all(flag is None for flags in solved for flag in flags):
        return {}
    solved = [np.array(flags, bool) for flags in solved]
    lists = {"success": [bool(s[1:].any()) for s in solved], "final_success": [bool(s[-1]) for s in solved]}
    lists |= {"initial_success": [bool(s[0]) for s in solved]}
    return lists | {"discounted_return": [float(s[1:] @ 0.99 ** np.arange(len(s) - 1)) for s in solved]}


def summarise(lists: dict[str, list]) -> dict[str, Any]:
    """Return means of lists with one entry per episode; of success as NAME_rate, and NAME_interval: Wilson's, 95 %.

    In an interval, episodes with the same number in the list `episode` count once: they are the same episode again.
    """
    from scipy.stats import binomtest  # which takes most of a second

    summary, (_, once) = {}, np.unique(lists["episode"], return_index=True)
    for name, values in lists.items():
        if name.endswith("success"):
            interval = binomtest(sum(values[i] for i in once), len(once)).proportion_ci(method="wilson")
            summary |= {f"{name}_rate": float(np.mean(values)), f"{name}_interval": list(interval)}
        elif name.endswith("return"):
            summary[name] = float(np.mean(values))
    return summary
