"""Effects on waveforms: their definitions, on drawn audio, and what they never do."""

import io
import math

import numpy as np
import pytest
import soundfile
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from canter.training.feed.waveform import (
    CODECS,
    change_gain,
    clip_peaks,
    code,
    low_pass,
    mean_power,
    mix_noise,
    peak_level,
    reverberate,
    telephone,
)

RATE = 16000
EFFECTS = {
    "noise": lambda audio: mix_noise(audio, tone(300, len(audio)), 3.0),
    "rir": lambda audio: reverberate(audio, a_room(7)),
    "gain": lambda audio: change_gain(audio, -6.0),
    "clipping": lambda audio: clip_peaks(audio, 0.4),
    "low_pass": lambda audio: low_pass(audio, RATE, 2000.0),
    **{codec: lambda audio, codec=codec: telephone(audio, RATE, codec) for codec in CODECS},
}
sizes = st.integers(1, 9000)
seeds = st.integers(0, 2**32)


def drawn(seed, size, scale=0.2):
    return (scale * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def tone(hertz, size, rate=RATE, scale=0.3):
    return (scale * np.sin(2 * np.pi * hertz * np.arange(size) / rate)).astype(np.float32)


def a_room(seed, direct=40, size=2000):
    """Return an impulse response whose direct path arrives after ``direct`` samples."""
    tail = drawn(seed, size, 0.3) * np.exp(-np.arange(size) / 400)
    response = np.clip(tail, -0.9, 0.9).astype(np.float32)
    response[:direct] *= 0.01
    response[direct] = 1.0
    return response


def decibels(ratio):
    return 10 * math.log10(ratio)


@given(seeds, sizes, st.floats(-20, 60), st.floats(1e-3, 3.0), st.floats(1e-3, 3.0))
def test_the_measured_snr_is_the_drawn_one(seed, size, snr, speech_scale, noise_scale):
    speech, noise = drawn(seed, size, speech_scale), drawn(seed + 1, size, noise_scale)
    assume(size > 30)
    mixed = mix_noise(speech, noise, snr).astype(np.float64)
    # a mixture beyond the full scale is scaled as one: find its speech and noise again by least squares
    parts, *_ = np.linalg.lstsq(np.stack([speech, noise], 1).astype(np.float64), mixed, rcond=None)
    measured = decibels(mean_power(parts[0] * speech) / mean_power(parts[1] * noise))
    assert measured == pytest.approx(snr, abs=0.1)


@given(seeds, st.integers(200, 9000), st.integers(0, 300))
def test_a_room_keeps_times_and_power(seed, size, direct):
    speech = np.zeros(size, np.float32)
    speech[size // 2] = 0.5
    response = a_room(seed, direct)
    wet = reverberate(speech, response)
    assert int(np.argmax(np.abs(wet))) == size // 2
    assert mean_power(wet) == pytest.approx(mean_power(speech), rel=1e-4)
    direct_only = np.zeros(direct + 5, np.float32)
    direct_only[direct] = -0.3  # a response of the direct path is the speech, at any delay
    np.testing.assert_allclose(
        np.abs(reverberate(drawn(seed, size, 0.1), direct_only)), np.abs(drawn(seed, size, 0.1)), atol=1e-6
    )


def test_a_room_is_a_convolution():
    speech, response = drawn(0, 5000, 0.05), a_room(1, direct=30)
    wanted = np.convolve(speech, response)[30:5030]
    wanted *= math.sqrt(mean_power(speech) / mean_power(wanted))
    np.testing.assert_allclose(reverberate(speech, response), wanted, atol=1e-5)


@given(seeds, sizes, st.sampled_from(["mulaw", "alaw"]))
def test_g711_changes_nothing_the_second_time(seed, size, codec):
    once = code(drawn(seed, size, 0.5), codec)
    np.testing.assert_array_equal(code(once, codec), once)


@pytest.mark.parametrize(("codec", "levels"), [("mulaw", 255), ("alaw", 256)])
def test_g711_has_its_levels(codec, levels):
    every = (np.arange(-32768, 32768) / 32768).astype(np.float32)
    assert len(np.unique(code(every, codec))) == levels  # mu-law has two zeros
    strong = tone(400, 8000, 8000, 0.5)
    noise = code(strong, codec) - strong
    assert 33 < decibels(mean_power(strong) / mean_power(noise)) < 42  # about 38 dB in theory


@pytest.mark.parametrize("codec", CODECS)
def test_a_telephone_has_its_band_and_no_delay(codec):
    def loss(hertz):
        audio = tone(hertz, RATE)
        return decibels(mean_power(telephone(audio, RATE, codec)) / mean_power(audio))

    # GSM models a voice, not a tone
    assert loss(1000) > -1 if codec != "gsm" else loss(500) > -6
    assert loss(60) < -20
    assert loss(3900) < -6
    assert loss(5000) < -30
    pulse = np.zeros(RATE, np.float32)
    pulse[8000:8040] = tone(800, 40)
    received = telephone(pulse, RATE, codec)
    shifts = [float(np.dot(np.roll(received, -shift), pulse)) for shift in range(-200, 201)]
    assert abs(int(np.argmax(shifts)) - 200) <= 4


@given(st.floats(500, 6000))
@settings(max_examples=20)
def test_a_low_pass_is_3_db_down_at_its_cutoff(cutoff):
    def gain(hertz):
        audio = tone(hertz, RATE)
        return decibels(mean_power(low_pass(audio, RATE, cutoff)[4000:12000]) / mean_power(audio[4000:12000]))

    assert gain(cutoff) == pytest.approx(-3, abs=0.3)
    assert gain(cutoff / 2) == pytest.approx(0, abs=0.1)
    assert gain(min(7900.0, 2 * cutoff)) < (-30 if cutoff < 3950 else -3)


def test_a_low_pass_above_all_frequencies_changes_nothing():
    audio = drawn(0, 100)
    assert low_pass(audio, RATE, 8000.0) is audio


@given(seeds, sizes, st.floats(0.05, 1.0))
def test_clipping_limits_to_a_fraction_of_the_peak(seed, size, fraction):
    audio = drawn(seed, size)
    clipped = clip_peaks(audio, fraction)
    limit = fraction * peak_level(audio)
    assert peak_level(clipped) == pytest.approx(limit, rel=1e-5)
    inside = np.abs(audio) < limit
    np.testing.assert_array_equal(clipped[inside], audio[inside])


@given(st.floats(-40, 40))
def test_gain_is_in_decibels(gain):
    audio = drawn(0, 500)
    assert decibels(mean_power(change_gain(audio, gain)) / mean_power(audio)) == pytest.approx(gain, abs=1e-4)


@pytest.mark.parametrize("name", EFFECTS)
@given(seed=seeds, size=sizes, scale=st.sampled_from([1e-30, 1e-4, 0.2, 5.0]))
@settings(max_examples=30, deadline=None)
def test_length_type_and_scale_are_kept(name, seed, size, scale):
    audio = drawn(seed, size, scale)
    before = audio.copy()
    done = EFFECTS[name](audio)
    assert done.shape == audio.shape
    assert done.dtype == np.float32
    assert np.isfinite(done).all()
    assert peak_level(done) <= max(1.0, peak_level(before)) * (1 + 1e-6)
    np.testing.assert_array_equal(audio, before)


@pytest.mark.parametrize("name", EFFECTS)
@pytest.mark.parametrize("size", [1, 5000])
def test_silence_stays_silence(name, size):
    silence = np.zeros(size, np.float32)
    assert peak_level(EFFECTS[name](silence)) <= 1e-3  # GSM decodes silence to a faint noise


def test_silent_noise_changes_nothing():
    speech = drawn(0, 100)
    np.testing.assert_array_equal(mix_noise(speech, np.zeros(100, np.float32), 5.0), speech)


def test_codecs_are_those_of_libsndfile():
    for subtype in CODECS.values():
        assert soundfile.check_format("WAV", subtype)
        with io.BytesIO() as file:
            soundfile.write(file, np.zeros(320, np.int16), 8000, format="WAV", subtype=subtype)
