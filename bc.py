# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "numpy>=1.26", "scipy>=1.11", "gymnasium>=1.2,<2", "filelock>=3.12", "tyro>=0.9",
#     "tqdm>=4.66", "tensorboard>=2.21", "mujoco==3.3.0", "metaworld==3.1.1", "gymnasium-robotics==1.4.2", "pillow>=10"]
# ///
"""BC, behavioural cloning: a policy as likely as possible to have chosen the actions of the trajectories.

It looks at no success example: the methods that do are to be better than it. It is LAEO with `--bc-coef 1`. With
`--only-solved` it is an oracle, which is told the episodes that end solved and clones these alone: no method.

    python bc.py --env-id FetchReach --gradient-steps 3000
    python bc.py --env-id FetchPush
    python bc.py --env-id FetchPush --only-solved

Differences from the LAEO paper's baseline (Hatch et al. 2023, Section 5) and its code (docs/bc.md has the reasons):
 1. Observations are standardised; images by a mean of each pixel and one deviation.
 2. Networks are narrower, batches smaller, steps fewer; the learning rate starts higher and falls to zero, as in LAEO.
 3. Success is measured on 100 episodes with fixed seeds, played by the final policy.
 4. The action of largest density is played; the code plays the median, tanh of the normal distribution's mean.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Generator, Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import common

METHOD = Path(__file__).stem
Whole, Count, Share = Annotated[int, 0, 2**32 - 1], Annotated[int, 1, 2**32 - 1], Annotated[float, 0, 1]  # bounds
DEFAULTS = {"gradient_steps": (20_000, 28_000), "batch_size": (256, 128), "random_shift": (0, 2)}  # states, images
README = {"FetchPush": "0.881 / 0.836", "FetchPushImage": "0.780 / 0.713", "FetchPushImageOccluded": "0.510 / 0.485"}


@dataclass
class Args:
    env_id: str = "FetchReach"  # one of the tasks in the README, or any Gymnasium id, also MODULE:ID
    quality: Literal["medium", "hard"] = "medium"  # of a task's standard dataset: 45 to 50 or 8 to 12 % succeed
    dataset: Path | None = None  # a dataset directory to use instead of datasets/ENV_ID-QUALITY
    verify: bool = False  # check the dataset's checksums, which reads all of it
    allow_version_mismatch: bool = False  # use a dataset although another version of the simulator made it
    gradient_steps: Annotated[int | None, 1, 2**32 - 1] = None  # training steps; states 20,000, images 28,000
    batch_size: Annotated[int | None, 1, 2**32 - 1] = None  # transitions in a batch; states 256, images 128
    learning_rate: Share = 1e-3  # Adam's step size at the start; it falls linearly to zero
    hidden_dim: Count = 256  # width of the network's two hidden layers
    only_solved: bool = False  # an ORACLE, no method: clone only episodes that end solved, by the data's successes.npy
    channels: Count = 16  # for images: of the first convolution; the second and the third have twice as many
    random_shift: Annotated[int | None, 0, 32] = None  # for images, 2: move them by up to so many pixels (augmentation)
    seed: Whole = 0  # of the network, batches, held-out episodes and evaluation starts
    num_threads: Count = 1  # of PyTorch on a CPU; more are faster alone, and far slower beside other busy processes
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto: on the GPU if there is one
    holdout_fraction: Annotated[float, 0, 0.9] = 0.05  # share of the episodes that is never trained on, at least one
    log_interval: Count = 500  # gradient steps between two lines of metrics
    eval_interval: Whole = 10_000  # gradient steps between two evaluations; 0: only at the end
    eval_episodes: Whole = 100  # of each evaluation, with the same starts; 0: use no environment
    checkpoint_minutes: Annotated[float, 0, 1e6] = 5.0  # of training between two checkpoints; the last step has one too
    run_dir: Path | None = None  # where results go; runs/ENV_ID__METHOD__SEED__TIME if not given
    track: bool = False  # log to Weights & Biases too; with WANDB_MODE=offline only to files in the run directory
    wandb_project: str = "example-based-control"  # with --track: the project there
    wandb_entity: str | None = None  # with --track: the user or the team there
    resume: Path | None = None  # a run directory to go on with, as if it had never stopped; it has the other flags


def mlp(sizes: list[int], generator: Generator) -> nn.Sequential:
    """Return a ReLU network with a linear last layer, Glorot-uniform weights and zero biases."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
        layers += [nn.ReLU(), nn.utils.skip_init(nn.Linear, fan_in, fan_out)]  # nn.Linear draws from global state
        nn.init.xavier_uniform_(layers[-1].weight, generator=generator), nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers[1:])  # no activation before the first layer


class Encoder(nn.Module):
    """Standardises observations [B, D]; of images [B, H, W, C] a convolutional network then makes features."""

    def __init__(self, mean: Tensor, std: Tensor, args: Args, generator: Generator):
        super().__init__()
        self.register_buffer("observation_mean", mean.clone())
        self.register_buffer("observation_std", std.clone())
        self.net, self.dim, self.pad = nn.Identity(), mean.numel(), args.random_shift  # dim: how many features
        if mean.ndim == 3:
            (height, width, channels), a, b = mean.shape, args.channels, 2 * args.channels
            sizes = (channels, a, 8, 4, 2), (a, b, 4, 2, 1), (b, b, 3, 1, 1)  # channels, kernel, stride, padding
            convolutions = [nn.utils.skip_init(nn.Conv2d, *size) for size in sizes]
            for c in convolutions:
                nn.init.xavier_uniform_(c.weight, generator=generator), nn.init.zeros_(c.bias)
            layers, self.dim = [layer for c in convolutions for layer in (c, nn.ReLU())] + [nn.Flatten()], 8 * a
            dense = mlp([(height // 8) * (width // 8) * b, self.dim], generator)
            self.net = nn.Sequential(*layers, *dense, nn.LayerNorm(self.dim), nn.Tanh())

    def forward(self, observation: Tensor, shift: Tensor | None = None) -> Tensor:
        """Return features [B, dim] of observations; images are padded, then cut at row and column `shift` [B, 2]."""
        x = (observation - self.observation_mean).div_(self.observation_std)
        if shift is not None:  # what never moves is zero now, wherever it is moved
            i, *sizes = (torch.arange(size, device=x.device) for size in x.shape[:3])
            rows, columns = ((k + shift[:, [axis]] - self.pad).clamp(0, len(k) - 1) for axis, k in enumerate(sizes))
            pixels = (i[:, None, None] * len(sizes[0]) + rows[:, :, None]) * len(sizes[1]) + columns[:, None]
            x = x.flatten(0, 2).index_select(0, pixels.flatten()).view(x.shape)
        return self.net(x.movedim(-1, 1) if x.ndim == 4 else x)


class Actor(nn.Module):
    """Tanh-normal policy pi(a | s), in [-1, 1]; `forward`, which is exported, returns actions in their own bounds."""

    def __init__(self, encoder: Encoder, action_bounds: Tensor, hidden_dim: int, generator: Generator):
        super().__init__()
        self.register_buffer("action_bounds", action_bounds)  # [2, A]
        self.encoder, sizes = encoder, [encoder.dim, hidden_dim, hidden_dim, 2 * action_bounds.shape[1]]
        self.net = mlp(sizes, generator)

    def distribution(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, each [B, A], of the normal distribution under the tanh."""
        mean, std = self.net(features).chunk(2, -1)
        return mean, F.softplus(std) + 0.1

    def mode(self, features: Tensor) -> Tensor:
        """Return the actions [B, A], in [-1, 1], of largest density, from the encoder's features [B, dim]."""
        mean, std = self.distribution(features)
        action, slope = torch.tanh(mean), 2 * std**2  # it begins at the median, whose magnitude is smaller
        for _ in range(20):  # the density is largest where its derivative is 0: atanh(a) = mean + 2 std^2 a
            action = torch.tanh(mean + slope * action)
        return action

    def forward(self, observation: Tensor) -> Tensor:
        """Return the actions [B, A] that are played for observations [B, ...]: the mode, in their own bounds."""
        return torch.lerp(*self.action_bounds, (self.mode(self.encoder(observation)) + 1) / 2)

    def log_prob(self, mean: Tensor, std: Tensor, action: Tensor) -> Tensor:
        """Return log pi(a | s) [B] of actions [B, A], which count as 0.999 beyond: the density at 1 may be infinite."""
        policy = TransformedDistribution(Normal(mean, std, validate_args=False), TanhTransform(), validate_args=False)
        return policy.log_prob(action.clamp(-0.999, 0.999)).sum(-1)


def bc_loss(log_prob: Tensor) -> Tensor:
    """Minus the mean log-likelihood, in nats, from log-probabilities [B] of the data's actions."""
    return -log_prob.mean()


class Data(NamedTuple):
    observations: Tensor  # [episodes * (steps + 1), ...] the file, mapped into memory; on a GPU a copy if it fits there
    batches: common.Transitions  # what is trained on
    train: common.Transitions  # of it, as many episodes as are held out, for metrics that can be compared with these
    heldout: common.Transitions  # what is never trained on
    device: torch.device  # where batches go


def solved_episodes(path: Path, dataset: common.Dataset, episodes: np.ndarray) -> np.ndarray:
    """Return those of the episodes whose last state is solved, by success flags that no method may see: an oracle."""
    if not (file := path / "successes.npy").exists():
        raise common.UserError(f"--only-solved needs {file}, which says what states are solved; leave it out.")
    flags, shape = common.load_array(file, "|b1"), dataset.observations.shape[:2]
    if flags.shape != shape:
        raise common.UserError(f"{file} has shape {flags.shape}; the observations need {shape}.")
    solved = episodes[flags[episodes, dataset.lengths[episodes]]]
    if not len(solved):
        raise common.UserError(f"--only-solved finds no training episode of {path} that ends solved; leave it out.")
    return solved


def load_data(args: Args, device: torch.device) -> tuple[common.Dataset, Data, Tensor, Tensor]:
    """Set flags that are not given; return dataset, transitions, mean and deviation of observations."""
    environment = args.env_id if args.eval_episodes else None
    dataset = common.load_dataset(args.dataset, environment, args.verify, args.allow_version_mismatch)
    rng = np.random.default_rng(common.seed_sequence(args.seed, "split"))
    training, heldout, _ = common.split_dataset(dataset, args.holdout_fraction, 0, rng)
    observations, image = torch.from_numpy(dataset.observations).flatten(0, 1), dataset.observations.ndim == 5
    if args.random_shift and not image:
        raise common.UserError(f"--random-shift is for images, and {args.dataset} has none; leave it out.")
    vars(args).update({name: x[image] for name, x in DEFAULTS.items() if getattr(args, name) in (None, "auto")})
    index, t = np.nonzero(np.arange(dataset.observations.shape[1]) <= dataset.lengths[training, None])
    rows = np.random.default_rng(0).permutation(training[index] * dataset.observations.shape[1] + t)
    x = observations[torch.from_numpy(rows[: 2_000 if image else 100_000])].float()
    mean, std = x.mean(0), x.std(0).clamp(min=1e-3)  # some numbers never move
    if image:
        std = (x - mean).square().mean().sqrt().expand(mean.shape)
    if device.type == "cuda" and observations.nbytes < 0.75 * torch.cuda.mem_get_info()[0]:
        observations = observations.to(device)
    if args.only_solved:  # after the statistics, which are those of all methods
        training = solved_episodes(args.dataset, dataset, training)
    uses = [common.transitions(dataset, episodes) for episodes in (training, training[: len(heldout)], heldout)]
    return dataset, Data(observations, *uses, device), mean, std


class Batch(NamedTuple):
    observation: Tensor  # [B, ...]
    action: Tensor  # [B, A]
    shift: Tensor | None  # [B, 2]


def sample(data: Data, args: Args, step: int, use: str = "batches") -> Batch:
    """Draw transitions uniformly. The batch depends on the data, the seed and the step alone."""
    rng = np.random.default_rng(common.seed_sequence(args.seed, "batches" if use == "batches" else "metrics", step))
    i = rng.integers(len(getattr(data, use).row), size=args.batch_size)
    row, _, _, action = (torch.from_numpy(x[i]) for x in getattr(data, use))
    observation = data.observations.index_select(0, row.to(data.observations.device)).to(data.device)
    size = (args.batch_size, 2)
    shift = torch.from_numpy(rng.integers(2 * args.random_shift + 1, size=size)) if args.random_shift else None
    return Batch(observation, action.to(data.device), None if shift is None else shift.to(data.device))


def update(batch: Batch, actor: Actor, optimizer: Adam) -> None:
    """Take one gradient step."""
    optimizer.zero_grad()
    features = actor.encoder(batch.observation, batch.shift)
    bc_loss(actor.log_prob(*actor.distribution(features), batch.action)).backward()
    optimizer.step()


@torch.no_grad()
def measure(batch: Batch, actor: Actor) -> dict[str, float]:
    """Return metrics of one batch, without the random shift; docs/bc.md explains each."""
    mean, std = actor.distribution(actor.encoder(batch.observation))
    metrics = {
        "bc_loss": bc_loss(actor.log_prob(mean, std, batch.action)),
        "action_error": (torch.tanh(mean) - batch.action).abs().mean(),
        "policy_std": std.mean(),
    }
    return {name: value.item() for name, value in metrics.items()}


@torch.inference_mode()
def evaluate(policy: nn.Module, env_id: str, episodes: int, seed: int, device: torch.device) -> dict[str, Any]:
    """Play episodes in an environment of their own; return what docs/training.md explains, and each one's outcome."""
    env, known, solved, lists = common.make_env(env_id), {}, [], {"seed": [], "episode": [], "return": []}
    for i in range(episodes):
        lists["seed"].append(common.episode_seed(seed, "evaluation", i))
        observation, info = env.reset(seed=lists["seed"][-1])
        first, infos, total, done = np.array(observation), [info], 0.0, False
        while not done:
            x = torch.from_numpy(np.asarray(observation, np.float32)[None]).to(device)
            observation, reward, terminated, truncated, info = env.step(policy(x)[0].cpu().numpy())
            infos.append(info)
            total, done = total + float(reward), terminated or truncated
        key = first.tobytes(), np.asarray(observation).tobytes(), len(infos)
        lists["episode"].append(known.setdefault(key, len(known)))
        lists["return"].append(total)
        solved.append([info.get("success", info.get("is_success")) for info in infos])
    env.close()
    lists |= common.success_lists(solved)
    return common.summarise(lists) | {"episodes": lists}


def load_checkpoint(args: Args) -> tuple[dict[str, Any], Args]:
    """Return the checkpoint of the run to go on with, and its flags. Raises common.UserError if that cannot be done."""
    path, given = args.resume / "checkpoint.pt", {f.name for f in fields(Args) if getattr(args, f.name) != f.default}
    if __name__ == "__main__":  # a flag that was given counts even if its value is the default
        given |= {flag[2:].split("=")[0].replace("-", "_") for flag in sys.argv if flag.startswith("--")}
    if given := given - {"resume", "dataset"}:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given))
        raise common.UserError(f"--resume keeps its run's flags: the learning rate falls over its steps; drop {names}.")
    try:
        checkpoint = torch.load(common.intact(path), weights_only=True, map_location="cpu")
        flags = {**checkpoint["args"], "run_dir": args.resume}
        if checkpoint["method"] != METHOD or not 0 < checkpoint["step"] <= flags["gradient_steps"]:
            raise ValueError(f"it is a run of {checkpoint['method']}.py at step {checkpoint['step']}")
        float(checkpoint["log_size"]), [float(checkpoint["seconds"][x]) for x in ("data", "training", "evaluation")]
        return checkpoint, Args(**{**flags, "dataset": args.dataset or Path(flags["dataset"])})
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        reason = f"{args.resume} cannot be resumed ({common.first_line(error)})"
        raise common.UserError(f"{reason}; if it was stopped before its first checkpoint, start anew.") from None


def train(args: Args) -> dict[str, Any]:
    """Train, evaluate, write policy.pt2 and result.json, return the latter. Raises common.UserError for a mistake."""
    started, (checkpoint, args) = time.perf_counter(), load_checkpoint(args) if args.resume else ({}, replace(args))
    common.check_flags(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise common.UserError("--device is cuda, and PyTorch finds no GPU here; leave it out to train on the CPU.")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")  # high: TF32, as convolutions
    args.dataset = common.find_dataset(args.env_id, args.quality, args.dataset)
    dataset, data, mean, std = load_data(args, device)
    generator = Generator().manual_seed(int(common.seed_sequence(args.seed, "weights").generate_state(1)[0]))
    bounds, encoder = torch.from_numpy(dataset.action_bounds), Encoder(mean, std, args, generator)
    actor = Actor(encoder, bounds, args.hidden_dim, generator).to(device)
    optimizer = Adam(actor.parameters(), args.learning_rate, eps=1e-7, fused=True)
    parts, first_step = {"actor": actor, "optimizer": optimizer}, checkpoint.get("step", 0)
    try:
        for name, part in parts.items() if checkpoint else ():
            part.load_state_dict(checkpoint[name])
        if checkpoint and checkpoint["dataset"] != dataset.checksum:
            raise ValueError("its dataset was another one")
    except Exception as error:  # of half a dozen types
        raise common.UserError(f"{args.run_dir} cannot be resumed ({common.first_line(error)}); start anew.") from None

    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{METHOD}__{args.seed}__{time.time_ns()}"
    args.run_dir = args.run_dir or Path("runs") / name
    path = args.run_dir / "metrics.jsonl"
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    with common.explain_os_errors(args.run_dir):
        args.run_dir.mkdir(parents=True, exist_ok=True)
        if path.exists() and not checkpoint:
            raise common.UserError(f"{args.run_dir} holds a run; choose another --run-dir, or --resume that one.")
        tracker = import_module("tracking").start(args, plain, checkpoint.get("track")) if args.track else nullcontext()
        with open(path, "ab" if checkpoint else "xb") as file:  # what came after the checkpoint is written again
            file.truncate(min(checkpoint.get("log_size", 0), file.tell()))
        writer = SummaryWriter(args.run_dir, purge_step=first_step + 1)
    seconds = checkpoint.get("seconds", {"data": 0.0, "training": 0.0, "evaluation": 0.0})
    title = f"{METHOD} on {args.env_id}" + (f" (README, default flags: {x})" if (x := README.get(args.env_id)) else "")
    progress = tqdm(desc=title, initial=first_step, total=args.gradient_steps, mininterval=1)

    def spend(kind: str) -> None:
        nonlocal started
        seconds[kind], started = seconds[kind] + time.perf_counter() - started, time.perf_counter()

    def log(step: int, prefix: str, metrics: dict[str, float]) -> None:
        line = {f"{prefix}/{name}": value for name, value in metrics.items()}
        with common.explain_os_errors(path), open(path, "a") as file:
            for name, value in line.items():
                if not np.isfinite(value):
                    raise common.UserError(f"{name} is {value} at step {step}; try a smaller --learning-rate.")
                writer.add_scalar(name, value, step)
            file.write(json.dumps({"step": step} | line) + "\n")
        if args.track:
            tracker.log(line, step)

    def evaluate_now(step: int) -> dict[str, Any]:
        spend("training")
        results = evaluate(actor, args.env_id, args.eval_episodes, args.seed, device)
        log(step, "eval", {name: x for name, x in sorted(results.items()) if isinstance(x, float)})
        spend("evaluation")
        return results

    def save(step: int) -> None:
        spend("training")
        writer.flush()  # a resumed run writes only what follows
        content = {name: part.state_dict() for name, part in parts.items()} | {"step": step, "method": METHOD}
        content |= {"args": plain, "dataset": dataset.checksum, "seconds": seconds, "log_size": path.stat().st_size}
        content["track"] = tracker.id if args.track else None  # of the run on Weights & Biases
        moments = [moment for state in optimizer.state.values() for moment in state.values()]
        if not all(torch.isfinite(x).all() for x in [*actor.parameters(), *moments]):
            raise common.UserError(f"the networks are not finite at step {step}; try a smaller --learning-rate.")
        with common.write_file(args.run_dir / "checkpoint.pt") as file:
            torch.save(content, file)

    spend("data")
    saved = time.monotonic()
    with common.explain_os_errors(args.run_dir), writer, progress, tracker, ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(sample, data, args, first_step)  # the next batch is drawn while this one is trained on
        for step in range(first_step, args.gradient_steps):
            if args.eval_episodes and args.eval_interval and step % args.eval_interval == 0:
                evaluate_now(step)
            batch, ahead = ahead.result(), thread.submit(sample, data, args, step + 1)
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / args.gradient_steps)
            update(batch, actor, optimizer)
            progress.update()
            for name in ("train", "heldout") if (step + 1) % args.log_interval == 0 else ():
                log(step + 1, name, measure(sample(data, args, step + 1, name), actor))
            if step + 1 == args.gradient_steps or time.monotonic() - saved > 60 * args.checkpoint_minutes:
                save(step + 1)
                saved = time.monotonic()
        result = evaluate_now(args.gradient_steps) if args.eval_episodes else {}

    inputs, batch = (torch.from_numpy(np.zeros_like(dataset.observations[:2, 0])),), torch.export.Dim("batch")
    export = torch.export.export, actor.cpu().requires_grad_(False), inputs
    program = ThreadPoolExecutor(1).submit(*export, dynamic_shapes=({0: batch},)).result()  # no signal is handled there
    with common.write_file(args.run_dir / "policy.pt2") as file:
        torch.export.save(program, file)
    result |= {"method": METHOD, "args": plain, "dataset": dataset.checksum, "seconds": seconds}
    result |= {"versions": common.versions("torch", "numpy", "gymnasium", "mujoco", "gymnasium-robotics", "metaworld")}
    if device.type == "cuda":
        result |= {"gpu": torch.cuda.get_device_name(), "peak_gpu_bytes": torch.cuda.max_memory_allocated()}
    with common.write_file(args.run_dir / "result.json") as file:
        file.write(json.dumps(result, indent=2).encode())
    means = ", ".join(f"{name} {x:.3f}" for name, x in sorted(result.items()) if isinstance(x, float))
    print(f"{args.run_dir}: {means}{'' if 'success_rate' in result else ' (success was not measured)'}")
    return result


if __name__ == "__main__":
    with common.user_errors("interrupted; --resume RUN_DIR goes on from the last checkpoint."):
        train(tyro.cli(Args))
