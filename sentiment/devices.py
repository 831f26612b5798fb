"""How many operations a device can do a second, and how many a step of training takes."""

import ctypes
import re
from typing import Any

import numpy as np
import torch

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
# Dense matrix operations a second by the makers' data sheets, in the order in which the names are looked for: bf16/fp16, fp32.
PEAKS = {
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A10G": (70e12, 35e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
}


PART = re.compile(r"\bMIG\b|\bLaptop\b")  # a share of a card, or a smaller one of the same name


def native_precision(device: str) -> str:
    """bf16 where the device's own instructions compute in it, fp16 on an older CUDA device, fp32 elsewhere."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if native else "fp32"
    return "fp32"


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak in operations a second, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).replace("-", " ")
    for known, (half, single) in PEAKS.items():
        if re.search(rf"\b{known}\b", name) and not PART.search(name):
            return single if precision == "fp32" else half
    return None


def step_flops(model: Any, lengths: np.ndarray, wanted: float | None = None, asking: float | None = None) -> float:
    """Operations to train on reviews of these lengths in tokens, forward and backward, padding not counted.

    6 for each token and each weight of a matrix that it is multiplied with, and 12 * layers * hidden_size * length for each
    token's attention (Chowdhery et al. 2022, PaLM, appendix B). `wanted` is the number of tokens that the last layer and the
    head are computed for, all if it is not given; the last layer's keys and values are always those of all, and its queries and
    their attention those of `asking` tokens, `wanted` if it is not given. The token embeddings are counted as no matrix.
    """
    config = model.config
    tokens, last = float(lengths.sum()), f"encoder.layer.{config.num_hidden_layers - 1}."
    wanted = tokens if wanted is None else wanted
    asking = wanted if asking is None else asking
    counted = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "embeddings" in name:
            continue
        body = "encoder." in name and (last not in name or ".key." in name or ".value." in name)
        queries = last in name and ".query." in name
        counted += parameter.numel() * (tokens if body else asking if queries else wanted)
    attention = 12.0 * config.hidden_size * np.square(lengths, dtype=np.float64).sum()
    layers = config.num_hidden_layers - 1 + asking / tokens
    return float(6 * counted + attention * layers)


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that were freed, for the next step to take.

    glibc gives them back to the system at once, which zeroes every page anew: an eighth of the time of a step on a CPU. Nothing
    happens with other C libraries.
    """
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        for name, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1)):
            library.mallopt(name, value)


def describe(device: torch.device) -> str:
    """A device's name for people: `cuda (NVIDIA H200)`, `cpu (2 threads, AVX512)`."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"
    return device.type
