"""The training loop of Algorithm 1 (arXiv 2310.04378): steps, checkpoints, resuming; for a node or a command line."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from . import checkpoint
from .adapter import Average, LoraAdapters
from .draws import START, WHOLE_RUN, draw, generator
from .engine import Alone, Engine
from .objective import Batch, ConditionalDenoiser, distillation_loss
from .recompute import recomputing
from .settings import Settings

logger = logging.getLogger(__name__)

Source = Callable[[int, Sequence[int]], Batch]
"""(step, items) -> the latents and conds of these items of this step; always the same for the same numbers."""

Callback = Callable[[int, float], None]
"""(steps done, loss of the last one). What it raises ends the run."""


class _Loss(nn.Module):
    """The loss as a module that holds the adapters and not the network: an engine shares the former only."""

    def __init__(self, adapters: LoraAdapters, compute: Callable[[int, Sequence[int]], Tensor]) -> None:
        super().__init__()
        self.adapters = adapters
        self.compute = compute

    def forward(self, step: int, items: Sequence[int]) -> Tensor:
        return self.compute(step, items)


class Trainer:
    """Distils the network under `adapters` into them, a step at a time.

    denoise: the network, (x, sigma, cond) -> x0.   source: where latents and conds come from.
    table: (n,) ascending sigmas of all training timesteps, on the network's device.   flow: a flow model.
    identity: facts about model and data that a resumed run must share.
    `done` counts finished steps, `losses` has the loss of each.
    """

    def __init__(
        self,
        denoise: ConditionalDenoiser,
        adapters: LoraAdapters,
        source: Source,
        table: Tensor,
        settings: Settings,
        *,
        flow: bool = False,
        identity: Mapping[str, Any] | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.grid = settings.grid(len(table))
        self.denoise, self.source, self.table, self.settings, self.flow = denoise, source, table, settings, flow
        self.adapters = adapters
        self.identity = dict(identity or {})
        self.engine: Engine = engine or Alone()
        self.factors = adapters.factors()
        self.optimizer = torch.optim.AdamW(
            self.factors.values(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.scaler = GradScaler(table.device.type, enabled=settings.scale_loss)
        self.average = Average([*self.factors.values()], settings.average) if settings.average else None
        self.done = 0
        self.losses: list[float] = []
        self._updating = False
        self._loss = self.engine.prepare(_Loss(adapters, self._compute))

    def step(self) -> float:
        """One optimizer step; returns its loss, the mean over all its images.

        If anything is raised before the optimizer runs, nothing has changed and the step can be made again.
        Raises FloatingPointError if the loss is not a number any more.
        """
        settings, engine = self.settings, self.engine
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.table.device)
        for part in range(settings.accumulate):
            first = (part * engine.num_processes + engine.process_index) * settings.batch
            last = part == settings.accumulate - 1
            with nullcontext() if last else engine.no_sync(self._loss):
                loss = self._loss(self.done, range(first, first + settings.batch)) / settings.accumulate
                engine.backward(self.scaler.scale(loss))
            total += loss.detach()
        value = float(engine.reduce(total, "mean"))
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss of step {self.done + 1} is {value}. Lower learning_rate (now {settings.learning_rate:g}), "
                "or train in bf16 or fp32."
            )
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.factors.values(), settings.clip)
        self._updating = True
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate_at(self.done)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.done += 1
        if self.average:
            self.average.update(self.done)
        self.losses.append(value)
        self._updating = False
        return value

    def _compute(self, step: int, items: Sequence[int]) -> Tensor:
        settings = self.settings
        batch = self.source(step, items)
        return distillation_loss(
            self.denoise,
            self.adapters,
            batch,
            draw(settings.seed, step, items, batch.z0, self.grid, settings.cfg),
            stride=settings.skip,
            table=self.table,
            huber_c=settings.huber_c,
            weighting=settings.weighting,
            flow=self.flow,
            averaged=self.average.in_place if self.average and settings.average_target else nullcontext,
        )

    @contextmanager
    def result(self) -> Iterator[LoraAdapters]:
        """The adapters as they are to be used: with the moving average in them if there is one."""
        with self.average.in_place() if self.average else nullcontext():
            yield self.adapters

    def save(self, path: Path) -> None:
        """Write everything that a resumed run needs."""
        tensors: dict[str, Tensor] = {f"lora/{name}": factor for name, factor in self.factors.items()}
        for name, factor in self.factors.items():
            for part, value in self.optimizer.state.get(factor, {}).items():
                tensors[f"{part}/{name}"] = value
        if self.average:
            tensors |= {f"average/{name}": value for name, value in zip(self.factors, self.average.values, strict=True)}
        if self.losses:
            tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        scaler = self.scaler.state_dict()
        facts = {"settings": self.settings.kept(), "identity": self.identity, "done": self.done, "scaler": scaler}
        checkpoint.write(path, tensors, facts)

    def load(self, path: Path) -> None:
        """Go on where the checkpoint stopped. Raises ValueError, having changed nothing, if it is of another run."""
        tensors, facts = checkpoint.read(path)
        if missing := sorted({"settings", "identity", "done", "scaler"} - facts.keys()):
            raise ValueError(
                f"{path.name} is no checkpoint of a training (it lacks {', '.join(missing)}); it may hold the pictures of "
                "another. Use another name."
            )
        wrong = checkpoint.differences(facts["settings"], self.settings.kept())
        wrong += checkpoint.differences(facts["identity"], self.identity)
        shapes = {name: list(factor.shape) for name, factor in self.factors.items()}
        there = {n.removeprefix("lora/"): list(tensor.shape) for n, tensor in tensors.items() if n.startswith("lora/")}
        wrong += checkpoint.differences(there, shapes)[:3]
        if wrong:
            raise ValueError(
                f"{path.name} is the checkpoint of another training ({'; '.join(wrong)}). Set these as they were, or "
                "use another name to start anew."
            )
        state: dict[int, dict[str, Tensor]] = {}
        for number, (name, factor) in enumerate(self.factors.items()):
            factor.data.copy_(tensors[f"lora/{name}"])
            state[number] = {
                p: tensors[f"{p}/{name}"] for p in ("step", "exp_avg", "exp_avg_sq") if f"{p}/{name}" in tensors
            }
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict(whole | {"state": {n: parts for n, parts in state.items() if parts}})
        if self.average:
            for name, value in zip(self.factors, self.average.values, strict=True):
                value.copy_(tensors[f"average/{name}"])
        self.scaler.load_state_dict(facts["scaler"])
        self.done = facts["done"]
        self.losses = tensors["losses"].tolist() if "losses" in tensors else []

    def run(self, *, save_to: Path | None = None, save_every: int = 100, callback: Callback | None = None) -> None:
        """All steps that are left. With `save_to`, goes on from that checkpoint if it is there and keeps it up to date.

        On any exception, also an interrupt, the last finished step is saved and the exception raised again. A checkpoint
        that cannot be written is warned of, and the training goes on: what was learnt is not thrown away for it.
        Raises ValueError or FileExistsError, before anything is trained, if `save_to` is of another run or no checkpoint.
        """
        main = self.engine.process_index == 0
        if save_to is not None:
            checkpoint.check_writable(save_to)
            if save_to.exists():
                self.load(save_to)
        started = saved = self.done
        try:
            while self.done < self.settings.steps:
                loss = self.step()
                if callback:
                    callback(self.done, loss)
                if save_to is not None and main and self.done % save_every == 0:
                    self._keep(save_to)
                    saved = self.done
        finally:
            # Half an update is no state to go on from; then the checkpoint before it stays.
            if save_to is not None and main and self.done > max(saved, started) and not self._updating:
                self._keep(save_to)

    def _keep(self, path: Path) -> None:
        try:
            self.save(path)
        except OSError as error:
            logger.warning("No checkpoint of step %d: %s", self.done, error)


@contextmanager
def adapters_on(
    network: nn.Module,
    rank: int,
    alpha: float | None = None,
    *,
    seed: int = 0,
    recompute: bool = False,
    device: torch.device | None = None,
) -> Iterator[LoraAdapters]:
    """Fresh adapters on the network, which is as before afterwards, also after an error or an interrupt.

    rank, alpha, device: see LoraAdapters.   recompute: gradient checkpointing, less memory for more time.
    """
    adapters = LoraAdapters(network, rank, alpha, generator=generator(seed, WHOLE_RUN, 0, START), device=device)
    try:
        with recomputing(network, recompute):
            yield adapters
    finally:
        adapters.remove()
