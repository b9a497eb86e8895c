"""The optimisation loop shared by everything that is pretrained: resumable, with EMA and a progress bar."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm


def fit(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    checkpoint: Path,
    *,
    steps: int,
    learning_rate: float,
    save_every: int = 100,
    ema_decay: float = 0.999,
) -> None:
    """Minimise `loss_at(step)` with AdamW (warm-up, then linear decay to zero); leaves the averaged weights in `model`.

    A run that was killed goes on from `checkpoint` and ends with the weights of one that was not: `loss_at` must draw
    its randomness from the step number (`augment.step_generator`).
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2, betas=(0.9, 0.99))
    warmup = min(200, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    ema = EMAModel(model.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        ema.load_state_dict(state["ema"])
        ema.to(next(model.parameters()).device)
        start = state["step"]
    model.train()
    average = None
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=checkpoint.stem, mininterval=5)
    for step in progress:
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(model.parameters())
        value = loss.item()
        average = value if average is None else 0.98 * average + 0.02 * value
        progress.set_postfix(loss=f"{average:.4f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            _save(state | {"schedule": schedule.state_dict(), "ema": ema.state_dict()}, checkpoint)
    ema.copy_to(model.parameters())
    model.eval()


def _save(state: dict, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
