"""The training loop. One process holds both towers, or two processes hold one each; the loop is the same."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.loader.batch import Batch, BatchShare, SplitFeed
from pipeline.loader.batches import EvaluationLoader, TrainingLoader
from trainer.config import Config, to_toml
from trainer.errors import LostError, RunError
from trainer.model.layers import freeze_statistics
from trainer.parallel.crossing import make_net
from trainer.parallel.mesh import Mesh, MeshCoord
from trainer.parallel.status import GlobalStatus, LocalStatus, all_could, check_consistency
from trainer.precision import image_dtype
from trainer.stopping import StopRequest
from trainer.training import checkpoint
from trainer.training.async_checkpoint import AsyncCheckpointer, PendingCheckpoint
from trainer.training.consistency import facts_of_start
from trainer.training.evaluate import StoppedEvaluation, count_net
from trainer.training.history import read_past
from trainer.training.init_from import frozen_layers
from trainer.training.metrics import MetricsLog, TrainingProgress
from trainer.training.optimizer import PaperSGD, count_plateaus, rates_at
from trainer.training.profiling import StepProfiler
from trainer.training.run_folder import START_NAME, Result, blame, write_result
from trainer.training.start import commit_start
from trainer.training.step import ForwardBackward, StepInputs, StepWork
from trainer.training.step_graph import GraphBackend, StepRunner, find_backend
from trainer.training.verdicts import LaunchedStep, Verdicts, default_lag, step_row
from twotower import terminal, verbosity
from twotower.words import pluralize


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
        stop: looked at in every step: when it is asked for, the run saves and ends.
        timed: opened around every phase of a step, with its name: ``wait`` (for the batch), ``transfer``, ``forward``,
            ``backward``, ``check``, ``optimizer``. The benchmark's clock; the default does nothing and takes 0.2 us.
        is_new: begin with the prepared start's weights, or new ones, whatever checkpoints are there: the run may
            replace another one.
        lag: steps that the host reads late, 0 or 1; None: as the device works. The same in all processes.
        graphs: of the steps; None: as the recipe and the device have them.
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
        stop: StopRequest | None = None,
        timed: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        is_new: bool = False,
        lag: int | None = None,
        graphs: GraphBackend | None = None,
    ) -> None:
        self.timed, self.is_new = timed, is_new
        self.config, self.data, self.run, self.mesh, self.device = config, data, run, mesh, device
        self.link = mesh.link if mesh else None
        self.coord = mesh.coord if mesh else MeshCoord(0, 2)
        self.skip_list, self.profile_steps = skip_list, profile_steps
        self.started = time.perf_counter()
        self.stop = stop or StopRequest()
        self.leads = self.coord.rank == 0
        train = config.train
        if train.threads:
            torch.set_num_threads(train.threads)
        if device.startswith("cuda"):
            torch.cuda.set_device(device)  # kernels are tried on the current one, which else is the first
        self.net = make_net(config, self.link, device=device)
        freeze_statistics(self.net, frozen_layers(config))
        self.optimizer = PaperSGD(self.net.named_parameters(), config.optimizer)
        self.saver = AsyncCheckpointer(run, self.net, self.optimizer, mesh=mesh, keep=train.keep_checkpoints)
        self.gradients = ForwardBackward(self.net, train, mesh=mesh, device=device, timed=timed)
        self.verdicts = Verdicts(default_lag(device, mesh) if lag is None else lag)
        lagging = self.verdicts.lag > 0
        self.work = StepWork(self.net, self.gradients, self.optimizer, mesh=mesh, guarded=lagging)
        say = verbosity.remark if self.leads else (lambda _: None)
        graphs = graphs or find_backend(config, device, mesh, lag=self.verdicts.lag, say=say)
        rows = train.batch_size // self.coord.replicas
        self.runner = StepRunner(self.work, rows=rows, seed=train.seed, backend=graphs, say=say)
        self.plateaus = self._known_plateaus()  # as all processes know them
        self.step = 0
        self.log: MetricsLog | None = None
        state = self._resume()
        self.loader = self._open_loader(state)
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.total_steps = train.epochs * self.steps_per_epoch
        self.past = past = read_past(self.run, self.step if self.leads else 0)  # only rank 0 writes about the run
        self.last_evaluation: dict[str, Any] = past.evaluations[-1] if past.evaluations else {}
        self.held_out_errors = [1 - row["top1"] for row in past.evaluations]
        self.images_per_s = past.images_per_s
        self.elapsed_before_s = past.elapsed_s
        self.ledger = list(past.ledger)
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
            split_feed=SplitFeed(self.coord.rank % 2, 2, link.exchange_pixels, link.between_gpus) if link else None,
            share=BatchShare(self.coord.replica, self.coord.replicas),
            dtype=image_dtype(self.config.train.precision, self.device),
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

    def _check_consistency(self) -> None:
        """Refuses to start where the processes would not do the same work."""
        check_consistency(self.mesh, facts_of_start(self.config, self.data, self.step, self.device))
        if self.mesh:
            self.mesh.begin_steps()

    def train(self) -> Result:
        """Trains to the end, to a signal, or to an error; writes result.json in every case.

        Raises:
            DivergedError: loss or gradient not finite, on either tower; the weights stay as they were.
            PeerError: the other tower is gone or disagrees.
        """
        if self.leads:
            commit_start(self.run)
        self.progress = TrainingProgress(self.total_steps, done=self.step, quiet=not self.leads)
        reason, sentence = "failed", ""
        try:
            self.log = MetricsLog(self.run, self.config, self.step, self.past) if self.leads else None
            with self.progress:
                stopped = self._loop()
            reason, sentence = ("stopped", f"asked to by {stopped}") if stopped else ("finished", "")
        except Exception as error:
            known = RunError(blame(error, self.run)) if isinstance(error, OSError) else error
            if self.mesh and self.mesh.failures.known:  # without the peer, all else is a consequence
                known = self.mesh.failures.known
            sentence = str(known) if known is not error else f"{type(error).__name__}: {error}"
            if self.mesh and not isinstance(known, LostError):
                self.mesh.failures.ended(self.coord.rank, known)
            raise known from None
        finally:
            result = self._result(reason, sentence)
            self._close(result)
        return result

    def _close(self, result: Result) -> None:
        """Writes the result and closes what is open; a full disk does not hide why the run failed.

        Raises:
            RunError: a run that did not fail cannot say so.
        """
        try:
            if self.leads:
                write_result(self.run, result)
            if self.log:
                self.log.close(result.exit_reason)
        except OSError as error:
            if result.exit_reason != "failed":
                raise RunError(blame(error, self.run)) from None
            terminal.warn(blame(error, self.run))
        finally:
            self.loader.close()
            self.runner.close()

    def _loop(self) -> str | None:
        """Steps, evaluations and checkpoints; returns why it stopped early, if it did."""
        self.progress.say(self._opening_line())
        name = "".join(self.net.towers) + (str(self.coord.replica) if self.coord.replicas > 1 else "")
        profiler = StepProfiler(self.run, name, steps=self.profile_steps, device=self.device)
        stop = False
        complete = self._make_up_evaluation()
        while self.step < self.total_steps and complete and not stop:
            stop = self._one_step()
            profiler.step()
            if stop or self._evaluation_is_due() or self._checkpoint_is_due():
                stop = self._settle() or stop  # what follows is about this very step
            complete = not self._evaluation_is_due() or self._evaluate()
            if stop or not complete or self._checkpoint_is_due():
                self._save()
        self.saver.finish()
        profiler.close()
        return (self.stop.name or "another process") if not complete or self.step < self.total_steps else None

    def _ended_epochs(self) -> int:
        """Epochs that end with the step just made; 0 within an epoch."""
        return self.step // self.steps_per_epoch if self.step % self.steps_per_epoch == 0 else 0

    def _evaluation_is_due(self) -> bool:
        """Whether the recipe asks for an evaluation after this step."""
        ended, every = self._ended_epochs(), self.config.train.evaluate_every_epochs
        return self.step == self.total_steps or bool(ended and every and ended % every == 0)

    def _make_up_evaluation(self) -> bool:
        """Evaluates the step to go on from where that was given up, or its row was lost; False where a stop came."""
        known = not self.leads or self.last_evaluation.get("step") == self.step
        if not self.step or not self._evaluation_is_due() or all_could(known, self.mesh):
            return True
        if not self._evaluate():
            return False
        if self.leads:
            checkpoint.rate(checkpoint.folder_of(self.run, self.step), self.last_evaluation["top1"])
        return True

    def _opening_line(self) -> str:
        """What the run is about to do."""
        towers = "two processes, one per tower" if self.link else "one process"
        towers += ", decoding shared between them" if self.loader.shares_decoding else ""
        towers = f"{self.coord.replicas} replicas of {towers}" if self.coord.replicas > 1 else towers
        begin = f"from step {self.step}" if self.step else "from the start"
        return (
            f"{pluralize(self.config.train.epochs, 'epoch')} of {pluralize(self.steps_per_epoch, 'step')}, "
            f"batch {self.config.train.batch_size}, {towers}, {self.device}, {begin}"
        )

    def _checkpoint_is_due(self) -> bool:
        """Whether the recipe asks for a checkpoint after this step; there is always one at the end."""
        train, ended = self.config.train, self._ended_epochs()
        by_step = train.checkpoint_every_steps and self.step % train.checkpoint_every_steps == 0
        by_epoch = ended and ended % train.checkpoint_every_epochs == 0
        return bool(self.step == self.total_steps or by_step or by_epoch)

    def _one_step(self) -> bool:
        """Launches one update, and reads what is due; whether a process was asked to stop."""
        begin_s = time.perf_counter()
        if self.link:
            self.link.ledger.clear()
        with self.timed("wait"):
            batch = self.loader.next()
        launched = LaunchedStep(
            step=self.step,
            epoch=batch.epoch,
            keys=batch.keys,
            begin_s=begin_s,
            waited_s=time.perf_counter() - begin_s,
            queue_ready_share=self.loader.queue_fill.ready_share,
        )
        inputs = StepInputs(batch.images, batch.labels, lambda: self._notes(batch).words, self.step)
        if self.verdicts.lag and self.plateaus is not None:
            launched.learning_rate = self._set_rates(self.plateaus)
            launched.begin(self.mesh, self.net.towers, self.runner(inputs))
            self.verdicts.add(launched)
            self._went(launched)
            return self._settle(leave=self.verdicts.lag)
        stop = self._settle()
        launched.begin(self.mesh, self.net.towers, self.runner.measure(inputs))
        with self.timed("check"):
            verdict = self._read(launched)
        self.plateaus = verdict.plateaus
        launched.learning_rate = self._set_rates(verdict.plateaus)
        self.work.update()
        self._went(launched)
        self._note(launched, verdict)
        return stop or verdict.stop

    def _notes(self, batch: Batch) -> LocalStatus:
        """What this process tells the others of a step."""
        return LocalStatus(
            fingerprint=batch.fingerprint,
            order_fingerprint=batch.order_fingerprint,
            stop=self.stop.name is not None,
            plateaus=count_plateaus(self.held_out_errors, self.config.optimizer),
            written=self.saver.written,
            unsaved=self.saver.failed,
        )

    def _set_rates(self, plateaus: int) -> float:
        """Sets the learning rates of the step to be made; returns the weights'."""
        train, epoch = self.config.train, self.step / self.steps_per_epoch
        rates = rates_at(self.config.optimizer, epoch, epochs=train.epochs, plateaus=plateaus)
        self.optimizer.set_rates(rates)
        return rates.weights

    def _went(self, launched: LaunchedStep) -> None:
        """A step was launched, to its end."""
        self.step += 1
        rows = len(launched.keys)
        if self.link and rows > self.ledger_rows:  # a run may go on with a partial batch
            self._note_ledger([row.to_dict() for row in self.link.ledger.rows()], rows)

    def _settle(self, *, leave: int = 0) -> bool:
        """Reads what became of steps, until ``leave`` are left; whether a process was asked to stop."""
        stop = False
        for launched in self.verdicts.due(leave=leave):
            verdict = self._read(launched)
            self._note(launched, verdict)
            stop = stop or verdict.stop
        return stop

    def _read(self, launched: LaunchedStep) -> GlobalStatus:
        """What became of a step, in all processes.

        Raises:
            DivergedError: loss or gradient not finite anywhere; no update was applied, of this step or a later one.
        """
        verdict = launched.read()
        self.saver.advance(verdict)
        if not verdict.finite:
            self.step = launched.step
            self.saver.finish()
            raise launched.diverged(verdict)
        return verdict

    def _note(self, launched: LaunchedStep, verdict: GlobalStatus) -> None:
        """Writes the row of a step that was applied."""
        took_s = self.verdicts.took_s(launched)
        row = step_row(launched, verdict, took_s=took_s, replicas=self.coord.replicas)
        self.images_per_s.append(row["images_per_s"])
        if self.log:
            row["elapsed_s"] = self._elapsed_s()  # wall time since the run began, of all its parts
            self.log.write(row)
            self.progress.step(row)

    def _note_ledger(self, ledger: list[dict[str, Any]], rows: int) -> None:
        """Keeps what crossed in the largest step so far; also for a later part of the run that makes no step."""
        if self.log and ledger != self.ledger:
            self.log.write({"kind": "ledger", "step": self.step, "rows": ledger})
        self.ledger, self.ledger_rows = ledger, rows

    def _evaluate(self) -> bool:
        """Top-1 and top-5 on the held-out split; False where a stop came before all of it was seen."""
        train = self.config.train
        loader = EvaluationLoader(
            self.data,
            self.config.data,
            batch_size=max(1, train.batch_size // self.coord.replicas),
            split=train.evaluate_split,
            device=self.device,
            skip_list=self.skip_list,
            share=BatchShare(self.coord.replica, self.coord.replicas),
        )
        try:
            evaluation = count_net(self.net, self._until_stopped(loader, loader.most_batches), self.mesh)
        except StoppedEvaluation:
            return False
        self.plateaus = self._known_plateaus()
        if evaluation is None or self.log is None:
            return True
        self.held_out_errors.append(1 - evaluation.top1)
        epoch = self.step / self.steps_per_epoch
        row = {"kind": "evaluation", "step": self.step, "epoch": epoch, "split": train.evaluate_split}
        row |= {"views": evaluation.views, "top1": evaluation.top1, "top5": evaluation.top5, "loss": evaluation.loss}
        self.last_evaluation = row | {"num_samples": evaluation.num_samples, "elapsed_s": self._elapsed_s()}
        self.log.write(self.last_evaluation)
        self.log.flush()
        top5 = "" if evaluation.top5 is None else f", top-5 {evaluation.top5:.4f}"
        self.progress.say(
            f"epoch {epoch:g}/{train.epochs}: top-1 {evaluation.top1:.4f}{top5} "
            f"on {pluralize(evaluation.num_samples, 'held-out image')}, "
            f"{self.images_per_s.median():.0f} images/s"
        )
        return True

    def _known_plateaus(self) -> int | None:
        """None where the next step has to ask: only rank 0 knows the evaluations, and tells all in each step."""
        return None if self.config.optimizer.schedule == "plateau" else 0

    def _until_stopped(self, batches: Iterable[Batch], most: int) -> Iterator[Batch]:
        """This replica's batches of an evaluation, as long as no process is asked to stop.

        All agree on that ``most`` times, the batches of the replica that has most of them.

        Raises:
            StoppedEvaluation: one is.
        """
        found = iter(batches)
        for _ in range(most):
            batch = next(found, None)
            if not all_could(self.stop.name is None, self.mesh):
                raise StoppedEvaluation
            if batch is not None:
                yield batch

    def _save(self) -> None:
        """Begins a checkpoint; it is written beside the steps that follow.

        Raises:
            CheckpointError: the one before could not be written (a full disk, for example).
        """
        self.saver.finish()
        top1 = self.last_evaluation["top1"] if self.last_evaluation.get("step") == self.step else None
        self.saver.begin(PendingCheckpoint(self.step, to_toml(self.config), self.loader.state(), top1))
        if self.log:
            self.log.flush()

    def _elapsed_s(self) -> float:
        """Wall time of the run, all its parts together, s."""
        return self.elapsed_before_s + time.perf_counter() - self.started

    def _result(self, reason: str, sentence: str) -> Result:
        """The run so far."""
        evaluation = self.last_evaluation
        return Result(
            exit_reason=reason,
            reason=sentence,
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            top1=evaluation.get("top1"),
            top5=evaluation.get("top5"),
            num_samples=evaluation.get("num_samples", 0),
            elapsed_s=self._elapsed_s(),
            images_per_s=self.images_per_s.median(),
            processes=self.coord.world if self.mesh else 1,
            batch_size=self.config.train.batch_size,
            ledger=self.ledger,
        )
