"""``make audit``: licences of everything that is installed, and known vulnerabilities. ``make licences``: a list.

Licences are read from each package's own metadata. Vulnerabilities are asked of a service by pip-audit, which stands in
an environment of its own; what it could not look up counts as not checked, never as safe. Exit codes: 0 all is well,
1 a licence that is not expected or a vulnerability, 3 not everything could be checked.
"""

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.lock import normalized

PERMISSIVE = re.compile(
    r"MIT|BSD|Apache|PSF|Python Software Foundation|ISC\b|Zlib|CC0|BSL-1\.0|Unlicense|HPND", re.IGNORECASE
)
OTHER = re.compile(r"GPL|MPL|Mozilla|EPL|EUPL|CDDL|NVIDIA|Proprietary|Non-?Commercial", re.IGNORECASE)
# What is known not to be permissive, and why it may be used: a name, or the beginning of names.
EXPECTED = {
    "nvidia-": "NVIDIA's own, of CUDA's libraries, which torch and DALI need",
    "cuda-toolkit": "names NVIDIA's packages and holds nothing itself",
    "certifi": "MPL-2.0, of its own files only; unchanged",
    "pathspec": "MPL-2.0, of its own files only; unchanged; of mypy",
    "tqdm": "MPL-2.0 and MIT, of its own files only; unchanged",
    "twotower": "this",
}


def licence_of(metadata: importlib.metadata.PackageMetadata) -> str:
    """What a package says its licence is, in a line; empty where it says nothing."""
    stated = metadata.get_all("License-Expression") or []
    stated += [row.rpartition("::")[2].strip() for row in metadata.get_all("Classifier") or [] if row.startswith("Lic")]
    stated += (metadata.get("License") or "").strip().splitlines()[:1]
    return "; ".join(dict.fromkeys(text.strip() for text in stated if text.strip(" =")))


def is_permissive(licence: str) -> bool:
    """Whether a licence asks for no more than a notice."""
    return bool(PERMISSIVE.search(licence)) and not OTHER.search(licence)


def expected(name: str) -> str:
    """Why a package that is not permissive may be used; empty for one that nobody has looked at."""
    family = name.partition("-")[0] + "-"
    return EXPECTED.get(name) or EXPECTED.get(family, "")


def check_licences(packages: Iterable[importlib.metadata.Distribution]) -> list[str]:
    """Prints what is not permissive; returns the names of those that nobody has looked at."""
    found = {package.name: licence_of(package.metadata) for package in packages}
    strict = {name: licence for name, licence in found.items() if not is_permissive(licence)}
    print(
        f"licences: {len(found) - len(strict)} of {len(found)} packages are permissive (MIT, BSD, Apache and the like)"
    )
    for name, licence in sorted(strict.items()):
        print(f"  {name}: {licence or 'not stated'}: {expected(name) or 'NOT EXPECTED: look at it'}")
    return [name for name in strict if not expected(name)]


def list_licences(lock: Path) -> int:
    """Prints version and licence of every package of a lock file, which is what the images hold; how many are unknown.

    A package that is not installed here is named as such: its licence was not looked at.
    """
    installed = {normalized(package.name): package for package in importlib.metadata.distributions()}
    names = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", lock.read_text(), re.MULTILINE)
    unknown = 0
    for name, version in names:
        package = installed.get(normalized(name))
        licence = licence_of(package.metadata) if package else ""
        unknown += not licence
        why = "" if not licence or is_permissive(licence) else f" ({expected(normalized(name)) or 'not looked at'})"
        print(f"{name} {version}: {licence or ('not stated' if package else 'not installed here')}{why}")
    print(f"{len(names)} packages of {lock.name}, {unknown} without a licence that could be read here")
    return unknown


def check_vulnerabilities(pip_audit: str) -> tuple[list[str], str]:
    """Asks pip-audit about this environment.

    Returns:
        A line for each known vulnerability, and what could not be checked (empty where everything was).
    """
    command = [pip_audit, "--progress-spinner=off", "--format=json", f"--path={sysconfig.get_path('purelib')}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"pip-audit cannot be run: {error}"
    try:
        rows = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return [], f"pip-audit says: {(done.stderr.strip().splitlines() or ['nothing'])[-1][:200]}"
    return summarize(rows)


def summarize(rows: Sequence[dict]) -> tuple[list[str], str]:
    """What pip-audit's rows say: known vulnerabilities, and what could not be looked up."""
    found = [
        f"{row['name']} {row['version']}: {bad['id']}, fixed in {', '.join(bad['fix_versions']) or 'no version yet'}"
        for row in rows
        for bad in row.get("vulns", ())
    ]
    skipped = [row["name"] for row in rows if "skip_reason" in row and row["name"] != "twotower"]
    if not skipped:
        return found, ""
    shown = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
    return found, f"{len(skipped)} of {len(rows)} packages are unknown to the service ({shown})"


def main() -> int:
    """Checks both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(sys.prefix).with_name(".venv-audit") / "bin" / "pip-audit"
    parser.add_argument("--pip-audit", default=str(default), metavar="PATH", help="default: %(default)s")
    parser.add_argument("--list", type=Path, metavar="LOCK", help="only list the licences of a lock file's packages")
    arguments = parser.parse_args()
    if arguments.list:
        return 3 if list_licences(arguments.list) else 0
    unexpected = check_licences(importlib.metadata.distributions())
    known, unchecked = check_vulnerabilities(arguments.pip_audit)
    print(f"vulnerabilities: {len(known)} known" + (f"; NOT CHECKED: {unchecked}" if unchecked else ""))
    for line in known:
        print(f"  {line}")
    return 1 if unexpected or known else 3 if unchecked else 0


if __name__ == "__main__":
    sys.exit(main())
