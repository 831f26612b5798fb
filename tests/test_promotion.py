"""What the promote stage decides, and what it leaves behind when it decides in a run of `dvc repro` or `dvc exp run`."""

import contextlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from sentiment import checkpoint, params, registry
from sentiment.classifier import Classifier, Inference
from sentiment.errors import ParamsError
from sentiment.registry import Registry
from stages import promote

V1 = {"sentiment@v1.0.0", "sentiment#production#1"}
V2 = V1 | {"sentiment@v1.1.0", "sentiment#production#2"}
QUEUE_SECONDS = 120


def decide(repository):
    """The decision of the promote stage, run here."""
    promote.main()
    return repository.decision()


def f1_in_production(repository):
    """The f1_macro that the version in production was registered with."""
    registry = Registry(repository.path)
    return json.loads(registry.read(registry.in_stage("production"), "metrics/test.json"))["f1_macro"]


def test_the_first_model_is_promoted_as_v1_0_0(promoted):
    decision = promoted.decision()
    assert promoted.tags() == V1
    assert (decision["verdict"], decision["version"], decision["tag"]) == ("promoted", "v1.0.0", "sentiment#production#1")
    assert decision["production"] is None


def test_a_better_model_becomes_v1_1_0_in_production(repository):
    repository.set(train__lr=0.9)
    repository.run("dvc", "repro")
    decision = repository.decision()
    assert repository.tags() == V2
    assert (decision["verdict"], decision["version"], decision["tag"]) == ("promoted", "v1.1.0", "sentiment#production#2")
    assert (decision["candidate"], decision["production"], decision["production_version"]) == (0.9, 0.8, "v1.0.0")


@pytest.mark.parametrize("quality", [0.7, 0.8], ids=["worse", "tie"])
def test_a_model_that_is_not_better_is_kept_out_with_a_reason(repository, candidate, quality):
    decision = decide(candidate(repository, train__lr=quality))
    assert decision["verdict"] == "kept"
    assert "promote.min_delta" in decision["reason"]
    assert f"{quality:.4f} against 0.8000 of v1.0.0" in decision["reason"]
    assert repository.tags() == V1


def test_a_run_again_of_a_rejected_model_makes_no_tag(repository):
    repository.run("dvc", "repro", "--force", "--single-item", "promote")
    assert repository.decision()["verdict"] == "kept"
    assert repository.tags() == V1


@pytest.mark.parametrize(("min_f1", "verdict"), [(0.79, "promoted"), (0.8, "kept"), (0.81, "kept")])
def test_f1_macro_has_to_be_above_min_f1(empty, candidate, min_f1, verdict):
    decision = decide(candidate(empty, train__lr=0.8, promote__min_f1=min_f1))
    assert decision["verdict"] == verdict
    assert ("promote.min_f1" in decision["reason"]) == (verdict == "kept")
    assert bool(empty.tags()) == (verdict == "promoted")


@pytest.mark.parametrize(("min_delta", "verdict"), [(0.09, "promoted"), (0.11, "kept")])
def test_the_gain_has_to_be_above_min_delta(repository, candidate, min_delta, verdict):
    decision = decide(candidate(repository, train__lr=0.9, promote__min_delta=min_delta))
    assert decision["verdict"] == verdict
    assert (repository.tags() == V2) == (verdict == "promoted")


@pytest.mark.parametrize("metric", ["f1_makro", "loss", "reviews"])
def test_a_metric_to_promote_by_has_to_be_one_that_grows(repository, candidate, metric):
    candidate(repository, promote__metric=metric)
    with pytest.raises(ParamsError, match=rf"promote.metric is {metric}.*f1_macro"):
        promote.main()


def test_another_metric_decides_if_it_is_named(repository, candidate):
    decision = decide(candidate(repository, train__lr=0.9, promote__metric="accuracy"))
    assert (decision["metric"], decision["candidate"], decision["production"]) == ("accuracy", 0.9, 0.8)


def test_a_stage_of_another_name_has_its_own_production(repository, candidate):
    decision = decide(candidate(repository, train__lr=0.7, promote__stage="homologacao"))
    assert decision["tag"].startswith("sentiment#homologacao#")
    assert decision["production_version"] is None
    assert f1_in_production(repository) == 0.8


def test_the_same_test_reviews_are_compared_by_the_stored_predictions(repository, candidate, monkeypatch):
    candidate(repository, train__lr=0.9)
    monkeypatch.setattr(promote, "predict", lambda *_: pytest.fail("the production model was run"))
    decision = decide(repository)
    assert decision["compared_on"] == "predictions stored with the production model"
    assert decision["production"] == 0.8


@pytest.fixture(scope="module")
def real(pretended, tmp_path_factory, copy_of):
    """A repository whose model in production is a tiny real one, with a threshold at which it tells both classes. Copy it."""
    repository = copy_of(pretended, tmp_path_factory.mktemp("real") / "repository")
    texts = ["negativo ruim produto", "positivo bom produto", "um produto bom", "um produto ruim"] * 5
    tokenizer = checkpoint.word_piece(texts, 200)
    sizes = {"hidden_size": 8, "layers": 1, "heads": 2, "intermediate_size": 8}
    model_settings = params.load(repository.path / "params.yaml").model.model_copy(update=sizes)
    model = checkpoint.load_model(model_settings, ["negativo", "positivo"], tokenizer, 16)
    folder = repository.path / "weights"
    model.save_pretrained(folder)
    checkpoint.save_word_piece(tokenizer, folder)
    chance = Classifier.load(save_inference(folder, None), "cpu").probabilities([f"positivo produto {k}" for k in range(40)])
    save_inference(folder, float(np.median(chance[:, 1])))
    repository.commit()
    repository.run("dvc", "repro")
    return repository


def test_on_other_test_reviews_the_production_model_is_scored(real, tmp_path, copy_of, candidate):
    repository = candidate(copy_of(real, tmp_path / "repository"), prepare__test=0.3, train__lr=0.9)
    decision = decide(repository)
    reviews = pd.read_parquet("data/prepared/test.parquet")
    classifier = Classifier.load(repository.path / "weights", "cpu")
    said = classifier.decide(classifier.probabilities(reviews["text"].tolist()))
    assert decision["compared_on"] == "production model scored on this test"
    assert decision["production"] == pytest.approx(f1_score(reviews["label"], said, average="macro"), abs=1e-6)


def test_reviews_that_the_production_model_has_learnt_from_are_left_out(real, tmp_path, copy_of, candidate):
    repository = candidate(copy_of(real, tmp_path / "repository"), prepare__test=0.4, train__lr=0.9)
    decision = decide(repository)
    assert decision["compared_on"] == "production model scored on 60 reviews of this test; it has learnt from the other 20"
    assert decision["test_reviews"] == 60
    answers = pd.read_parquet("data/predictions/test.parquet")
    left = answers[~answers["review_id"].str.fullmatch(r"0\.4-\w+-\d")]
    assert decision["candidate"] == pytest.approx(f1_score(left["label"], left["prediction"], average="macro"), abs=1e-6)


def test_reviews_that_it_has_learnt_without_their_title_are_left_out(real, tmp_path, copy_of, candidate, caplog):
    repository = candidate(
        copy_of(real, tmp_path / "repository"), prepare__test=0.3, train__lr=0.9, prepare__text=["title", "review_text"]
    )
    path = Path("data/prepared/test.parquet")
    frame = pd.read_parquet(path)
    names = frame["review_id"].str.extract(r"0\.3-(\w+)-(\d)$")
    frame["text"] = ("Oi - " + names[0] + " " + names[1]).fillna("Oi - " + frame["text"])  # the first ten of a class are learnt
    frame.to_parquet(path)
    decision = decide(repository)
    assert decision["compared_on"] == "production model scored on 60 reviews of this test; it has learnt from the other 20"
    assert "reads review_text and this model title, review_text" in caplog.text


def test_a_production_model_that_has_learnt_from_all_test_reviews_blocks_a_promotion(real, tmp_path, copy_of, candidate):
    repository = candidate(copy_of(real, tmp_path / "repository"), prepare__test=0.4, train__lr=0.9)
    for name in ("data/predictions/test.parquet", "data/prepared/test.parquet"):
        frame = pd.read_parquet(name)
        frame[frame["review_id"].str.fullmatch(r"0\.4-\w+-\d")].to_parquet(name)
    decision = decide(repository)
    assert decision["verdict"] == "blocked"
    assert "has learnt from all of these test reviews" in decision["reason"]


def save_inference(folder, threshold):
    """How the model in a folder is to be read; returns the folder."""
    Inference(max_length=16, case="as_written", text=["review_text"], temperature=1.0, threshold=threshold).save(folder)
    return folder


def test_without_a_git_identity_a_promotion_is_blocked_and_the_run_goes_on(repository):
    repository.git("config", "--unset", "user.name")
    repository.git("config", "--unset", "user.email")
    repository.git("config", "user.useConfigOnly", "true")
    repository.set(train__lr=0.9)
    done = repository.run("dvc", "repro")
    decision = repository.decision()
    assert decision["verdict"] == "blocked"
    assert "git config --global user.name" in decision["reason"]
    assert "Traceback" not in done.stdout + done.stderr
    assert repository.tags() == V1


def test_a_blocked_promotion_goes_through_by_the_command_that_it_names(repository):
    repository.git("config", "user.name", "")
    repository.git("config", "user.useConfigOnly", "true")
    repository.set(train__lr=0.9)
    repository.run("dvc", "repro")
    retry = repository.decision()["retry"].split()
    repository.git("config", "user.name", "Ana Souza")
    repository.run(*retry)
    assert repository.decision()["verdict"] == "promoted"
    assert repository.tags() == V2


def test_in_a_shallow_clone_a_promotion_is_blocked(repository, tmp_path, candidate):
    repository.git("commit", "--quiet", "--allow-empty", "--message", "mais um")
    repository.git("clone", "--quiet", "--depth", "1", f"file://{repository.path}", str(tmp_path / "clone"))
    clone = type(repository)(tmp_path / "clone", repository.environment)
    decision = decide(candidate(clone, train__lr=0.9))
    assert decision["verdict"] == "blocked"
    assert "git fetch --unshallow --tags" in decision["reason"]


def test_outside_a_git_repository_a_promotion_is_blocked(empty, candidate):
    shutil.rmtree(empty.path / ".git")
    decision = decide(candidate(empty))
    assert decision["verdict"] == "blocked"
    assert "is in no git repository" in decision["reason"]


def test_a_production_model_lost_from_the_cache_blocks_a_promotion(repository, candidate):
    shutil.rmtree(repository.path / ".dvc" / "cache")
    decision = decide(candidate(repository, train__lr=0.9))
    assert decision["verdict"] == "blocked"
    assert "sentiment@v1.0.0 cannot be read from DVC's cache" in decision["reason"]
    assert "dvc pull" in decision["reason"]
    assert repository.tags() == V1


def three_classes(repository, candidate):
    labels = {"negativo": [1, 2], "neutro": [3], "positivo": [4, 5]}
    return candidate(repository, prepare__labels=labels, train__lr=0.9)


def test_a_production_model_of_other_classes_blocks_a_promotion(repository, candidate):
    decision = decide(three_classes(repository, candidate))
    assert decision["verdict"] == "blocked"
    assert "tells negativo, positivo, and this model negativo, neutro, positivo" in decision["reason"]
    assert repository.tags() == V1


def test_the_command_that_frees_production_for_other_classes_works(repository, candidate):
    decision = decide(three_classes(repository, candidate))
    command = decision["reason"].split(": ")[-1].replace("STAGE", "production").split()
    repository.run(*command)
    assert decide(repository)["tag"] == "sentiment#production#3"


@pytest.mark.parametrize("place", [(), ("--temp",)], ids=["workspace", "temp"])
def test_an_experiment_promotes_in_the_repository_itself(repository, inside, place):
    repository.run("dvc", "exp", "run", *place, "--set-param", "train.lr=0.9")
    inside(repository)
    assert repository.tags() == V2
    assert f1_in_production(repository) == 0.9
    assert repository.git("for-each-ref", "refs/sentiment") == ""


@pytest.mark.slow
def test_queued_experiments_share_one_production(repository, inside):
    for quality in ("0.85", "0.9"):
        repository.run("dvc", "exp", "run", "--queue", "--set-param", f"train.lr={quality}")
    repository.run("dvc", "queue", "start", "--jobs", "2")
    try:
        wait_for_queue(repository)
    finally:
        repository.run("dvc", "queue", "stop", "--kill")
    inside(repository)
    versions = Registry(repository.path).versions()
    turns = repository.git("tag", "--list", "sentiment#production#*").split()
    assert f1_in_production(repository) == 0.9
    assert len(versions) == len({version.name for version in versions}) == len(turns)
    assert len(versions) in (2, 3)
    assert repository.git("status", "--porcelain") == ""


def wait_for_queue(repository):
    """Wait until both experiments of the queue have succeeded."""
    end = time.monotonic() + QUEUE_SECONDS
    while time.monotonic() < end:
        status = repository.run("dvc", "queue", "status").stdout
        assert "Failed" not in status, status
        if status.count("Success") == 2:
            return
        time.sleep(1)
    pytest.fail(f"the queue did not end\n{status}")


def test_the_decision_and_the_tag_list_each_gate_with_value_bound_and_verdict(repository):
    repository.set(train__lr=0.9)
    repository.run("dvc", "repro")
    gates = repository.decision()["gates"]
    on = ["min_f1", "min_class_f1", "min_delta", "confidence", "max_slice_loss"]
    assert [each["gate"].split("promote.")[-1] for each in gates] == on
    told = repository.git("tag", "--list", "--format=%(contents)", "sentiment#production#2")
    for each in gates:
        assert f"{each['gate']}: {each['value']:.4f} (bound {each['bound']:.4f}), passed" in told


class Killed(BaseException):
    """What stands for a kill."""


def kill_at(monkeypatch, number):
    """Let the process be killed where it calls git for the `number`-th time from here; returns what counts the calls."""
    calls, run = [], registry.git

    def git(*arguments, **named):
        calls.append(arguments)
        if len(calls) == number:
            raise Killed
        return run(*arguments, **named)

    monkeypatch.setattr(registry, "git", git)
    return calls


def test_killed_at_any_moment_there_is_a_whole_promotion_or_none(repository, candidate, monkeypatch):
    candidate(repository, train__lr=0.9)
    outcomes = []
    for number in range(1, 100):
        with monkeypatch.context() as patch:
            calls = kill_at(patch, number)
            with contextlib.suppress(Killed):
                promote.main()
        if len(calls) < number:
            break
        with Registry(repository.path).lock():
            pass
        assert repository.tags() in (V1, V2)
        assert f1_in_production(repository) == (0.8 if repository.tags() == V1 else 0.9)
        outcomes.append(repository.tags() == V2)
        if outcomes[-1]:
            repository.git("tag", "--delete", *(V2 - V1))
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}


def test_a_version_that_a_kill_left_without_its_stage_is_taken_back(repository, candidate):
    repository.git("tag", "--annotate", "--message", "pela metade", "sentiment@v1.1.0", "HEAD")
    repository.git("update-ref", registry.UNFINISHED, "sentiment@v1.1.0")
    decision = decide(candidate(repository, train__lr=0.9))
    assert decision["version"] == "v1.1.0"
    assert repository.tags() == V2
    assert repository.git("for-each-ref", "refs/sentiment") == ""


def test_a_version_that_somebody_registered_by_hand_stays(repository, candidate):
    repository.git("tag", "--annotate", "--message", "à mão", "sentiment@v1.1.0", "HEAD")
    assert decide(candidate(repository, train__lr=0.9))["version"] == "v1.2.0"


def test_where_all_tags_were_deleted_promotion_begins_anew(repository, candidate):
    repository.git("tag", "--delete", *V1)
    decision = decide(candidate(repository, train__lr=0.7))
    assert (decision["verdict"], decision["production"]) == ("promoted", None)
    assert repository.tags() == V1


def test_a_promotion_that_runs_again_says_that_the_model_is_in_production(repository):
    repository.run("dvc", "repro", "--force", "--single-item", "promote")
    assert repository.decision()["reason"].endswith("all its answers are those of v1.0.0, which is in production")
