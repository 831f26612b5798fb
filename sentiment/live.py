"""DVCLive within a stage: it records metrics, and leaves experiments and dvc.yaml to DVC."""

import contextlib
from pathlib import Path
from typing import Any

from accelerate import PartialState
from dvclive import Live


def recorder(state: PartialState, folder: Path) -> Any:
    """DVCLive on the first process, nothing on the others."""
    if not state.is_main_process:
        return contextlib.nullcontext()
    return Live(str(folder), save_dvc_exp=False, dvcyaml=None, monitor_system=False)


def show(live: Live, step: int, values: dict[str, float]) -> None:
    """Hand values to DVCLive at a step."""
    live.step = step
    for name, value in values.items():
        live.log_metric(name, value)
