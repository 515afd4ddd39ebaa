"""What every endpoint works with, in one object. Knows which parts there are, not what they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from octavo.api.errors import ApiError, ModelNotFoundError, UnavailableError
from octavo.api.lifecycle import Lifecycle, State
from octavo.config import ModelConfig, SchedulerConfig, ServerConfig
from octavo.engine.options import Defaults, SeedSource
from octavo.engine.protocols import Engine
from octavo.text.chat_template import ChatTemplate
from octavo.text.tokenizer import Tokenizer


class Metrics(Protocol):
    """What the front end needs of `octavo.observability.metrics`."""

    @property
    def content_type(self) -> str: ...

    def render(self) -> bytes: ...

    def on_rejected(self, reason: str) -> None: ...

    def on_stop_string(self, request_id: str) -> None: ...

    def observe_http(self, *, handler: str, method: str, status: int, seconds: float) -> None: ...


class Siblings(Protocol):
    """What a server's HTTP processes are doing together."""

    @property
    def num_requests(self) -> int:
        """HTTP requests for generations that are being answered."""

    @property
    def num_choices(self) -> int:
        """Requests that the engine has not ended."""

    async def metrics(self) -> bytes:
        """Every series of the server. Raises TimeoutError when another process is silent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """The one HTTP process of a server."""

    engine: Engine
    lifecycle: Lifecycle
    own: Metrics | None

    @property
    def num_requests(self) -> int:
        return self.lifecycle.num_active

    @property
    def num_choices(self) -> int:
        return self.engine.num_unfinished

    async def metrics(self) -> bytes:
        return b"" if self.own is None else self.own.render()


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """The parts of one HTTP front end."""

    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate | None
    server: ServerConfig
    model: ModelConfig
    scheduler: SchedulerConfig
    metrics: Metrics | None
    lifecycle: Lifecycle
    siblings: Siblings
    defaults: Defaults
    seeds: SeedSource
    created: int  # Unix seconds

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names clients may use; the first is shown."""
        return self.server.served_model_name or (self.model.model or self.engine.info.model,)

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises `ModelNotFoundError`."""
        names = self.model_names
        if name is None:
            return names[0]
        if name not in names:
            raise ModelNotFoundError(name, known=names)
        return name

    def check_admission(self, num_new: int) -> None:
        """Raises `UnavailableError` (503) when no new generation can be taken now."""
        if self.lifecycle.state is State.STARTING:
            raise UnavailableError("The model is still being loaded", code="starting")
        if self.lifecycle.state is State.DRAINING:
            raise UnavailableError("The server is shutting down", code="draining", retry_after=5)
        limit = self.scheduler.max_num_queued_reqs
        if limit is None:
            return
        num_waiting = self.siblings.num_choices - self.engine.info.max_num_seqs
        if num_waiting + num_new > limit:
            if self.metrics is not None:
                self.metrics.on_rejected("max_num_queued_reqs")
            raise UnavailableError(
                f"{max(0, num_waiting)} requests are already waiting, {num_new} came, "
                f"and at most {limit} may wait",
                code="queue_full",
            )

    def check_token_ids(self, ids: Any, *, param: str) -> None:
        """Raises `ApiError` for the first id outside the vocabulary."""
        size = self.engine.info.vocab_size
        if ids and (min(ids) < 0 or max(ids) >= size):
            wrong = next(i for i in ids if not 0 <= i < size)
            raise ApiError(
                f"{param}: token ids must be from 0 to {size - 1}, got {wrong}", param=param
            )
