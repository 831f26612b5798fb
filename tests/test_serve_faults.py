"""Processes that die, hang or are asked to end, under load: what was taken is answered, and what died comes back."""

import json
import os
import resource
import signal
import socket
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path

import pandas as pd
import psutil
import pytest

import models
from sentiment import conversion
from serving import Load, Service, choose_engine, preparations


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory):
    return choose_engine(folder, tmp_path_factory.mktemp("engines"))


@pytest.fixture
def service(folder, cache, environment, tmp_path):
    with Service(tmp_path / "service", environment, model=folder, cache=cache) as made:
        yield made


@pytest.fixture
def temporary():
    """A folder for temporary files, with a name that is short enough for a socket (pytest's own is not always)."""
    with tempfile.TemporaryDirectory(prefix="t-") as made:
        yield Path(made)


class Asked:
    """A request that is under way in a thread."""

    def __init__(self, service, path="/predict", value=None):
        self.answer = None
        self.thread = threading.Thread(target=self.ask, args=(service, path, value or {"text": "chegou antes do prazo"}))
        self.thread.start()

    def ask(self, service, path, value):
        try:
            self.answer = service.post(path, value)
        except OSError as error:
            self.answer = error

    def wait(self):
        self.thread.join(60)
        return self.answer


def arrived(service, requests):
    """Wait until so many connections to the service's port stand."""
    ours = lambda: [c for c in psutil.net_connections("tcp") if c.laddr.port == service.port and c.status == "ESTABLISHED"]  # noqa: E731
    service.wait(lambda: len(ours()) >= requests)


def test_a_killed_http_process_comes_back_and_the_others_go_on(service):
    with Load(service) as load:
        load.wait_for(20)
        killed = service.children()["workers"][0]
        os.kill(killed, signal.SIGKILL)
        service.wait(lambda: len(set(service.children()["workers"]) - {killed}) == 2)
        load.wait_for(50)
    assert {status for status, _ in load.answers} == {200}
    assert len(load.errors) <= len(load.threads)  # what that process was answering is lost, and no more


def test_no_request_fails_when_the_models_process_is_killed(service):
    with Load(service) as load:
        load.wait_for(20)
        killed = service.children()["predictor"][0]
        os.kill(killed, signal.SIGKILL)
        service.wait(lambda: service.children()["predictor"] not in ([], [killed]))
        load.wait_for(50, seconds=60)
    assert load.errors == []
    assert {status for status, _ in load.answers} == {200}
    assert any("died; it is started again" in line for line in service.log())


def test_counters_outlive_a_killed_process(service):
    def asked():
        lines = service.get("/metrics")[2].decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("sentiment_predictions_total"))

    for _ in range(20):
        service.predict()
    before = asked()
    for pid in service.children()["workers"]:
        os.kill(pid, signal.SIGKILL)
    service.wait(lambda: service.get("/live")[0] == 200)
    assert asked() == before == 20


def test_a_request_that_was_taken_is_answered_before_the_end(service):
    (predictor,) = service.children()["predictor"]
    os.kill(predictor, signal.SIGSTOP)
    asked = [Asked(service) for _ in range(4)]
    arrived(service, 4)
    service.process.send_signal(signal.SIGTERM)
    os.kill(predictor, signal.SIGCONT)
    assert [each.wait()[0] for each in asked] == [200] * 4
    assert service.stop() == 0
    assert any("the model's process ends" in line for line in service.log())


def test_sigterm_to_all_processes_at_once_ends_it_as_gently(service):
    (predictor,) = service.children()["predictor"]
    os.kill(predictor, signal.SIGSTOP)
    asked = [Asked(service), Asked(service, "/predict/batch", {"texts": ["muito bom"] * 256})]
    arrived(service, 2)
    for pid in [*service.children()["workers"], predictor, service.process.pid]:
        os.kill(pid, signal.SIGTERM)
    os.kill(predictor, signal.SIGCONT)
    assert [each.wait()[0] for each in asked] == [200] * 2
    assert service.stop() == 0


def test_sighup_to_all_processes_at_once_ends_none(service):
    before = service.children()
    with Load(service) as load:
        load.wait_for(10)
        for pid in [*before["workers"], *before["predictor"], service.process.pid]:
            os.kill(pid, signal.SIGHUP)
        load.wait_for(30)
    assert load.errors == []
    assert {status for status, _ in load.answers} == {200}
    assert service.children() == before


def test_sighup_before_the_models_process_can_handle_it_does_not_end_it(folder, cache, environment, tmp_path):
    service = Service(tmp_path / "service", environment, model=folder, cache=cache)
    try:
        service.start(wait_for_model=False)
        (predictor,) = service.children()["predictor"]
        service.process.send_signal(signal.SIGHUP)
        service.wait(lambda: service.get("/health")[0] == 200, 60)
        assert service.children()["predictor"] == [predictor]
    finally:
        assert service.stop() == 0


def test_ctrl_c_in_the_terminal_ends_it_as_gently(service):
    (predictor,) = service.children()["predictor"]
    os.kill(predictor, signal.SIGSTOP)
    asked = Asked(service)
    arrived(service, 1)
    os.killpg(service.process.pid, signal.SIGINT)
    os.kill(predictor, signal.SIGCONT)
    assert asked.wait()[0] == 200
    assert service.stop() == 0


def test_nothing_is_left_behind_when_the_first_process_is_killed(service):
    everything = [psutil.Process(pid) for pids in service.children().values() for pid in pids]
    service.process.kill()
    _, left = psutil.wait_procs(everything, timeout=20)
    assert not left


def test_an_answer_that_takes_too_long_is_504_and_the_next_is_right(folder, cache, environment, tmp_path):
    with Service(tmp_path / "service", environment, model=folder, cache=cache, timeout_seconds=1) as service:
        (predictor,) = service.children()["predictor"]
        expected = service.predict("não gostei")
        os.kill(predictor, signal.SIGSTOP)
        status, _, body = service.post("/predict", {"text": "muito bom"})
        assert (status, body["title"]) == (504, "Gateway Timeout")
        os.kill(predictor, signal.SIGCONT)
        service.wait(lambda: service.get("/health")[0] == 200)
        assert service.predict("não gostei") == expected


def test_too_many_waiting_texts_are_503_with_a_time_to_come_again(folder, cache, environment, tmp_path):
    many = {"texts": [f"produto {k} veio quebrado e não recomendo a ninguém" for k in range(256)]}
    with Service(tmp_path / "service", environment, model=folder, cache=cache, queue_texts=1, batch_tokens=32) as service:
        (predictor,) = service.children()["predictor"]
        os.kill(predictor, signal.SIGSTOP)
        asked = [Asked(service, "/predict/batch", many) for _ in range(6)]
        arrived(service, 6)
        os.kill(predictor, signal.SIGCONT)
        answers = [each.wait() for each in asked]
        assert {status for status, _, _ in answers} == {200, 503}
        refused = [headers for status, headers, _ in answers if status == 503]
        assert all(1 <= int(headers["Retry-After"]) <= 60 for headers in refused)
        assert b"sentiment_rejected_requests_total" in service.get("/metrics")[2]
        assert service.post("/predict", {"text": "bom"})[0] == 200


def limit_descriptors(pid, more):
    """Let a process open so many descriptors more, and no others."""
    used = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    free = (number for number in range(1024) if number not in used)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (next(islice(free, more, None)), 1024))


def test_where_descriptors_run_out_connections_wait_and_the_log_does_not_overflow(service):
    for pid in service.children()["workers"]:
        limit_descriptors(pid, 4)
    idle = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(40)]
    service.wait(lambda: any("no connection can be taken" in line for line in service.log()))
    time.sleep(1)
    for each in idle:
        each.close()
    service.wait(lambda: service.post("/predict", {"text": "bom"})[0] == 200)
    assert sum("no connection can be taken" in line for line in service.log()) < 50  # it was thousands a second


def test_where_the_models_process_runs_out_of_descriptors_it_goes_on(service):
    (predictor,) = service.children()["predictor"]
    limit_descriptors(predictor, 1)
    asked = [Asked(service, "/predict/batch", {"texts": ["muito bom"] * 2}) for _ in range(12)]  # a connection for each thread
    service.wait(lambda: any("no connection of the HTTP processes" in line for line in service.log()))
    resource.prlimit(predictor, resource.RLIMIT_NOFILE, (1024, 1024))
    assert [each.wait()[0] for each in asked] == [200] * 12
    assert service.children()["predictor"] == [predictor]


def test_nothing_is_left_on_disk_or_running_at_the_end(folder, environment, temporary, tmp_path):
    service = Service(tmp_path / "service", environment | {"TMPDIR": str(temporary)}, model=folder)
    try:
        service.start(wait_for_model=False)
        service.wait(lambda: preparations(service))
        (preparing,) = preparations(service)
        preparing.suspend()
        assert service.stop() == 0
        assert not preparing.is_running()
        assert not list(temporary.iterdir())
    finally:
        service.stop()


def test_what_a_killed_models_process_was_measuring_is_ended(folder, environment, tmp_path):
    with Service(tmp_path / "service", environment, model=folder, engine="torch") as service:
        (measured,) = (tmp_path / "service" / "engines").iterdir()
        with conversion.locked(measured):
            service.wait(lambda: preparations(service))
            (measuring,) = preparations(service)
            os.kill(service.children()["predictor"][0], signal.SIGKILL)
            service.wait(lambda: not measuring.is_running())


def test_engines_that_could_not_be_measured_are_measured_when_asked_for(folder, environment, tmp_path):
    reviews = tmp_path / "reviews.parquet"
    with Service(tmp_path / "service", environment, model=folder, engine="torch", reviews=reviews) as service:
        service.wait(lambda: service.get("/health")[2]["failure"], 60)
        assert service.get("/health")[2]["failure"]["what"] == "the engines cannot be measured"
        assert service.total("sentiment_model_failing") == 0
        pd.DataFrame({"text": ["bom", "ruim"], "label": ["negativo", "positivo"]}).to_parquet(reviews)
        service.process.send_signal(signal.SIGHUP)
        service.wait(lambda: service.get("/health")[2]["engine_measured"], 60)
        assert service.get("/health")[2]["failure"] is None
        loaded = sum("model loaded" in line for line in service.log())
        service.process.send_signal(signal.SIGHUP)
        service.wait(lambda: service.get("/health")[2]["engine_measured"])
    assert sum("model loaded" in line for line in service.log()) == loaded


def test_a_port_that_is_taken_ends_the_start_and_everything_with_it(service, folder, environment, temporary, tmp_path):
    second = Service(tmp_path / "second", environment | {"TMPDIR": str(temporary)}, model=folder, port=service.port)
    with pytest.raises(AssertionError, match="the service ended with 1"):
        second.start()
    assert not list(temporary.iterdir())
    assert "in use" in second.output.read_text()


def test_wrong_settings_end_the_start_with_the_variables_name(folder, environment, tmp_path):
    wrong = Service(tmp_path / "wrong", environment, model=folder, port="oito mil")
    with pytest.raises(AssertionError, match="SERVE_PORT"):
        wrong.start()


def test_large_batches_and_single_texts_share_the_model(service):
    many = {"texts": ["parou de funcionar em dois dias"] * 256}
    asked = [Asked(service, "/predict/batch", many) for _ in range(2)]
    singles = [service.predict("excelente")["sentiment"] for _ in range(10)]
    assert len(set(singles)) == 1
    for each in asked:
        status, _, body = each.wait()
        assert status == 200
        assert len(body["results"]) == 256
        assert len({json.dumps(result) for result in body["results"]}) == 1
