"""Try settings of LAEO and BC on FetchPushImage, also such that the scripts have no flags for:

    python benchmark/image_search.py --only shift --seeds 100 101 --jobs 2

benchmark/image_search.json names the settings and what each has differently from the fields of Setting below, which are
laeo.py's own for images, but for those of `nearest`: with these the update is that of laeo.update to the bit. Every
setting that has no result yet is trained on every seed, with laeo.py's networks and batches, and then played on 200
starts of that seed. Seeds are 100 or more, which are in no table of results. With the objective `weighted`, which
laeo.py has for states alone, p*/p is learned from randomly shifted images, without noise. Results go to
benchmark/results/image_search/NAME-SEED.json.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Generator, Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from made import machine, made  # noqa: E402

import common  # noqa: E402
import laeo  # noqa: E402

SETTINGS = Path(__file__).parent / "image_search.json"
ENV_ID, EPISODES, FIRST_SEED = "FetchPushImage", 200, 100
RATIO_SHIFT, RATIO_STEPS = 4, 200  # pixels and gradient steps, as p*/p is learned
STEMS = {  # kernel, stride and padding of the three convolutions
    "paper": ((8, 4, 2), (4, 2, 1), (3, 1, 1)),
    "fine": ((4, 2, 1), (4, 2, 1), (3, 2, 1)),
    "mid": ((8, 4, 2), (3, 1, 1), (3, 2, 1)),
    "six": ((6, 3, 2), (4, 2, 1), (3, 1, 1)),
}


@dataclass
class Setting:
    method: Literal["laeo", "bc"] = "laeo"
    objective: Literal["weighted", "f", "exp_f", "log_exp_f", "nearest"] = "log_exp_f"
    queue: int = 4096  # with the objective nearest: how many of the last futures are kept
    nearest: int = 200  # and how many of these, the nearest to the examples, stand for success
    clone_by_value: bool = False  # and whether cloning weighs the data's actions, as with `weighted`
    bc_coef: float = 0.5
    num_success: int = 200
    steps: int = 28_000
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.0  # Adam's, of all parameters
    shift: int = 2  # random shift in pixels
    same_shift: bool = False  # whether a state and its future are shifted alike
    pixel_noise: float = 0.0  # deviation of the noise on standardised pixels while training
    erase: int = 0  # half the side of a square that is made zero while training, in pixels
    dropout: float = 0.0  # share of the encoder's features that is dropped while training
    stem: Literal["paper", "fine", "mid", "six"] = "paper"
    channels: int = 16  # of the first convolution
    dense: int = 8  # width of the layer after the convolutions, in parts of the channels; 0: no such layer
    norm: bool = True  # LayerNorm and tanh behind that layer, else ReLU
    separate: bool = False  # whether the actor has an encoder of its own
    detach: Literal["", "actor", "critic"] = ""  # whose loss does not train the encoder
    action_scale: float | None = None  # of actions in the critic's first layer; None: the script's own


@dataclass
class Args:
    only: str = ""  # only settings whose name contains this
    seeds: tuple[int, ...] = (FIRST_SEED,)  # 100 or more
    jobs: int = 1  # how many runs at a time
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto: on the GPU if there is one
    dataset: Path = ROOT / "datasets" / f"{ENV_ID}-medium"
    output: Path = Path(__file__).parent / "results" / "image_search"


def read_settings(path: Path = SETTINGS) -> dict[str, Setting]:
    """Return the settings by name. Raises common.UserError for a field or a word that there is not."""
    settings, choices = {}, {field.name: getattr(field.type, "__args__", ()) for field in fields(Setting)}
    for name, differs in json.loads(path.read_text()).items():
        for key, x in differs.items():
            if key not in choices or (isinstance(x, str) and x not in choices[key]):
                raise common.UserError(f"{path.name}: '{name}' has {key} {x}; Setting in image_search.py has no such.")
        settings[name] = Setting(**differs)
    return settings


def differences(setting: Setting) -> dict:
    """Return the fields whose values are not the defaults."""
    return {field.name: x for field in fields(Setting) if (x := getattr(setting, field.name)) != field.default}


class Augment(nn.Module):
    """Adds noise to standardised images [B, C, H, W] and erases a square of each, only while training."""

    def __init__(self, noise: float, erase: int):
        super().__init__()
        self.noise, self.erase = noise, erase

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        x = x + self.noise * torch.randn_like(x)
        centres = [n * torch.rand(len(x), 1, device=x.device) for n in x.shape[2:]]
        near = [(torch.arange(n, device=x.device) - c).abs() < self.erase for n, c in zip(x.shape[2:], centres)]
        return x.masked_fill((near[0][:, :, None] & near[1][:, None])[:, None], 0.0)


def make_encoder(mean: Tensor, std: Tensor, args: laeo.Args, generator: Generator, setting: Setting) -> laeo.Encoder:
    """Return laeo.py's encoder with the layers of a setting, which are drawn in the same order."""
    encoder = laeo.Encoder(mean, std, args, Generator())
    widths = mean.shape[2], setting.channels, 2 * setting.channels, 2 * setting.channels
    sizes = zip(widths, widths[1:], STEMS[setting.stem])
    convolutions = [nn.utils.skip_init(nn.Conv2d, a, b, *shape) for a, b, shape in sizes]
    for c in convolutions:
        nn.init.xavier_uniform_(c.weight, generator=generator), nn.init.zeros_(c.bias)
    layers = [layer for c in convolutions for layer in (c, nn.ReLU())] + [nn.Flatten()]
    encoder.dim = flat = nn.Sequential(*layers)(torch.zeros(1, *mean.movedim(-1, 0).shape)).shape[1]
    if setting.dense:
        encoder.dim = setting.dense * setting.channels
        layers += laeo.mlp([flat, encoder.dim], generator)
        layers += [nn.LayerNorm(encoder.dim), nn.Tanh()] if setting.norm else [nn.ReLU()]
    augment = [Augment(setting.pixel_noise, setting.erase)] if setting.pixel_noise or setting.erase else []
    dropout = [nn.Dropout(setting.dropout)] if setting.dropout else []
    encoder.net = nn.Sequential(*augment, *layers, *dropout)
    return encoder


def build(mean: Tensor, std: Tensor, bounds: Tensor, args: laeo.Args, generator: Generator, setting: Setting) -> tuple:
    """Return actor and critic."""
    encoders = [make_encoder(mean, std, args, generator, setting) for _ in range(1 + setting.separate)]
    actor = laeo.Actor(encoders[0], bounds, args.hidden_dim, generator)
    critic = laeo.Critic(encoders[-1], bounds.shape[1], args.hidden_dim, args.repr_dim, generator)
    if setting.action_scale is not None:
        critic.action_scale = setting.action_scale
    return actor, critic


def fit_log_ratio(
    encoder: laeo.Encoder, data: laeo.Data, examples: Tensor, args: laeo.Args, generator: Generator
) -> np.ndarray:
    """Learn log p*(s) / p(s) of images, as laeo.fit_log_ratio of states; return it for every image of the data."""
    head = laeo.mlp([encoder.dim, 64, 64, 1], generator)
    classifier = nn.Sequential(encoder, head, nn.Flatten(0)).to(data.device)
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-3)
    for step in range(RATIO_STEPS):
        logits = []
        for images in examples, laeo.sample(data, args, step).observation:
            shift = torch.randint(2 * RATIO_SHIFT + 1, (len(images), 2), generator=generator).to(data.device)
            logits.append(head(encoder(images, shift)).flatten())
        optimizer.zero_grad()
        laeo.classifier_loss(*logits).backward()
        optimizer.step()
    return torch.cat([classifier(x.to(data.device)).detach().cpu() for x in data.observations.split(1024)]).numpy()


def update(
    batch: laeo.Batch, examples: Tensor, actor: laeo.Actor, critic: laeo.Critic, optimizer: torch.optim.Adam,
    args: laeo.Args, setting: Setting, queue: Tensor | None = None, step: int = 0,
) -> None:  # fmt: skip
    """Take one gradient step: laeo.update with what a setting has differently."""
    optimizer.zero_grad()
    (shift, examples_shift), size = batch.shifts, len(batch.action)
    if shift is not None and setting.same_shift:
        shift = shift[:size].repeat(2, 1)
    state_shift = shift if shift is None else shift[:size]
    if setting.method == "bc":
        mean, std = actor.distribution(actor.encoder(batch.observation, state_shift))
        (-actor.log_prob(mean, std, batch.action).mean()).backward()
        optimizer.step()
        return
    features, future = critic.encoder(torch.cat([batch.observation, batch.future]), shift).chunk(2)
    of_actor = actor.encoder(batch.observation, state_shift) if setting.separate else features
    of_actor = of_actor.detach() if setting.detach == "actor" else of_actor
    if setting.detach == "critic":
        features, future = features.detach(), future.detach()
    phi, psi, weighted = critic.phi(features, batch.action), critic.psi(future), args.policy_objective == "weighted"

    mean, std = actor.distribution(of_actor)
    action = torch.tanh(mean + std * batch.noise)
    with torch.no_grad():
        goals = psi if weighted else critic.psi(critic.encoder(examples[batch.chosen], examples_shift))
    near = args
    if setting.objective == "nearest":
        place = step * size % setting.queue
        queue[:, place : place + size] = psi.detach()
        queue = queue[:, : (step + 1) * size]  # what is known so far
        share = min(1.0, setting.nearest / queue.shape[1])
        near = replace(args, policy_objective="nearest", nearest_share=share)
    states = *laeo.value_states(goals.detach(), batch.log_ratio, queue, near), size, near.policy_objective
    critic.requires_grad_(False)
    value = laeo.policy_value(critic.phi(features.detach(), action), *states)
    critic.requires_grad_(True)
    weighs = weighted or setting.clone_by_value
    advantage = laeo.policy_value(phi.detach(), *states) - value.detach() if weighs else torch.zeros_like(value)
    loss = laeo.policy_loss(value, actor.log_prob(mean, std, batch.action), advantage, args.bc_coef)
    (laeo.critic_loss(phi, psi) + loss).backward()
    optimizer.step()


@torch.no_grad()
def measure(
    batch: laeo.Batch, examples: Tensor, actor: laeo.Actor, critic: laeo.Critic, args: laeo.Args, setting: Setting
) -> dict[str, float]:
    """Return laeo.py's metrics of one batch; of BC, and of separate encoders, the likelihood of actions alone."""
    if setting.method == "laeo" and not setting.separate:
        return laeo.measure(batch, examples, actor, critic, args)
    mean, std = actor.distribution(actor.encoder(batch.observation))
    return {"bc_loss": -actor.log_prob(mean, std, batch.action).mean().item(), "policy_std": std.mean().item()}


def run(name: str, setting: Setting, seed: int, given: Args) -> dict:
    """Train and play one setting on one seed; write the result and return it."""
    started, cuda = time.perf_counter(), given.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_num_threads(1)
    torch.manual_seed(seed)  # of augmentation and dropout
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    args = laeo.Args(
        ENV_ID, dataset=given.dataset, num_success=setting.num_success, batch_size=setting.batch_size, seed=seed,
        bc_coef=setting.bc_coef, learning_rate=setting.learning_rate, gradient_steps=setting.steps, eval_episodes=0,
        random_shift=setting.shift, channels=setting.channels,
        policy_objective="log_exp_f" if setting.objective == "nearest" else setting.objective,
    )  # fmt: skip
    dataset, data, mean, std, examples = laeo.load_data(args, device)
    generator = Generator().manual_seed(int(common.seed_sequence(seed, "weights").generate_state(1)[0]))
    networks = build(mean, std, torch.from_numpy(dataset.action_bounds), args, generator, setting)
    actor, critic = (network.to(device) for network in networks)
    if setting.method == "laeo" and setting.objective == "weighted":
        classifier = make_encoder(mean, std, replace(args, random_shift=RATIO_SHIFT), generator, setting)
        data = data._replace(log_ratio=fit_log_ratio(classifier, data, examples, args, generator))
    rates = {"lr": args.learning_rate, "eps": 1e-7, "weight_decay": setting.weight_decay}
    optimizer = torch.optim.Adam(nn.ModuleList([actor, critic]).parameters(), **rates, fused=True)
    queue = torch.zeros(2, setting.queue, args.repr_dim, device=device)
    seconds, started = {"data": time.perf_counter() - started}, time.perf_counter()
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(laeo.sample, data, args, 0)
        for step in range(setting.steps):
            batch, ahead = ahead.result(), thread.submit(laeo.sample, data, args, step + 1)
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / setting.steps)
            update(batch, examples, actor, critic, optimizer, args, setting, queue, step)
    batches = {use: laeo.sample(data, args, setting.steps, use) for use in ("train", "heldout")}
    actor.eval(), critic.eval()
    metrics = {use: measure(x, examples, actor, critic, args, setting) for use, x in batches.items()}
    seconds["training"] = time.perf_counter() - started
    result = laeo.evaluate(actor, ENV_ID, EPISODES, seed, device)
    result |= {"name": name, "differs": differences(setting), "settings": asdict(setting), "steps": setting.steps}
    result |= {"schedule": "steps", "device": torch.cuda.get_device_name() if cuda else machine()["cpu"]}
    result["made"] = made(torch.cuda.get_device_name() if cuda else None)
    result |= {"args": {"env_id": ENV_ID, "seed": seed}, "seconds": seconds, "metrics": metrics}
    with common.write_file(given.output / f"{name}-{seed}.json") as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
    return result


def stop(pool: Executor) -> None:
    """Drop the jobs of a pool that have not begun, and end the processes of the others: after Ctrl-C none is left."""
    pool.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
        process.terminate()
        process.join()


def missing(names: Iterable[str], given: Any) -> dict[str, tuple[str, int]]:
    """Return name and seed of what has no result yet, by NAME-SEED. Raises common.UserError for --jobs or --seeds."""
    if given.jobs < 1 or min(given.seeds, default=0) < FIRST_SEED:
        raise common.UserError(f"--jobs must be 1 or more, and --seeds {FIRST_SEED} or more, which no table has.")
    found = {f"{name}-{seed}": (name, seed) for name in names if given.only in name for seed in given.seeds}
    return {label: job for label, job in found.items() if not (given.output / f"{label}.json").exists()}


def run_all(function: Callable[..., dict], todo: dict[str, tuple], jobs: int) -> None:
    """Call a function with each of these arguments, in processes of their own; print the rates that it returns."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes, which read it when they load PyTorch
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        try:
            futures = {pool.submit(function, *arguments): label for label, arguments in todo.items()}
            for future in as_completed(futures):
                result = future.result()
                rates = f"{result['success_rate']:.3f} / {result['final_success_rate']:.3f}"
                print(f"{futures[future]}: {rates}", flush=True)
        finally:
            stop(pool)


def main(given: Args) -> None:
    """Run what has no result yet."""
    settings = read_settings()
    todo = missing(settings, given)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise common.UserError("--device is cuda, and PyTorch finds no GPU here; leave it out to train on the CPU.")
    if not given.dataset.exists():
        raise common.UserError(f"there is no dataset {given.dataset}; python benchmark/run.py data makes it.")
    run_all(run, {label: (name, settings[name], seed, given) for label, (name, seed) in todo.items()}, given.jobs)


if __name__ == "__main__":
    with common.user_errors():
        main(tyro.cli(Args))
