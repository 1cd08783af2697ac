"""The training loop of Algorithm 1 (arXiv 2310.04378): steps, checkpoints, resuming; for a node or a command line."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from . import checkpoint
from .adapter import Average, LoraAdapters
from .draws import START, WHOLE_RUN, draw, generator
from .engine import Alone, Engine
from .health import Diverged, Health
from .objective import Batch, ConditionalDenoiser, distillation_loss
from .optimizers import optimizer_of, restore, state_of
from .recompute import recomputing
from .settings import Settings

logger = logging.getLogger(__name__)

Source = Callable[[int, Sequence[int]], Batch]
"""(step, items) -> the latents and conds of these items of this step; always the same for the same numbers."""

Callback = Callable[[int, float], None]
"""(steps done, loss of the last one). What it raises ends the run."""

# What may be set anew to go on after a divergence from the last sound state.
REMEDIES = {"learning_rate", "warmup", "decay", "steps", "weight_decay", "betas", "clip", "scale_loss", "decay_shape"}


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
    identity: facts about model and data that a resumed run must share.   spread: root mean square of the latents.
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
        spread: float = 1.0,
    ) -> None:
        self.grid = settings.grid(len(table))
        self.denoise, self.source, self.table, self.settings, self.flow = denoise, source, table, settings, flow
        self.adapters = adapters
        self.identity = dict(identity or {})
        self.engine: Engine = engine or Alone()
        self.factors = adapters.factors()
        self.optimizer = optimizer_of(self.factors.values(), settings)
        self.scaler = GradScaler(table.device.type, enabled=settings.scale_loss)
        self.average = Average([*self.factors.values()], settings.average) if settings.average else None
        self.done = self._kept = 0
        self.losses: list[float] = []
        self.health = Health(settings, spread)
        self._updating = False
        self._resumed: Path | None = None
        self._astray = False
        self._due: Path | None = None  # where a checkpoint goes as soon as the next loss shows that the state is sound
        self._loss = self.engine.prepare(_Loss(adapters, self._compute))

    def step(self) -> float:
        """One optimizer step; returns its loss, the mean over all its images.

        If anything is raised before the optimizer runs, nothing has changed and the step can be made again.
        Raises Diverged if the weights lead nowhere any more.
        """
        settings, engine = self.settings, self.engine
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for part in range(settings.accumulate):
            first = (part * engine.num_processes + engine.process_index) * settings.batch
            last = part == settings.accumulate - 1
            with nullcontext() if last else engine.no_sync(self._loss):
                loss = self._loss(self.done, range(first, first + settings.batch)) / settings.accumulate
                engine.backward(self.scaler.scale(loss))
            losses.append(loss.detach())
        value = float(engine.reduce(reduce(torch.add, losses), "mean"))
        self._astray = True
        self.health.check(self.done + 1, [*self.losses, value])
        self._astray = False
        if self._due is not None and self.health.sound(value):
            self._keep(self._due)
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
            phases=settings.phases,
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
        remembered, numbers = state_of(self.optimizer, self.factors)
        tensors |= remembered
        if self.average:
            tensors |= {f"average/{name}": value for name, value in zip(self.factors, self.average.values, strict=True)}
        if self.losses:
            tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        scaler = self.scaler.state_dict()
        facts = {"settings": self.settings.kept(), "identity": self.identity, "done": self.done, "scaler": scaler}
        facts |= {"state": numbers} if numbers else {}
        checkpoint.write(path, tensors, facts)

    def load(self, path: Path) -> None:
        """Go on where the checkpoint stopped. Raises ValueError, having changed nothing, if it is of another run."""
        tensors, facts = checkpoint.read(path)
        if missing := sorted({"settings", "identity", "done", "scaler"} - facts.keys()):
            raise ValueError(
                f"{path.name} is no checkpoint of a training (it lacks {', '.join(missing)}); it may hold the pictures of "
                "another. Use another name."
            )
        changed = checkpoint.differences(facts["settings"], self.settings.kept())
        cured = bool(facts.get("diverged")) and all(one.split(":")[0] in REMEDIES for one in changed)
        wrong = [] if cured else [*changed]
        wrong += checkpoint.differences(facts["identity"], self.identity)
        shapes = {name: list(factor.shape) for name, factor in self.factors.items()}
        there = {n.removeprefix("lora/"): list(tensor.shape) for n, tensor in tensors.items() if n.startswith("lora/")}
        wrong += checkpoint.differences(there, shapes)[:3]
        if wrong:
            raise ValueError(
                f"{path.name} is the checkpoint of another training ({'; '.join(wrong)}). Set these as they were, or "
                "use another name to start anew."
            )
        if changed:
            logger.warning(
                "The training diverged at step %d; it goes on from step %d, the last sound one that was kept, with %s.",
                facts["diverged"], facts["done"], "; ".join(changed),
            )  # fmt: skip
        for name, factor in self.factors.items():
            factor.data.copy_(tensors[f"lora/{name}"])
        parts = {key: value for key, value in tensors.items() if not key.startswith(("lora/", "average/"))}
        restore(self.optimizer, self.factors, parts | facts.get("state", {}))
        if self.average:
            for name, value in zip(self.factors, self.average.values, strict=True):
                value.copy_(tensors[f"average/{name}"])
        self.scaler.load_state_dict(facts["scaler"])
        self.done = facts["done"]
        self.losses = tensors["losses"].tolist() if "losses" in tensors else []
        if self.done > self.settings.steps:
            logger.warning(
                "%s has been trained for %d steps already, and steps is %d: the LoRA is that of %d. Use another name for one of fewer "
                "steps.", path.name, self.done, self.settings.steps, self.done,
            )  # fmt: skip

    @property
    def sound(self) -> bool:
        """Whether the LoRA is fit to be used and to go on from, as far as its losses tell."""
        return not self._updating and not self._astray and all(map(self.health.sound, self.losses[-1:]))

    def resume(self, path: Path | None) -> None:
        """Go on from that checkpoint, if it is there, as `run` does. Raises as `run` does."""
        if path is not None:
            checkpoint.check_writable(path)
            if path.exists():
                self.load(path)
        self._resumed = path

    def run(self, *, save_to: Path | None = None, save_every: int = 100, callback: Callback | None = None) -> None:
        """All steps that are left. With `save_to`, goes on from that checkpoint if it is there and keeps it up to date.

        On any exception, also an interrupt, the last finished step is saved and the exception raised again. A checkpoint
        that cannot be written is warned of, and the training goes on: what was learnt is not thrown away for it.
        Only a state that the loss after it shows to be sound is kept by the way, and none after a divergence: the one
        before stays, and a lower learning rate goes on from it.
        Raises ValueError or FileExistsError, before anything is trained, if `save_to` is of another run or no checkpoint.
        """
        keeps = save_to is not None and self.engine.process_index == 0
        if save_to != self._resumed:
            self.resume(save_to)
        self._resumed = None  # a second call looks again
        started = self._kept = self.done
        try:
            while self.done < self.settings.steps:
                loss = self.step()
                if callback:
                    callback(self.done, loss)
                if keeps and self.done % save_every == 0:
                    self._due = save_to
        except Diverged as error:
            self._due = None
            # At once, and nothing was kept since: then it is the kept state that leads there.
            at_once = self.done == started
            if keeps and save_to is not None and save_to.exists():
                self._mark(save_to)
            told = Diverged(f"{error}{_way_out(save_to, self._kept, at_once)}")
            told.kept = 0 if at_once else self._kept
            raise told from error
        except BaseException:
            self._keep_last(save_to if keeps else None)
            raise
        self._keep_last(save_to if keeps else None)

    def _keep_last(self, path: Path | None) -> None:
        # Half an update is no state to go on from; then the checkpoint before it stays.
        if path is not None and self.done > self._kept and not self._updating:
            self._keep(path)

    def _keep(self, path: Path) -> None:
        self._due = None
        try:
            self.save(path)
            self._kept = self.done
        except OSError as error:
            logger.warning("No checkpoint of step %d: %s", self.done, error)

    def _mark(self, path: Path) -> None:
        """Writes into the last checkpoint that the training diverged after it: then it may go on with other settings."""
        try:
            tensors, facts = checkpoint.read(path)
            checkpoint.write(path, tensors, facts | {"diverged": self.done + 1})
        except (OSError, ValueError) as error:
            logger.warning("%s could not be marked as one before a divergence: %s", path.name, error)


def _way_out(path: Path | None, kept: int, at_once: bool) -> str:
    if path is None or not kept:
        return ""
    if at_once:
        return f" If it stays so, the state that {path.name} keeps is past help: remove that file, or use another name."
    return f" It then goes on from step {kept}, the last one that {path.name} keeps."


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
