"""Weights & Biases, for the scripts' flag --track alone."""

from typing import Any

import common


def start(args: Any, config: dict[str, Any], run_id: str | None = None) -> Any:
    """Start a run on Weights & Biases, or go on with the one of `run_id`; return it, whose `log` takes metrics.

    Raises common.UserError if that cannot be done.
    """
    try:
        import wandb  # optional, and slow to import

        place = {"project": args.wandb_project, "entity": args.wandb_entity, "dir": args.run_dir}
        return wandb.init(**place, name=args.run_dir.name, config=config, id=run_id, resume="allow")
    except Exception as error:  # ImportError, or one of half a dozen types for a missing account or network
        reason = f"--track cannot start Weights & Biases ({common.first_line(error)})"
        raise common.UserError(f"{reason}; `pip install wandb` and `wandb login`, or set WANDB_MODE=offline.") from None
