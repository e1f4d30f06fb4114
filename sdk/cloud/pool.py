"""Links to several clouds, where a client has more than one.

Stands where a `CloudLink` stands; requests go through `Pool.at`, by the endpoint that the decision
names. Connecting is shared: all callers that want an endpoint wait for the same attempt.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nearfar.errors import (
    CloudUnavailable,
    ConfigError,
    DeadlineExceeded,
    NearfarError,
    SecurityError,
)
from nearfar.eventloop import mark_seen
from nearfar.units import Deadline
from nearfar.wire import messages as wire
from sdk.cloud.endpoints import endpoint_name
from sdk.cloud.link import CloudLink, LinkState
from sdk.routing.router import MAX_ENDPOINT_BYTES

if TYPE_CHECKING:
    from sdk.config import CloudConfig

logger = logging.getLogger(__name__)


class Pool:
    """Links to several clouds. Belongs to one event loop, like `CloudLink`.

    Args:
        configs: At least two, with different names.

    Attributes:
        links: One for each, in their order.
        on_reached: Told how connecting to an endpoint ended; `None` for well.

    Raises:
        ConfigError: Two clouds have the same name.
    """

    def __init__(self, configs: Sequence[CloudConfig]) -> None:
        self.links = tuple(CloudLink(config) for config in configs)
        self._by_name = {endpoint_name(link.config.name): link for link in self.links}
        if len(self._by_name) < len(self.links):
            raise ConfigError(
                f"Two clouds have the same name (the first {MAX_ENDPOINT_BYTES} characters count)",
                field="cloud",
                fix="Give each CloudConfig a name of its own",
            )
        self.on_reached: Callable[[str, NearfarError | None], None] | None = None
        self._reaching: dict[str, asyncio.Task[None]] = {}
        self._is_closed = False

    @property
    def state(self) -> LinkState:
        """What is known about all of them together.

        `offers` are those of the first cloud that has a model; `region` tells all regions, so that
        it changes when one of them does.
        """
        offers: dict[str, wire.ModelOffer] = {}
        known = False
        for link in reversed(self.links):
            if link.state.offers is not None:
                known = True
                offers.update(link.state.offers)
        return LinkState(
            is_connected=any(link.state.is_connected for link in self.links),
            offers=offers if known else None,
            region="|".join(link.state.region or "" for link in self.links),
            in_flight=sum(link.in_flight for link in self.links),
        )

    def at(self, name: str) -> CloudLink:
        """The link to one endpoint."""
        return self._by_name[name]

    def is_reaching(self, name: str) -> bool:
        """Whether a connection to that endpoint is being made."""
        task = self._reaching.get(name)
        return task is not None and not task.done()

    def reach(self, names: Sequence[str]) -> None:
        """Begin to connect to endpoints; nobody waits for it."""
        for name in names:
            self._begin(name)

    async def connect(self, deadline: Deadline, names: Sequence[str] = ()) -> LinkState:
        """Connect to endpoints; the first one that can be used is enough.

        What was begun goes on beside, so that the others can be used soon.

        Args:
            deadline: When the caller gives up.
            names: Which; without any all, and then each is waited for.

        Raises:
            DeadlineExceeded: The deadline passed first.
            SecurityError, ConfigError, CloudUnavailable: None can be used; an error that somebody
                must look at comes before one of the weather.
        """
        pending = {self._begin(name) for name in names or self._by_name}
        until = asyncio.FIRST_COMPLETED if names else asyncio.ALL_COMPLETED
        errors: list[BaseException] = []
        is_reached = False
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=deadline.timeout_s(), return_when=until
            )
            if not done:
                raise DeadlineExceeded(
                    "The deadline passed while connecting to the clouds",
                    tried=("cloud",),
                    fix="Call warm_up() before the first request, or allow more time",
                )
            for task in done:
                error = None if task.cancelled() else task.exception()
                if error is not None:
                    errors.append(error)
                elif not task.cancelled():
                    is_reached = True
            if is_reached and names:
                return self.state
        if is_reached:
            return self.state
        errors.sort(key=lambda error: not isinstance(error, (SecurityError, ConfigError)))
        raise errors[0] if errors else CloudUnavailable("The client was closed")

    async def refresh(self, deadline: Deadline) -> LinkState:
        """Ask all clouds again what they serve.

        Raises:
            As `connect`.
        """
        await self.connect(deadline)
        connected = [link for link in self.links if link.state.is_connected]
        results = await asyncio.gather(
            *(link.refresh(deadline) for link in connected), return_exceptions=True
        )
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors and len(errors) == len(results):
            raise errors[0]
        return self.state

    async def close(self) -> None:
        """Close all connections; idempotent."""
        self._is_closed = True
        tasks = list(self._reaching.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self.links))

    def _begin(self, name: str) -> asyncio.Task[None]:
        task = self._reaching.get(name)
        if task is None or task.done():
            task = self._reaching[name] = asyncio.ensure_future(self._reach(name))
            task.add_done_callback(mark_seen)
        return task

    async def _reach(self, name: str) -> None:
        link = self._by_name[name]
        try:
            await link.connect(Deadline())
        except NearfarError as error:
            if not isinstance(error, CloudUnavailable) and not self._is_closed:
                logger.warning("cloud %s is not used: %s", link.config.name, error.problem)
            self._tell(name, error)
            raise
        self._tell(name, None)

    def _tell(self, name: str, error: NearfarError | None) -> None:
        if self.on_reached is not None:
            self.on_reached(name, error)
