"""Several models as one: the mean of their calibrated probabilities (deep ensembles, Lakshminarayanan et al. 2017).

An ensemble's folder is like any model's, but that config.json lists the configurations, temperatures and biases of its members,
and that model.safetensors holds the weights of all of them, the first one's under `members.0.`.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sentiment.files import read_json

KIND = "sentiment-ensemble"  # the model_type, which transformers does not know: it reads no ensemble by mistake


class Ensemble(nn.Module):
    """Classifiers of the same classes and the same tokenizer, or what reads batches for them."""

    biases: torch.Tensor  # float32 [members, classes]

    def __init__(
        self, members: Iterable[nn.Module], temperatures: Sequence[float], biases: Sequence[Sequence[float]], config: Any
    ) -> None:
        super().__init__()
        self.members, self.temperatures, self.config = nn.ModuleList(members), list(temperatures), config
        self.register_buffer("biases", torch.tensor(biases), persistent=False)

    def forward(self, *inputs: Any, **named: Any) -> torch.Tensor:
        """The logarithms of the members' mean probabilities: float32 [reviews, classes]."""
        told = []
        for member, temperature, bias in zip(self.members, self.temperatures, self.biases.unbind(), strict=True):
            outputs = member(*inputs, **named)
            logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
            told.append((logits.float() / temperature + bias).log_softmax(-1))
        return torch.stack(told).logsumexp(0) - math.log(len(told))

    def of(self, members: Iterable[nn.Module]) -> "Ensemble":
        """The same of what reads batches for each member."""
        return Ensemble(members, self.temperatures, self.biases.tolist(), self.config)

    def num_parameters(self) -> int:
        """The parameters of all members."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and model.safetensors to a folder, which is made if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        members: list[Any] = list(self.members)
        configs = [json.loads(member.config.to_json_string(use_diff=False)) for member in members]
        classes = {name: configs[0][name] for name in ("id2label", "label2id")}
        fitted = {"temperatures": self.temperatures, "biases": self.biases.tolist()}
        values = {"model_type": KIND, **classes, **fitted, "members": configs}
        (folder / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "model.safetensors")


class Config:
    """What is asked of a model's configuration."""

    model_type = KIND

    def __init__(self, names: list[str]) -> None:
        self.id2label, self.num_labels = dict(enumerate(names)), len(names)


def is_ensemble(folder: Path) -> bool:
    """Whether a model's folder holds an ensemble."""
    return bool(read_json(folder / "config.json").get("model_type") == KIND)


def load(folder: Path) -> Ensemble:
    """The ensemble in a folder, as it was saved; what is wrong with the folder raises the libraries' own errors."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    values = read_json(folder / "config.json")
    configs = [AutoConfig.for_model(**config) for config in values["members"]]
    members = [AutoModelForSequenceClassification.from_config(config, trust_remote_code=False) for config in configs]
    names = [values["id2label"][str(k)] for k in range(len(values["id2label"]))]
    biases = values.get("biases", [[0.0] * len(names)] * len(members))  # of before there were any
    ensemble = Ensemble(members, values["temperatures"], biases, Config(names))
    ensemble.load_state_dict(load_file(folder / "model.safetensors"))
    return ensemble
