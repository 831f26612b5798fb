"""The git repository that a run belongs to, and files of its revisions."""

import os
import subprocess
from pathlib import Path

from sentiment.errors import RegistryError
from sentiment.logs import first_line

EXPERIMENTS = (".dvc", "tmp", "exps")
GIT_SECONDS = 600


def git(folder: Path, *arguments: str, given: str | None = None, **environment: str) -> str:
    """The output of a git command, which reads what is `given`; raises RegistryError where it fails, or after 10 minutes."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            env=os.environ | {"GIT_TERMINAL_PROMPT": "0"} | environment,
            input=given,
            stdin=subprocess.DEVNULL if given is None else None,
            capture_output=True,
            text=True,
            check=False,
            timeout=GIT_SECONDS,
        )
    except FileNotFoundError:
        raise RegistryError("git is not installed, so no model can be promoted; install git") from None
    except subprocess.TimeoutExpired:
        raise RegistryError(f"git {arguments[0]} took more than {GIT_SECONDS} s; check the network and the address") from None
    if done.returncode:
        raise RegistryError(f"git {arguments[0]} failed ({done.stderr.strip() or done.returncode}); mend it and promote again")
    return done.stdout.strip()


def find_repository(folder: Path) -> Path:
    """The root of the repository that keeps the tags: for a run of `dvc exp run --temp` or `--queue` the one it came from.

    Raises RegistryError where there is none.
    """
    try:
        root = Path(git(folder, "rev-parse", "--show-toplevel")).resolve()
    except RegistryError as error:
        raise RegistryError(f"{folder.resolve()} is in no git repository ({first_line(error)}); clone the project") from error
    for parent in root.parents:
        if parent.parts[-3:] == EXPERIMENTS:
            return Path(*parent.parts[:-3])
    return root
