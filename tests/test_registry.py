"""The tags and snapshots that a promotion makes, and those who read them: gto, DVC, git, and sentiment.registry."""

import io
import json
import sys

import pandas as pd
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from sentiment.errors import RegistryError
from sentiment.registry import Registry, Version, from_parquet, resolve
from sentiment.repository import find_repository
from stages import promote

WEIGHTS = "models/sentiment/weights.txt"
PREDICTIONS = "data/predictions/test.parquet"


@pytest.fixture
def two_versions(promoted_twice, tmp_path, copy_of, inside):
    """A repository with v1.0.0 (f1_macro 0.8) and v1.1.0 (0.9), the second one in production, entered."""
    return inside(copy_of(promoted_twice, tmp_path / "repository"))


def test_versions_are_sorted_by_number_and_not_by_letter(repository, inside):
    inside(repository)
    head = repository.git("rev-parse", "HEAD")
    for name in ("v1.2.0", "v1.10.0", "v1.9.0"):
        repository.git("tag", "--annotate", f"sentiment@{name}", "--message", name)
    registry = Registry(repository.path)
    assert [version.name for version in registry.versions()] == ["v1.10.0", "v1.9.0", "v1.2.0", "v1.0.0"]
    assert registry.versions()[0] == Version("v1.10.0", head)
    assert registry.next_version() == "v1.11.0"


def test_an_empty_registry_has_nothing_in_stage_and_begins_at_v1_0_0(empty, inside):
    registry = Registry(inside(empty).path)
    assert registry.versions() == []
    assert registry.in_stage("production") is None
    assert registry.next_version() == "v1.0.0"
    with pytest.raises(RegistryError, match=r"no version or stage is called production.*none yet"):
        registry.find("production")


@pytest.mark.parametrize("name", ["production", "v1.0.0", "1.0.0", "sentiment@v1.0.0"])
def test_a_version_is_found_by_its_stage_its_name_and_its_tag(promoted, inside, name):
    registry = Registry(inside(promoted).path)
    assert registry.find(name) == Version("v1.0.0", promoted.git("rev-parse", "sentiment@v1.0.0^{commit}"))


def test_an_unknown_version_is_named_together_with_those_that_exist(promoted, inside):
    with pytest.raises(RegistryError, match=r"called v7.0.0 \(versions: v1.0.0\)"):
        Registry(inside(promoted).path).find("v7.0.0")


def test_the_repository_is_found_from_a_folder_within_it(repository, inside):
    inside(repository)
    assert find_repository(repository.path / "models") == repository.path.resolve()


def test_an_experiment_s_folder_belongs_to_the_repository_it_came_from(repository, inside):
    inside(repository)
    inner = repository.path / ".dvc" / "tmp" / "exps" / "standalone" / "tmp1"
    inner.mkdir(parents=True)
    repository.git("init", "--quiet", str(inner))
    assert find_repository(inner) == repository.path.resolve()


def test_a_folder_in_no_repository_is_an_error_that_says_so(tmp_path):
    with pytest.raises(RegistryError, match="is in no git repository"):
        find_repository(tmp_path)


def test_a_snapshot_holds_the_run_on_top_of_head(promoted_twice):
    repository, tag = promoted_twice, "sentiment@v1.1.0"
    lock = YAML(typ="safe").load(repository.git("show", f"{tag}:dvc.lock"))
    locked = {out["path"]: out["md5"] for out in lock["stages"]["train"]["outs"]}
    now = YAML(typ="safe").load(repository.path / "dvc.lock")
    assert repository.git("rev-parse", f"{tag}^{{commit}}^@") == repository.git("rev-parse", "main~")
    assert "lr: 0.9" in repository.git("show", f"{tag}:params.yaml")
    assert locked == {out["path"]: out["md5"] for out in now["stages"]["train"]["outs"]}
    assert json.loads(repository.git("show", f"{tag}:metrics/test.json"))["f1_macro"] == 0.9
    assert json.loads(repository.git("show", f"{tag}:metrics/promotion.json"))["version"] == "v1.1.0"
    assert repository.git("rev-parse", f"{tag}^{{commit}}") == repository.git("rev-parse", "sentiment#production#2^{commit}")


def test_a_tag_says_why_the_model_was_promoted(promoted):
    text = promoted.git("for-each-ref", "--format=%(objecttype) %(taggername) %(contents)", "refs/tags/sentiment@v1.0.0")
    assert text.startswith("tag Ana Souza sentiment v1.0.0: nothing was in production, and f1_macro is 0.8000")
    assert "f1_macro above promote.min_f1: 0.8000 (bound 0.6000), passed" in text


def test_a_promotion_leaves_branch_index_and_files_alone(repository, inside):
    repository.set(train__lr=0.9)
    repository.run("dvc", "repro", "train")
    (repository.path / "anotação.md").write_text("ainda não\n", encoding="utf-8")
    repository.git("add", "anotação.md")
    (repository.path / "train.py").open("a", encoding="utf-8").write("# um comentário\n")
    (repository.path / "solto.txt").write_text("fora do git\n", encoding="utf-8")
    inside(repository)
    before = state(repository)
    promote.main()
    assert repository.decision()["verdict"] == "promoted"
    assert state(repository) == before


def state(repository):
    """The branches, the index and the files, but for the decision that the promotion writes."""
    decision = ":!metrics/promotion.json"
    return [
        repository.git("symbolic-ref", "HEAD"),
        repository.git("for-each-ref", "refs/heads"),
        repository.git("ls-files", "--stage"),
        repository.git("diff", "HEAD", "--", ".", decision),
        repository.git("status", "--porcelain", "--", ".", decision),
        repository.git("stash", "list"),
    ]


def test_dvc_artifacts_get_fetches_production(two_versions, tmp_path):
    two_versions.run("dvc", "artifacts", "get", ".", "sentiment", "--stage", "production", "--out", str(tmp_path / "model"))
    assert (tmp_path / "model" / "weights.txt").read_text(encoding="utf-8") == "36 de 40\n"


@pytest.mark.parametrize(
    ("asked", "version"), [({"stage": "production"}, "v1.1.0"), ({"version": "v1.0.0"}, "v1.0.0"), ({}, "v1.1.0")]
)
def test_dvc_api_tells_where_a_model_is(two_versions, asked, version):
    import dvc.api

    shown = dvc.api.artifacts_show("sentiment", repo=str(two_versions.path), **asked)
    assert shown["path"] == "models/sentiment"
    assert two_versions.git("rev-parse", f"{shown['rev']}^{{commit}}") == two_versions.git(
        "rev-parse", f"sentiment@{version}^{{commit}}"
    )


def test_dvc_file_system_reads_an_old_version_s_model_and_predictions(two_versions):
    from dvc.api import DVCFileSystem

    files = DVCFileSystem(str(two_versions.path), rev="sentiment@v1.0.0")
    predictions = pd.read_parquet(io.BytesIO(files.read_bytes(PREDICTIONS)))
    assert files.read_text(WEIGHTS) == "32 de 40\n"
    assert (predictions["label"] == predictions["prediction"]).mean() == 0.8


def test_git_checkout_and_dvc_checkout_bring_a_version_back(two_versions):
    two_versions.git("checkout", "--quiet", "sentiment@v1.0.0")
    two_versions.run("dvc", "checkout")
    assert (two_versions.path / WEIGHTS).read_text(encoding="utf-8") == "32 de 40\n"
    assert "lr: 0.8" in (two_versions.path / "params.yaml").read_text(encoding="utf-8")


def test_gto_shows_versions_and_the_stage(two_versions):
    rows = json.loads(two_versions.run("gto", "show", "--json").stdout)
    assert rows["sentiment"]["version"] == "v1.1.0"
    assert "v1.1.0" in json.dumps(rows["sentiment"]["stage"])


def test_a_model_folder_is_fetched_once_and_kept_by_version(two_versions):
    name, folder = resolve("v1.0.0", two_versions.path)
    kept = folder / "weights.txt"
    assert (name, kept.read_text(encoding="utf-8")) == ("v1.0.0", "32 de 40\n")
    kept.write_text("a mesma cópia", encoding="utf-8")
    assert resolve("v1.0.0", two_versions.path) == (name, folder)
    assert kept.read_text(encoding="utf-8") == "a mesma cópia"
    assert "models/registry" not in two_versions.git("status", "--porcelain", "--untracked-files=all")


def test_a_folder_is_its_own_model(tmp_path):
    assert resolve(str(tmp_path)) == (str(tmp_path), tmp_path)


def test_a_rollback_by_gto_is_what_the_next_model_is_compared_with(two_versions, candidate):
    two_versions.run("gto", "assign", "sentiment", "--version", "v1.0.0", "--stage", "production", "--force")
    assert Registry(two_versions.path).in_stage("production").name == "v1.0.0"
    assert resolve("production", two_versions.path)[0] == "v1.0.0"
    candidate(two_versions, train__lr=0.85)
    promote.main()
    decision = two_versions.decision()
    assert (decision["production_version"], decision["production"]) == ("v1.0.0", 0.8)
    assert (decision["version"], decision["tag"]) == ("v1.2.0", "sentiment#production#4")


def test_a_table_in_memory_is_read_without_a_hold_on_its_bytes_that_a_thread_could_let_go_of_at_exit(monkeypatch):
    written = io.BytesIO()
    pd.DataFrame({"text": ["bom", "ruim"], "label": [1, 0]}).to_parquet(written)
    content, holders, read = written.getvalue(), [], pq.read_table
    free = sys.getrefcount(content)

    def counts(*args, **options):
        holders.append(sys.getrefcount(content))
        return read(*args, **options)

    monkeypatch.setattr(pq, "read_table", counts)
    assert from_parquet(content, columns=["text"]).to_dict("list") == {"text": ["bom", "ruim"]}
    assert holders
    assert holders[0] <= free + 1  # the argument of from_parquet
