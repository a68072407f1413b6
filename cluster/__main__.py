"""Command line: python -m cluster up | down | submit | status | logs | stop | doctor."""

import twotower.linux_only  # noqa: F401  before all that other systems lack

# isort: split
import argparse
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from cluster import commands
from cluster.errors import ClusterError
from cluster.local import default_folder
from cluster.training import ray_train
from twotower import verbosity
from twotower.command_line import Parser
from twotower.words import MOST_OF_A_LINE, cut, one_line

Add = Callable[..., argparse.ArgumentParser]
EXIT_CODES = (
    "exit codes: of submit and logs --follow the command's own; 0 done, 1 a bug of ours, 2 something to fix (one line "
    "says what), 70 a job ended without telling how, 127 its program is not there, 128 + N ended by signal N; those of "
    "all commands are in docs/commands.md"
)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m cluster",
        description="Run the project's commands as Ray jobs: on this machine, a `ray up` cluster, KubeRay or Slurm.",
        epilog=_example(
            "python -m cluster up --local",
            "python -m cluster submit -- python -m pipeline prepare --source digits --output /data/digits",
            "python -m cluster down",
        )
        + f"\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(run: Callable[[argparse.Namespace], int], text: str, *examples: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            run.__name__,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=_example(*examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    _add_cluster_commands(add)
    _add_job_commands(add)
    doctor = add(commands.doctor, "check a cluster and this machine, and say what to do", "python -m cluster doctor")
    _add_address(doctor)
    doctor.add_argument("--json", action="store_true", help="findings as JSON")
    verbosity.add_common_options(parser, subparsers)
    return parser


def _example(*lines: str) -> str:
    return "example:\n" + textwrap.indent("\n".join(lines), "  ")


def _add_address(parser: argparse.ArgumentParser) -> None:
    where = (
        "dashboard, http://HOST:PORT (default: RAY_API_SERVER_ADDRESS, else port 8265 here); RAY_ADDRESS is not asked"
    )
    parser.add_argument("--address", metavar="URL", help=where)
    place = "of the local cluster, whose token is there (default: %(default)s)"
    parser.add_argument("--folder", type=Path, default=default_folder(), metavar="DIR", help=place)


def _add_cluster_commands(add: Add) -> None:
    up = add(
        commands.up,
        "start a cluster, with token authentication and the dashboard on loopback",
        "python -m cluster up --local",
        "python -m cluster up --local --nodes 2 --cpus 1",
        "python -m cluster up cluster/deploy/ray-cluster.yaml",
    )
    down = add(commands.down, "end a cluster that `up` started", "python -m cluster down")
    for parser in (up, down):
        parser.add_argument("config", nargs="?", metavar="CLUSTER.yaml", help="a `ray up` cluster")
        parser.add_argument("--local", action="store_true", help="on this machine (default without CLUSTER.yaml)")
        place = "sockets and logs of the local cluster (default: %(default)s)"
        parser.add_argument("--folder", type=Path, default=default_folder(), metavar="DIR", help=place)
    up.add_argument("--cpus", type=int, default=0, metavar="N", help="CPUs per node (default: all cores, shared)")
    up.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes on this machine (default: 1)")
    up.add_argument("--dashboard-port", type=int, default=8265, metavar="N", help="0: any (default: 8265)")
    time_to_save = "seconds that a stopped job has to save its work before it is killed (default: 60)"
    up.add_argument("--stop-wait", type=int, default=60, metavar="S", help=time_to_save)


def _add_job_commands(add: Add) -> None:
    submit = add(
        commands.submit,
        "run a command as a Ray job, show its log, and exit with its exit code",
        "python -m cluster submit -- python -m pipeline prepare --source digits --output /data/digits --address auto",
        "python -m cluster submit --towers 2 -- python -m trainer train --config configs/digits.toml "
        "--data /data/digits --run /runs/one",
    )
    option = submit.add_argument
    visible = "variable for the job; Ray shows it in logs and to all who use the cluster; repeatable"
    hidden = "variable for the job that Ray does not show, with its value here or a file's content; repeatable"
    include = "file or folder of the tree to send, though git does not know it or it looks like a secret; repeatable"
    option("--id", metavar="ID", help="job id, never used before on the cluster (default: a new one)")
    option("--no-wait", action="store_true", help="return when the cluster has the job")
    option("--env", action="append", default=[], metavar="NAME=VALUE", help=visible)
    option("--secret", action="append", default=[], metavar="NAME[=@FILE]", help=hidden)
    option("--include", action="append", default=[], metavar="PATH", help=include)
    option("--untracked", action="store_true", help="send also the files that git does not know and does not ignore")
    option("--dry-run", action="store_true", help="only list the files that would be sent")
    option("--python", default="python", metavar="PATH", help="interpreter on the cluster (default: python)")
    option("--every-node", action="store_true", help="run it on every node at once, for example a benchmark")
    option("--print", action="store_true", help="only print the equal `ray job submit` command")
    ray_train.add_options(submit.add_argument_group("training", "with --towers or --replicas, through Ray Train"))
    option("entrypoint", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="what to run")
    status = add(commands.status, "show jobs: state, progress, exit code", "python -m cluster status --json")
    status.add_argument("id", nargs="?", metavar="ID", help="one job (default: all)")
    status.add_argument("--json", action="store_true", help="as JSON")
    logs = add(commands.logs, "show a job's log", "python -m cluster logs --follow prepare-20261122-103000-1f3a")
    logs.add_argument("id", metavar="ID")
    logs.add_argument("--follow", action="store_true", help="until the job is over; exits with its exit code")
    stop = add(commands.stop, "stop a job: SIGTERM, time to save, SIGKILL", "python -m cluster stop ID")
    stop.add_argument("id", metavar="ID")
    for parser in (submit, status, logs, stop):
        _add_address(parser)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; 2 after an error that the user can mend."""
    _open_closed_streams()
    parsed = _parser().parse_args(arguments)
    verbosity.apply(parsed)
    try:
        code = int(parsed.run(parsed))
        sys.stdout.flush()
        return code
    except ClusterError as error:
        verbosity.log.debug("the error arose here:", exc_info=True)
        print(f"error: {cut(one_line(str(error)), MOST_OF_A_LINE)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still unwritten would be tried again at the end
        if isinstance(error, BrokenPipeError):
            return 141
        place = error.filename or "stdout"
        print(f"error: {place}: {error.strerror or error}", file=sys.stderr)
        return 2


def _open_closed_streams() -> None:
    """A shell's `>&-` leaves Python without a stream; what is written to it is then for nobody."""
    sys.stdout = sys.stdout or open(os.open(os.devnull, os.O_WRONLY), "w")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.open(os.devnull, os.O_WRONLY), "w")  # noqa: SIM115, PTH123


if __name__ == "__main__":
    sys.exit(main())
