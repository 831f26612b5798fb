"""The service's settings: a wrong one ends it with a line that names the variable, a misspelt one is reported."""

import re
import subprocess
import sys
from ipaddress import ip_network
from pathlib import Path

import pytest

from serve import settings
from serving import ROOT, Service


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """A function that sets variables, after all of the service's have been taken out."""
    for name in [name for name in settings.os.environ if name.upper().startswith(settings.PREFIX)]:
        monkeypatch.delenv(name)

    def given(**values):
        for name, value in values.items():
            monkeypatch.setenv(f"SERVE_{name.upper()}", value)

    return given


def refused():
    """The lines about each wrong setting."""
    with pytest.raises(SystemExit) as ended:
        settings.load()
    first, *lines = str(ended.value.code).splitlines()
    assert first == "the service cannot start:"
    return lines


WRONG = {
    "port": ["oitenta", "-1", "65536", "tcp://10.0.0.1:8000"],  # the last is what Kubernetes sets for a service named "serve"
    "workers": ["0", "1.5", "-2"],
    "http_threads": ["0"],
    "engine": ["tensorflow"],
    "device": ["tpu"],
    "threads": ["0"],
    "batch_tokens": ["8"],
    "batch_wait_ms": ["-1", "2000", "nan"],
    "queue": ["0", "muitos"],
    "timeout_seconds": ["0", "nan", "inf"],
    "read_seconds": ["-1", "inf"],
    "poll_seconds": ["0", "inf"],
    "max_body_bytes": ["0"],
    "max_text_chars": ["0"],
    "max_texts": ["0", "1e3"],
    "api_key": ["curta", "ção" * 8, "com um espaço no meio", "dezesseis\tletras"],
    "trusted_proxies": ["10.0.0.300", "proxy.example.org", "10.0.0.1, 10.0.0.1/8"],
    "log_text": ["all"],
    "log_format": ["xml"],
    "log_bytes": ["0", "10MB"],
    "log_files": ["0"],
    "log_level": ["VERBOSE"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_setting_ends_the_service_with_one_line_that_names_it(variables, name, value):
    variables(**{name: value})
    (line,) = refused()
    assert re.fullmatch(rf"  SERVE_{name.upper()}: \S.+", line)


def test_every_wrong_setting_has_its_line(variables):
    variables(port="oitenta", workers="0", log_text="tudo")
    assert [line.split(":")[0].strip() for line in refused()] == ["SERVE_PORT", "SERVE_WORKERS", "SERVE_LOG_TEXT"]


@pytest.mark.parametrize(
    ("workers", "http_threads", "places"), [("2", "192", 256), ("1", "192", 191), ("1", "1", 1), ("8", "64", 256)]
)
def test_as_many_wait_by_default_as_the_threads_can_hold(variables, workers, http_threads, places):
    variables(workers=workers, http_threads=http_threads)
    assert settings.load().places == places


def test_a_queue_that_the_threads_cannot_fill_is_refused_by_name(variables):
    variables(workers="1", http_threads="8", queue="8")
    (line,) = refused()
    assert line.startswith("  SERVE_QUEUE: ")
    assert "8" in line


def test_a_wrong_key_is_not_repeated(variables):
    variables(api_key="segredo-curto")
    assert "segredo" not in " ".join(refused())


def test_the_defaults_are_valid_and_an_empty_variable_is_its_default(variables):
    plain = settings.load()
    assert (plain.port, plain.model, plain.log_text, plain.api_key, plain.trusted_proxies) == (
        8000,
        "production",
        "preview",
        None,
        [],
    )
    variables(port="", model="", api_key="", trusted_proxies="", log_file="")
    assert settings.load() == plain


def test_values_are_read_as_their_types(variables):
    variables(port="0", workers="3", read_seconds="2.5", trusted_proxies="127.0.0.1, 10.0.0.0/8,2001:db8::/32", log_file="-",
              api_key="uma-chave-de-teste", reviews="avaliações.parquet", model="v1.0.0")  # fmt: skip
    found = settings.load()
    assert (found.port, found.workers, found.read_seconds, found.model) == (0, 3, 2.5, "v1.0.0")
    assert found.trusted_proxies == [ip_network(each) for each in ("127.0.0.1/32", "10.0.0.0/8", "2001:db8::/32")]
    assert (found.log_file, found.reviews) == (None, Path("avaliações.parquet"))
    assert found.api_key.get_secret_value() == "uma-chave-de-teste"


def test_a_key_from_a_file_is_read_without_its_last_newline(variables):
    variables(api_key="uma-chave-de-teste\n")
    assert settings.load().api_key.get_secret_value() == "uma-chave-de-teste"


def test_an_address_of_ipv6_may_stand_in_brackets(variables):
    variables(host="[::1]")
    assert settings.load().host == "::1"


def test_of_a_network_with_a_machines_address_it_says_what_is_wrong(variables):
    variables(trusted_proxies="10.0.0.5/8")
    (line,) = refused()
    assert "10.0.0.5/8 has host bits set" in line


def test_a_folder_for_temporary_files_that_is_too_deep_for_a_socket_ends_the_start(environment, tmp_path):
    deep = tmp_path / ("profundo" * 15)
    deep.mkdir()
    service = Service(tmp_path / "service", environment | {"TMPDIR": str(deep)})
    command = [sys.executable, "-m", "gunicorn", "-c", "serve/gunicorn.conf.py", "serve.app:app"]
    done = subprocess.run(command, cwd=ROOT, env=service.environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "set TMPDIR" in done.stderr
    assert not list(deep.iterdir())


def test_the_key_is_not_shown_with_the_settings(variables):
    variables(api_key="uma-chave-de-teste")
    found = settings.load()
    assert "uma-chave" not in f"{found} {found!r} {found.model_dump()}"


def test_a_setting_cannot_be_changed_once_it_is_read():
    with pytest.raises(ValueError, match="frozen"):
        settings.load().port = 1


def test_names_that_are_no_settings_are_reported(variables):
    variables(modle="v1.0.0", port_8000_tcp="tcp://10.0.0.1:8000", port="8001", model="v1.0.0")
    assert settings.unknown() == ["SERVE_MODLE", "SERVE_PORT_8000_TCP"]


def test_the_table_lists_every_setting_with_its_default_and_its_meaning():
    head, rule, *rows = settings.table().splitlines()
    assert (head, rule) == ("| variable | default | what |", "|---|---|---|")
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    assert [name for name, _, _ in cells] == [f"`SERVE_{name.upper()}`" for name in settings.Settings.model_fields]
    assert all(len(each) == 3 and each[2] for each in cells)
    shown = {name.strip("`"): value.strip("`") for name, value, _ in cells}
    assert (shown["SERVE_PORT"], shown["SERVE_POLL_SECONDS"], shown["SERVE_API_KEY"]) == ("8000", "10", "")


def test_the_defaults_of_the_table_are_values_that_can_be_given(variables):
    rows = [row.strip("|").split(" | ") for row in settings.table().splitlines()[2:]]
    variables(**{row[0].strip(" `").removeprefix("SERVE_").lower(): row[1].strip(" `") for row in rows})
    given = settings.load()
    for name, field in settings.Settings.model_fields.items():
        assert getattr(given, name) == field.default


def test_the_table_is_what_the_module_prints():
    done = subprocess.run([sys.executable, "-m", "serve.settings"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == settings.table()


ENDING = {"a port": {"port": "oitenta"}, "a key": {"api_key": "curta"}, "a log file that is a folder": {"log_file": "/"},
          "an infinite time": {"timeout_seconds": "inf"}}  # fmt: skip


@pytest.mark.parametrize("wrong", ENDING.values(), ids=ENDING)
def test_the_service_ends_with_the_line_and_without_a_trace(environment, tmp_path, wrong):
    service = Service(tmp_path / "service", environment, **wrong)
    command = [sys.executable, "-m", "gunicorn", "-c", "serve/gunicorn.conf.py", "serve.app:app"]
    done = subprocess.run(command, cwd=ROOT, env=service.environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert f"SERVE_{next(iter(wrong)).upper()}: " in done.stderr
    assert "Traceback" not in done.stderr
