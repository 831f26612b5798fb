"""The service's settings: environment variables SERVE_*, checked at start."""

import ipaddress
import os
import re
import sys
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "SERVE_"
KEY = re.compile(r"[\x21-\x7e]{16,}")
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Settings(BaseSettings):
    """One attribute a variable: SERVE_MODEL is `model`; each description is the variable's documentation."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="ignore", env_ignore_empty=True, protected_namespaces=()
    )

    model: str = Field("production", description="a stage (production, or promote.stage), a version (v1.0.0), or a model folder")
    repo: str = Field(".", description="the repository that has the tags: a clone's folder, or a git URL")
    poll_seconds: Seconds = Field(10.0, description="between two looks at the tags")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="port to listen on")
    workers: Count = Field(2, description="HTTP processes; the model is not in them")
    http_threads: Count = Field(192, description="requests that an HTTP process works on at once")
    engine: Literal["auto", "openvino", "onnxruntime", "torch"] = Field(
        "auto", description="what computes: openvino, onnxruntime, torch; auto measures"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="cpu, cuda; auto: a CUDA GPU if there is one")
    threads: Count | None = Field(None, description="of the engine; default: all processors (of the container's quota)")
    lanes: Count | None = Field(
        None,
        description="batches that OpenVINO computes side by side while several wait, one a thread; 1 saves memory",
    )
    cache: Path = Field(Path("models/registry/engines"), description="folder for converted models")
    copies: Path = Field(Path("models/registry/copies"), description="folder for what a git URL's tags are copied to")
    reviews: Path | None = Field(
        None, description="Parquet with columns text and label, to measure int8 on; default: the version's own test split"
    )
    batch_tokens: Annotated[int, Field(ge=32)] | None = Field(
        None, description="tokens computed together; default: what suits the engine"
    )
    batch_wait_ms: Annotated[float, Field(ge=0, le=1000)] = Field(
        10.0,
        description="how long a batch that is not full waits at most for as many texts as came together lately, and a quarter of "
        "the time that the last one took; a lone text never waits",
    )
    queue: Count | None = Field(
        None, description="requests that may wait, beyond which the answer is 503; default: 256, below workers x http_threads"
    )
    queue_texts: Count = Field(1024, description="texts that may wait; beyond that a request of several texts is answered 503")
    timeout_seconds: Seconds = Field(30.0, description="for an answer; then 504")
    read_seconds: Seconds = Field(10.0, description="for a client to send its request")
    max_body_bytes: Count = Field(1 << 20, description="of a request; beyond that 413")
    max_text_chars: Count = Field(50_000, description="of a text; beyond that 422")
    max_texts: Count = Field(256, description="texts in a batch; beyond that 422")
    api_key: SecretStr | None = Field(None, description="if set, predictions need it as X-API-Key or as a bearer token")
    trusted_proxies: Annotated[list[Network], NoDecode] = Field(
        [], description="addresses or networks, by commas, whose X-Forwarded-For is believed"
    )
    log_text: Literal["preview", "hash", "off"] = Field(
        "preview", description="what logs hold of a text: 50 characters, a hash, nothing"
    )
    log_format: Literal["text", "json"] = Field("text", description="json: an object a line")
    log_file: Path | None = Field(Path("logs/api.log"), description="rotating log file; - for none")
    log_bytes: Count = Field(10_000_000, description="size at which the log file is rotated")
    log_files: Count = Field(5, description="rotated log files kept")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="WARNING leaves requests out")

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def split_at_commas(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return [ipaddress.ip_network(part.strip()) for part in value.split(",") if part.strip()]

    @field_validator("host", mode="before")
    @classmethod
    def without_brackets(cls, value: Any) -> Any:
        return value[1:-1] if isinstance(value, str) and value.startswith("[") and value.endswith("]") else value

    @field_validator("log_file", mode="before")
    @classmethod
    def dash_is_none(cls, value: Any) -> Any:
        return None if value == "-" else value

    @field_validator("api_key")
    @classmethod
    def is_long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        key = value.get_secret_value().strip() if value else None  # a file's last newline, say, which no header can hold
        if key is not None and not KEY.fullmatch(key):
            raise ValueError(
                "must have at least 16 characters, all of them printable ASCII without blanks; "
                "python -c 'import secrets; print(secrets.token_hex())'"
            )
        return SecretStr(key) if key else None

    @model_validator(mode="after")
    def more_threads_than_places(self) -> "Settings":
        if self.queue and self.workers * self.http_threads <= self.queue:
            raise ValueError(f"workers x http_threads ({self.workers * self.http_threads}) must be above queue ({self.queue})")
        return self

    @cached_property
    def places(self) -> int:
        """Requests that may wait: `queue`, or as many as suit the threads that they would wait in."""
        return self.queue or max(1, min(256, self.workers * self.http_threads - 1))

    @cached_property
    def root(self) -> Path:
        """The folder of this clone."""
        return Path(__file__).resolve().parent.parent


def load() -> Settings:
    """The settings of this environment; ends the process with one line a problem if they are wrong."""
    try:
        settings = Settings()  # type: ignore[call-arg]
    except ValidationError as error:
        found = {str((each["loc"] or ("queue",))[0]).upper(): each["msg"] for each in error.errors()}  # of a union, the last
        sys.exit("the service cannot start:\n  " + "\n  ".join(f"{PREFIX}{name}: {what}" for name, what in found.items()))
    return settings


def unknown() -> list[str]:
    """Variables SERVE_* that mean nothing here: misspelt ones, or Kubernetes' for a service of that name."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def table() -> str:
    """The settings as a Markdown table."""
    rows = [
        f"| `{PREFIX}{name.upper()}` | {default(field)} | {field.description} |" for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| variable | default | what |", "|---|---|---|", *rows])


def default(field: Any) -> str:
    """A field's default as one would write it in the environment."""
    return (
        ""
        if field.default in (None, [])
        else f"`{field.default:g}`"
        if isinstance(field.default, float)
        else f"`{field.default}`"
    )


if __name__ == "__main__":
    print(table())  # noqa: T201  python -m serve.settings
