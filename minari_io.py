"""Datasets from and to Minari (https://minari.farama.org), for `collect_data.py --from-minari` and `--to-minari`.

Neither direction loses anything of observations, actions, lengths, terminals and rewards: images are stored without
JPEG, which is Minari's default. Episodes are read and written one by one.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

import common

if TYPE_CHECKING:
    from collect_data import Args


def import_minari() -> Any:
    """Return the module, which is an optional dependency. Raises UserError if it or what it needs is missing."""
    try:
        import h5py  # noqa: F401  Minari imports both of them only when it reads or writes
        import minari
        import PIL  # noqa: F401
    except ImportError as error:
        raise common.UserError(
            f"Minari cannot be imported ({common.first_line(error)}); on Python 3.11 or later: pip install -r "
            "requirements-optional.txt"
        ) from None
    return minari


class Field(Sequence):
    """One field of all episodes, each read from the file when it is asked for."""

    def __init__(self, dataset: Any, name: str):
        self._dataset, self._name = dataset, name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, episode: int) -> np.ndarray:
        return getattr(self._dataset[episode], self._name)


def find_success_examples(args: "Args", dataset: Any) -> np.ndarray:
    """Return success examples [examples, ...] of a Minari dataset, chosen as the flags say, or else by its infos.

    Raises UserError if there are none.
    """
    if args.success_examples:
        try:
            examples, shape = np.load(args.success_examples, allow_pickle=False), dataset.observation_space.shape
            if not len(examples) or examples.shape[1:] != shape:
                raise ValueError(f"it must hold one or more observations {list(shape)}")
            return examples
        except Exception as error:  # numpy.load raises half a dozen types for a damaged file
            raise common.UserError(
                f"--success-examples {args.success_examples} cannot be used ({common.first_line(error)})."
            ) from None
    examples: list[np.ndarray] = []
    for episode in dataset:
        infos = episode.infos or {}
        if args.success_reward is not None:
            examples.extend(episode.observations[1:][episode.rewards >= args.success_reward])
        elif any(np.ndim(infos.get(name)) and infos[name][-1] for name in ("success", "is_success")):
            examples.append(episode.observations[-1])
    if not examples:
        raise common.UserError(
            f"no success examples are known in {args.from_minari}: give a file of them, --success-examples FILE.npy, "
            "or the reward of a success, --success-reward R, or a dataset whose infos hold 'success' or 'is_success'."
        )
    rng = np.random.default_rng(common.seed_sequence(args.seed, "mixture"))
    return np.stack(examples)[rng.permutation(len(examples))]  # a method takes the first of them


def read(args: "Args", output: Path) -> dict[str, Any]:
    """Make the dataset `output` from the Minari dataset args.from_minari, whole or not at all; return its metadata.

    Raises UserError if it is not there, if its observations or actions are not arrays, and if no success examples are
    known (`find_success_examples`).
    """
    minari, name = import_minari(), args.from_minari
    try:
        dataset = minari.load_dataset(name)
    except FileNotFoundError:
        raise common.UserError(f"there is no Minari dataset {name} here; get it with: minari download {name}") from None
    except Exception as error:  # of its own file formats
        raise common.UserError(f"the Minari dataset {name} cannot be read ({common.first_line(error)}).") from None
    space, actions = dataset.observation_space, dataset.action_space
    if not isinstance(space, gym.spaces.Box):
        raise common.UserError(
            f"the observations of {name} are a {type(space).__name__} space; they must be arrays, which "
            "gymnasium.wrappers.FlattenObservation makes of it when the episodes are recorded."
        )
    if not isinstance(actions, gym.spaces.Box) or len(actions.shape) != 1:
        raise common.UserError(f"the actions of {name} are {actions}; they must be a Box of one axis.")
    observations, terminations = Field(dataset, "observations"), Field(dataset, "terminations")
    examples, terminals = find_success_examples(args, dataset), [bool(episode[-1]) for episode in terminations]
    with common.write_directory(output) as directory:
        data = directory / "data"
        rewards = Field(dataset, "rewards")
        common.save_dataset(data, observations, Field(dataset, "actions"), examples, terminals, rewards)
        metadata = common.read_metadata(data) | {"num_success_examples": len(examples), "minari": name}
        # Not the versions of this machine: those that the file names.
        requirements = [text.split("==") for text in dataset.storage.metadata.get("requirements", [])]
        metadata["versions"] = {parts[0]: parts[1] for parts in requirements if len(parts) == 2}
        if dataset.env_spec:
            env_id = dataset.env_spec.id.removeprefix("laeo/").removesuffix("-v0")
            metadata["env_id"] = env_id if env_id in common.TASKS else dataset.env_spec.id
        if np.isfinite([actions.low, actions.high]).all():
            metadata["action_bounds"] = [actions.low.tolist(), actions.high.tolist()]
        for file in data.glob("*.npy"):
            file.rename(directory / file.name)
        shutil.rmtree(data)
        (directory / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    print(f"{output}: {len(dataset)} episodes and {len(examples)} success examples of {name}")
    return metadata


def write(args: "Args", source: Path) -> dict[str, Any]:
    """Write the dataset `source` to Minari as args.to_minari, whole or not at all; return its metadata.

    `MinariDataset.recover_environment` makes the environment where robot_tasks.py can be imported. The infos hold
    `success` if the dataset does. Raises UserError if there is no such dataset, or one of that name in Minari.
    """
    minari, name = import_minari(), args.to_minari
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage import get_dataset_path

    if args.from_minari:
        raise common.UserError("--from-minari and --to-minari are two commands.")
    if not source.exists():
        raise common.UserError(
            f"there is no dataset {source}; make it with: python collect_data.py --env-id {args.env_id} --quality "
            f"{args.quality} --output {source}"
        )
    try:
        parse_dataset_id(name)
    except (TypeError, ValueError):
        raise common.UserError(f"--to-minari is {name}; Minari's names are NAME-v0 or NAMESPACE/NAME-v0.") from None
    target = get_dataset_path(name)
    if target.exists():
        raise common.UserError(f"{target} exists; choose another name, or: minari delete {name}")
    data, metadata = common.load_dataset(source, None), common.read_metadata(source)
    optional = {"rewards": "f4", "successes": "?"}
    optional = {key: common.load_array(source / f"{key}.npy", types) for key, types in optional.items()
                if (source / f"{key}.npy").exists()}  # fmt: skip

    def episodes() -> Iterator[EpisodeBuffer]:
        for e, n in enumerate(data.lengths.tolist()):
            end = np.arange(1, n + 1) == n
            yield EpisodeBuffer(
                observations=data.observations[e, : n + 1],
                actions=data.actions[e, :n],
                rewards=optional["rewards"][e, :n] if "rewards" in optional else np.zeros(n, np.float32),
                terminations=end & data.terminals[e],
                truncations=end & ~data.terminals[e],
                infos={"success": optional["successes"][e, : n + 1]} if "successes" in optional else {},
            )

    env_id, image = metadata.get("env_id"), data.observations.dtype == np.uint8
    env_id, env = f"laeo/{env_id}-v0" if env_id in common.TASKS else env_id, gym.Env()
    env.spec = gym.registry.get(env_id)  # all that Minari reads of an environment when it is given the spaces
    low, high = (0, 255) if image else (-np.inf, np.inf)
    with common.explain_os_errors(target), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an author and other fields that only an upload needs
        try:
            minari.create_dataset_from_buffers(
                name,
                episodes(),
                env=env if env.spec else None,
                observation_space=gym.spaces.Box(low, high, data.observations.shape[2:], data.observations.dtype),
                action_space=gym.spaces.Box(*data.action_bounds, dtype=np.float32),
                data_format="hdf5",
                requirements=[f"{package}=={version}" for package, version in metadata["versions"].items()],
                jpeg_encoding=False,
            )
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
    print(f"{target}: {len(data.lengths)} episodes of {source}")
    return metadata
