"""Which model the service answers with: what the tags name, also when they change under load, and never a broken one."""

import json
import signal
import time
from itertools import pairwise

import pytest
from prometheus_client.parser import text_string_to_metric_families

import models
from sentiment import conversion
from sentiment.registry import Registry
from serving import Load, Service, choose_engine, preparations


@pytest.fixture(scope="module")
def one_version(pretended, copy_of, tmp_path_factory):
    """A repository with a real (tiny) model in production as v1.0.0. Shared: copy it."""
    repository = copy_of(pretended, tmp_path_factory.mktemp("registry") / "repository")
    models.model_folder(repository.path / "weights", seed=1)
    repository.run("dvc", "repro")
    repository.commit("o primeiro modelo")
    return repository


@pytest.fixture
def repository(one_version, copy_of, tmp_path):
    return copy_of(one_version, tmp_path / "repository")


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """A cache with the choice of the engine for every model of this file."""
    folder = tmp_path_factory.mktemp("engines")
    for seed in range(1, 6):
        choose_engine(models.model_folder(folder / f"model-{seed}", seed=seed), folder / "cache")
    return folder / "cache"


def promote(repository, lr, seed, damage=None):
    """Train a better model, which is promoted; `damage` is done to its folder beforehand."""
    models.model_folder(repository.path / "weights", seed=seed)
    if damage:
        damage(repository.path / "weights")
    repository.set(train__lr=lr)
    repository.run("dvc", "repro")
    assert repository.decision()["verdict"] == "promoted"
    repository.commit("mais um modelo")


def go_back(repository, version):
    repository.run("gto", "assign", "sentiment", "--version", version, "--stage", "production", "--force")


def version_of(service):
    return service.get("/health")[2].get("model_version")


def metric(service, name, **labels):
    families = text_string_to_metric_families(service.get("/metrics")[2].decode())
    samples = [each for family in families for each in family.samples if each.name == name]
    return sum(each.value for each in samples if labels.items() <= each.labels.items())


def test_production_is_served_and_named(repository, environment, tmp_path):
    with Service(tmp_path / "service", environment, repo=repository.path) as service:
        assert service.predict()["model_version"] == "v1.0.0"
        health = service.get("/health")[2]
        assert (health["model_version"], health["commit"]) == ("v1.0.0", repository.git("rev-parse", "sentiment@v1.0.0^{commit}"))
        assert health["metrics"]["f1_macro"] == 0.8
        assert service.get("/")[2]["version"] == "v1.0.0"
        assert metric(service, "sentiment_model_info", version="v1.0.0") == 1


def test_no_request_fails_while_a_better_model_takes_over_and_while_going_back(repository, engines, environment, tmp_path):
    with Service(tmp_path / "service", environment, repo=repository.path, cache=engines) as service, Load(service) as load:
        load.wait_for(50)
        promote(repository, 0.9, seed=2)
        service.wait(lambda: version_of(service) == "v1.1.0", 60)
        load.wait_for(50)
        go_back(repository, "v1.0.0")
        service.wait(lambda: version_of(service) == "v1.0.0", 60)
        load.wait_for(50)
        assert load.errors == []
        assert {status for status, _ in load.answers} == {200}
        seen = [version for _, version in load.answers]
        changes = [after for before, after in pairwise(seen) if before != after]
        assert seen[0] == seen[-1] == "v1.0.0"
        assert "v1.1.0" in changes
        assert len(service.children()["predictor"]) == 1
        assert metric(service, "sentiment_model_info", version="v1.0.0") == 1
        assert metric(service, "sentiment_model_info", version="v1.1.0") == 0


def cut_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000])


def make_not_finite(folder):
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickle_only(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def give_too_many_biases(folder):
    inference = json.loads((folder / "inference.json").read_text())
    (folder / "inference.json").write_text(json.dumps(inference | {"bias": [0.1, 0.2, 0.3]}))


def test_broken_models_leave_the_old_one_serving_and_are_reported(repository, engines, environment, tmp_path):
    with Service(tmp_path / "service", environment, repo=repository.path, cache=engines) as service, Load(service) as load:
        load.wait_for(5)
        for k, damage in enumerate([cut_weights, make_not_finite, pickle_only, give_too_many_biases]):
            failures = metric(service, "sentiment_model_load_failures_total")
            promote(repository, 0.85 + k / 20, seed=2 + k, damage=damage)
            service.wait(lambda before=failures: metric(service, "sentiment_model_load_failures_total") > before, 60)
            load.wait_for(5)
            status, _, health = service.get("/health")
            assert (status, health["model_version"]) == (200, "v1.0.0")
            assert health["failure"]["what"] == "the model cannot be loaded"
            assert str(tmp_path) not in str(health)
        assert set(load.answers) == {(200, "v1.0.0")}
        assert load.errors == []
        assert metric(service, "sentiment_model_failing") == 1
        assert any("ERROR serve.registry" in line and "still=v1.0.0" in line for line in service.log())
        go_back(repository, "v1.0.0")
        service.wait(lambda: service.get("/health")[2]["failure"] is None, 60)
        assert metric(service, "sentiment_model_failing") == 0
        promote(repository, 0.975, seed=6)
        service.wait(lambda: version_of(service) == "v1.5.0", 60)
        assert metric(service, "sentiment_model_failing") == 0


def test_a_promotion_does_not_wait_until_the_engines_of_the_model_before_are_measured(repository, environment, tmp_path):
    with Service(tmp_path / "service", environment, repo=repository.path) as service:
        (measured,) = (tmp_path / "service" / "engines").iterdir()
        with conversion.locked(measured):  # as another process does that takes its time
            service.wait(lambda: len(preparations(service)) == 1)
            promote(repository, 0.9, seed=2)
            service.wait(lambda: version_of(service) == "v1.1.0", 60)
        service.wait(lambda: service.get("/health")[2]["engine_measured"], 60)
        assert version_of(service) == "v1.1.0"
        assert not (measured / "openvino.json").exists()


def test_a_service_that_ends_measures_no_longer(repository, environment, tmp_path):
    with Service(tmp_path / "service", environment, repo=repository.path) as service:
        (measured,) = (tmp_path / "service" / "engines").iterdir()
        with conversion.locked(measured):
            service.wait(lambda: len(preparations(service)) == 1)
            (measuring,) = preparations(service)
            assert service.stop() == 0
            assert not measuring.is_running()


def test_sighup_makes_it_look_at_once_and_loses_no_request(repository, engines, environment, tmp_path):
    with Service(tmp_path / "service", environment, repo=repository.path, cache=engines, poll_seconds=3600) as service:
        service.wait(lambda: service.get("/health")[2]["engine_measured"], 60)
        before = service.children()
        promote(repository, 0.9, seed=2)
        assert version_of(service) == "v1.0.0"
        with Load(service) as load:
            load.wait_for(10)
            service.process.send_signal(signal.SIGHUP)
            service.wait(lambda: version_of(service) == "v1.1.0", 60)
            load.wait_for(10)
        assert load.errors == []
        assert {status for status, _ in load.answers} == {200}
        assert service.children() == before


def test_a_pinned_version_stays_when_another_is_promoted(repository, engines, environment, tmp_path):
    promote(repository, 0.9, seed=2)
    with Service(tmp_path / "service", environment, repo=repository.path, cache=engines, model="v1.0.0") as service:
        assert version_of(service) == "v1.0.0"
        promote(repository, 0.95, seed=3)
        service.process.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert version_of(service) == "v1.0.0"


def test_a_service_without_a_model_answers_503_and_takes_the_first_one_promoted(pretended, copy_of, environment, tmp_path):
    empty = copy_of(pretended, tmp_path / "empty")
    service = Service(tmp_path / "service", environment, repo=empty.path)
    try:
        service.start(wait_for_model=False)
        status, headers, body = service.post("/predict", {"text": "bom"})
        assert (status, body["title"]) == (503, "Service Unavailable")
        assert int(headers["Retry-After"]) >= 1
        assert (service.get("/health")[0], service.get("/ready")[0], service.get("/live")[0]) == (503, 503, 200)
        models.model_folder(empty.path / "weights", seed=1)
        empty.run("dvc", "repro")
        service.wait(lambda: service.get("/ready")[0] == 200, 60)
        assert service.predict()["model_version"] == "v1.0.0"
    finally:
        service.stop()


def test_two_services_on_one_clone_serve_and_follow_it(repository, environment, tmp_path):
    cache = choose_engine(repository.path / "models" / "sentiment", tmp_path / "engines")
    shared = {"repo": repository.path, "cache": cache}
    one, two = (Service(tmp_path / name, environment, **shared) for name in ("one", "two"))
    try:
        one.process = None
        for service in (one, two):
            service.start(wait_for_model=False)
        for service in (one, two):
            service.wait(lambda each=service: version_of(each) == "v1.0.0", 90)
        promote(repository, 0.9, seed=2)
        for service in (one, two):
            service.wait(lambda each=service: version_of(each) == "v1.1.0", 90)
        assert one.predict()["probabilities"] == two.predict()["probabilities"]
        assert one.stop() == 0
        assert two.predict()["model_version"] == "v1.1.0"
    finally:
        for service in (one, two):
            service.stop()


def test_a_git_url_is_served_from_its_dvc_remote_and_followed(repository, engines, environment, tmp_path):
    repository.run("dvc", "remote", "add", "--default", "loja", str(tmp_path / "loja"))
    repository.commit("um remoto")
    promote(repository, 0.85, seed=4)
    repository.run("dvc", "push", "--all-tags")
    bare = tmp_path / "origem.git"
    repository.git("clone", "--quiet", "--bare", str(repository.path), str(bare))
    repository.git("remote", "add", "origin", str(bare))
    with Service(tmp_path / "service", environment, repo=f"file://{bare}", cache=engines, copies=tmp_path / "copies") as service:
        assert service.predict()["model_version"] == "v1.1.0"
        promote(repository, 0.9, seed=5)
        repository.run("dvc", "push", "--all-tags")
        repository.git("push", "--quiet", "origin", "--tags")
        service.wait(lambda: version_of(service) == "v1.2.0", 60)


def test_the_state_of_the_tags_changes_with_a_promotion_and_with_going_back(repository, environment, inside):
    inside(repository)
    registry = Registry.open(repository.path)
    states = [registry.state()]
    assert registry.state() == states[0]
    promote(repository, 0.9, seed=2)
    states.append(registry.state())
    go_back(repository, "v1.0.0")
    states.append(registry.state())
    assert len(set(states)) == 3


def test_a_repository_that_is_not_there_is_an_error(tmp_path):
    from sentiment.errors import RegistryError

    with pytest.raises(RegistryError, match="git clone failed"):
        Registry.open(f"file://{tmp_path}/nada", tmp_path / "copies")
