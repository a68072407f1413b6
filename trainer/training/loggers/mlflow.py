"""MLflow: ``train.loggers = ["mlflow"]``, extra ``mlflow``.

Its own variables hold: ``MLFLOW_TRACKING_URI`` names the server, ``MLFLOW_EXPERIMENT_NAME`` the experiment. Without a
server everything is in ``RUN/loggers/mlflow`` (``mlflow ui --backend-store-uri RUN/loggers/mlflow``).
"""

import os
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.training.loggers import FOLDER, flat_recipe, note, recall, scalars_of

IN_BACKGROUND = True
MOST_METRICS = 1000  # of one call, the server's limit
MOST_PARAMS = 100
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def open_logger(run: Path, config: Config, from_step: int) -> "MlflowLogger":
    """Begins a run there, or goes on with this run's.

    Raises:
        Exception: mlflow's own.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    from mlflow.entities import Param
    from mlflow.tracking import MlflowClient

    noted = recall(run, "mlflow")
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not server:
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # the only store that mlflow-skinny has of its own
    client = MlflowClient(server or (run / FOLDER / "mlflow").absolute().as_uri())
    if noted.get("server") == server:
        client.update_run(noted["run"], status="RUNNING")
        return MlflowLogger(client, noted["run"])
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "twotower")
    experiment = client.get_experiment_by_name(name)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
    run_id = client.create_run(experiment_id, run_name=run.resolve().name).info.run_id
    params = [Param(key, str(value)) for key, value in flat_recipe(config).items()]
    for first in range(0, len(params), MOST_PARAMS):
        client.log_batch(run_id, params=params[first : first + MOST_PARAMS])
    note(run, "mlflow", {"server": server, "run": run_id})
    return MlflowLogger(client, run_id)


class MlflowLogger:
    """Adds rows to an open run of MLflow; of steps that it has already, nothing: a resumed run repeats them."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._waiting: list[Any] = []
        names = client.get_run(run_id).data.metrics
        self._known = {name: max(m.step for m in client.get_metric_history(run_id, name)) for name in names}

    def add(self, row: dict[str, Any], at_s: float) -> None:
        """Keeps the row's numbers for the next call."""
        from mlflow.entities import Metric

        for name, value in scalars_of(row).items():
            if row["step"] > self._known.get(name, -1):
                self._waiting.append(Metric(name, value, round(1000 * at_s), row["step"]))

    def flush(self) -> None:
        """Sends what is kept."""
        while self._waiting:
            self._client.log_batch(self._run_id, metrics=self._waiting[:MOST_METRICS])
            del self._waiting[:MOST_METRICS]

    def close(self, exit_reason: str) -> None:
        """Sends the rest, and how the run ended."""
        self.flush()
        self._client.set_terminated(self._run_id, STATUS[exit_reason])
