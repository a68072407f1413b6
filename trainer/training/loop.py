"""The training loop. One process holds both towers, or two processes hold one each; the loop is the same."""

import contextlib
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.loader.batch import Batch, BatchShare, SplitFeed
from pipeline.loader.batches import EvaluationLoader, TrainingLoader
from pipeline.manifest import read_manifest
from trainer.config import Config
from trainer.errors import DivergedError, LostError, RunError
from trainer.model import kernels
from trainer.model.layers import freeze_statistics
from trainer.parallel.crossing import make_net
from trainer.parallel.mesh import Mesh, MeshCoord
from trainer.parallel.status import GlobalStatus, LocalStatus, all_reduce_status, check_consistency
from trainer.training import checkpoint
from trainer.training.async_checkpoint import AsyncCheckpointer, PendingCheckpoint
from trainer.training.evaluate import Evaluation, evaluate_net
from trainer.training.init_from import frozen_layers
from trainer.training.metrics import MetricsLog, TrainingProgress, read_metrics
from trainer.training.optimizer import PaperSGD, count_plateaus, rates_at
from trainer.training.profiling import StepProfiler
from trainer.training.run_folder import START_NAME, Result, write_result
from trainer.training.start import commit_start
from trainer.training.step import ForwardBackward


class Trainer:
    """A run in this process.

    Args:
        config: the recipe.
        data: data set folder.
        run: run folder; a start that is prepared there (``trainer.training.start``) is committed before the first step.
        mesh: the other processes, or None where this one is alone and holds both towers.
        device: ``cpu`` or ``cuda:N``.
        skip_list: file with keys of samples to leave out, one a line.
        profile_steps: steps to record, see :class:`trainer.training.profiling.StepProfiler`.
        timed: opened around every phase of a step, with its name: ``wait`` (for the batch), ``transfer``, ``forward``,
            ``backward``, ``check``, ``optimizer``. The benchmark's clock; the default does nothing and takes 0.2 us.
        is_new: begin with the prepared start's weights, or new ones, whatever checkpoints are there: the run may
            replace another one.
    """

    def __init__(
        self,
        config: Config,
        data: Path,
        run: Path,
        *,
        mesh: Mesh | None = None,
        device: str = "cpu",
        skip_list: Path | None = None,
        profile_steps: int = 0,
        timed: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        is_new: bool = False,
    ) -> None:
        self.timed, self.is_new = timed, is_new
        self.config, self.data, self.run, self.mesh, self.device = config, data, run, mesh, device
        self.link = mesh.link if mesh else None
        self.coord = mesh.coord if mesh else MeshCoord(0, 2)
        self.skip_list, self.profile_steps = skip_list, profile_steps
        self.started = time.perf_counter()
        self.stop_signal: str | None = None
        self.leads = self.coord.rank == 0
        train = config.train
        if train.threads:
            torch.set_num_threads(train.threads)
        self.net = make_net(config, self.link, device=device)
        freeze_statistics(self.net, frozen_layers(config))
        self.optimizer = PaperSGD(self.net.named_parameters(), config.optimizer)
        self.saver = AsyncCheckpointer(run, self.net, self.optimizer, mesh=mesh, keep=train.keep_checkpoints)
        self.gradients = ForwardBackward(self.net, train, mesh=mesh, device=device, timed=timed)
        self.step = 0
        state = self._resume()
        self.loader = self._open_loader(state)
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.total_steps = train.epochs * self.steps_per_epoch
        self.last_evaluation: Evaluation | None = None
        self.evaluated_step = -1
        self.held_out_errors = self._read_errors()
        self.images_per_s: list[float] = []
        self.ledger: list[dict[str, Any]] = []
        self.ledger_rows = 0
        self._check_consistency()

    def _open_loader(self, state: dict[str, Any] | None) -> TrainingLoader:
        """Where the batches come from, after ``state``; the benchmark puts a measured one here."""
        link = self.link
        return TrainingLoader(
            self.data,
            self.config.data,
            batch_size=self.config.train.batch_size,
            seed=self.config.train.seed,
            device=self.device,
            state=state,
            skip_list=self.skip_list,
            split_feed=SplitFeed(self.coord.rank, self.coord.world, link.exchange_pixels) if link else None,
            share=BatchShare(self.coord.replica, self.coord.replicas),
        )

    def _resume(self) -> dict[str, Any] | None:
        """Loads the newest complete checkpoint, if there is one; returns the loader's state.

        Raises:
            CheckpointError: there are checkpoints, and every one is damaged.
        """
        folder = self.run / START_NAME if self.is_new else self.run  # weights to begin with lie in the prepared start
        found = checkpoint.choose(folder, quiet=True)  # who checked the start has said what is passed over
        if found is None:
            return None
        checkpoint.load_towers(found.folder, self.net, self.optimizer)
        self.step = found.record.step
        return found.record.loader

    def _read_errors(self) -> list[float]:
        """Top-1 errors of the evaluations up to the step to go on from; only tower a knows them."""
        rows = read_metrics(self.run) if self.leads and self.step else []
        return [1 - row["top1"] for row in rows if row["kind"] == "evaluation" and row["step"] <= self.step]

    def _check_consistency(self) -> None:
        """Refuses to start where the processes would not do the same work."""
        fingerprints = {
            "recipe": self.config.fingerprint,
            "data set": read_manifest(self.data).fingerprint,
            "torch version": torch.__version__,
            "step to start from": self.step,
            "kernels (see TWOTOWER_KERNELS in docs/commands.md)": kernels.describe(self.device),
        }
        check_consistency(self.mesh, fingerprints)

    def request_stop(self, number: int, _frame: object = None) -> None:
        """Signal handler: finish the step, save, end."""
        self.stop_signal = signal.Signals(number).name

    def train(self) -> Result:
        """Trains to the end, to a signal, or to an error; writes result.json in every case.

        Raises:
            DivergedError: loss or gradient not finite, on either tower; the weights stay as they were.
            PeerError: the other tower is gone or disagrees.
        """
        if self.leads:
            commit_start(self.run)
        self.log = MetricsLog(self.run, self.step) if self.leads else None
        self.progress = TrainingProgress(self.total_steps, done=self.step, quiet=not self.leads)
        handlers = {number: signal.signal(number, self.request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        reason, sentence = "failed", ""
        try:
            with self.progress:
                stopped = self._loop()
            reason, sentence = ("stopped", f"asked to by {stopped}") if stopped else ("finished", "")
        except OSError as error:
            sentence = f"{self.run} cannot be written: {error.strerror or error}"
            raise RunError(sentence) from None
        except Exception as error:
            sentence = f"{type(error).__name__}: {error}"
            if self.mesh and not isinstance(error, LostError):
                self.mesh.failures.ended(self.coord.rank, error)
            raise
        finally:
            result = self._result(reason, sentence)
            self._close(result)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return result

    def _close(self, result: Result) -> None:
        """Writes the result and closes what is open; a full disk does not hide why the run ended."""
        try:
            if self.leads:
                write_result(self.run, result)
            if self.log:
                self.log.close()
        except OSError as error:
            print(f"warning: {self.run} cannot be written: {error.strerror or error}", file=sys.stderr, flush=True)
        self.loader.close()

    def _loop(self) -> str | None:
        """Steps, evaluations and checkpoints; returns why it stopped early, if it did."""
        self.progress.say(self._opening_line())
        name = "".join(self.net.towers) + (str(self.coord.replica) if self.coord.replicas > 1 else "")
        profiler = StepProfiler(self.run, name, steps=self.profile_steps, device=self.device)
        stop = False
        if self.step == self.total_steps:  # resumed after the last step; both towers must agree on whether to evaluate
            self._evaluate()
        while self.step < self.total_steps and not stop:
            stop = self._one_step().stop
            profiler.step()
            ended_epochs = self.step // self.steps_per_epoch if self.step % self.steps_per_epoch == 0 else 0
            last = self.step == self.total_steps
            every = self.config.train.evaluate_every_epochs
            if last or (ended_epochs and every and ended_epochs % every == 0):
                self._evaluate()
            if last or stop or self._checkpoint_is_due(ended_epochs):
                self._save()
        self.saver.finish()
        profiler.close()
        return (self.stop_signal or "another process") if stop and self.step < self.total_steps else None

    def _opening_line(self) -> str:
        """What the run is about to do."""
        towers = "two processes, one per tower" if self.link else "one process"
        towers = f"{self.coord.replicas} replicas of {towers}" if self.coord.replicas > 1 else towers
        begin = f"from step {self.step}" if self.step else "from the start"
        return (
            f"{self.config.train.epochs} epochs of {self.steps_per_epoch} steps, batch {self.config.train.batch_size}, "
            f"{towers}, {self.device}, {begin}"
        )

    def _checkpoint_is_due(self, ended_epochs: int) -> bool:
        """Whether the recipe asks for a checkpoint after this step."""
        train = self.config.train
        by_step = train.checkpoint_every_steps and self.step % train.checkpoint_every_steps == 0
        return bool(by_step or (ended_epochs and ended_epochs % train.checkpoint_every_epochs == 0))

    def _one_step(self) -> GlobalStatus:
        """One update; logs a row."""
        begin = time.perf_counter()
        if self.link:
            self.link.ledger.clear()
        with self.timed("wait"):
            batch = self.loader.next()
        waited_s = time.perf_counter() - begin
        loss = self.gradients(batch.images, batch.labels, self.step)
        with self.timed("check"):
            verdict = self._agree(batch, loss)
        epoch = self.step / self.steps_per_epoch
        learning_rates = rates_at(
            self.config.optimizer, epoch, epochs=self.config.train.epochs, plateaus=verdict.plateaus
        )
        self.optimizer.set_rates(learning_rates)
        with self.timed("optimizer"):
            self.optimizer.step()
        self.step += 1
        rows = len(batch.keys)
        if self.link and rows > self.ledger_rows:  # a run may go on with a partial batch
            self.ledger, self.ledger_rows = [row.to_dict() for row in self.link.ledger.rows()], rows
        elapsed_s = time.perf_counter() - begin
        self.images_per_s.append(rows * self.coord.replicas / elapsed_s)
        if self.log:
            row = {
                "kind": "step",
                "step": self.step,  # 1 is the first
                "epoch": batch.epoch,  # 0 is the first
                "loss": verdict.loss,  # mean over the batch before this step's update, nats
                "learning_rate": learning_rates.weights,
                "images_per_s": self.images_per_s[-1],  # of all replicas, over the step's wall time
                "data_wait_share": waited_s / elapsed_s,  # of the step's wall time, 0..1
                "queue_ready_share": self.loader.queue_fill.ready_share,  # batches ready over the queue's depth, 0..1
                "gradient_norm": verdict.norms,  # Euclidean, {tower: norm}
            }
            self.log.write(row)
            self.progress.step(row)
        return verdict

    def _agree(self, batch: Batch, loss: float) -> GlobalStatus:
        """Compares notes with the other processes before the update.

        Raises:
            DivergedError: loss or gradient not finite anywhere.
        """
        norms = self._gradient_norms()
        finite = all(map(math.isfinite, norms.values())) and (math.isfinite(loss) or "a" not in self.net.towers)
        notes = LocalStatus(
            fingerprint=batch.fingerprint,
            finite=finite,
            stop=self.stop_signal is not None,
            plateaus=count_plateaus(self.held_out_errors, self.config.optimizer),
            norms=norms,
            loss=loss,
            written=self.saver.written,
            unsaved=self.saver.failed,
        )
        verdict = all_reduce_status(self.mesh, notes, f"step {self.step} (first key here {batch.keys[0]})")
        self.saver.advance(verdict)
        if not verdict.finite:
            self.saver.finish()
            shown = ", ".join(f"{name} {value:.3g}" for name, value in verdict.norms.items())
            raise DivergedError(
                f"step {self.step}: not finite (loss {verdict.loss:.4g}, gradient norms {shown}); the update was not "
                f"applied; batch keys {', '.join(batch.keys[:4])}, ...; lower optimizer.learning_rate or inspect these "
                "images"
            )
        return verdict

    def _gradient_norms(self) -> dict[str, float]:
        """Euclidean norm of all gradients, by tower held here."""
        gradients = {name: p.grad for name, p in self.net.named_parameters() if p.grad is not None}
        towers = self.net.split_towers(gradients).items()
        return {
            name: float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(parts.values())))))
            for name, parts in towers
        }

    def _evaluate(self) -> None:
        """Top-1 and top-5 on the held-out split."""
        train = self.config.train
        loader = EvaluationLoader(
            self.data,
            self.config.data,
            batch_size=train.batch_size,
            split=train.evaluate_split,
            device=self.device,
            skip_list=self.skip_list,
        )
        evaluation = evaluate_net(self.net, loader)
        if evaluation is None or self.log is None:
            return
        self.last_evaluation, self.evaluated_step = evaluation, self.step
        self.held_out_errors.append(1 - evaluation.top1)
        epoch = self.step / self.steps_per_epoch
        row = {"kind": "evaluation", "step": self.step, "epoch": epoch, "split": train.evaluate_split}
        row |= {"views": evaluation.views, "top1": evaluation.top1, "top5": evaluation.top5}
        self.log.write(row | {"loss": evaluation.loss, "num_samples": evaluation.num_samples})
        self.log.flush()
        top5 = "" if evaluation.top5 is None else f", top-5 {evaluation.top5:.4f}"
        self.progress.say(
            f"epoch {epoch:g}/{train.epochs}: top-1 {evaluation.top1:.4f}{top5} "
            f"on {evaluation.num_samples} held-out images, {statistics.median(self.images_per_s or [0.0]):.0f} images/s"
        )

    def _save(self) -> None:
        """Begins a checkpoint; it is written beside the steps that follow.

        Raises:
            CheckpointError: the one before could not be written (a full disk, for example).
        """
        self.saver.finish()
        evaluation = self.last_evaluation if self.evaluated_step == self.step else None
        self.saver.begin(
            PendingCheckpoint(
                self.step, self.config.fingerprint, self.loader.state(), evaluation.top1 if evaluation else None
            )
        )
        if self.log:
            self.log.flush()

    def _result(self, reason: str, sentence: str) -> Result:
        """The run so far."""
        evaluation = self.last_evaluation
        return Result(
            exit_reason=reason,
            reason=sentence,
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            top1=evaluation.top1 if evaluation else None,
            top5=evaluation.top5 if evaluation else None,
            num_samples=evaluation.num_samples if evaluation else 0,
            elapsed_s=time.perf_counter() - self.started,
            images_per_s=statistics.median(self.images_per_s or [0.0]),
            processes=self.coord.world if self.mesh else 1,
            batch_size=self.config.train.batch_size,
            ledger=self.ledger,
        )
