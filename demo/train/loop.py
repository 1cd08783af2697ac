"""The loop that base.py, finetune.py and lora.py share: a time to train for, a checkpoint, a moving average."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import load_state, save_state
from data import caption
from torch import nn
from tqdm import tqdm


@dataclass(frozen=True)
class Course:
    """How long and how fast to train."""

    minutes: float  # of this run; of computing, so that a busy machine makes it longer and not worse
    batch: int
    lr: float
    warm_up: int  # steps
    average: float  # the share that a step leaves of the moving average of the parameters
    seed: int  # of poses, captions and noise
    weight_decay: float = 0.0
    empty: float = 0.0  # share of captions left out, for a model that is sampled with guidance
    save_every: int = 250  # steps

    def lr_at(self, step: int, left: float) -> float:
        """Warm-up, flat, and linear to almost nothing over the last 40 % of the time. left: share of the time, 0..1."""
        return self.lr * min(1.0, (step + 1) / self.warm_up, max(left / 0.4, 0.01))


def words_of(data: dict[str, torch.Tensor], index: torch.Tensor, empty: float, generator: torch.Generator) -> list[str]:
    """A caption of each of these pictures."""
    return [
        "" if empty and torch.rand((), generator=generator) < empty else caption(concept, colour, generator)
        for concept, colour in zip(data["concept"][index].tolist(), data["colour"][index].tolist(), strict=True)
    ]


def train(
    modules: dict[str, nn.Module],
    data: dict[str, torch.Tensor],
    loss_of: Callable[[torch.Tensor, list[str], torch.Generator], torch.Tensor],
    course: Course,
    path: Path,
    export: Callable[[dict[str, dict[str, torch.Tensor]], int], None],
) -> None:
    """Train all parameters of the modules, from the checkpoint at `path` if there is one.

    data: what base.latents returns.   loss_of: (latents, captions, generator) -> a number.
    export: called at every checkpoint with the averaged parameters, module by module and by name, and the step.
    """
    names = [(kind, name) for kind, module in modules.items() for name, _ in module.named_parameters()]
    parameters = [p.requires_grad_(True) for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=course.lr, betas=(0.9, 0.99), weight_decay=course.weight_decay)
    average, step = [p.detach().clone() for p in parameters], 0
    if state := load_state(path):
        for kind, module in modules.items():
            module.load_state_dict(state[kind])
        optimizer.load_state_dict(state["optimizer"])
        average, step = state["average"], state["step"]

    def checkpoint() -> None:
        weights = {kind: module.state_dict() for kind, module in modules.items()}
        save_state(path, {**weights, "optimizer": optimizer.state_dict(), "average": average, "step": step})
        averaged: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in modules}
        for (kind, name), mean in zip(names, average, strict=True):
            averaged[kind][name] = mean
        export(averaged, step)

    generator = torch.Generator().manual_seed(course.seed + step)
    start, seconds, running = time.thread_time(), course.minutes * 60, None
    with tqdm(total=round(seconds), unit="s", mininterval=5) as bar:
        while (elapsed := time.thread_time() - start) < seconds:
            for group in optimizer.param_groups:
                group["lr"] = course.lr_at(step, 1 - elapsed / seconds)
            index = torch.randint(len(data["latent"]), (course.batch,), generator=generator)
            words = words_of(data, index, course.empty, generator)
            loss = loss_of(data["latent"][index].float(), words, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - min(course.average, step / (step + 20)))
            running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
            bar.n = round(elapsed)
            bar.set_postfix(step=step, loss=f"{running:.4f}")
            if step % course.save_every == 0:
                checkpoint()
    checkpoint()
