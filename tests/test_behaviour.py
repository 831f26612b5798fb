"""The behavioural checks: the shipped cases, and what counts as a failure."""

import re
from pathlib import Path

import numpy as np
import pytest

from sentiment import behaviour, text
from sentiment.errors import DataError

SHIPPED = Path(__file__).parents[1] / "data" / "checks" / "portugues.yaml"
NAMES = ["negativo", "positivo"]
GOOD = re.compile(r"bom|[óo]tim|exc?elente|ador|am[ei]i|recom|perfeit|maravilh|sucesso", re.IGNORECASE)


@pytest.fixture(scope="module")
def shipped():
    return behaviour.load(SHIPPED)


def by_words(texts):
    """A model that calls good what has a good word, whatever else it says."""
    return np.array([[0.1, 0.9] if GOOD.search(each) else [0.8, 0.2] for each in texts])


def test_there_are_at_least_300_cases_of_all_kinds_and_none_twice(shipped):
    cases = shipped.cases()
    assert len(cases) >= 300
    assert {case.kind for case in cases} == {"minimum", "invariance", "direction"}
    assert len({(case.check, case.texts) for case in cases}) == len(cases)
    assert {case.label for case in cases if case.kind == "minimum"} == set(NAMES)
    assert all(text.clean(each) == each and "{" not in each for case in cases for each in case.texts)
    assert all(case.texts[0] != case.texts[-1] for case in cases if case.kind != "minimum")


def test_a_model_of_good_words_fails_at_negation_and_passes_at_plain_praise(shipped):
    rows = behaviour.summary(behaviour.run(shipped, NAMES, by_words, lambda values: values.argmax(1))).set_index("check")
    assert rows.loc["negação de elogio", "failure_rate"] > 0.4
    assert rows.loc["ironia", "failure_rate"] > 0.2
    assert rows.loc["marca trocada", "failure_rate"] == 0
    assert rows.loc["elogio a mais", "failure_rate"] == 0
    assert rows["cases"].sum() == len(shipped.cases())


def checks(**more):
    return behaviour.Checks.model_validate({"better": "positivo", "checks": [{"name": "uma", **more}]})


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        ({"kind": "minimum", "positivo": ["bom", "ruim"], "negativo": ["ruim"]}, [False, True, False]),
        ({"kind": "invariance", "pairs": [["bom", "ótimo"], ["bom", "ruim"]]}, [False, True]),
        ({"kind": "direction", "pairs": [["ruim", "bom"], ["bom", "ruim"], ["bom", "ótimo"]]}, [False, True, False]),
        ({"kind": "minimum", "fill": {"x": ["bom", "ruim"]}, "positivo": ["é {x}"]}, [False, True]),
    ],
)
def test_what_fails(check, expected):
    rows = behaviour.run(checks(**check), NAMES, by_words, lambda values: values.argmax(1))
    assert rows["failed"].tolist() == expected


def test_the_models_own_threshold_decides():
    strict = lambda values: (values[:, 1] > 0.95).astype(int)  # noqa: E731
    rows = behaviour.run(checks(kind="minimum", positivo=["bom"]), NAMES, by_words, strict)
    assert rows["failed"].tolist() == [True]


@pytest.mark.parametrize(
    ("check", "words"),
    [
        ({"kind": "minimum", "positivo": ["é {y}"]}, r"nothing fills \{y\}"),
        ({"kind": "minimum", "neutro": ["talvez"]}, "speak of neutro"),
    ],
)
def test_checks_that_cannot_be_run_are_said(check, words):
    with pytest.raises(DataError, match=words):
        behaviour.run(checks(**check), NAMES, by_words, lambda values: values.argmax(1))


@pytest.mark.parametrize(
    "content", ["a: 1", "- b", "better: x\nchecks: [{name: a, kind: minimum, pairs: [[a, b]]}]", "better: [", "checks: []"]
)
def test_a_file_that_holds_no_checks_is_said(tmp_path, content):
    path = tmp_path / "checks.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match="holds no checks"):
        behaviour.load(path)
    with pytest.raises(DataError, match=r"evaluate\.checks"):
        behaviour.load(tmp_path / "none.yaml")
