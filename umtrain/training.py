"""The loop: steps, validation, checkpoints; memory is left to the strategy, images to the task."""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from umtrain.checkpoint import (
    BEST,
    FOLDER,
    load_checkpoint,
    prune,
    save_checkpoint,
    step_of,
    step_path,
    step_paths,
)
from umtrain.clock import RunClock
from umtrain.config import RunConfig, config_to_dict
from umtrain.console import Console, format_duration
from umtrain.console import Task as Work
from umtrain.data.loader import Batch, Loader
from umtrain.data.manifest import Split
from umtrain.errors import DataError, RankError, RunError
from umtrain.logger import RunLogger
from umtrain.memory.allocator import giving_back
from umtrain.memory.base import Strategy
from umtrain.optimization import create_optimizer, create_schedule
from umtrain.parallel.ranks import Ranks
from umtrain.progress import Progress, Step, StepLog
from umtrain.randomness import random_state, restore_random_state
from umtrain.report.record import Record
from umtrain.signals import StopRequest
from umtrain.tasks import Row, Task

# A network that has lost its weights to a number that is none never comes back.
_MOST_LEFT_OUT_IN_A_ROW = 10


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
            if not batch["id"]:  # Note: [A batch without an image] in umtrain/data/loader.py
                found.append([])
                continue
            strategy.on_progress = _Inside(bar, done, "batch").update
            with autocast(device, precision):
                outputs = model(network_input(task, ranks, batch, device))
            total_loss += task.loss(outputs, batch).item() * len(batch["id"])
            found.append(task.predictions(outputs, batch, split))
            bar.update(done)
    model.train(was_training)
    ranks.merge_skipped(task.skipped)
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
    `stop` is what signals go to: see Note: [Ending between two states] in umtrain/signals.py.
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
        clock: RunClock | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.task, self.strategy = task, strategy
        self.clock = clock or RunClock()
        self.config: RunConfig = task.config
        self.device, self.run_dir, self.console = device, run_dir, console
        self.logger, self.on_validation = logger, on_validation
        self.stop = stop or StopRequest(self.config.signal_grace_s)
        self.ranks = ranks_of(task)
        self.loader = task.loader("train", training=True, share=self.ranks.share)
        self.validation = task.loader("val", training=False, share=self.ranks.share)
        self.ranks.tie(model, strategy)
        with autocast(device, self.config.precision):
            with giving_back():  # glibc's heap keeps no hole of it
                sample = task.sample_input(device, input_dtype(self.config.precision))
            self.model = strategy.prepare(model, self.ranks.band_of(sample))
        self.n_train = len(task.manifest.split("train"))
        # Images of one batch of all ranks.
        self.together = self.config.batch_size * self.ranks.share.n_ranks
        n_batches = math.ceil(self.n_train / self.together)
        self.steps_per_epoch = math.ceil(n_batches / self.config.optim.accumulate)
        planned = self.config.epochs * self.steps_per_epoch
        self.total_steps = min(planned, self.config.max_steps or planned)
        self.optimizer = create_optimizer(self.model, self.config.optim)
        self.schedule = create_schedule(self.optimizer, self.config.optim, self.total_steps)
        self.progress = Progress()
        self._memory_before: Record | None = None
        self._n_steps_before = 0
        self._n_done = 0  # steps of the epoch under way, by as many ranks as there are now
        self._is_whole = True  # no step has begun that is not over
        self._is_end_agreed = False  # all ranks end after this step
        self._saved_step: int | None = None
        self._given_up: list[Path] = []  # checkpoints of steps that this session goes back before
        self._saved_s = time.monotonic()

    def fit(self) -> None:
        """Train to the last step; validate, and save, each epoch and every checkpoint_minutes.

        Interrupted, or stopped by an image, it saves what it has first.
        """
        self.model.train()
        try:
            with StepLog(self.run_dir / "steps.csv", self.progress.steps) as log:
                self._fit(log)
        except (KeyboardInterrupt, DataError, RankError):
            if self._is_whole and self._saved_step != len(self.progress.steps):
                with self.stop.finishing():
                    self._save()
            raise

    def _fit(self, log: StepLog) -> None:
        for epoch in range(self.progress.epochs + 1, self.config.epochs + 1):
            if (epoch - 1) * self.steps_per_epoch >= self.total_steps:
                break
            self._train_epoch(epoch, log)
            self._validate(epoch)

    def _train_epoch(self, epoch: int, log: StepLog) -> None:
        first_step = (epoch - 1) * self.steps_per_epoch
        planned = min(self.steps_per_epoch, self.total_steps - first_step)
        n_done = self._n_done
        if n_done >= planned:
            return
        title = f"epoch {epoch}/{self.config.epochs}"
        self.loader.set_epoch(epoch, n_done * self.config.optim.accumulate)
        with self.console.task(title, planned) as bar, self._steps_together():
            batches = _timed(self.loader)
            for done in range(n_done + 1, planned + 1):
                self.strategy.on_progress = _Inside(bar, done, "step").update
                with self.stop.finishing():
                    step = self._step(epoch, done - 1, batches)
                    self._note(step, log)
                if self._is_end_agreed:
                    self.stop.end()
                bar.update(done, f"loss {step.loss:.4f}  {step.images / step.step_s:.2f}/s")
                self._save_if_due()
        # The tail of an epoch cut short by max_steps is left unread: end its workers now.
        batches.close()

    def _steps_together(self) -> AbstractContextManager[None]:
        """Return what surrounds steps: Note: [Ranks end after the same step] in signals.py."""
        return nullcontext() if self.ranks.world.is_alone else self.stop.finishing()

    def _note(self, step: Step, log: StepLog) -> None:
        self.progress.steps.append(step)
        self._n_done += 1
        self._is_whole = True
        log.write(step)
        self._log_step(step)

    def _log_step(self, step: Step) -> None:
        if not step.images:
            return
        images_per_s = step.images / step.step_s
        figures = {"loss": step.loss, "lr": step.lr, "images_per_s": images_per_s}
        self.logger.step(step.step, figures)

    def _step(self, epoch: int, step_in_epoch: int, batches: Iterator[tuple[Batch, float]]) -> Step:
        number = len(self.progress.steps) + 1
        n_batches, n_images_planned = self._plan_step(step_in_epoch)
        lr = self.optimizer.param_groups[0]["lr"]
        wait_s, busy_s, n_counted, total_loss = 0.0, 0.0, 0.0, 0.0
        undo = _BufferCopy(self.model) if self.config.on_nan == "skip" else None
        ids: list[str] = []
        for i in range(n_batches):
            batch, waited_s = self._next_batch(batches, n_images_planned - i * self.together)
            wait_s += waited_s
            start_s = self._now()
            counts = self.ranks.start_batch(batch["id"], is_last=i == n_batches - 1)
            if batch["id"]:
                total_loss += self._forward_backward(batch, counts / n_images_planned)
            elif self.ranks.joins_statistics:
                self._pass_along()
            n_counted += counts
            ids += batch["id"]
            busy_s += self._now() - start_s
        start_s = self._now()
        total_loss, n_images = self._finish_sums(total_loss, n_counted)
        if n_images:
            total_loss *= self._spread(n_images_planned / n_images)
            if undo is not None and not self._is_finite(total_loss):
                undo.put_back()
                self._leave_out(number, self.ranks.joined(ids), total_loss)
            else:
                self._update()
        else:
            total_loss = math.nan
            self.optimizer.zero_grad(set_to_none=True)
        self._advance_schedule()
        busy_s += self._now() - start_s
        return Step(number, epoch, total_loss, lr, n_images, busy_s, wait_s)

    def _next_batch(
        self, batches: Iterator[tuple[Batch, float]], n_left: int
    ) -> tuple[Batch, float]:
        """Return this rank's part of a batch, and the wait for it; `n_left` images are planned."""
        if not self.ranks.share.n_own(min(self.together, n_left)):
            return {"id": []}, 0.0
        return next(batches)

    def _finish_sums(self, loss: float, n_images: float) -> tuple[float, int]:
        """Return the sums over all ranks once those of the gradients are there too.

        A signal to one of them stops all of them after this step.
        """
        self._is_whole = False
        is_asked = float(self.stop.name is not None)
        loss, n_images, n_asked = self.ranks.finish_step([loss, n_images, is_asked])
        if n_asked:
            self.stop.name = self.stop.name or "a signal to another rank"
            self._is_end_agreed = True
        return loss, round(n_images)

    def _pass_along(self) -> None:
        """Take part, without an image, in the statistics that ranks join; it counts for nothing."""
        sample = self.task.sample_input(self.device, input_dtype(self.config.precision))
        self._is_whole = False
        with self.strategy.step():
            with autocast(self.device, self.config.precision):
                outputs = self.model(torch.zeros_like(sample[:1]))
            torch.autograd.backward(outputs.float().sum() * 0)

    def _plan_step(self, step_in_epoch: int) -> tuple[int, int]:
        """Return the batches and all ranks' images of a step; an epoch's last may be fewer."""
        accumulate = self.config.optim.accumulate
        first = step_in_epoch * accumulate
        n_batches = min(accumulate, math.ceil(self.n_train / self.together) - first)
        n_images = min(n_batches * self.together, self.n_train - first * self.together)
        return n_batches, n_images

    def _forward_backward(self, batch: Batch, share: float) -> float:
        """Add the gradients of `batch` by its `share` of the step's images; return its loss."""
        precision = self.config.precision
        inputs = network_input(self.task, self.ranks, batch, self.device)
        self._is_whole = False
        with self.strategy.step():
            with autocast(self.device, precision):
                outputs = self.model(inputs)
            loss: Tensor = self.task.loss(outputs, batch) * share
            torch.autograd.backward(loss)
        value = loss.item()
        if not math.isfinite(value) and self.config.on_nan == "stop":
            raise RunError(
                f"the loss became {value} at step {len(self.progress.steps) + 1} on "
                f"{', '.join(map(str, batch['id']))}; try a smaller optim.lr (now "
                f"{self.config.optim.lr}), optim.clip_norm=1.0 or precision=fp32, or leave such "
                "updates out with on_nan=skip"
            )
        return value

    def _update(self) -> None:
        if self.config.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _is_finite(self, loss: float) -> bool:
        """Tell whether the loss and all gradients are numbers."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return math.isfinite(loss) and math.isfinite(nn.utils.get_total_norm(gradients).item())

    def _leave_out(self, number: int, ids: list[str], loss: float) -> None:
        """Drop the gradients of a step, and note that. Raises RunError if that goes on and on."""
        self.optimizer.zero_grad(set_to_none=True)
        left_out = self.progress.left_out
        left_out.append({"step": number, "images": ids, "loss": str(loss)})
        self.console.say(f"step {number}: no update, loss {loss} on {', '.join(ids)} (on_nan=skip)")
        latest = [entry["step"] for entry in left_out[-_MOST_LEFT_OUT_IN_A_ROW:]]
        if latest == list(range(number - _MOST_LEFT_OUT_IN_A_ROW + 1, number + 1)):
            raise RunError(
                f"{len(latest)} steps in a row had a loss or gradients that are no numbers, the "
                f"last of them step {number}; try a smaller optim.lr (now {self.config.optim.lr}), "
                "optim.clip_norm=1.0 or precision=fp32"
            )

    def _advance_schedule(self) -> None:
        if isinstance(self.schedule, torch.optim.lr_scheduler.LambdaLR):
            with warnings.catch_warnings():
                # The first step may be one without an update.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self.schedule.step()

    def _spread(self, factor: float) -> float:
        """Let the gradients be the mean over the images there are, not those planned."""
        if factor != 1:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return factor

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _validate(self, epoch: int) -> None:
        self.ranks.spread_buffers(self.model)
        self.ranks.merge_skipped(self.task.skipped)
        rows: list[Row] = []
        metrics: dict[str, Any] = {}
        loss = math.nan
        if self.task.manifest.split("val"):
            rows, loss = inference(
                self.task, self.model, self.strategy, "val", self.validation, self.console
            )
            if rows:
                metrics = self.task.metrics(rows)
                headline = {"loss": loss, self.task.headline: metrics.get(self.task.headline)}
                self.logger.validation(len(self.progress.steps), headline, rows)
                self.on_validation(rows, len(self.progress.steps))
        with self.stop.finishing():
            self._is_whole = False
            better, shown = True, "no validation images"
            if rows:
                better, shown = self._judge(epoch, metrics, loss)
            if better:
                self.progress.best_epoch = epoch
                self.progress.best_steps.append(len(self.progress.steps))
            self.progress.epochs = epoch
            self._n_done = 0
            self._is_whole = True
            self._save()
        epoch_loss = self.progress.epoch_loss(epoch)
        self.console.say(
            f"epoch {epoch}/{self.config.epochs}: train loss {epoch_loss:.4f}, {shown}"
        )

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

    def memory_use(self) -> Record:
        """Return what steps needed, with `reasons` for figures that could not be had.

        Of this session; of the one before, if this one had no step left to do.
        """
        if self._memory_before is not None and len(self.progress.steps) == self._n_steps_before:
            return dict(self._memory_before)
        figures = dataclasses.asdict(self.strategy.stats())
        return {"strategy": self.strategy.running_name, **figures}

    def _save_if_due(self) -> None:
        if time.monotonic() - self._saved_s >= 60 * self.config.checkpoint_minutes:
            with self.stop.finishing():
                self._save()

    def _save(self) -> None:
        """Write the state, then the best weights if they are new; drop what is no longer needed."""
        folder, step = self.run_dir / FOLDER, len(self.progress.steps)
        if self.ranks.world.is_main:
            save_checkpoint(step_path(folder, step), self._state())
            if self.progress.best_steps[-1:] == [step]:
                save_checkpoint(folder / BEST, self._weights())
            for path in self._given_up:
                if path != step_path(folder, step):
                    path.unlink(missing_ok=True)
            self._given_up = []
            prune(folder, self.progress.best_steps)
        self._saved_step, self._saved_s = step, time.monotonic()

    def _weights(self) -> dict[str, Any]:
        """Return what evaluation needs."""
        return {
            "model": self.model.state_dict(),
            "epoch": self.progress.epochs,
            "step": len(self.progress.steps),
        }

    def _state(self) -> dict[str, Any]:
        """Return all that decides how training goes on, and what it belongs to."""
        return {
            **self._weights(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": self.progress.state(),
            "random": random_state(),
            "strategy": self.strategy.running_name,
            "together": self.together,
            "n_images_of_epoch": self._n_images_done(),
            "config": config_to_dict(self.config),
            "manifest_sha256": self.task.manifest.sha256,
            "skipped": self.task.skipped.entries,
            "memory_use": self.memory_use(),
            "started_at_s": self.clock.started_at_s,
            "elapsed_s": self.clock.elapsed_s,
        }

    def restore(self, path: Path) -> None:
        """Put back the state that the checkpoint at `path` holds; see `_state`. Raises RunError."""
        state = load_checkpoint(path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.progress = Progress.from_state(state["progress"])
        self.progress.resumed_after.append(state["step"])
        self.clock.go_on(state["started_at_s"], state["elapsed_s"])
        self.task.skipped.restore(state["skipped"])
        restore_random_state(state["random"])
        self._n_done = self._steps_of(state["n_images_of_epoch"])
        if state["together"] != self.together:
            self._go_on_with_other_batches(state["together"])
        self._memory_before, self._n_steps_before = state["memory_use"], state["step"]
        self._saved_step = state["step"]
        if self.ranks.world.is_main:
            newer = [p for p in step_paths(self.run_dir / FOLDER) if step_of(p) > state["step"]]
            self._given_up = newer
            with self.stop.finishing():
                self._restore_best(state)

    def _n_images_done(self) -> int:
        """Return how many images of the epoch under way are behind it, readable or not."""
        n_images = self._n_done * self.config.optim.accumulate * self.together
        return min(n_images, self.n_train)

    def _steps_of(self, n_images: int) -> int:
        """Return the steps after which `n_images` of an epoch are behind it, or a few less."""
        if n_images == self.n_train:
            return self.steps_per_epoch
        return n_images // (self.config.optim.accumulate * self.together)

    def _go_on_with_other_batches(self, together_before: int) -> None:
        """Go on where another number of ranks left, at the rate of the same share of training."""
        if isinstance(self.schedule, torch.optim.lr_scheduler.LambdaLR):
            position = self.progress.epochs * self.steps_per_epoch + self._n_done
            self.schedule.last_epoch = position
            rates = zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
            for group, (base, factor) in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = base * factor(position)
        self.console.say(f"ranks    batches of {self.together} images, {together_before} before")

    def _restore_best(self, state: dict[str, Any]) -> None:
        """Make best.pt the best weights as of `state`: it may be of other steps, or damaged.

        Raises RunError if no file has them.
        """
        path = self.run_dir / FOLDER / BEST
        if not self.progress.best_steps:
            path.unlink(missing_ok=True)
            return
        step = self.progress.best_steps[-1]
        try:
            found = load_checkpoint(path)["step"]
            lacks = f"{path}: the weights of step {found}"
        except RunError as error:
            found, lacks = None, str(error)
        if found != step:
            best = state if state["step"] == step else self._load_best(step, lacks)
            save_checkpoint(path, {key: best[key] for key in self._weights()})

    def _load_best(self, step: int, lacks: str) -> dict[str, Any]:
        try:
            return load_checkpoint(step_path(self.run_dir / FOLDER, step))
        except RunError as error:
            raise RunError(
                f"the best weights so far, of step {step}, are in no file:\n  {error}\n  {lacks}\n"
                "Restore one of the two from a copy, go back before that step with resume=PATH of "
                "an earlier checkpoint, or start over in a new run_dir"
            ) from error


class _BufferCopy:
    """Running statistics as they were, for a step that is to leave no trace."""

    def __init__(self, model: nn.Module) -> None:
        self._pairs = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def put_back(self) -> None:
        """Undo what has changed since."""
        with torch.no_grad():
            for buffer, copy in self._pairs:
                buffer.copy_(copy)


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
