"""What a stage says when it fails: one sentence that says what to do."""

import errno
from pathlib import Path

import pandas as pd
import pyarrow.parquet
import pytest
from safetensors.torch import load_file

from sentiment.logs import guarded, is_disk_full, missing_output

READERS = [pd.read_parquet, pyarrow.parquet.read_table, load_file, Path.read_text]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["data/predictions/test.parquet", "models/sentiment/model.safetensors", "metrics/test.json"])
def test_an_output_that_is_not_there_is_named_with_what_makes_it(tmp_path, monkeypatch, caplog, read, name):
    monkeypatch.chdir(tmp_path)
    assert guarded("promote", lambda: read(Path(name)), tmp_path / "promote.log") == 1
    assert caplog.records[-1].getMessage() == f"{name} is not there: `dvc repro` makes it, `dvc checkout dvc.yaml` brings it back"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file", "/home/eu/data/a.csv"),
        FileNotFoundError(2, "No such file", "git"),
        KeyError("data/a"),
    ],
)
def test_what_no_stage_makes_is_not_promised(tmp_path, caplog, error):
    def fail():
        raise error

    assert missing_output(error) is None
    assert guarded("promote", fail, tmp_path / "promote.log") == 1
    assert "the whole trace is in" in caplog.records[-1].getMessage()


def test_a_full_disk_is_called_one(tmp_path, caplog):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    assert is_disk_full(RuntimeError("safetensors: IoError, os error 28"))
    assert not is_disk_full(ValueError("no space in the text"))
    assert guarded("train", fail, tmp_path / "train.log") == 1
    assert caplog.records[-1].getMessage().startswith("no space is left on the disk")
