"""Noise, rooms and channels in a run: the draws, the files that they come from, and the batches that result."""

import dataclasses
import json
import os
import tarfile

import numpy as np
import pytest
import soundfile

from canter.corpus.audio import load_utterance
from canter.errors import CheckpointError, ConfigError, ManifestError
from canter.fields import from_mapping
from canter.ranks import Ranks
from canter.training.config import AugmentConfig, TrainConfig, load_config, rooted
from canter.training.feed import augment
from canter.training.feed.augment import (
    EFFECTS,
    Augmentation,
    AugmentFile,
    AugmentFiles,
    describe_augmentation,
    find_augment_files,
)
from canter.training.feed.data import Steps, load_ahead
from canter.training.feed.speed import speeds_of
from canter.training.feed.waveform import mean_power, mix_noise
from canter.training.recipe import prepare_training, run_training

from ..conftest import Messages, stopping_after
from ..run.test_checkpoints import log, losses

RATE = 16000
ALL = AugmentConfig(
    gain=(-6.0, 3.0),
    gain_probability=0.5,
    clipping=(0.3, 0.9),
    clipping_probability=0.5,
    low_pass=(2000.0, 6000.0),
    low_pass_probability=0.5,
    telephone=("mulaw", "alaw", "gsm"),
    telephone_probability=0.5,
)


def write(path, samples, rate=RATE, **settings):
    soundfile.write(path, samples, rate, **settings)
    return path


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A folder of noise, long and short and at another rate, and one of two impulse responses."""
    folder = tmp_path_factory.mktemp("sounds")
    draw = np.random.default_rng(0)
    (folder / "noise").mkdir()
    (folder / "rir").mkdir()
    write(folder / "noise" / "long.flac", 0.1 * draw.standard_normal(20 * RATE))
    write(folder / "noise" / "short.wav", 0.1 * draw.standard_normal(RATE // 4))
    write(folder / "noise" / "other.ogg", np.clip(0.1 * draw.standard_normal(5 * 22050), -1, 1), 22050)
    for number, length in enumerate((800, 3000)):
        response = 0.2 * draw.standard_normal(length) * np.exp(-np.arange(length) / 500)
        response[20] = 0.95
        channels = np.stack([response, -response], 1)  # they cancel each other out
        write(folder / "rir" / f"{number}.wav", channels)
    return folder


@pytest.fixture
def noisy(config, sounds):
    """A run with every effect, each on half of the utterances."""
    every = dataclasses.replace(ALL, noise=(sounds / "noise",), rir=(sounds / "rir",), speed=(0.9, 1.1))
    return dataclasses.replace(config, augment=every, valid=(), track=(), batch_seconds=6.0)


def files_of(config, tmp_path, said=None):
    return find_augment_files(config, tmp_path, Messages([] if said is None else said))


# -- draws --


def test_the_draws_of_an_effect_do_not_depend_on_the_others(sounds, tmp_path, spoken):
    paths = {"noise": (sounds / "noise",), "rir": (sounds / "rir",)}
    files, _ = files_of(TrainConfig(augment=AugmentConfig(**paths)), tmp_path)
    every = Augmentation(dataclasses.replace(ALL, **paths), files, 3, RATE)

    def drawn(config, effect, row):
        generator = dataclasses.replace(every, config=config)._drawn(effect, 2, row)
        return None if generator is None else generator.random()

    for effect in EFFECTS:
        settings = {name: getattr(every.config, name) for name in (effect, f"{effect}_probability")}
        single = AugmentConfig(**settings)
        with_others = [drawn(every.config, effect, row) for row in range(50)]
        assert with_others == [drawn(single, effect, row) for row in range(50)]
        assert 10 < sum(one is not None for one in with_others) < 40
    assert len({tuple(drawn(every.config, effect, row) is None for row in range(50)) for effect in EFFECTS}) == 6


def test_draws_follow_seed_epoch_and_row(sounds, tmp_path):
    config = AugmentConfig(noise=(sounds / "noise",), noise_probability=1.0)
    files, _ = files_of(TrainConfig(augment=config), tmp_path)
    audio = (0.1 * np.random.default_rng(5).standard_normal(RATE)).astype(np.float32)

    def mixed(seed=0, epoch=0, row=0):
        done, failed = Augmentation(config, files, seed, RATE).apply(audio, epoch, row)
        assert not failed
        return done

    np.testing.assert_array_equal(mixed(), mixed())
    for other in ({"seed": 1}, {"epoch": 1}, {"row": 1}):
        assert np.abs(mixed(**other) - mixed()).max() > 1e-3


@pytest.mark.parametrize("seconds", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", ["long.flac", "short.wav", "other.ogg"])
def test_noise_of_any_length_reaches_the_drawn_snr(sounds, tmp_path, seconds, name):
    config = AugmentConfig(noise=(sounds / "noise",), noise_probability=1.0, noise_snr=(12.0,))
    files, _ = files_of(TrainConfig(augment=config), tmp_path)
    only = AugmentFiles(noise=tuple(one for one in files.noise if one.path.endswith(name)))
    audio = (0.1 * np.random.default_rng(5).standard_normal(round(seconds * RATE))).astype(np.float32)
    parts = []
    for row in range(5):
        done, failed = Augmentation(config, only, 0, RATE).apply(audio, 0, row)
        assert not failed
        noise = done.astype(np.float64) - audio
        assert 10 * np.log10(mean_power(audio) / mean_power(noise)) == pytest.approx(12, abs=0.1)
        parts.append(noise)
    assert len({part.tobytes() for part in parts}) == 5  # another part of the file for each row


def test_a_part_of_a_long_file_is_read_without_all_of_it(sounds, tmp_path, monkeypatch):
    config = AugmentConfig(noise=(sounds / "noise",), noise_probability=1.0)
    files, _ = files_of(TrainConfig(augment=config), tmp_path)
    long = AugmentFiles(noise=tuple(one for one in files.noise if one.seconds > 15))
    asked, read = [], augment.load_audio
    monkeypatch.setattr(augment, "load_audio", lambda path, **part: asked.append(part) or read(path, **part))
    audio = np.ones(RATE, np.float32)
    for row in range(50):
        Augmentation(config, long, 0, RATE).apply(audio, 0, row)
    assert {part["duration"] for part in asked} == {1.0}
    starts = sorted(part["offset"] for part in asked)
    assert starts[0] < 3
    assert starts[-1] > 16


# -- files --


def test_unusable_noise_is_named_with_the_way_out(sounds, tmp_path):
    draw = np.random.default_rng(0)
    write(tmp_path / "silent.wav", np.zeros(RATE))
    write(tmp_path / "brief.wav", 0.1 * draw.standard_normal(100))
    write(tmp_path / "odd.wav", np.full(RATE, np.nan, np.float32), subtype="FLOAT")
    (tmp_path / "text.wav").write_text("not audio at all")
    rows = [{"audio_filepath": f"{name}.wav", "duration": 1.0} for name in ("silent", "brief", "odd", "text", "gone")]
    rows.append({"audio_filepath": str(sounds / "noise" / "long.flac"), "duration": 4.0, "offset": 2.0})
    (tmp_path / "noise.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files, problems = files_of(TrainConfig(augment=AugmentConfig(noise=(tmp_path / "noise.jsonl",))), tmp_path)
    assert [(one.offset, one.seconds) for one in files.noise] == [(2.0, 4.0)]
    reasons = {one.line: one.reason for one in problems}
    assert {one.file for one in problems} == {str(tmp_path / "noise.jsonl")}
    assert "silent.wav is silent: every sample is 0; leave it out of --augment.noise" in reasons[1]
    assert "brief.wav" in reasons[2]
    assert "odd.wav: sample 0 is not a finite number; write the file again" in reasons[3]
    assert "text.wav" in reasons[4]
    assert "gone.wav" in reasons[5]
    (tmp_path / "silent").mkdir()
    write(tmp_path / "silent" / "a.wav", np.zeros(RATE))
    silent = TrainConfig(augment=AugmentConfig(rir=(tmp_path / "silent",)))
    with pytest.raises(ManifestError, match=r"(?s)--augment.rir has no usable row.*a.wav is silent"):
        files_of(silent, tmp_path / "silent")


def test_a_missing_manifest_ends_the_start(noisy):
    missing = dataclasses.replace(noisy.augment, noise=(noisy.output / "nowhere.jsonl",))
    with pytest.raises(ManifestError, match=r"nowhere.jsonl does not exist"):
        run_training(dataclasses.replace(noisy, augment=missing))


def test_responses_use_one_channel_and_noise_all(sounds, tmp_path):
    config = TrainConfig(augment=AugmentConfig(noise=(sounds / "noise",), rir=(sounds / "rir",)))
    files, problems = files_of(config, tmp_path)
    assert not problems
    assert {one.channel for one in files.rir} == {0}
    assert {one.channel for one in files.noise} == {None}
    again, _ = files_of(config, tmp_path)
    assert again == files


def test_noise_is_read_from_tars(sounds, tmp_path):
    with tarfile.open(tmp_path / "noise.tar", "w") as tar:
        for name in ("long.flac", "short.wav"):
            tar.add(sounds / "noise" / name, arcname=name)
    config = TrainConfig(augment=AugmentConfig(noise=(tmp_path / "noise.tar",), noise_probability=1.0))
    files, problems = files_of(config, tmp_path)
    assert not problems
    assert [round(one.seconds, 2) for one in files.noise] == [20.0, 0.25]
    audio = np.full(RATE, 0.1, np.float32)
    for row in range(10):
        done, failed = Augmentation(config.augment, files, 0, RATE).apply(audio, 0, row)
        assert not failed
        assert np.abs(done - audio).max() > 1e-3
    said = []
    assert files_of(config, tmp_path, said)[0] == files
    assert not said
    (tmp_path / "noise.tar").write_bytes(b"other")
    files_of(config, tmp_path, said)
    assert "2 noise files or impulse responses are not those with which the run began" in said[0]


def test_a_damaged_list_is_named(sounds, tmp_path):
    config = TrainConfig(augment=AugmentConfig(noise=(sounds / "noise",)))
    files_of(config, tmp_path)
    for content in ("", "[]", "{}", '{"noise": [["a", 0.0, 1.0, 2, "", 3]], "rir": []}', '{"noise": [[1]], "rir": []}'):
        (tmp_path / "augment.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"augment.json is damaged .*; remove it"):
            files_of(config, tmp_path)


# -- settings --


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"noise_snr": [5, 10]}, "augment.noise_snr has no effect without augment.noise"),
        ({"gain_probability": 0.1}, "augment.gain_probability has no effect without augment.gain"),
        ({"noise": "a", "noise_probability": 1.5}, "augment.noise_probability is 1.5; it must be between 0 and 1"),
        ({"noise": "a", "noise_snr": [20, 5]}, "augment.noise_snr is [20.0, 5.0]; the lower value comes first"),
        ({"noise": "a", "noise_snr": []}, "augment.noise_snr is empty"),
        ({"noise": "a", "noise_snr": float("nan")}, "augment.noise_snr is [nan]; it must be one value or two, finite"),
        ({"gain": [1, 2, 3]}, "augment.gain is [1.0, 2.0, 3.0]; it must be one value or two"),
        (
            {"clipping": [0.0, 0.5]},
            "augment.clipping is [0.0, 0.5]; it must be one value or two, above 0 and at most 1",
        ),
        ({"low_pass": -3}, "augment.low_pass is [-3.0]"),
        ({"telephone": ["g729"]}, "'g729' is none of mulaw, alaw, gsm"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, says):
    with pytest.raises(ConfigError) as caught:
        from_mapping(TrainConfig, {"augment": settings}, "x.yaml")
    assert says in str(caught.value)
    assert "x.yaml" in str(caught.value)


def test_paths_are_relative_to_the_file_and_urls_are_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("augment: {noise: musan.jsonl, rir: [rirs, more]}\n")
    config = load_config(tmp_path / "c.yaml")
    assert config.augment.noise == (tmp_path / "musan.jsonl",)
    assert rooted(config).augment.rir == (tmp_path / "rirs", tmp_path / "more")
    with pytest.raises(ConfigError, match=r"--augment.noise and --augment.rir take no URL"):
        rooted(TrainConfig(augment=AugmentConfig(noise=("s3://bucket/noise.jsonl",))))


def test_what_is_on_is_one_line():
    assert describe_augmentation(AugmentConfig(), AugmentFiles()) == ""
    one = AugmentFile("a.wav", 0.0, 1.0, None, "")
    config = dataclasses.replace(ALL, noise=("n",), rir=("r",), speed=(0.9, 1.1), time_masks=5)
    assert describe_augmentation(config, AugmentFiles((one, one), (one,))) == (
        "augmentation: speeds 0.9, 1.1; 1 room impulse responses, probability 0.5; 2 noise files at an SNR of 0 to 20 "
        "dB, probability 0.5; gain -6 to 3 dB, probability 0.5; clipping at 0.3 to 0.9 of the peak, probability 0.5; "
        "low-pass at 2000 to 6000 Hz, probability 0.5; telephone (mulaw, alaw, gsm), probability 0.5; 0 frequency and "
        "5 time masks"
    )


# -- batches and runs --


def batches(prepared, ranks=1, workers=0, start=None, step=0, epoch=0, last=6):
    """Return {(step, micro-batch): its audio and rows as bytes} of all ranks, from a step to a last one."""
    found = {}
    for rank in range(ranks):
        steps = Steps(prepared.schedule.plan, Ranks(rank, ranks), prepared.schedule.budget)

        def addresses(steps=steps):
            for address in steps.addresses(start, epoch, step):
                if address.step >= last:
                    return
                yield address

        for loaded in load_ahead(prepared.data.micro_batches, addresses(), workers):
            assert not loaded.unaugmented
            if loaded.batch is not None:
                key = (loaded.address.step, loaded.address.number)
                found[key] = (loaded.batch.audio.numpy().tobytes(), loaded.batch.rows.tolist())
    return found


def test_batches_do_not_depend_on_workers_and_ranks(noisy):
    prepared = prepare_training(dataclasses.replace(noisy, micro_batches_per_step=2, steps=6))
    alone = batches(prepared)
    assert len(alone) == 12
    for others in ({"workers": 1}, {"workers": 2}, {"ranks": 2}, {"ranks": 2, "workers": 1}):
        assert batches(prepared, **others) == alone


def test_the_batches_are_those_of_the_effects_over_clean_ones(noisy):
    noisy = dataclasses.replace(noisy, augment=dataclasses.replace(noisy.augment, speed=()))
    prepared = prepare_training(noisy)
    data = prepared.data.micro_batches
    address = next(Steps(prepared.schedule.plan).addresses(None, 0, 0))
    batch = data[address].batch
    changed = 0
    for number, row in enumerate(batch.rows.tolist()):
        clean = load_utterance(data.index.utterance(row), RATE)
        wanted, _ = data.augmentation.apply(clean, address.epoch, row)
        assert int(batch.audio_lengths[number]) == len(clean)
        np.testing.assert_array_equal(batch.audio[number, : len(clean)], wanted)
        assert np.isfinite(wanted).all()
        changed += not np.array_equal(clean, wanted)
    assert changed > 0


def test_runs_without_noise_keep_their_batches_and_speeds(config, noisy):
    clean = dataclasses.replace(config, valid=(), track=(), batch_seconds=6.0, augment=AugmentConfig(speed=(0.9, 1.1)))
    before = prepare_training(clean)
    assert before.data.micro_batches.augmentation is None
    assert not (clean.output / "augment.json").exists()
    plain = batches(before)
    after = prepare_training(dataclasses.replace(noisy, output=clean.output.with_name("noisy")))
    augmented = batches(after)
    assert {key: rows for key, (_, rows) in plain.items()} == {key: rows for key, (_, rows) in augmented.items()}
    assert [audio for audio, _ in plain.values()] != [audio for audio, _ in augmented.values()]
    assert [len(audio) for audio, _ in plain.values()] == [len(audio) for audio, _ in augmented.values()]
    # speeds drawn before there was noise
    assert speeds_of(np.arange(8), 1, 2, (0.9, 1.0, 1.1)).tolist() == [1.1, 1.1, 0.9, 0.9, 1.1, 1.1, 0.9, 1.0]


def test_a_stopped_run_resumes_bit_exactly(noisy, tmp_path):
    noisy = dataclasses.replace(noisy, save_every=3, steps=8)
    straight = dataclasses.replace(noisy, output=tmp_path / "straight")
    said = []
    run_training(straight, Messages(said))
    assert sum(line.startswith("augmentation: ") for line in said) == 1
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(noisy, stopping_after(5))
    run_training(dataclasses.replace(noisy, workers=1))
    assert losses(noisy) == losses(straight)
    assert log(noisy, "utterances.jsonl") == log(straight, "utterances.jsonl")


def test_noise_that_breaks_later_is_named_once_and_left_out(config, spoken, tmp_path):
    (tmp_path / "noise").mkdir()
    draw = np.random.default_rng(1)
    for name in ("a", "b"):
        write(tmp_path / "noise" / f"{name}.wav", 0.1 * draw.standard_normal(RATE))
    noise = AugmentConfig(noise=(tmp_path / "noise",), noise_probability=1.0)
    config = dataclasses.replace(config, augment=noise, valid=(), track=(), save_every=2, batch_seconds=6.0)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(config, stopping_after(3))
    os.remove(tmp_path / "noise" / "a.wav")
    said = []
    run_training(config, Messages(said))
    named = [line for line in said if "a.wav" in line]
    assert "is missing; restore them" in named[0]
    assert "utterances that drew it are trained without its noise or room" in named[1]
    assert len(named) == 2
    events = [row for row in log(config) if row.get("what") == "unaugmented"]
    assert [row["file"] for row in events] == [str(tmp_path / "noise" / "a.wav")]
    assert len(losses(config)) == 8
    assert not (config.output / "skipped.jsonl").exists()


def test_a_lost_list_of_noise_is_made_again_if_that_is_allowed(noisy):
    run_training(dataclasses.replace(noisy, steps=2))
    kept = (noisy.output / "augment.json").read_bytes()
    os.remove(noisy.output / "augment.json")
    with pytest.raises(CheckpointError, match=r"augment.json is missing since the run began.*--allow-changes"):
        run_training(dataclasses.replace(noisy, steps=2))
    run_training(dataclasses.replace(noisy, steps=2, allow_changes=True))
    assert (noisy.output / "augment.json").read_bytes() == kept


def train_rank(rank, config):
    return run_training(config).progress.step


# Python 3.12 warns of forking where threads are
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_two_ranks_take_the_steps_of_one_and_name_broken_noise_once(noisy, tmp_path, on_ranks):
    (tmp_path / "noise").mkdir()
    for name in ("a", "b"):
        write(tmp_path / "noise" / f"{name}.wav", 0.1 * np.random.default_rng(1).standard_normal(RATE))
    augment = dataclasses.replace(noisy.augment, noise=(tmp_path / "noise",), noise_probability=1.0)
    noisy = dataclasses.replace(noisy, augment=augment, micro_batches_per_step=4, batch_seconds=4.0, steps=4)
    one, two = (dataclasses.replace(noisy, output=tmp_path / name) for name in ("one", "two"))
    prepare_training(one)
    prepare_training(two)
    os.remove(tmp_path / "noise" / "a.wav")
    run_training(one)
    assert on_ranks(2, train_rank, two) == [(4, ""), (4, "")]
    assert log(two, "utterances.jsonl") == log(one, "utterances.jsonl")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for config in (one, two):
        events = [row for row in log(config) if row.get("what") == "unaugmented"]
        assert [row["file"] for row in events] == [str(tmp_path / "noise" / "a.wav")]


def test_other_noise_is_a_change_that_must_be_allowed(noisy, tmp_path):
    noisy = dataclasses.replace(noisy, steps=2)
    run_training(noisy)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "c.wav", 0.1 * np.random.default_rng(2).standard_normal(RATE))
    other = dataclasses.replace(noisy.augment, noise=(tmp_path / "other",))
    changed = dataclasses.replace(noisy, augment=other, steps=4)
    with pytest.raises(ConfigError, match=r"augment.noise"):
        run_training(changed)
    run_training(dataclasses.replace(changed, allow_changes=True))
    kept = json.loads((noisy.output / "augment.json").read_text())
    assert [one[0] for one in kept["noise"]] == [str(tmp_path / "other" / "c.wav")]


def test_a_row_that_cannot_be_used_is_reported_at_the_start(config, tmp_path):
    write(tmp_path / "silent.wav", np.zeros(RATE))
    write(tmp_path / "good.wav", 0.1 * np.random.default_rng(2).standard_normal(RATE))
    rows = [{"audio_filepath": f"{name}.wav", "duration": 1.0} for name in ("silent", "good")]
    (tmp_path / "noise.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    noise = AugmentConfig(noise=(tmp_path / "noise.jsonl",))
    prepare_training(dataclasses.replace(config, augment=noise), Messages(said))
    line = next(line for line in said if "silent" in line)
    assert line.startswith(f"1 rows of noise left out, listed in {config.output / 'augment.skipped.jsonl'}: ")
    listed = [json.loads(row) for row in (config.output / "augment.skipped.jsonl").read_text().splitlines()]
    assert [row["line"] for row in listed] == [1]


def test_loud_speech_with_loud_noise_stays_in_scale():
    loud, noise = np.ones(1000, np.float32), np.ones(1000, np.float32)
    assert np.abs(mix_noise(loud, noise, 0.0)).max() == pytest.approx(1.0)
