"""`ray start` for a node that listens on loopback only: `python -m cluster.jobs.loopback_node --head ...`.

Ray replaces 127.0.0.1 by the machine's outer address, and then its servers listen on every interface: whoever reaches
the machine reaches them. Only where Ray is told that it has no clusters (as on macOS) does 127.0.0.1 stay, for which
there is an environment variable; but then `ray start` refuses a second node. So the variable is set for all processes
that the node starts (agents, workers, jobs), and `ray start` itself, here, is told the same by hand (Ray 2.60).
"""

import os
import sys

LOOPBACK = "127.0.0.1"
STAY_ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": 127.0.0.1 is an address as any other


def main(arguments: list[str]) -> None:
    """Become a node of Ray at 127.0.0.1; `arguments` are those of `ray start`."""
    os.environ.pop(STAY_ON_LOOPBACK, None)  # read when Ray is imported
    from ray._private import services
    from ray.scripts import scripts

    services.resolve_ip_for_localhost = lambda host: host  # see the top of this file
    os.environ[STAY_ON_LOOPBACK] = "0"
    scripts.cli(["start", f"--node-ip-address={LOOPBACK}", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
