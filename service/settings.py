"""Settings of the service: environment variables `RETINASERVE_<NAME>`, one class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.errors import DataError

ENV_PREFIX: Final = "RETINASERVE_"
_KUBERNETES_LINK: Final = re.compile(r"(.+_)?(SERVICE_(HOST|PORT)|PORT_\d+_(TCP|UDP|SCTP)).*")
"""What follows the prefix in variables that describe a Kubernetes service of that name."""
_LINK_URL: Final = re.compile(r"(tcp|udp|sctp)://.*")
"""Kubernetes gives <SERVICE>_PORT such a value, which for three settings is their variable."""

RATE_PATTERN: Final = r"^[1-9][0-9]{0,8}/[smh]$"
_ORIGIN: Final = re.compile(r"\*|https?://[^/?#\s@]+")


def bundled_models() -> Path:
    """The model repository that ships inside the package."""
    return Path(str(files("service"))) / "models"


class Settings(BaseSettings):
    """What an operator may decide. Every field is the variable `RETINASERVE_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    models_dir: Path = Field(default_factory=bundled_models)
    """Model repository: MODELS_DIR/<name>/<version>/model.onnx. Default: the bundled one."""

    default_model: str | None = None
    """Model that serves requests which name none. Default: the only one in the repository."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda|cuda:\d+(,cuda:\d+)*)$")
    """auto, cpu, cuda, or a list such as cuda:0,cuda:1."""

    cpus: int | None = Field(default=None, ge=1, le=1024)
    """CPUs that decoding and inference may keep busy. Default: what affinity and quota allow."""

    cpu_inferences: int | None = Field(default=None, ge=1, le=64)
    """Most concurrent inferences on a CPU, each on its share of the cores; one that is alone has
    all cores. Default: half the cores, but at least 2 where there are 2 cores, and at most 4."""

    cpu_winograd: bool = True
    """Whether a CPU may compute convolutions with fewer multiplications or in strips, where that is
    faster: to about six digits."""

    gpu_engine: Literal["session", "graphs"] = "session"
    """How a GPU runs a model file: whole in one session of onnxruntime, or `graphs`: the network as
    CUDA graphs and the selection on the CPU. `graphs` has not been measured on a GPU yet."""

    gpu_memory_bytes: int | None = Field(default=None, ge=1_048_576)
    """Most memory of each GPU for a model's weights and intermediate values. Default: no limit."""

    gpu_tf32: bool = True
    """Whether float32 files may compute products in TF32, faster and to about three digits."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface (as the container image sets it)."""

    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 lets the system choose."""

    max_batch_size: int | None = Field(default=None, ge=1, le=256)
    """Most images in one inference. Default: 1 on a CPU, where more gain nothing; 16 on CUDA."""

    max_queue_delay_ms: float = Field(default=0.0, ge=0.0, le=10_000.0)
    """How long an idle device waits for a batch to fill. 0: it never waits."""

    max_queue_size: int = Field(default=128, ge=1)
    """Most images held at a time: arrived, decoding, waiting or in inference. More get 503."""

    max_queue_bytes: int = Field(default=268_435_456, ge=1)
    """Most bytes of images, as they were sent, held at a time. More get 503."""

    request_timeout_ms: int = Field(default=10_000, ge=1)
    """Longest time from a complete body to its answer; `X-Deadline-Ms` may shorten it."""

    body_timeout_ms: int = Field(default=10_000, ge=1)
    """Longest time that a body may take to arrive."""

    drain_delay_seconds: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """After SIGTERM: how long to go on serving, with /readyz at 503, before the listener closes."""

    drain_seconds: float = Field(default=8.0, ge=0.0, allow_inf_nan=False)
    """After the listener closed: how long work in flight may take to finish."""

    watchdog_seconds: float = Field(default=30.0, gt=0.0)
    """A batch that takes longer means that the device is lost: /healthz turns 503, and the server
    exits with status 1."""

    max_body_bytes: int = Field(default=33_554_432, ge=1)
    """Largest request body."""

    max_image_pixels: int = Field(default=50_000_000, ge=1)
    """Largest image, width x height, judged from its header."""

    decode_memory_bytes: int = Field(default=1_073_741_824, ge=1_048_576)
    """Most memory of images while they are decoded, over all threads, an eighth of it for small
    ones alone. Large ones wait for room; one that would not fit even alone gets 413."""

    max_batch_images: int = Field(default=64, ge=1)
    """Most images in one request to /v1/detect/batch."""

    api_keys_file: Path | None = None
    """File of API keys, as `retinaserve keys` writes it. Once set, every call needs a key."""

    rate_limit: str | None = Field(default=None, pattern=RATE_PATTERN)
    """Most requests of one key (without keys: of one client address): 100/s, 6000/m or 1000/h."""

    metrics_public: bool = True
    """Whether /metrics is open to those without a key."""

    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Web pages elsewhere that may call: https://a.example,https://b.example, or * for all."""

    admin_host: str = "127.0.0.1"
    """Address of the admin listener, where models are loaded, unloaded and chosen."""

    admin_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of the admin listener; it needs API_KEYS_FILE. Default: none."""

    grpc_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of the gRPC server on HOST; it needs the extra `grpc`. Default: there is none."""

    font_file: Path | None = None
    """TrueType or OpenType font of class names on drawn images, where a name with characters that
    the font lacks becomes `class 3`. Default: Pillow's own, which has little beyond ASCII."""

    log_format: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object a line."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe line that is written; requests are logged at info."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_sets_nothing(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Empty variables, as Compose makes them of `${X:-}`, and links to Kubernetes services."""
        return {
            name: value
            for name, value in values.items()
            if name == "api_keys_file" or not (_is_empty(value) or _is_link(name, value))
        }

    @field_validator("api_keys_file", mode="before")
    @classmethod
    def _keys_are_not_lost(cls, value: object) -> object:
        # Unset means open to all, which a variable that was left empty must not lead to.
        if _is_empty(value):
            raise ValueError("it is empty; name the file, or unset it to serve without keys")
        return value

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if _ORIGIN.fullmatch(origin) is None:
                raise ValueError(f"{origin!r} is not an origin; write https://host[:port]")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower_log_level(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("*", mode="before")
    @classmethod
    def _no_quotes(cls, value: object) -> object:
        # `docker run --env-file` keeps them.
        if isinstance(value, str) and value[:1] in ("'", '"') and value.endswith(value[0]):
            raise ValueError("the quotes are part of the value; write it without them")
        return value


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like settings and are none: misspelt, or of another version."""
    known = Settings.model_fields
    return sorted(
        name
        for name, setting in _prefixed(environment).items()
        if setting not in known
        and not _KUBERNETES_LINK.fullmatch(setting.upper())
        and not _is_link(setting, environment[name])
    )


def service_links(environment: Mapping[str, str]) -> list[str]:
    """Variables of settings that Kubernetes has set to the address of a service."""
    return sorted(
        name
        for name, setting in _prefixed(environment).items()
        if setting in Settings.model_fields and _is_link(setting, environment[name])
    )


def load_settings(**given: object) -> Settings:
    """Settings from the environment, with those `given` (and not None) on top.

    Raises DataError that names the variable, its value and what would be right.
    """
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name, value in chosen.items():
        if _is_empty(value):
            raise DataError(f"{_option(name)} is empty; give a value, or leave it out")
    try:
        return Settings(**chosen)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        source = _option(name) if name in chosen else ENV_PREFIX + name.upper()
        reason = first["msg"].removeprefix("Value error, ")
        raise DataError(f"{source}={first['input']}: {reason}") from error


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _prefixed(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables with the prefix, and what they would be called as settings."""
    return {
        name: name.upper().removeprefix(ENV_PREFIX).lower()
        for name in environment
        if name.upper().startswith(ENV_PREFIX)
    }


def _is_empty(value: object) -> bool:
    return isinstance(value, str) and not value.strip()


def _is_link(name: str, value: object) -> bool:
    """Whether a variable comes from a Kubernetes service; their names end in _PORT."""
    is_port = name == "port" or name.endswith("_port")
    return is_port and isinstance(value, str) and _LINK_URL.fullmatch(value) is not None
