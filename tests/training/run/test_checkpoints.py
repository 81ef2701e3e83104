"""Checkpoints are complete or absent, and verified; some settings may change between starts."""

import dataclasses
import json
import resource
import shutil

import pytest
import torch

from canter.errors import CanterError, ConfigError
from canter.loading import load_model
from canter.training.config import OptimizerConfig
from canter.training.recipe import prepare_training, run_training
from canter.training.run.checkpoints import Checkpoints, Snapshot, damage, read_snapshot

from ..conftest import Messages, stopping_after


def log(config, name="metrics.jsonl"):
    return [json.loads(line) for line in (config.output / name).read_text().splitlines()]


def losses(config):
    return [row["loss"] for row in log(config) if row["kind"] == "train"]


@pytest.fixture
def quiet(config):
    return dataclasses.replace(config, valid=(), save_every=2, keep_checkpoints=3, track=())


@pytest.mark.parametrize("file", ["model.safetensors", "training/optimizers.pt", "training/state.json"])
@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(quiet, tmp_path, file, harm):
    run_training(quiet)
    again = dataclasses.replace(quiet, output=tmp_path / "again")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(again, stopping_after(7))
    path = again.output / "checkpoints" / "step-000006" / file
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes(content[:middle] if harm == "cut" else flipped)
    said = []
    run_training(again, Messages(said))
    assert any("step-000006 is damaged" in line and "resuming from step-000004" in line for line in said)
    assert any(line == "continuing at step 4 of 8" for line in said)
    assert losses(again) == losses(quiet)
    steps = [row["step"] for row in log(again, "utterances.jsonl")]
    assert steps == list(range(1, 9))


def test_files_of_a_killed_writer_are_not_a_checkpoint(quiet):
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(quiet, stopping_after(5))
    folder = quiet.output / "checkpoints"
    half = folder / ".step-000006.partial"
    shutil.copytree(folder / "step-000004", half)
    (half / "training" / "state.json").unlink()
    with (quiet.output / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # torn
    said = []
    run_training(quiet, Messages(said))
    assert "continuing at step 4 of 8" in said
    assert not half.exists()
    assert len(losses(quiet)) == 8


@pytest.mark.parametrize("more", [-1000, 1000])  # than the model's file takes: the optimisers' takes twice as much
def test_a_disk_that_is_full_is_named_and_loses_nothing(quiet, more):
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(quiet, stopping_after(3))
    most = (quiet.output / "checkpoints" / "step-000002" / "model.safetensors").stat().st_size + more
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(CanterError, match=r"could not be written .* the one before is complete"):
            run_training(quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run_training(quiet).progress.step == 8


def test_a_full_disk_before_the_first_checkpoint_is_reported(quiet, tmp_path):
    """There is nothing to resume from, and no partial checkpoint uses up the disk."""
    prepare_training(quiet)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(CanterError, match=r"could not be written .* none was saved before it: .* first step"):
            run_training(quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any((quiet.output / "checkpoints").iterdir())
    assert run_training(quiet).progress.step == 8


def test_a_log_that_cannot_be_written_is_named(quiet):
    (quiet.output / "metrics.jsonl").mkdir(parents=True)
    (quiet.output / "config.yaml").write_text("")
    with pytest.raises(CanterError, match=r"metrics.jsonl: cannot write there \(Is a directory\)"):
        run_training(quiet)


def test_the_newest_is_the_one_of_the_most_steps(tmp_path):
    for name in ("step-999999", "step-1000000", "step-1000000.copy"):
        (tmp_path / name / "training").mkdir(parents=True)
        (tmp_path / name / "training" / "state.json").touch()
    assert [path.name for path in Checkpoints(tmp_path, 1).complete()] == ["step-999999", "step-1000000"]


def test_a_run_killed_before_its_best_was_marked_marks_it(config, monkeypatch):
    config = dataclasses.replace(config, track=())

    def killed(self, step, metrics, card):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "set_best", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run_training(config)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(config, stopping_after(5))
    best = json.loads((config.output / "checkpoints" / "best.json").read_text())
    assert best["checkpoint"] == "step-000004"
    assert [row["step"] for row in log(config) if row["kind"] == "valid"] == [4]


def test_checkpoints_are_kept_by_count_and_the_best_besides(config):
    run_training(dataclasses.replace(config, save_every=1, keep_checkpoints=2, track=()))
    best = json.loads((config.output / "checkpoints" / "best.json").read_text())["checkpoint"]
    names = {path.name for path in (config.output / "checkpoints").glob("step-*")}
    assert {"step-000007", "step-000008", best} == names
    assert all(damage(config.output / "checkpoints" / name) is None for name in names)


def test_a_moving_average_is_what_is_saved_and_the_weights_lie_beside(quiet, tmp_path):
    averaged = dataclasses.replace(quiet, optimizer=dataclasses.replace(quiet.optimizer, ema=0.9))
    run_training(averaged)
    folder = averaged.output / "checkpoints" / "step-000008"
    snapshot = read_snapshot(folder, load_model(folder))
    model = load_model(folder).state_dict()
    assert snapshot.average is not None
    moved = {name for name, tensor in snapshot.weights.items() if not torch.equal(tensor, model[name])}
    assert any("encoder.layers" in name for name in moved)
    assert not any("running_mean" in name for name in moved)
    again = dataclasses.replace(averaged, output=tmp_path / "again")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(again, stopping_after(5))
    run_training(again)
    other = load_model(again.output / "checkpoints" / "step-000008").state_dict()
    assert all(torch.equal(other[name], tensor) for name, tensor in model.items())


def test_changes_are_refused_unless_allowed_and_then_said(quiet):
    run_training(dataclasses.replace(quiet, steps=4))
    hotter = dataclasses.replace(quiet.optimizer, learning_rate=1e-2)
    changed = dataclasses.replace(quiet, steps=6, optimizer=hotter)
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: 0.\d+ -> 0.01.*--allow-changes"):
        run_training(changed)
    said = []
    finished = run_training(dataclasses.replace(changed, allow_changes=True), Messages(said))
    assert finished.progress.step == 6
    assert any(line.startswith("changed from here on: optimizer.learning_rate") for line in said)
    assert [row["what"] for row in log(quiet) if row["kind"] == "event"] == ["changed"]


def test_another_plan_takes_the_epoch_from_its_start(quiet):
    run_training(dataclasses.replace(quiet, steps=2))
    changed = dataclasses.replace(quiet, steps=4, batch_seconds=8.0, allow_changes=True)
    assert run_training(changed).progress.step == 4


def test_weights_of_another_shape_are_never_gone_on_with(quiet):
    run_training(dataclasses.replace(quiet, steps=2))
    other = dataclasses.replace(quiet, model=dataclasses.replace(quiet.model, width=64), allow_changes=True)
    with pytest.raises(ConfigError, match=r"model.width: 32 -> 64 would make its weights useless"):
        run_training(other)


def test_a_validation_that_was_cut_short_is_made_up_for(config):
    config = dataclasses.replace(config, track=())
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(config, stopping_after(5))
    lines = (config.output / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"valid"' not in line]
    (config.output / "metrics.jsonl").write_text("".join(kept))
    run_training(config)
    assert [row["step"] for row in log(config) if row["kind"] == "valid"] == [4, 8]


def test_nothing_is_unpickled(quiet):
    run_training(dataclasses.replace(quiet, steps=2))
    folder = quiet.output / "checkpoints" / "step-000002"
    torch.save([Snapshot({}, {}, [])], folder / "training" / "optimizers.pt")
    with pytest.raises(Exception, match="training state is damaged"):
        read_snapshot(folder, load_model(folder))


def newest(config):
    folder = Checkpoints(config.output / "checkpoints", 1).complete()[-1]
    return read_snapshot(folder, load_model(folder))


def test_changed_options_hold_and_the_next_change_is_asked_for_again(quiet):
    run_training(dataclasses.replace(quiet, steps=2))
    optimizer = dataclasses.replace(quiet.optimizer, weight_decay=0.5)
    changed = dataclasses.replace(quiet, steps=3, optimizer=optimizer)
    run_training(dataclasses.replace(changed, allow_changes=True))
    adamw, muon = newest(quiet).optimizers
    assert [group["weight_decay"] for group in adamw["param_groups"]] == [0.5, 0.0]
    assert muon["param_groups"][0]["weight_decay"] == 0.5
    with pytest.raises(ConfigError, match=r"steps: 3 -> 4.*--allow-changes"):
        run_training(dataclasses.replace(changed, steps=4))


def test_what_is_trained_may_become_less_and_more(quiet):
    quiet = dataclasses.replace(quiet, allow_changes=True, optimizer=OptimizerConfig(ema=0.9))
    snapshots = []
    for steps, freeze in ((2, ()), (4, ("encoder.*",)), (6, ())):
        run_training(dataclasses.replace(quiet, steps=steps, freeze=freeze))
        snapshots.append(newest(quiet))
    weights = [snapshot.weights for snapshot in snapshots]
    for name in ("encoder.layers.0.norm_out.bias", "encoder.layers.0.feed_forward1.linear1.weight"):
        assert torch.equal(weights[0][name], weights[1][name])
        assert not torch.equal(weights[1][name], weights[2][name])
    adamw, muon = snapshots[2].optimizers
    assert adamw["state"]["encoder.layers.0.norm_out.bias"]["step"] == 2
    assert adamw["state"]["ctc.bias"]["step"] == 6
    assert "encoder.layers.0.feed_forward1.linear1.weight" in muon["state"]


def test_another_optimizer_may_have_the_matrices(quiet):
    for steps, name in ((2, "muon"), (3, "adamw"), (4, "muon")):
        optimizer = OptimizerConfig(name=name)
        run_training(dataclasses.replace(quiet, steps=steps, allow_changes=True, optimizer=optimizer))
    assert len(newest(quiet).optimizers) == 2


def test_training_state_that_numbers_its_parameters_is_read_or_refused(quiet, tmp_path):
    """The file has the format of an earlier version."""
    run_training(quiet)
    again = dataclasses.replace(quiet, output=tmp_path / "again")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(again, stopping_after(5))
    beside = again.output / "checkpoints" / "step-000004" / "training"
    (beside / "checksums.json").unlink()
    state = json.loads((beside / "state.json").read_text())
    del state["checksums"]
    (beside / "state.json").write_text(json.dumps(state))
    states = torch.load(beside / "optimizers.pt")
    for state in states:
        names = [name for group in state["param_groups"] for name in group["params"]]
        state["state"] = {names.index(name): values for name, values in state["state"].items()}
        for group in state["param_groups"]:
            group["params"] = [names.index(name) for name in group["params"]]
    torch.save(states, beside / "optimizers.pt")
    fewer = dataclasses.replace(again, freeze=("encoder.*",), allow_changes=True)
    with pytest.raises(CanterError, match="does not say which parameters it is of, and others are trained"):
        run_training(fewer)
    run_training(dataclasses.replace(again, allow_changes=True))
    assert losses(again) == losses(quiet)
