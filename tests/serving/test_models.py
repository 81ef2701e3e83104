"""Several models in one service: which are loaded, which make room for others, and the requests that wait for one."""

import asyncio
import contextlib
import copy
import re
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch

from canter.errors import ConfigError
from canter.inference.engine.requests import EngineConfig, Request
from canter.loading import save_module
from canter.models.formats.peft import save_adapter
from canter.models.lora import LoraAdapter, fingerprint_of, linear_layers
from canter.serving import app
from canter.serving.config import ServiceConfig
from canter.serving.model import ModelSource, cache_bytes
from canter.serving.pool import ModelPool
from canter.serving.protocol import ApiError

from .conftest import PATIENCE, Running, came_about, connection, form, head, held, noise, running, wav

ENGINE = EngineConfig(rows=4, frames=256)


@pytest.fixture(scope="module")
def folders(model, whisper, tmp_path_factory) -> dict[str, Path]:
    """A Canary and a Whisper on disk, by name."""
    root = tmp_path_factory.mktemp("models")
    return {name: save_module(one, root / name) for name, one in (("canary", model), ("whisper", whisper))}


@pytest.fixture(scope="module")
def sources(folders) -> list[ModelSource]:
    return [ModelSource((name,), folder, ENGINE, "cpu") for name, folder in folders.items()]


@pytest.fixture(scope="module")
def sizes(sources) -> dict[str, int]:
    """Memory of each model."""
    with contextlib.closing(ModelPool(sources, ServiceConfig())) as pool:
        return {offered.name: offered.bytes for offered in pool.offered}


@pytest.fixture(scope="module")
def expected(model, whisper) -> dict[str, str]:
    """The text of a clip by each model in a service of its own."""
    found = {}
    for name, one in (("canary", model), ("whisper", whisper)):
        with running(ModelSource((name,), one, ENGINE)) as live:
            found[name] = said(live, name)
    assert len({*found.values()}) == 2
    return found


def client_of(live: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)


def said(live: Running, name: str, **more: Any) -> str:
    with client_of(live) as client:
        file = ("a.wav", wav(noise(2.0, 4)))
        return client.audio.transcriptions.create(model=name, file=file, language="en", **more).text


def loaded(live: Running) -> list[str]:
    return [served.name for served in live.service.models.loaded]


def metrics_of(live: Running) -> dict[str, float]:
    lines = live.service.metrics.text().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[0] != "#"}


def test_two_models_of_different_families_at_once(sources, expected):
    first = replace(sources[0], names=("canary", "whisper-1"))
    with running(first, sources[1], language="en") as live, client_of(live) as client:
        assert [one.id for one in client.models.list()] == ["canary", "whisper"]
        assert client.models.retrieve("whisper-1").id == "canary"
        asked = ["canary", "whisper", "whisper-1"] * 3
        with ThreadPoolExecutor(len(asked)) as pool:
            found = [*pool.map(lambda name: said(live, name), asked)]
        assert found == [expected["canary" if name == "whisper-1" else name] for name in asked]
        with pytest.raises(openai.NotFoundError, match="no model 'large' here, only 'canary', 'whisper'") as error:
            said(live, "large")
        assert error.value.code == "model_not_found"
        text = client._client.post(f"{live.url}/v1/audio/transcriptions", files={"file": wav(noise(2.0, 4))})
        assert text.json()["text"] == expected["canary"]  # which is asked for without a name
        health = client._client.get(f"{live.url}/health").json()
        assert (health["model"], health["languages"]) == ("canary", ["de", "en"])
        told = [(one["name"], one["loaded"], one["detects"], one["targets"]) for one in health["models"]]
        assert told == [("canary", True, False, ["de", "en"]), ("whisper", True, True, ["en"])]
        assert live.quiet()
        values = metrics_of(live)
    assert values['canter_audio_seconds_total{model="canary"}'] == 2.0 * 7
    assert values['canter_audio_seconds_total{model="whisper"}'] == 2.0 * 3
    answered = 'canter_requests_total{{endpoint="/v1/audio/transcriptions",model="{}",status="{}"}}'
    assert values[answered.format("whisper", 200)] == 3
    assert values[answered.format("", 404)] == 1
    assert values['canter_tokens_total{model="whisper"}'] > 0


def test_the_model_used_longest_ago_makes_room(sources, sizes, expected):
    """Both are loaded at the start, the first is kept, and each comes back when it is asked for."""
    budget = max(sizes.values())
    with running(*sources, memory_bytes=budget) as live:
        assert loaded(live) == ["canary"]
        canary = weakref.ref(live.model.engine.model)
        before = metrics_of(live)
        for name in ("canary", "whisper", "whisper", "canary", "whisper"):
            assert said(live, name) == expected[name]
            assert loaded(live) == [name]
            assert sum(offered.bytes_in_use for offered in live.service.models.offered) <= budget
        assert canary() is None, "the weights of a model that was unloaded are still in memory"
        values = metrics_of(live)
    assert values['canter_model_loaded{model="canary"}'] == 0
    assert values['canter_model_bytes{model="whisper"}'] == sizes["whisper"]
    assert values['canter_model_loads_total{model="canary"}'] == before['canter_model_loads_total{model="canary"}'] + 1
    assert values['canter_model_unloads_total{model="canary"}'] == 2
    tokens = 'canter_tokens_total{model="canary"}'
    assert values[tokens] > before[tokens], "counters of a model that was unloaded do not fall"


def test_what_fits_stays(folders, sizes, expected):
    """Of three models two fit: the third takes the place of the one used longest ago."""
    names = {"canary": "canary", "whisper": "whisper", "again": "whisper"}
    sources = [ModelSource((name,), folders[kind], ENGINE, "cpu") for name, kind in names.items()]
    with running(*sources, memory_bytes=sizes["canary"] + sizes["whisper"]) as live:
        assert loaded(live) == ["canary", "whisper"]
        for name, kept in (
            ("canary", ["canary", "whisper"]),
            ("again", ["canary", "again"]),
            ("again", ["canary", "again"]),
            ("whisper", ["whisper", "again"]),
        ):
            assert said(live, name) == expected[names[name]]
            assert loaded(live) == kept


def test_a_model_that_need_not_go_stays(folders, sizes, expected):
    """The one used longest ago is too small to make room for another, and fits beside it."""
    assert sizes["whisper"] < sizes["canary"]
    names = {"large": "canary", "larger": "canary", "small": "whisper"}
    sources = [ModelSource((name,), folders[kind], ENGINE, "cpu") for name, kind in names.items()]
    with running(*sources, memory_bytes=sizes["canary"] + sizes["whisper"]) as live:
        assert loaded(live) == ["large", "small"]
        assert said(live, "small") == expected["whisper"]
        assert said(live, "large") == expected["canary"]
        small = live.service.models.offered[2].served
        assert said(live, "larger") == expected["canary"]
        assert loaded(live) == ["larger", "small"]
        assert live.service.models.offered[2].served is small


def test_an_adapter_comes_with_its_model(model, folders, sizes, expected, tmp_path):
    """It is asked for by its name, also while its model is not loaded, and the answer is that of the merged model."""
    trained, layers = copy.deepcopy(model), linear_layers(model)
    chosen = tuple(name for name in layers if "decoder" in name)
    trained.adapter = LoraAdapter(2, 4.0, 0.0, chosen, str(folders["canary"]), fingerprint_of(model))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in chosen:
        shapes = {"A": (2, layers[name].in_features), "B": (layers[name].out_features, 2)}
        tensors |= {f"{name}.lora_{one}": torch.randn(*shape, generator=generator) for one, shape in shapes.items()}
    adapter = save_adapter(trained, tmp_path / "medical", tensors)
    with running(ModelSource(("medical",), folders["canary"], ENGINE, "cpu", adapter=adapter)) as live:
        merged = said(live, "medical")
    canary = ModelSource(("canary",), folders["canary"], ENGINE, "cpu", adapters={"medical": adapter})
    whisper = ModelSource(("whisper",), folders["whisper"], ENGINE, "cpu")
    with contextlib.closing(ModelPool([canary], ServiceConfig())) as pool:
        size = pool.first.bytes
    assert size > sizes["canary"]
    with running(whisper, canary, memory_bytes=size) as live, client_of(live) as client:
        assert [one.id for one in client.models.list()] == ["whisper", "canary", "medical"]
        assert client.models.retrieve("medical").parent == "canary"
        assert loaded(live) == ["whisper"]
        assert said(live, "medical") == merged != expected["canary"]
        assert loaded(live) == ["canary"]
        assert said(live, "canary") == expected["canary"]


def test_two_busy_models_take_turns(sources, sizes, expected):
    """A model with requests inside is not unloaded; later requests for it wait behind the model that needs its room."""
    with running(*sources, memory_bytes=max(sizes.values())) as live, ThreadPoolExecutor(4) as pool:
        canary, whisper = live.service.models.offered
        with held(live.model.engine) as go_on:
            first = pool.submit(said, live, "canary")
            assert came_about(lambda: live.model.inside == 1)
            others = [pool.submit(said, live, "whisper") for _ in range(2)]
            assert came_about(lambda: whisper.waiting_requests == 2)
            assert came_about(lambda: canary.leaving)
            later = pool.submit(said, live, "canary")
            assert came_about(lambda: canary.waiting_requests == 1)
            assert loaded(live) == ["canary"]
            assert canary.inside == 1
            assert metrics_of(live)['canter_model_requests_waiting{model="whisper"}'] == 2
            go_on()
            assert first.result(PATIENCE) == later.result(PATIENCE) == expected["canary"]
            assert [one.result(PATIENCE) for one in others] == [expected["whisper"]] * 2
        assert (whisper.loads, canary.loads) == (2, 2)  # each once at the start; both of its requests were answered
        assert loaded(live) == ["canary"]
        assert live.quiet()


def test_a_client_that_gives_up_waiting_frees_the_other_model(sources, sizes, expected):
    """Requests that waited behind it are served by the model that stays, before the one inside has ended."""
    with running(*sources, memory_bytes=max(sizes.values())) as live, ThreadPoolExecutor(2) as pool:
        canary, whisper = live.service.models.offered
        body = form(wav(noise(2.0)), model="whisper")
        with held(live.model.engine):
            first = pool.submit(said, live, "canary")
            assert came_about(lambda: live.model.inside == 1)
            with connection(live) as client:
                client.sendall(head(len(body)) + body)
                assert came_about(lambda: canary.leaving)
                later = pool.submit(said, live, "canary")
                assert came_about(lambda: canary.waiting_requests == 1)
            assert came_about(lambda: canary.inside == 2)
            assert (whisper.waiting_requests, canary.leaving) == (0, False)
        assert first.result(PATIENCE) == later.result(PATIENCE) == expected["canary"]
        assert canary.unloads == 0
        assert live.quiet()


def test_a_model_that_does_not_come_in_time_is_503(sources, sizes, monkeypatch):
    """The clock jumps to the end of the request's time once it asks for the model."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, perf_counter=app.time.perf_counter)
    monkeypatch.setattr(app, "time", clock)
    with (
        running(*sources, memory_bytes=max(sizes.values()), timeout=PATIENCE) as live,
        ThreadPoolExecutor(1) as pool,
        client_of(live) as client,
    ):
        with held(live.model.engine):
            first = pool.submit(said, live, "canary")
            assert came_about(lambda: live.model.inside == 1)
            find = live.service.models.find

            def find_late(name: str | None) -> Any:
                clock.now = PATIENCE
                return find(name)

            monkeypatch.setattr(live.service.models, "find", find_late)
            for more in ({}, {"stream": True}):
                clock.now = 0.0
                with pytest.raises(openai.InternalServerError) as raised:
                    client.audio.transcriptions.create(model="whisper", file=wav(noise(1.0)), language="en", **more)
                assert (raised.value.status_code, raised.value.code) == (503, "overloaded")
                assert raised.value.response.headers["retry-after"] == "1"
                told = r"'whisper' could not be loaded within 1800 s; the memory is used by canary: try again later"
                assert re.search(told, raised.value.message)
        assert first.result(PATIENCE)
        assert live.quiet()


def test_a_model_that_fails_to_load_is_an_error_of_its_requests(folders, sources, sizes, expected, tmp_path, caplog):
    moving = shutil.copytree(folders["whisper"], tmp_path / "moving")
    with running(sources[0], replace(sources[1], model=moving), memory_bytes=max(sizes.values())) as live:
        moving.rename(tmp_path / "elsewhere")
        with pytest.raises(
            openai.InternalServerError, match="'whisper' could not be loaded; the service's log"
        ) as error:
            said(live, "whisper")
        assert error.value.status_code == 500
        assert str(tmp_path) not in error.value.message
        assert "moving does not exist" in caplog.text
        assert said(live, "canary") == expected["canary"]
        (tmp_path / "elsewhere").rename(moving)
        assert said(live, "whisper") == expected["whisper"]


def test_a_model_that_finds_no_memory_gets_that_of_idle_ones(sources, sizes, expected, monkeypatch):
    """The device has less memory than the budget says."""
    load = ModelSource.load

    def load_if_free(source: ModelSource) -> Any:
        if live.service.models.first.loaded:
            raise RuntimeError("CUDA out of memory")
        return load(source)

    with running(*sources, memory_bytes=max(sizes.values())) as live:
        live.service.models.budget = 2**40
        monkeypatch.setattr(ModelSource, "load", load_if_free)
        assert said(live, "whisper") == expected["whisper"]
        assert loaded(live) == ["whisper"]
        assert said(live, "canary") == expected["canary"]
        assert loaded(live) == ["canary", "whisper"]


def test_a_request_that_waits_for_a_model_is_answered_before_the_service_ends(sources, sizes, expected):
    with (
        running(*sources, memory_bytes=max(sizes.values())) as live,
        ThreadPoolExecutor(2) as pool,
        held(live.model.engine) as go_on,
    ):
        answers = [pool.submit(said, live, "canary")]
        assert came_about(lambda: live.model.inside == 1)
        answers.append(pool.submit(said, live, "whisper"))
        assert came_about(lambda: live.service.models.offered[1].waiting_requests == 1)
        live.server.should_exit = True
        go_on()
        assert [one.result(PATIENCE) for one in answers] == [expected["canary"], expected["whisper"]]


def test_requests_that_wait_when_the_service_closes_are_told(sources, sizes):
    async def wait_and_close() -> None:
        pool = ModelPool(sources, ServiceConfig(memory_bytes=max(sizes.values())))
        canary, whisper = pool.offered
        async with pool.using(canary):
            waiting = asyncio.create_task(pool.using(whisper).__aenter__())
            while not whisper.waiting_requests:
                await asyncio.sleep(0)
            pool.close()
            with pytest.raises(ApiError, match="shutting down"):
                await waiting
        with pytest.raises(ApiError, match="shutting down"):
            await pool.using(whisper).__aenter__()

    asyncio.run(wait_and_close())


def test_limits_hold_for_all_models_together(sources):
    with running(*sources, max_requests=1) as live, held(live.model.engine), client_of(live) as client:
        body = form(wav(noise(2.0)), model="canary")
        with connection(live) as inside:
            inside.sendall(head(len(body)) + body)
            assert came_about(lambda: live.model.inside == 1)
            with pytest.raises(openai.InternalServerError, match="the service is full"):
                client.audio.transcriptions.create(model="whisper", file=wav(noise(1.0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_bytes": 1000}, r"whisper takes \d+ MiB, caches of 4 rows included, more than the 0 MiB of --memory"),
        ({"language": "de"}, r"--language: 'de' \(German\) is not a language of this model.* \(whisper\)"),
        ({"language": "en", "names": ("canary",)}, "'canary' would name two models or adapters; give each a name"),
    ],
)
def test_what_cannot_be_served_together_is_an_error_of_the_start(sources, change, message):
    second = replace(sources[1], names=change.pop("names", ("whisper",)))
    with pytest.raises(ConfigError, match=message):
        ModelPool([sources[0], second], ServiceConfig(**change))


def test_weights_in_int8_count_as_what_they_are(folders, sizes):
    """oneDNN packs them, and their storage cannot be read."""
    source = ModelSource(("canary",), folders["canary"], ENGINE, "cpu", "int8")
    with running(source, memory_bytes=sizes["canary"]) as live:
        assert said(live, "canary")
        caches = cache_bytes(live.model.engine)
        assert caches < live.model.bytes < sizes["canary"]


@pytest.mark.parametrize("beams", [1, 3])
def test_the_memory_of_caches_is_what_full_rows_take(endless, beams):
    """Audio that fills the window, decoded up to the limit on tokens."""
    engine = ModelSource(("endless",), endless, EngineConfig(rows=3, frames=4096, beams=beams, max_repeats=0)).load()
    advance, most = engine._advance, 0

    def measured(live: Any, *rest: Any) -> Any:
        nonlocal most
        found = advance(live, *rest)
        most = max(most, live.cache.cross.nbytes + live.cache.own.nbytes)
        return found

    engine._advance = measured
    prompt = endless.prompt(source_lang="en", target_lang="en")
    engine.decode([Request(noise(40.0, seed), prompt) for seed in range(3)])
    assert most == pytest.approx(cache_bytes(engine), rel=0.25)
