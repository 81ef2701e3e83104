"""The models of a service: which are loaded within the memory budget, and the requests that wait for one that is not.

A model with requests inside is never unloaded. Where the one that is asked for does not fit beside the others, those
used longest ago make room: idle ones at once, and if these are not enough, others as soon as the requests inside are
answered. Until then new requests for them wait too, behind the model that needs the room, so that two busy models take
turns. One model is loaded at a time, in the order in which they were asked for.
"""

import asyncio
import contextlib
import itertools
import logging
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import fields

from canter.errors import ConfigError
from canter.inference.engine.requests import Counters
from canter.runtime import gib, is_out_of_memory, release_memory
from canter.serving.config import ServiceConfig
from canter.serving.model import ModelProfile, ModelSource, ServedModel, load_in_thread
from canter.serving.protocol import ApiError

log = logging.getLogger("canter.serving")
CLOSING = "the service is shutting down"


class OfferedModel:
    """A model that clients may ask for, loaded or not."""

    def __init__(self, source: ModelSource):
        self.source = source
        self.served: ServedModel | None = None
        self.known: ModelProfile | None = None
        self.inside = 0
        """Number of requests that use it."""
        self.last_use = 0
        """Number of its latest use among the uses of all models."""
        self.leaving = False
        """True while another model waits for its memory: new requests wait until it has been unloaded."""
        self.waiting: list[asyncio.Future[None]] = []
        """One for each request that waits for it."""
        self.loads = self.unloads = 0
        self._earlier: list[Counters] = []  # of engines that are gone

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def profile(self) -> ModelProfile:
        assert self.known is not None  # every model is loaded once at the start
        return self.known

    @property
    def loaded(self) -> bool:
        return self.served is not None

    @property
    def waiting_requests(self) -> int:
        return len(self.waiting)

    @property
    def bytes_in_use(self) -> int:
        """Memory that it takes now."""
        return self.served.bytes if self.served is not None else 0

    @property
    def bytes(self) -> int:
        """Memory that it takes, or is expected to take: as when it was loaded last, and before that, its files'."""
        if self.served is not None:
            return self.served.bytes
        return self.known.bytes if self.known is not None else self.source.weight_bytes()

    @property
    def counters(self) -> list[Counters]:
        """Counters of all its engines since the service started."""
        return [*self._earlier, *(self.served.counters if self.served else ())]

    def arrive(self, served: ServedModel) -> None:
        """Take the loaded model."""
        self.served, self.known = served, served.profile
        self.loads += 1

    def leave(self) -> ServedModel:
        """Return the loaded model, which the caller closes."""
        assert self.served is not None
        assert not self.inside
        served, self.served, self.leaving = self.served, None, False
        self._earlier = [_sum([*self._earlier, *served.counters])]
        self.unloads += 1
        return served


class ModelPool:
    """All models of a service, of which those are loaded that fit the memory budget.

    Its methods belong to the thread of the event loop; models are loaded in threads of their own.
    """

    def __init__(self, sources: Sequence[ModelSource], config: ServiceConfig):
        """Load each model once, so that a model that cannot be loaded is an error of the start, and keep those that
        fit, the first ones before the others.

        Raises ConfigError for names that stand twice and for a model that exceeds the budget by itself, and what
        loading raises.
        """
        self.config, self.budget = config, math.inf if config.memory_bytes is None else config.memory_bytes
        self.offered = [OfferedModel(source) for source in sources]
        self._by_name: dict[str, OfferedModel] = {}
        for offered in self.offered:
            for name in (*offered.source.names, *offered.source.adapter_names):
                if name in self._by_name:
                    raise ConfigError(
                        f"{name!r} would name two models or adapters; give each a name of its own, as in NAME=MODEL"
                    )
                self._by_name[name] = offered
        self._uses = itertools.count(1)
        self._queue: list[OfferedModel] = []  # models that requests wait for
        self._loader: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()  # set when a request has left a model or given up waiting for one
        self._closed = False
        try:
            for offered in reversed(self.offered):
                self._load_at_start(offered)
            for offered in self.offered:  # that made room for one that was larger than expected
                if not offered.loaded and self._excess(offered) <= 0:
                    self._load_at_start(offered)
        except BaseException:
            self.close()
            raise

    @property
    def first(self) -> OfferedModel:
        """The model of requests that name none."""
        return self.offered[0]

    @property
    def loaded(self) -> list[ServedModel]:
        return [offered.served for offered in self.offered if offered.served is not None]

    @property
    def alive(self) -> bool:
        return not self._closed and all(served.alive for served in self.loaded)

    def find(self, name: str | None) -> OfferedModel:
        """Return the model that a request asks for by its name or an adapter's; None is the first.

        Raises ApiError (404), with the names that there are.
        """
        if not name:
            return self.first
        if name not in self._by_name:
            names = [one for each in self.offered for one in (each.name, *each.source.adapter_names)]
            text = f"there is no model {name[:80]!r} here, only {', '.join(map(repr, names))}"
            raise ApiError(404, text, "model", "model_not_found")
        return self._by_name[name]

    @contextlib.asynccontextmanager
    async def using(self, offered: OfferedModel) -> AsyncIterator[ServedModel]:
        """Context manager of a request that uses a model, which is not unloaded meanwhile; load it if necessary.

        Cancelling the call ends the wait. Raises ApiError (500 or 503) for a model that cannot be loaded, and (503)
        when the service closes.
        """
        if self._closed:
            raise ApiError(503, CLOSING, code="overloaded")
        if offered.served is not None and not offered.leaving:
            offered.inside += 1
        else:
            await self._wait_for(offered)
        assert offered.served is not None
        try:
            yield offered.served
        finally:
            self._has_left(offered)

    def late(self, offered: OfferedModel) -> ApiError:
        """Return the error for a request whose model could not be loaded within its time."""
        busy = [one.name for one in self.offered if one.served is not None and one.inside]
        used = f"; the memory is used by {', '.join(busy)}" if busy else ""
        text = f"the model {offered.name!r} could not be loaded within {self.config.timeout:g} s{used}: try again later"
        return ApiError(503, text, "model", "overloaded")

    def close(self) -> None:
        """Close all models; requests that wait for one get an error (503)."""
        self._closed = True
        if self._loader is not None and not self._loader.get_loop().is_closed():
            self._loader.cancel()
        for offered in self.offered:
            self._refuse(offered, 503, CLOSING)
            if offered.served is not None:
                offered.served.close()

    # -- waiting --

    async def _wait_for(self, offered: OfferedModel) -> None:
        """Wait until the model is loaded and this request counts as inside."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        offered.waiting.append(waiting)
        if offered not in self._queue:
            self._queue.append(offered)
        if self._loader is None or self._loader.done():
            self._loader = asyncio.create_task(self._load_in_turn())
        try:
            await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self._has_left(offered)  # it was let in at the same moment
            raise
        finally:
            if waiting in offered.waiting:
                offered.waiting.remove(waiting)
                self._changed.set()

    def _has_left(self, offered: OfferedModel) -> None:
        offered.inside -= 1
        offered.last_use = next(self._uses)
        self._changed.set()

    def _admit(self, offered: OfferedModel) -> None:
        """Count the requests that wait for a model as inside, at once: nothing can unload it before they run."""
        for waiting in offered.waiting:
            if not waiting.done():
                offered.inside += 1
                waiting.set_result(None)
        offered.waiting.clear()

    def _refuse(self, offered: OfferedModel, status: int, text: str) -> None:
        for waiting in offered.waiting:
            if not waiting.done():
                waiting.set_exception(ApiError(status, text, "model", "overloaded" if status == 503 else None))
        offered.waiting.clear()

    # -- loading and unloading --

    async def _load_in_turn(self) -> None:
        """Load the models that requests wait for, one at a time, and admit the requests."""
        while self._queue:
            offered, error = self._queue[0], None
            try:
                if await self._has_room(offered):
                    await self._load(offered)
            except Exception as found:
                log.error("%s could not be loaded: %s", offered.name, found, exc_info=found)
                error = found
            self._queue.remove(offered)
            if offered.served is not None:
                self._admit(offered)
            elif error is not None and is_out_of_memory(error):
                self._refuse(offered, 503, f"there is no memory for the model {offered.name!r} now; try again later")
            else:
                self._refuse(
                    offered, 500, f"the model {offered.name!r} could not be loaded; the service's log says why"
                )

    async def _has_room(self, offered: OfferedModel) -> bool:
        """Unload other models until this one fits, and return True; False once no request waits for it any more, or it
        is loaded."""
        try:
            while offered.served is None and offered.waiting:
                excess = self._excess(offered)
                if excess <= 0:
                    return True
                if idle := _to_unload(self._others(offered, idle=True), excess):
                    await self._unload(idle[0])
                    continue
                for other in _to_unload(self._others(offered), excess):
                    other.leaving = True
                self._changed.clear()
                await self._changed.wait()
            return False
        finally:
            for one in self.offered:
                one.leaving = False

    async def _load(self, offered: OfferedModel) -> None:
        try:
            served = await asyncio.wrap_future(load_in_thread(offered.source, self.config))
        except Exception as error:
            if not is_out_of_memory(error) or not self._others(offered, idle=True):
                raise
            served = None
        if served is None:  # outside of the handler: the exception holds on to tensors
            while idle := self._others(offered, idle=True):
                await self._unload(idle[0])
            served = await asyncio.wrap_future(load_in_thread(offered.source, self.config))
        offered.arrive(served)

    def _load_at_start(self, offered: OfferedModel) -> None:
        self._unload_others(offered)
        try:
            served = load_in_thread(offered.source, self.config).result()
        except Exception as error:
            if not is_out_of_memory(error) or not self._others(offered):
                raise
            served = None
        if served is None:
            self._unload_others(offered, all_of_them=True)
            served = load_in_thread(offered.source, self.config).result()
        offered.arrive(served)
        offered.last_use = next(self._uses)
        if served.bytes > self.budget:
            raise ConfigError(
                f"{offered.name} takes {gib(served.bytes)}, caches of {served.engine.rows} rows included, more than "
                f"the {gib(self.budget)} of --memory; raise that, or lower --batch-size"
            )
        self._unload_others(offered)

    def _excess(self, offered: OfferedModel) -> float:
        """Return the bytes by which this model and the loaded ones exceed the budget."""
        return offered.bytes + sum(other.bytes for other in self._others(offered)) - self.budget

    def _others(self, offered: OfferedModel, idle: bool = False) -> list[OfferedModel]:
        """Return the other loaded models, or those without requests inside, the one used longest ago first."""
        others = [one for one in self.offered if one is not offered and one.served is not None]
        return sorted((one for one in others if not (idle and one.inside)), key=lambda one: one.last_use)

    async def _unload(self, offered: OfferedModel) -> None:
        served = offered.leave()
        await asyncio.to_thread(served.close)
        del served  # the last reference
        await asyncio.to_thread(release_memory)

    def _unload_others(self, offered: OfferedModel, all_of_them: bool = False) -> None:
        """Unload idle models until this one fits beside the others, at the start."""
        excess = math.inf if all_of_them else self._excess(offered)
        for other in _to_unload(self._others(offered), excess):
            other.leave().close()
            release_memory()


def _to_unload(models: Sequence[OfferedModel], excess: float) -> list[OfferedModel]:
    """Return the first of ``models`` that have at least ``excess`` bytes together, or all, without those that need not
    go because later ones suffice."""
    chosen: list[OfferedModel] = []
    for one in models:
        if excess <= 0:
            break
        chosen.append(one)
        excess -= one.bytes
    for one in [*chosen]:
        if one.bytes <= -excess:
            chosen.remove(one)
            excess += one.bytes
    return chosen


def _sum(counters: Sequence[Counters]) -> Counters:
    """Return counters that are the sums of others."""
    return Counters(**{one.name: sum(getattr(each, one.name) for each in counters) for one in fields(Counters)})
