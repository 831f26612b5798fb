"""The model registry: versions and stages as git tags by gto, models in DVC's cache. Nothing else knows about tags.

A version is an annotated tag `sentiment@v1.0.0`, a stage's turn another, `sentiment#production#1`; both stand on a snapshot
commit that holds the parameters, metrics and dvc.lock of the run, so that DVC finds the model there.
"""

import hashlib
import logging
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock

from sentiment.errors import RegistryError
from sentiment.files import atomic
from sentiment.logs import first_line
from sentiment.repository import find_repository, git

if TYPE_CHECKING:
    import pandas as pd

ARTIFACT = "sentiment"
MODEL = "models/sentiment"
FIRST_VERSION = "v1.0.0"
PREDICTIONS = "data/predictions/test.parquet"
COPIES = Path("models/registry/copies")  # of the tags of git URLs
HOLDING_REF = "refs/sentiment/snapshot"
UNFINISHED = "refs/sentiment/promotion"  # the version tag of a promotion, from before its tags are made until they are there
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|[\w.-]+@[\w.-]+:")  # https://…, ssh://…, file://…, git@host:owner/name


log = logging.getLogger(__name__)


def from_parquet(content: bytes, columns: list[str] | None = None) -> "pd.DataFrame":
    """The table of a Parquet file whose content is in memory.

    The content is copied into Arrow's own memory: a thread of Arrow's that lets go of a Python object while the interpreter ends
    aborts the process (https://github.com/apache/arrow/issues/34314).
    """
    import pandas as pd
    import pyarrow as pa

    copy = pa.BufferOutputStream()
    copy.write(content)
    return pd.read_parquet(pa.BufferReader(copy.getvalue()), columns=columns)


class Version(NamedTuple):
    """A registered model: its version (`v1.0.0`) and the commit that the tag names, 40 hexadecimal digits."""

    name: str
    commit: str

    @property
    def tag(self) -> str:
        """The version's git tag."""
        return f"{ARTIFACT}@{self.name}"


class Registry:
    """The versions and stages of a repository at `root`, on this disk; its models come through DVC from `address`, if given."""

    def __init__(self, root: Path, address: str | None = None) -> None:
        self.root, self.address = root, address

    @classmethod
    def open(cls, where: str | Path, copies: Path = COPIES) -> "Registry":
        """The registry of a folder in a clone, or of a git URL, whose tags are then copied to a folder in `copies`.

        Raises RegistryError if there is no repository.
        """
        if not ADDRESS.match(str(where)):
            return cls(find_repository(Path(where)))
        address = str(where)
        copy = copies / hashlib.sha256(address.encode()).hexdigest()[:16]
        with locked(copy):
            if not (copy / ".git").is_dir():
                with atomic(copy) as part:
                    git(Path(), "clone", "--quiet", "--no-checkout", address, str(part))
        return cls(copy.resolve(), address)

    def state(self) -> str:
        """All tags and their commits, as text: what differs after a promotion, or after going back. Takes milliseconds."""
        pattern = (f"refs/tags/{ARTIFACT}@*", f"refs/tags/{ARTIFACT}#*")
        if self.address:
            return git(self.root, "ls-remote", "--tags", self.address, *pattern)
        return git(self.root, "for-each-ref", "--format=%(objectname) %(refname)", *pattern)

    def fetch(self) -> None:
        """Bring the tags of a git URL up to date; nothing happens for a clone's folder."""
        if self.address:
            with locked(self.root):
                git(self.root, "fetch", "--quiet", "--force", "--tags", "--prune", "--prune-tags", "origin")

    def versions(self) -> list[Version]:
        """All versions, the newest first."""
        import gto.api

        rows = gto.api.show(str(self.root))
        if ARTIFACT not in rows:
            return []
        found = [row for row in gto.api.show(str(self.root), ARTIFACT) if row["registrations"]]
        return sorted((Version(row["version"], row["commit_hexsha"]) for row in found), key=number, reverse=True)

    def in_stage(self, stage: str) -> Version | None:
        """The version that a stage holds, or None: the one of its tag with the highest number that was not taken back.

        gto itself shows the highest version that ever had the stage, so that going back to an older one would not show.
        """
        from gto.constants import Action
        from gto.tag import parse_name

        turns, taken_back = [], set()
        for line in git(self.root, "for-each-ref", "--format=%(refname:short) %(*objectname)", f"refs/tags/{ARTIFACT}#*").split(
            "\n"
        ):
            tag = parse_name(line.split(" ")[0], raise_on_fail=False)
            if tag.get("stage") == stage:
                turns.append((tag.get("counter", 0), tag["action"], line.split(" ")[1]))
        registered = {version.commit: version for version in self.versions()}
        for _, action, commit in sorted(turns, reverse=True):
            if action == Action.UNASSIGN:
                taken_back.add(commit)
            elif commit not in taken_back and commit in registered:
                return registered[commit]
        return None

    def find(self, name: str) -> Version:
        """The version called `v1.0.0`, or the one that a stage of that name holds; raises RegistryError if there is none."""
        held = self.in_stage(name)
        for version in [held] if held else self.versions():
            if held or name in (version.name, version.tag, version.name.removeprefix("v")):
                return version
        known = ", ".join(version.name for version in self.versions()) or "none yet"
        raise RegistryError(f"no version or stage is called {name} (versions: {known}); promote one with `dvc repro`")

    def read(self, version: Version, path: str) -> bytes:
        """A file of the version's commit, in git or in DVC's cache; raises RegistryError if it is not to be had."""
        with self.files(version) as files:
            return files.read_bytes(path)

    def folder(self, version: Version) -> Path:
        """The version's model folder, fetched from DVC's cache or remote once; raises RegistryError if it is not there."""
        target = self.root / "models" / "registry" / f"{version.name}-{version.commit[:12]}"
        with locked(target):
            if not target.is_dir():
                with self.files(version) as files, atomic(target) as part:
                    files.get(MODEL, str(part), recursive=True)
        return target

    def test_reviews(self, version: Version) -> "pd.DataFrame":
        """The reviews that a version was tested on: text, label and prediction (both by name), and rows without a label.

        The rows without a label are the texts of its validation split. Raises RegistryError if they are not to be had.
        """
        import pandas as pd

        def read(path: str) -> pd.DataFrame:
            return from_parquet(self.read(version, path))

        tested = read(PREDICTIONS)[["review_id", "label", "prediction"]]
        texts = read("data/prepared/test.parquet").set_index("review_id")["text"]
        others = read("data/prepared/validation.parquet")[["text"]].assign(label=None, prediction=None)
        return pd.concat([tested.assign(text=texts.loc[tested["review_id"]].to_numpy()), others], ignore_index=True)

    @contextmanager
    def files(self, version: Version) -> Iterator[Any]:
        """The files of a version's commit; what fails inside raises RegistryError."""
        from dvc.api import DVCFileSystem

        try:
            yield DVCFileSystem(self.address or str(self.root), rev=version.commit)
        except Exception as error:
            raise RegistryError(
                f"{version.tag} cannot be read from DVC's cache ({type(error).__name__}: {first_line(error)}); fetch it with "
                f"`dvc pull` at that tag, or train it again: git checkout {version.tag} && dvc repro"
            ) from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let one promotion at a time compare and tag, after taking back one that was killed half-way."""
        folder = self.root / ".dvc" / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "promotion.lock"):
            self.take_back()
            yield

    def take_back(self) -> None:
        """Remove the version of a promotion that was killed before it had its stage; nothing if there is none."""
        unfinished = git(self.root, "for-each-ref", "--format=%(tag) %(*objectname)", UNFINISHED)
        if not unfinished:
            return
        name, commit = unfinished.split()
        turns = git(self.root, "for-each-ref", "--format=%(*objectname)", f"refs/tags/{ARTIFACT}#*").split()
        if commit not in turns and git(self.root, "tag", "--list", name):
            git(self.root, "update-ref", "-d", f"refs/tags/{name}")
            log.warning("%s was left by a promotion that was killed, and is taken back", name)
        git(self.root, "update-ref", "-d", UNFINISHED)

    def check_writable(self) -> None:
        """Raise RegistryError unless tags can be made here: a full clone, and a git identity."""
        if git(self.root, "rev-parse", "--is-shallow-repository") == "true":
            raise RegistryError("this is a shallow clone, which lacks tags; run `git fetch --unshallow --tags`")
        try:
            git(self.root, "var", "GIT_COMMITTER_IDENT")
        except RegistryError:
            raise RegistryError(
                "git does not know who you are, so it makes no tag; run `git config --global user.name YOU` and "
                "`git config --global user.email YOU@EXAMPLE.COM`"
            ) from None
        git(self.root, "rev-parse", "--verify", "HEAD")

    def next_version(self) -> str:
        """The version after the newest one: v1.0.0, v1.1.0, v1.2.0, …"""
        versions = self.versions()
        if not versions:
            return FIRST_VERSION
        first, second, _ = number(versions[0])
        return f"v{first}.{second + 1}.0"

    def promote(self, workspace: Path, name: str, stage: str, message: str) -> str:
        """Register a snapshot of the workspace as version `name` and give it the stage; returns the stage's tag.

        The workspace's branch, index and files stay as they are. Both tags are made in one transaction of git, and not one after
        the other by gto, so that whoever kills it finds both or none; between the two instants in which git writes them,
        `take_back` does the rest.
        """
        commit = self.snapshot(workspace, f"Snapshot for {ARTIFACT}@{name}\n\n{message}")
        self.wait_for_a_new_second()
        tags = (f"{ARTIFACT}@{name}", self.next_turn(stage))
        version, turn = (self.tag_object(tag, commit, message) for tag in tags)
        made = [f"create refs/tags/{tag} {found}" for tag, found in zip(tags, (version, turn), strict=True)]
        git(self.root, "update-ref", UNFINISHED, version)
        git(self.root, "update-ref", "--stdin", given="\n".join(["start", *made, "prepare", "commit", ""]))
        for done in (UNFINISHED, HOLDING_REF):
            git(self.root, "update-ref", "-d", done)
        return tags[1]

    def tag_object(self, name: str, commit: str, message: str) -> str:
        """An annotated tag that no reference names yet; returns its hash."""
        tagger = git(self.root, "var", "GIT_COMMITTER_IDENT")
        return git(self.root, "mktag", given=f"object {commit}\ntype commit\ntag {name}\ntagger {tagger}\n\n{message}\n")

    def next_turn(self, stage: str) -> str:
        """The tag of a stage's next turn, numbered as gto does it: one more than the highest of all stages."""
        numbers = re.findall(r"#(\d+)$", git(self.root, "tag", "--list", f"{ARTIFACT}#*"), re.MULTILINE)
        return f"{ARTIFACT}#{stage}#{max(map(int, numbers), default=0) + 1}"

    def identity(self) -> tuple[str, str]:
        """The name and the e-mail address that git signs with here."""
        name, email = git(self.root, "var", "GIT_COMMITTER_IDENT").rsplit(">", 1)[0].split(" <", 1)
        return name, email

    def wait_for_a_new_second(self) -> None:
        """Git dates tags by the second, and gto and DVC order a stage's turns by date: let no two share one."""
        dates = git(self.root, "for-each-ref", "--format=%(taggerdate:unix)", f"refs/tags/{ARTIFACT}#*").split()
        newest = max(map(int, dates), default=0)
        while newest <= time.time() < newest + 1:
            time.sleep(0.05)

    def snapshot(self, workspace: Path, message: str) -> str:
        """Commit HEAD's tree with the tracked changes, dvc.lock and metrics/ on top, by a temporary index; returns its hash.

        The parent is HEAD; no branch moves. A workspace that is a repository of its own (`--temp`, `--queue`) hands the
        commit over to the repository of the tags.
        """
        with tempfile.TemporaryDirectory() as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            git(workspace, "read-tree", "HEAD", **index)
            git(workspace, "add", "--update", ".", **index)
            there = [name for name in ("dvc.lock", "metrics") if (workspace / name).exists()]
            git(workspace, "add", "--", *there, **index)
            tree = git(workspace, "write-tree", **index)
        name, email = self.identity()
        who = {"GIT_AUTHOR_NAME": name, "GIT_AUTHOR_EMAIL": email, "GIT_COMMITTER_NAME": name, "GIT_COMMITTER_EMAIL": email}
        commit = git(workspace, "commit-tree", tree, "-p", "HEAD", "-m", message, **who)
        if Path(git(workspace, "rev-parse", "--show-toplevel")).resolve() != self.root.resolve():
            git(workspace, "update-ref", HOLDING_REF, commit)
            git(self.root, "fetch", "--quiet", "--no-tags", str(workspace.resolve()), f"+{HOLDING_REF}:{HOLDING_REF}")
        return commit


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Let one process at a time make a file or folder that several may want."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        yield


def number(version: Version) -> tuple[int, ...]:
    """A version's numbers, to sort by: (1, 0, 0) for v1.0.0."""
    return tuple(int(part) for part in version.name.removeprefix("v").split("-")[0].split("."))


def resolve(name: str, start: Path = Path()) -> tuple[str, Path]:
    """The version's name and model folder for `production` (or any stage), a version, or a folder (its path as its name)."""
    if Path(name).is_dir():
        return name, Path(name)
    registry = Registry(find_repository(start))
    version = registry.find(name)
    return version.name, registry.folder(version)
