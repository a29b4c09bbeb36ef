"""The loop: steps, validation, checkpoints; memory is left to the strategy, images to the task."""

import contextlib
import csv
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from umtrain.checkpoint import BEST, FOLDER, LAST, save_checkpoint
from umtrain.config import OptimConfig, RunConfig
from umtrain.console import Console, format_duration
from umtrain.console import Task as Work
from umtrain.data.loader import Batch, Loader
from umtrain.data.manifest import Split
from umtrain.errors import RunError
from umtrain.logger import RunLogger
from umtrain.memory.base import Strategy
from umtrain.parallel.ranks import Ranks
from umtrain.report.record import Record, throughput
from umtrain.tasks import Row, Task

WARMUP_STEPS = 3


@dataclass(frozen=True)
class Step:
    """One optimizer update, a line of steps.csv."""

    step: int
    epoch: int
    loss: float
    lr: float
    images: int
    step_s: float
    data_wait_s: float


@dataclass
class Progress:
    """Where training stands."""

    steps: list[Step] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    epochs: int = 0
    best: tuple[float, float] | None = None
    best_epoch: int | None = None

    def train_figures(self) -> Record:
        """Return the record's train section."""
        losses = [step.loss for step in self.steps]
        return {
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "steps": len(self.steps),
            "epochs": self.epochs,
            "best_epoch": self.best_epoch,
            "validations": self.validations,
        }

    def throughput(self) -> Record:
        """Return the record's throughput section, warm-up steps left out."""
        timed = self.steps[WARMUP_STEPS:]
        figures = throughput([step.step_s for step in timed], [step.images for step in timed])
        return {
            **figures,
            "warmup_steps": min(WARMUP_STEPS, len(self.steps)),
            "data_wait_s": sum(step.data_wait_s for step in timed),
        }


def inference(
    task: Task,
    model: nn.Module,
    strategy: Strategy,
    split: Split,
    loader: Loader,
    console: Console,
) -> tuple[list[Row], float]:
    """Run `model` over the batches of `split`; return prediction rows and mean loss (nan if none).

    The model computes on the device that its parameters are on, in the configured precision, as
    `strategy` has prepared it. Each rank runs its share, which `loader` has, and returns the rows
    of all.
    """
    found: list[list[Row]] = []
    total_loss = 0.0
    device, ranks = next(model.parameters()).device, ranks_of(task)
    precision = task.config.precision
    was_training = model.training
    model.eval()
    with torch.inference_mode(), console.task(f"evaluating {split}", len(loader)) as bar:
        for done, batch in enumerate(loader, 1):
            strategy.on_progress = _Inside(bar, done, "batch").update
            with autocast(device, precision):
                outputs = model(network_input(task, ranks, batch, device))
            total_loss += task.loss(outputs, batch).item() * len(batch["id"])
            found.append(task.predictions(outputs, batch, split))
            bar.update(done)
    model.train(was_training)
    rows, total_loss = ranks.in_order(found), ranks.whole_sum(total_loss)
    return rows, total_loss / len(rows) if rows else math.nan


def ranks_of(task: Task) -> Ranks:
    """Return how this process trains `task` with others, alone if there are none."""
    return Ranks.of(task.config, task.input_shape[0])


def network_input(task: Task, ranks: Ranks, batch: Batch, device: torch.device) -> Tensor:
    """Return the network's input on this rank: all rows of the batch's images, or a band."""
    dtype = input_dtype(task.config.precision)
    if task.inputs_by_pixel:
        batch = {**batch, "image": ranks.band_of(batch["image"])}
        return task.inputs(batch, device, dtype)
    return ranks.band_of(task.inputs(batch, device, dtype))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which the network computes in `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def input_dtype(precision: str) -> torch.dtype:
    """Return the dtype of the network's input: bf16 halves the largest image's memory."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


class Trainer:
    """Trains one model on one task with one memory strategy.

    `on_validation` is given the rows of each validation and the number of steps before it.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        strategy: Strategy,
        device: torch.device,
        run_dir: Path,
        console: Console,
        logger: RunLogger,
        on_validation: Callable[[list[Row], int], None] = lambda rows, number: None,
    ) -> None:
        self.task, self.strategy = task, strategy
        self.config: RunConfig = task.config
        self.device, self.run_dir, self.console = device, run_dir, console
        self.logger, self.on_validation = logger, on_validation
        self.ranks = ranks_of(task)
        self.loader = task.loader("train", training=True, share=self.ranks.share)
        self.validation = task.loader("val", training=False, share=self.ranks.share)
        self.ranks.tie(model, strategy)
        with autocast(device, self.config.precision):
            sample = task.sample_input(device, input_dtype(self.config.precision))
            self.model = strategy.prepare(model, self.ranks.band_of(sample))
        self.n_train = len(task.manifest.split("train"))
        self.steps_per_epoch = math.ceil(len(self.loader) / self.config.optim.accumulate)
        planned = self.config.epochs * self.steps_per_epoch
        self.total_steps = min(planned, self.config.max_steps or planned)
        self.optimizer = create_optimizer(self.model, self.config.optim)
        self.schedule = create_schedule(self.optimizer, self.config.optim, self.total_steps)
        self.progress = Progress()

    def fit(self) -> None:
        """Train to the last step; validate, and keep the last and the best weights, each epoch."""
        self.model.train()
        with _StepLog(self.run_dir / "steps.csv") as log:
            for epoch in range(1, self.config.epochs + 1):
                if len(self.progress.steps) >= self.total_steps:
                    break
                self._train_epoch(epoch, log)
                self.progress.epochs = epoch
                self._validate(epoch)

    def _train_epoch(self, epoch: int, log: "_StepLog") -> None:
        left = min(self.steps_per_epoch, self.total_steps - len(self.progress.steps))
        title = f"epoch {epoch}/{self.config.epochs}"
        self.loader.set_epoch(epoch)
        with self.console.task(title, left) as bar:
            batches = _timed(self.loader)
            for done in range(1, left + 1):
                self.strategy.on_progress = _Inside(bar, done, "step").update
                step = self._step(epoch, batches)
                self.progress.steps.append(step)
                log.write(step)
                self._log_step(step)
                bar.update(done, f"loss {step.loss:.4f}  {step.images / step.step_s:.2f}/s")
        # The tail of an epoch cut short by max_steps is left unread: end its workers now.
        batches.close()

    def _log_step(self, step: Step) -> None:
        images_per_s = step.images / step.step_s
        figures = {"loss": step.loss, "lr": step.lr, "images_per_s": images_per_s}
        self.logger.step(step.step, figures)

    def _step(self, epoch: int, batches: Iterator[tuple[Batch, float]]) -> Step:
        number = len(self.progress.steps) + 1
        n_batches, n_images_planned = self._plan_step((number - 1) % self.steps_per_epoch)
        lr = self.optimizer.param_groups[0]["lr"]
        wait_s, busy_s, n_images, total_loss = 0.0, 0.0, 0, 0.0
        together = self.config.batch_size * self.ranks.share.n_ranks
        for i in range(n_batches):
            batch, waited_s = next(batches)
            wait_s += waited_s
            start_s = self._now()
            n_in_batch = min(together, n_images_planned - n_images)
            n_counted = self.ranks.start_batch(n_in_batch, i == n_batches - 1)
            total_loss += self._forward_backward(batch, n_counted / n_images_planned)
            n_images += n_in_batch
            busy_s += self._now() - start_s
        start_s = self._now()
        total_loss = self.ranks.finish_step(total_loss)
        self._update()
        busy_s += self._now() - start_s
        return Step(number, epoch, total_loss, lr, n_images, busy_s, wait_s)

    def _plan_step(self, step_in_epoch: int) -> tuple[int, int]:
        """Return the batches and all ranks' images of a step; an epoch's last may be fewer."""
        accumulate = self.config.optim.accumulate
        batch_size = self.config.batch_size * self.ranks.share.n_ranks
        first = step_in_epoch * accumulate
        n_batches = min(accumulate, len(self.loader) - first)
        n_images = min(n_batches * batch_size, self.n_train - first * batch_size)
        return n_batches, n_images

    def _forward_backward(self, batch: Batch, share: float) -> float:
        """Add the gradients of `batch` by its `share` of the step's images; return its loss."""
        precision = self.config.precision
        inputs = network_input(self.task, self.ranks, batch, self.device)
        with self.strategy.step():
            with autocast(self.device, precision):
                outputs = self.model(inputs)
            loss: Tensor = self.task.loss(outputs, batch) * share
            torch.autograd.backward(loss)
        value = loss.item()
        if not math.isfinite(value):
            raise RunError(
                f"the loss became {value} at step {len(self.progress.steps) + 1} on "
                f"{', '.join(map(str, batch['id']))}; try a smaller optim.lr (now "
                f"{self.config.optim.lr}), optim.clip_norm=1.0 or precision=fp32"
            )
        return value

    def _update(self) -> None:
        if self.config.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.schedule, torch.optim.lr_scheduler.LambdaLR):
            self.schedule.step()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _validate(self, epoch: int) -> None:
        better, shown = True, "no validation images"
        self.ranks.spread_buffers(self.model)
        if self.task.manifest.split("val"):
            rows, loss = inference(
                self.task, self.model, self.strategy, "val", self.validation, self.console
            )
            metrics = self.task.metrics(rows)
            better, shown = self._judge(epoch, metrics, loss)
            headline = {"loss": loss, self.task.headline: metrics.get(self.task.headline)}
            self.logger.validation(len(self.progress.steps), headline, rows)
            self.on_validation(rows, len(self.progress.steps))
        if better:
            self.progress.best_epoch = epoch
            self._save(BEST, self._weights(epoch))
        self._save(LAST, self._state(epoch))
        self.console.say(
            f"epoch {epoch}/{self.config.epochs}: train loss {self._epoch_loss(epoch):.4f}, {shown}"
        )

    def _save(self, name: str, state: dict[str, Any]) -> None:
        if self.ranks.world.is_main:
            save_checkpoint(self.run_dir / FOLDER / name, state)

    def _judge(self, epoch: int, metrics: dict[str, Any], loss: float) -> tuple[bool, str]:
        """Note a validation; return whether it is the best so far, and words for it."""
        name = self.task.headline
        headline = metrics.get(name)
        score = self.task.score(metrics, loss)
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(loss if headline is None else -score[0])
        self.progress.validations.append({"epoch": epoch, "loss": loss, name: headline})
        better = self.progress.best is None or score > self.progress.best
        if better:
            self.progress.best = score
        value = "-" if headline is None else f"{headline:.3f}"
        return better, f"val loss {loss:.4f}, val {name} {value}{'  (best)' if better else ''}"

    def _epoch_loss(self, epoch: int) -> float:
        losses = [step.loss for step in self.progress.steps if step.epoch == epoch]
        return sum(losses) / len(losses)

    def _weights(self, epoch: int) -> dict[str, Any]:
        """Return what evaluation needs."""
        return {
            "model": self.model.state_dict(),
            "epoch": epoch,
            "step": len(self.progress.steps),
        }

    def _state(self, epoch: int) -> dict[str, Any]:
        """Return what training needs to go on."""
        return {
            **self._weights(epoch),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }


def create_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW or SGD; vectors (norms, biases) are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in trained if parameter.ndim > 1],
            "weight_decay": config.weight_decay,
        },
        {
            "params": [parameter for parameter in trained if parameter.ndim <= 1],
            "weight_decay": 0.0,
        },
    ]
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=True, fused=True
        )
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def create_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return warm-up then cosine or constant, stepped each update; or plateau, each epoch.

    Plateau has no warm-up: it starts at the full rate and falls to 0.3 of it after 4 epochs
    without a better validation.
    """
    if config.schedule == "plateau":
        # Absolute: relative to a negative best (an AUC's), an equal value would count as better.
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.3, patience=3, threshold=1e-4, threshold_mode="abs"
        )
    warmup_steps = round(config.warmup_fraction * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if config.schedule == "constant":
            return 1.0
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class _Inside:
    """Progress inside a step, once it takes longer than one waits for without wondering."""

    _QUIET_S = 3.0

    def __init__(self, bar: Work, number: int, name: str) -> None:
        self._bar, self._number, self._name = bar, number, name
        self._start_s = time.monotonic()

    def update(self, share: float) -> None:
        """Say how far the step is and how long it will take."""
        gone_s = time.monotonic() - self._start_s
        if gone_s > self._QUIET_S and 0 < share < 1:
            left = format_duration(gone_s * (1 - share) / share)
            text = f"{self._name} {self._number}: {share:.0%}, {left} left"
            self._bar.update(self._number - 1, text)


def _timed(loader: Loader) -> Generator[tuple[Batch, float]]:
    batches = iter(loader)
    while True:
        start_s = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch, time.perf_counter() - start_s


class _StepLog(contextlib.AbstractContextManager["_StepLog"]):
    """steps.csv, a line as each step ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: IO[str] | None = None

    def __enter__(self) -> "_StepLog":
        self._stream = self._path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._stream, [item.name for item in fields(Step)])
        self._writer.writeheader()
        return self

    def write(self, step: Step) -> None:
        assert self._stream is not None
        self._writer.writerow(asdict(step))
        self._stream.flush()

    def __exit__(self, *_: object) -> None:
        assert self._stream is not None
        self._stream.close()
