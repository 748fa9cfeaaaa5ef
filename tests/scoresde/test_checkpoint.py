"""Checkpoints: round trips, damage of every kind, a full disk, and pickles that must not run."""

import errno
import os
import pickle
import re
import shutil

import pytest
import safetensors.torch
import torch

from scoresde.data.spec import DataSpec
from scoresde.models.score_model import ScoreModel
from scoresde.storage import (
    CheckpointError,
    checkpoints,
    files,
    find_model,
    latest,
    load_model,
    read_checkpoint,
    read_tensors,
    save_checkpoint,
    save_model,
    write_tensors,
)
from scoresde.storage.checkpoints import clean
from scoresde.storage.digests import BLANK, sealed
from scoresde.storage.optimizers import load_optimizer, optimizer_tensors
from scoresde.storage.tensors import check_tensors


def model(width=16, dtype=torch.float32):
    torch.manual_seed(width)
    options = {"shape": [2], "conditions": {"class_label": {"kind": "class", "classes": 3}}, "width": width, "depth": 1}
    config = {
        "network": {"name": "mlp", "mlp": options},
        "sde": {"name": "vp", "vp": {"beta_max": 15.0}},
        "data_spec": {"shape": [2]},
        "codec": {"name": "affine", "affine": {"data_shape": [2], "shift": 0.5, "scale": 2.0}},
        "parameterization": "noise",
    }
    made = ScoreModel.from_config(config).to(dtype)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made.eval()


def tensors(made, averaged=None):
    weights = {"part.model": made.state_dict(), "average.ema": (averaged or made).state_dict()}
    return {**weights, "optimizer.train": {"a|exp_avg": torch.ones(2)}}


def save(root, step, made=None, keep=2, averaged=None, **state):
    made = made or model()
    return stored(root, step, tensors(made, averaged), state, made, keep)


def stored(root, step, found, state, made, keep=2):
    result = ("part.model", "average.ema")
    return save_checkpoint(root, step, found, state, result, dict.fromkeys(result, made.config()), keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_model_comes_back_from_its_file_alone(tmp_path, dtype):
    made = model(dtype=dtype)
    path = save_model(made, tmp_path / "deep" / "m.safetensors")
    back = load_model(path)
    x, t = torch.randn(5, 2, dtype=dtype), torch.full((5,), 0.3, dtype=dtype)
    assert torch.equal(made(x, t).score, back(x, t).score) and not back.training
    assert back.law == made.law and back.law.beta_max == 15.0
    assert back.data_spec == DataSpec((2,)) and back.config() == made.config()
    assert back.codec.config() == made.codec.config()
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]


def test_saving_again_replaces_and_a_failure_does_not(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_model(model(16), path)
    save_model(model(32), path)
    good = path.read_bytes()
    monkeypatch.setattr(files, "sync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(model(16), path)
    assert path.read_bytes() == good and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match=r"\.safetensors"):
        save_model(model(), tmp_path / "m.pth")


def full_disk(*_):
    """What a full disk says, at the latest when the file is synced."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_checkpoint_round_trip_and_pruning(tmp_path):
    made = model()
    for step in (1, 2, 30, 4):
        path = save(tmp_path, step, made, keep=3, note=step, nothing=None)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000002", "step_00000004", "step_00000030"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [p.name for p in checkpoints(tmp_path)]
    assert latest(tmp_path).name == "step_00000030" and latest(tmp_path / "none") is None
    found = read_checkpoint(path)
    assert found.step == 4 and found.state["note"] == 4 and found.state["nothing"] is None
    for name, value in made.state_dict().items():
        assert torch.equal(found.tensors["part.model"][name], value)
        assert torch.equal(found.tensors["average.ema"][name], value)
    # as a checkpoint folder, a folder of checkpoints, or the workdir above it
    shutil.copytree(tmp_path, tmp_path / "run" / "checkpoints")
    for place in (path, tmp_path, tmp_path / "run"):
        assert torch.equal(load_model(place).network.inlet.weight, made.network.inlet.weight)


def test_averaged_or_raw_weights(tmp_path):
    raw, averaged = model(), model()
    with torch.no_grad():
        averaged.network.inlet.bias.fill_(7.0)
    path = save(tmp_path, 1, raw, averaged=averaged)
    assert find_model(tmp_path) == path / "average.ema.safetensors"
    assert find_model(path, ema=False) == path / "part.model.safetensors"
    assert bool((load_model(tmp_path).network.inlet.bias == 7.0).all())
    assert torch.equal(load_model(tmp_path, ema=False).network.inlet.bias, raw.network.inlet.bias)


@pytest.mark.parametrize("failing", ["part.", "optimizer.", "state.", "rename"])
def test_full_disk_or_kill_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, failing):
    before = save(tmp_path, 10)
    content = {p.name: p.read_bytes() for p in before.iterdir()}
    real, calls = files.sync, []

    def sometimes(path):
        calls.append(path)
        (full_disk if failing in path.name else real)(path)

    if failing == "rename":
        monkeypatch.setattr(type(tmp_path), "rename", full_disk)
    else:
        monkeypatch.setattr(files, "sync", sometimes)
    with pytest.raises(OSError, match=r"step 20 .*No space left.*step_00000010") as caught:
        save(tmp_path, 20)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000010"]
    assert {p.name: p.read_bytes() for p in before.iterdir()} == content
    read_checkpoint(before)
    save(tmp_path, 20)
    assert latest(tmp_path).name == "step_00000020"


def test_debris_of_a_killed_run_is_ignored_and_cleaned(tmp_path):
    good = save(tmp_path, 5)
    shutil.copytree(good, tmp_path / ".incomplete-step_00000009-123")
    (tmp_path / "step_00000008").mkdir()  # never made by us: a folder without state.json is no checkpoint
    assert latest(tmp_path) == good
    clean(tmp_path)
    assert not (tmp_path / ".incomplete-step_00000009-123").exists() and good.exists()


def test_bad_weights_and_existing_steps_are_refused(tmp_path):
    good = save(tmp_path, 5)
    with pytest.raises(FileExistsError, match="never overwritten"):
        save(tmp_path, 5)
    broken = model()
    with torch.no_grad():
        broken.network.inlet.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"network\.inlet\.bias.*NaN"):
        save(tmp_path, 6, broken)
    with pytest.raises(ValueError, match=r"Optimizer state 'a\|exp_avg_sq'.*infinite"):
        endless = {**tensors(model()), "optimizer.train": {"a|exp_avg_sq": torch.tensor([1.0, float("inf")])}}
        stored(tmp_path, 6, endless, {}, model())
    with pytest.raises(ValueError, match="cannot be a file's name"):
        stored(tmp_path, 6, {**tensors(model()), "../out": {}}, {}, model())
    with pytest.raises(ValueError, match="keep"):
        save(tmp_path, 6, keep=0)
    assert latest(tmp_path) == good and len(list(tmp_path.iterdir())) == 1


def sealed_again(text):
    """A state.json that was changed by somebody who knows how its digest is made."""
    return sealed(re.sub(r'"digest": "\w+"', f'"digest": "{BLANK}"', text, count=1))


DAMAGES = ("truncate", "flip", "remove", "exchange", "json", "digit", "list", "bomb", "format", "place", "result")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_named(tmp_path, damage):
    path = save(tmp_path, 5, seconds=12.5)
    file = path / "part.model.safetensors"
    content = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        file.unlink()
    elif damage == "exchange":  # a whole file, of another step
        shutil.copy(save(tmp_path / "other", 5, model(32)) / file.name, file)
    else:
        state = (path / "state.json").read_text()
        changed = {
            "json": state[:50],
            "digit": state.replace('"seconds": 12.5', '"seconds": 13.5'),
            "list": "[1, 2]",
            "bomb": "[" * 50_000,
            "format": state.replace("scoresde-3", "scoresde-2"),
            "place": sealed_again(state.replace('"optimizer.train"', '"../optimizer.train"')),
            "result": sealed_again(state.replace('"raw": "part.model"', '"raw": "part.other"')),
        }[damage]
        assert changed != state
        (path / "state.json").write_text(changed)
    words = r"truncated|changed|lacks|damaged|another digest|format 'scoresde-2' and this version reads 'scoresde-3'"
    with pytest.raises(CheckpointError, match=words) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    if damage not in ("remove", "truncate"):  # nor is the model alone taken from it
        with pytest.raises(CheckpointError):
            load_model(path, ema=False)


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_truncated_model_files(tmp_path, cut):
    path = save_model(model(), tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_model(path)


def test_any_first_byte_of_a_good_file_is_read(tmp_path):
    """A safetensors file starts with the length of its header: 0x80, a pickle's first byte, is as good as any."""
    first = set()
    for pad in range(0, 260, 8):
        path = tmp_path / f"{pad}.safetensors"
        safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata={"pad": "x" * pad})
        first.add(path.read_bytes()[0])
        assert float(read_tensors(path)[0]["a"]) == 1.0
    assert 0x80 in first


class Bomb:
    """A pickle of this touches a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("kind", ["zip", "pickle", "legacy"])
def test_a_pickle_is_refused_and_not_executed(tmp_path, kind):
    file, mark = tmp_path / "m.safetensors", tmp_path / "executed"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save({"model": Bomb(mark)}, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match="pickle"):
        load_model(file)
    checkpoint = save(tmp_path / "run", 5)
    shutil.copy(file, checkpoint / "average.ema.safetensors")
    with pytest.raises(CheckpointError, match="pickle"):
        load_model(checkpoint)
    with pytest.raises(CheckpointError, match="pickle"):
        read_checkpoint(checkpoint)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))  # the bomb is real
    assert mark.exists()


def test_tensors_that_do_not_fit_are_named():
    wanted = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2), "c": torch.zeros(1)}
    check_tensors(wanted, wanted, "file")
    found = {"a.weight": torch.zeros(3, 2), "a.biass": torch.zeros(2), "c": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        check_tensors(found, wanted, "file.safetensors")
    text = str(caught.value)
    for part in ("missing: a.bias", "unexpected: a.biass", "a.weight (3, 2) instead of (2, 3)", "Was 'a.biass'"):
        assert part in text


def test_wrong_tensors_and_foreign_files(tmp_path):
    small, path = model(16), tmp_path / "m.safetensors"
    write_tensors(model(32).state_dict(), path, small.config())
    with pytest.raises(CheckpointError, match="of another shape"):
        load_model(path)
    write_tensors(small.state_dict(), path, {**small.config(), "sde": {"name": "vpp"}})
    with pytest.raises(CheckpointError, match="Did you mean 'vp'"):
        load_model(path)
    safetensors.torch.save_file(small.state_dict(), path)
    with pytest.raises(CheckpointError, match="no scoresde model configuration"):
        load_model(path)
    safetensors.torch.save_file(small.state_dict(), path, metadata={"scoresde": "{"})
    with pytest.raises(CheckpointError, match="damaged header"):
        load_model(path)
    for nowhere in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"No such|No checkpoint"):
            load_model(nowhere)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_optimizer_continues_bitwise(name):
    made = model(), model()
    steppers = [getattr(torch.optim, name)(m.parameters(), lr=1e-2, fused=True) for m in made]

    def step(i):
        m, optimizer = made[i], steppers[i]
        x = torch.linspace(-1, 1, 8).reshape(4, 2)
        m(x, torch.full((4,), 0.5)).noise.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step(0)
    made[1].load_state_dict(made[0].state_dict())
    load_optimizer(steppers[1], made[1], optimizer_tensors(steppers[0], made[0]), "here")
    for _ in range(3):
        step(0)
        step(1)
    for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_optimizer(steppers[1], made[1], {"other|exp_avg": torch.zeros(3)}, "here")
