"""The training loop: ``echo4o train configs/tiny.yaml`` or ``python scripts/train.py --model_path …``.

One step fetches its micro-batches, encodes their images, adds up their gradients under losses normalised over the whole
step, clips, updates, and averages. Everything it uses was built before (`echo4o.train.setup`), so that wrong settings
end the run before any training.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from echo4o.checkpoint.folders import CheckpointError, claimed, step_folder
from echo4o.checkpoint.writer import Progress, Saved
from echo4o.config import RunConfig
from echo4o.packed import PackedBatch
from echo4o.train.console import ConsoleProgress
from echo4o.train.evaluating import Evaluator, Sampler
from echo4o.train.failures import reporting_failures
from echo4o.train.latents import LatentCounts, encode_batch
from echo4o.train.liveness import Liveness
from echo4o.train.logs import set_up_logs
from echo4o.train.losses import LossBreakdown, StepTotals, micro_loss
from echo4o.train.metrics import PLOT_FILE, plot_losses
from echo4o.train.optim import set_learning_rate
from echo4o.train.processes import Processes
from echo4o.train.setup import Run, join, require_writable, set_up
from echo4o.train.signs import stragglers
from echo4o.train.stopping import StopRequest, write_stop_marker

logger = logging.getLogger(__name__)

#: Ranks are compared once the slowest spends more than this share of the time, and more than these seconds between two
#: log lines, on making packs.
SLOW_DATA_SHARE, SLOW_DATA_SECONDS = 0.1, 2.0


class RunError(RuntimeError):
    """The machine ended the run (device memory, disk); the message names the remedy."""


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


def train(config: RunConfig, sampler: Sampler | None = None) -> None:
    """Run a training from its settings to its last checkpoint.

    Args:
        sampler: draws ``eval_requests`` at every evaluation.

    Raises:
        echo4o.config.ConfigError: for settings that cannot work, before any training.
        NonFiniteError: after ``max_nonfinite_steps`` skipped steps in a row.
        RunError: if the device's memory or the disk does not suffice.
        CheckpointError: if the last checkpoint cannot be written.
    """
    training = config.training
    processes = Processes.from_environment(training.dist_timeout)
    with reporting_failures(processes):
        require_writable("results_dir", training.results_dir)
        with set_up_logs(training.results_dir, processes.rank, processes.world_size) as log:
            device = join(config, processes)
            liveness = Liveness(
                processes,
                training.results_dir,
                log,
                hang_timeout=training.hang_timeout,
                dead_rank_timeout=training.dead_rank_timeout,
            )
            # The stop request outermost: torchrun signals all ranks once one has died, and the message comes first.
            stop = StopRequest(training.stop_grace, liveness.end)
            alone = contextlib.nullcontext() if processes.rank else claimed(training.checkpoint_dir)
            require_writable("checkpoint_dir", training.checkpoint_dir)
            with stop, liveness, reporting_failures(processes, liveness), alone:
                run = set_up(config, processes, device, liveness)
                console = ConsoleProgress(run.total_steps, run.step, enabled=run.engine.rank == 0)
                with contextlib.closing(run), console, reporting_failures(processes, liveness):
                    Trainer(run, console, stop, liveness, sampler).fit()
            processes.close()


@dataclass
class StepResult:
    """One optimiser step: its losses over all micro-batches and ranks, None where it had no such token."""

    loss: float
    mse: float | None
    ce: float | None
    grad_norm: float
    totals: StepTotals
    skipped: bool = False


class Trainer:
    """The loop over a `Run`."""

    def __init__(
        self, run: Run, console: ConsoleProgress, stop: StopRequest, liveness: Liveness, sampler: Sampler | None = None
    ) -> None:
        self.run = run
        self.config = run.config.training
        self.console = console
        self.stop = stop
        self.liveness = liveness
        self.work_seconds = 0.0
        self.workers_started = False
        self.evaluator = Evaluator(run, console.say, liveness, self.should_stop, sampler)
        self.latents = LatentCounts(run.config.data.latent_cache if run.vae is not None else None)
        self.writer = run.checkpoint_writer(lambda: liveness.progress(run.step, "save"))
        self.breakdown = LossBreakdown()
        self.breakdown.load_state_dict(run.trainer_state.get("breakdown", {}))
        self.skipped_steps = int(run.trainer_state.get("skipped_steps", 0))
        self.skipped_in_a_row = int(run.trainer_state.get("skipped_in_a_row", 0))

    def fit(self) -> None:
        run = self.run
        if run.step >= run.total_steps:
            self.console.say(f"step {run.step} of {run.total_steps} is done: nothing to train (raise --total_steps)")
            return
        if self.should_stop():
            self.stopped(None)
            return
        self.evaluator.begin()
        batches = iter(run.loader)
        for step in range(run.step + 1, run.total_steps + 1):
            self.liveness.progress(step, "data")
            started = time.perf_counter()
            with run.throughput.waiting():
                micro_batches = self.fetch(batches)
            # What a rank does before all of them meet: those that take long for it keep the others waiting.
            self.work_seconds += time.perf_counter() - started
            self.liveness.progress(step, "forward, backward and update")
            with _explained_out_of_memory(micro_batches):
                result = self.train_step(micro_batches, lr=run.schedule(step - 1))
            run.step = step
            if run.row_log is not None:
                run.row_log.write(step, micro_batches)
            self.count(result, micro_batches)
            if step % self.config.log_every == 0 or step == run.total_steps:
                self.log(result)
            self.console.advance(step)
            if self.should_stop():
                self.save(last=True)
                self.stopped(step)
                return
            if step % self.config.save_every == 0 and step < run.total_steps:
                self.save()
            self.report(self.writer.poll())
            if step < run.total_steps:
                self.evaluator.after(step)
        self.save(last=True)
        self.evaluator.after(run.total_steps)
        if not self.evaluator.is_idle:
            self.plot()

    # ------------------------------------------------------------ one step

    def fetch(self, batches: Iterator[PackedBatch]) -> list[PackedBatch]:
        """The micro-batches of one step: all of them first, because the losses are divided by their common totals.

        The first call starts the worker processes, which must not get stop signals. Later ones may be interrupted.
        """
        with contextlib.ExitStack() as stack:
            if not self.workers_started and self.run.config.data.num_workers:
                stack.enter_context(self.stop.held_back())
            micro_batches = [next(batches) for _ in range(self.run.packs_per_rank)]
        self.workers_started = True
        return micro_batches

    def train_step(self, micro_batches: Sequence[PackedBatch], lr: float) -> StepResult:
        run, engine, config = self.run, self.run.engine, self.config
        local = StepTotals.local(micro_batches, config.ce_loss_reweighting)
        totals = StepTotals(*engine.all_reduce_sum(local).tolist())
        losses = []
        for number, batch in enumerate(micro_batches, start=1):
            with engine.no_sync(enabled=number < len(micro_batches)):
                loss = self.forward(batch, totals)
                engine.backward(loss.total)
            loss.total = None
            losses.append(loss)
        grad_norm = engine.clip_grad_norm(config.max_grad_norm)
        # Read the losses only now: on a GPU each look at a number waits for all work before it.
        shares = torch.zeros(2, dtype=torch.float64)
        for loss in losses:
            shares += torch.tensor([float(part or 0.0) for part in (loss.ce, loss.mse)], dtype=torch.float64)
        ce, mse = engine.all_reduce_sum(shares).tolist()
        result = StepResult(
            loss=config.ce_weight * ce + config.mse_weight * mse,
            mse=mse if totals.mse else None,
            ce=ce if totals.ce else None,
            grad_norm=grad_norm,
            totals=totals,
        )
        if math.isfinite(result.loss) and math.isfinite(grad_norm):
            set_learning_rate(engine.optimizer, lr)
            engine.step()
            run.ema.update()
            for batch, loss in zip(micro_batches, losses, strict=True):
                self.breakdown.add(batch, loss, run.model_config.timestep_shift)
        else:
            result.skipped = True
        engine.zero_grad()
        return result

    def forward(self, batch: PackedBatch, totals: StepTotals):
        run, config = self.run, self.config
        batch = batch.to(run.engine.device, non_blocking=True)
        with run.engine.autocast():
            latents = noise = None
            if run.vae is not None:
                latents, noise = encode_batch(run.vae, batch, run.model_config.latent_patch_size)
            output = run.engine.module(batch, latents, noise, return_hidden=False)
        return micro_loss(
            output.mse,
            output.ce,
            batch,
            totals,
            mse_weight=config.mse_weight,
            ce_weight=config.ce_weight,
            ce_loss_reweighting=config.ce_loss_reweighting,
            nothing=output.nothing,
        )

    # ------------------------------------------------------------ bookkeeping

    def count(self, result: StepResult, micro_batches: Sequence[PackedBatch]) -> None:
        """Throughput and skipped steps; raises NonFiniteError when training has broken down."""
        self.run.throughput.add_step(micro_batches)
        self.latents.add(micro_batches)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if not result.skipped:
            return
        self.skipped_steps += 1
        rows = [row for batch in micro_batches for row in batch.sample_rows]
        what = "loss" if not math.isfinite(result.loss) else "gradient"
        logger.warning(
            "step %d skipped: the %s is not finite (rows %s)", self.run.step, what, ", ".join(rows[:8]) or "unknown"
        )
        if self.skipped_in_a_row >= self.config.max_nonfinite_steps:
            raise NonFiniteError(
                f"{self.skipped_in_a_row} steps in a row had a {what} that is not finite, up to step {self.run.step}. "
                f"Resume from an earlier checkpoint in {self.config.checkpoint_dir} with a lower --lr or "
                "--max_grad_norm, or check the rows named above."
            )

    def log(self, result: StepResult) -> None:
        run = self.run
        counted = {**run.loader_counters(), **self.latents.counters()}
        own = (self.breakdown.state_dict(), counted, self.work_seconds, run.engine.processes.host)
        breakdowns, counters, seconds, hosts = zip(*run.engine.gather(own), strict=True)
        self.breakdown.merge(breakdowns)
        if max(seconds) > max(SLOW_DATA_SECONDS, SLOW_DATA_SHARE * run.throughput.seconds):
            for who in stragglers(seconds, hosts):
                logger.warning("%s to make its packs; the other ranks wait for it", who)
        self.work_seconds = 0.0
        values = {
            "loss": result.loss,
            "mse": result.mse,
            "ce": result.ce,
            "lr": run.schedule(run.step - 1),
            "grad_norm": result.grad_norm,
            "num_mse_tokens": int(result.totals.mse),
            "skipped_steps": self.skipped_steps,
            **self.breakdown.means(),
            **run.throughput.summary(run.engine.world_size),
            **_summed(counters),
        }
        self.breakdown.reset()
        self.latents.reset()
        run.throughput.reset()
        if run.engine.rank == 0:
            try:
                for sink in run.sinks:
                    sink.write(run.step, values)
            except OSError as error:
                raise RunError(
                    f"cannot log step {run.step} in {self.config.results_dir}: {error}. Make room there, then continue "
                    "with --auto_resume True."
                ) from error
        self.console.log(run.step, values)

    def should_stop(self) -> bool:
        """True on every rank if any was asked to stop."""
        asked = torch.tensor([self.stop.reason is not None], dtype=torch.float64)
        return bool(self.run.engine.all_reduce_sum(asked))

    def save(self, *, last: bool = False) -> None:
        """Save and draw the loss plot. Training survives a periodic save that fails (full disk), but not the `last`."""
        run = self.run
        trainer = {
            "breakdown": self.breakdown.state_dict(),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        progress = Progress(run.step, trainer, {"data": run.loader.state_dict()})
        self.liveness.progress(run.step, "save")
        with run.throughput.paused():
            try:
                self.report(self.writer.save(progress, wait=last))
            except CheckpointError as error:
                if last:
                    raise
                logger.warning("%s; training goes on, the previous checkpoint is untouched", error)
            self.report(self.writer.wait() if last else self.writer.poll())
            self.plot()

    def stopped(self, step: int | None) -> None:
        """Say where a stopped run goes on, to people and in ``stopped.json``."""
        run, reason = self.run, self.stop.reason or "another rank was stopped"
        where = f"saved step {step}" if step is not None else "nothing was trained"
        self.console.say(f"{reason}: {where}; continue with --auto_resume True")
        if run.engine.rank == 0:
            folder = step_folder(self.config.checkpoint_dir, run.step) if run.step else ""
            write_stop_marker(self.config.results_dir, reason, run.step, folder)

    def report(self, saved: Saved | None) -> None:
        """Say how a save ended that was under way."""
        if saved is None:
            return
        if saved.error is not None:
            logger.warning("%s; training goes on, the previous checkpoint is untouched", saved.error)
        else:
            self.console.say(f"saved {saved.folder} in {saved.seconds:.1f} s (training waited {saved.stalled:.1f} s)")

    def plot(self) -> None:
        if self.run.engine.rank:
            return
        metrics = self.run.metrics_path
        try:
            plot_losses(metrics, metrics.with_name(PLOT_FILE))
        except OSError as error:
            logger.warning("cannot draw the loss plot: %s", error)


def _summed(counters: Sequence[Mapping[str, int]]) -> dict[str, int]:
    names = dict.fromkeys(name for part in counters for name in part)
    return {name: sum(part.get(name, 0) for part in counters) for name in names}


@contextlib.contextmanager
def _explained_out_of_memory(micro_batches: Sequence[PackedBatch]) -> Iterator[None]:
    """Forward, backward and the optimiser's first step may all be where memory ends; the longest pack decides."""
    try:
        yield
    except RuntimeError as error:
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        if not on_gpu and "can't allocate memory" not in str(error):
            raise
        longest = max(micro_batches, key=lambda batch: batch.sequence_length)
        raise RunError(
            f"out of {'GPU' if on_gpu else 'host'} memory on a pack of {longest.sequence_length:,} tokens, "
            f"{len(longest.sample_lens)} samples ({', '.join(longest.sample_rows[:8])}). Lower --expected_num_tokens "
            "and --max_num_tokens, pass --activation_checkpointing full, or train less (--lora_rank, --freeze_und)."
        ) from error
