"""The service with models of transformers: the same texts as the engine's, and refusals of what they cannot do."""

import numpy as np
import openai
import pytest

pytest.importorskip("transformers")

from canter.inference.engine.requests import EngineConfig, Request
from canter.integrations.transformers import TransformersModel, TransformersTokenizer

from ..integrations.small_transformers import START, built, word_tokenizer
from .conftest import noise, running, wav


def adapted(family: str, languages: dict[str, int] | None = None) -> TransformersModel:
    found = TransformersModel(built(family).model, built(family).extractor)
    tokenizer = word_tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    found.tokenizer = TransformersTokenizer(tokenizer, [START], languages)
    return found


@pytest.fixture(scope="module")
def speech_to_text():
    return adapted("speech_to_text")


@pytest.fixture(scope="module")
def client(speech_to_text):
    with running(speech_to_text) as live, openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as found:
        yield found


def text_of(model: TransformersModel, samples: np.ndarray, prompt: list[int]) -> str:
    (found,) = model.engine(model.tokenizer.end, EngineConfig()).decode([Request(samples, prompt)])
    return model.tokenizer.decode(found.tokens)


def test_a_model_without_languages(client, speech_to_text):
    samples = noise(1.5)
    file = ("a.wav", wav(samples, subtype="FLOAT"))
    expected = text_of(speech_to_text, samples, [START])
    for language in ({}, {"language": "en"}, {"language": "German"}):
        assert client.audio.transcriptions.create(model="small", file=file, **language).text == expected
    told = client.audio.transcriptions.create(model="small", file=file, response_format="verbose_json", language="en")
    assert (told.text, told.language, told.segments[0].end) == (expected, "en", 1.5)
    with pytest.raises(openai.BadRequestError, match="'qwertz' is not the name or code of a language"):
        client.audio.transcriptions.create(model="small", file=file, language="qwertz")


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"temperature": 0.4}, "at temperature 0 only"),
        ({"timestamp_granularities": ["word"], "response_format": "verbose_json"}, "no times of words"),
        ({"prompt": "w7"}, "takes no 'prompt'"),
        ({"extra_body": {"suppress_tokens": "5"}}, "another library decodes this model, which cannot do that"),
        ({"extra_body": {"condition_on_previous_text": "true"}}, "leave condition_on_previous_text out"),
    ],
)
def test_what_the_model_cannot_do_is_refused(client, field, says):
    with pytest.raises(openai.BadRequestError, match=says):
        client.audio.transcriptions.create(model="small", file=("a.wav", wav(noise(0.5))), **field)


def test_audio_that_the_library_cannot_take_is_the_clients_error(client):
    """Speech2Text's filterbank needs 25 ms."""
    with pytest.raises(openai.BadRequestError, match=r"fails on 0.01 s of this audio") as error:
        client.audio.transcriptions.create(model="small", file=("a.wav", wav(noise(0.005))))
    assert error.value.code == "invalid_audio"
    assert client.audio.transcriptions.create(model="small", file=("a.wav", wav(noise(0.5)))).text


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # openai's, of translations
def test_a_model_of_several_languages_translates():
    model, samples = adapted("seamless", {"eng": 4, "deu": 5}), noise(0.8)
    file = ("a.wav", wav(samples, subtype="FLOAT"))
    with running(model) as live, openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client:
        said = client.audio.transcriptions.create(model="small", file=file, language="de").text
        english = client.audio.translations.create(model="small", file=file, extra_body={"language": "de"}).text
        with pytest.raises(openai.BadRequestError, match="needs the language of the audio"):
            client.audio.transcriptions.create(model="small", file=file)
    assert (said, english) == (text_of(model, samples, [START, 5]), text_of(model, samples, [START, 4]))
