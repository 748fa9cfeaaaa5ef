"""What lies on disk: digests that every changed byte breaks, locks, rows, and files made to do harm."""

import json
import os
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from scoresde.models.score_model import ScoreModel
from scoresde.networks import NETWORKS
from scoresde.pretrained import load_pretrained
from scoresde.storage import CheckpointError, load_model, read_tensors, save_model, usable_device, write_tensors
from scoresde.storage.files import parse_json, read_json, write_whole
from scoresde.storage.locks import LockedError, locked
from scoresde.storage.processes import first_tells
from scoresde.storage.rows import RowFile, read_lines


def config_of(network="mlp", **options):
    shape = {"mlp": [2], "ncsn": [3, 16, 16], "ncsnv2": [3, 16, 16]}.get(network, [3, 8, 8])
    small = {"mlp": {"width": 8, "depth": 1}, "dit": {"width": 16, "depth": 1, "heads": 2, "patch": 2}}
    attention = {"attention": []} if network in ("adm", "ddpm", "ncsnpp") else {}
    given = {"shape": shape, **small.get(network, {"channels": 8, **attention}), **options}
    sde = {"name": "vp", "vp": {}}
    return {"network": {"name": network, network: given}, "sde": sde, "data_spec": {"shape": shape}}


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return ScoreModel.from_config(config_of())


# --- tensors ----------------------------------------------------------------------------------------------------------
def test_equal_contents_are_equal_bytes_whatever_their_order(tmp_path, small):
    tensors = {"b": torch.arange(3), "a": torch.randn(2, 3), "half": torch.ones(5).bfloat16(), "c": torch.ones(0)}
    write_tensors(tensors, tmp_path / "1.safetensors", {"x": 1, "y": [2.5]})
    write_tensors(dict(reversed(tensors.items())), tmp_path / "2.safetensors", {"y": [2.5], "x": 1})
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    back, config = read_tensors(tmp_path / "1.safetensors")
    theirs = safetensors.torch.load_file(tmp_path / "1.safetensors")  # the format's own reader
    assert config == {"x": 1, "y": [2.5]} and set(back) == set(theirs) == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(back[name], value) and torch.equal(theirs[name], value) and back[name].dtype == value.dtype
    # views, gradients, shared memory, other strides
    base = torch.randn(4, 4, requires_grad=True)
    write_tensors({"t": base.T, "row": base[1], "same": base}, tmp_path / "3.safetensors")
    assert torch.equal(read_tensors(tmp_path / "3.safetensors")[0]["t"], base.T)
    for bad in ([1.0], torch.ones(2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="'x' cannot be stored"):
            write_tensors({"x": bad}, tmp_path / "4.safetensors")
    assert len(list(tmp_path.iterdir())) == 3


def test_every_flipped_bit_is_noticed(tmp_path, small):
    """One bit of any byte: of the header's length, its words, spaces and digits, the digest itself, and the weights."""
    path = save_model(small, tmp_path / "m.safetensors")
    good = path.read_bytes()
    refused = 0
    positions = range(0, len(good), 5)
    for i in positions:
        path.write_bytes(good[:i] + bytes([good[i] ^ (1 << i % 8)]) + good[i + 1 :])
        try:
            load_model(path)
        except CheckpointError:
            refused += 1
    assert refused == len(positions) > 300
    path.write_bytes(good)
    load_model(path)


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_every_network_is_built_without_memory_and_loaded(tmp_path, network):
    torch.manual_seed(0)
    made = ScoreModel.from_config(config_of(network))
    back = load_model(save_model(made, tmp_path / "m.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), back.state_dict().values(), strict=True))


def test_wrong_dtypes_and_nan_are_refused(tmp_path, small):
    path, state = tmp_path / "m.safetensors", small.state_dict()
    name = "network.inlet.bias"
    for changed, message in (
        (state[name].double(), "of another dtype: network.inlet.bias float64 instead of float32"),
        (state[name].int(), "of another dtype: network.inlet.bias int32"),
        (state[name] * float("nan"), "network.inlet.bias.* NaN or infinite"),
        (state[name] / 0.0, "network.inlet.bias.* NaN or infinite"),
    ):
        write_tensors({**state, name: changed}, path, small.config())
        with pytest.raises(CheckpointError, match=message):
            load_model(path)
    write_tensors({k: v.int() for k, v in state.items()}, path, small.config())
    with pytest.raises(CheckpointError, match="of another dtype"):
        load_model(path)
    write_tensors({k: v.half() for k, v in state.items()}, path, small.config())
    assert load_model(path).dtype == torch.float16  # all of them: it was saved so
    broken = ScoreModel.from_config(small.config())
    with torch.no_grad():
        broken.network.inlet.bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"network\.inlet\.bias.*not saved"):
        save_model(broken, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def nested(depth):
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


HARMFUL = [
    ({"network": {"name": "mlp", "mlp": {"shape": [2], "width": 400_000, "depth": 1}}}, "of another shape"),
    ({"network": {"name": "mlp", "mlp": {"shape": [2], "width": 2**62, "depth": 1}}}, "cannot be built"),
    ({"network": {"name": "mlp", "mlp": {"shape": [2], "width": 8, "depth": 10**9}}}, "more layers"),
    ({"network": {"name": "dit", "dit": {"shape": [3, 8, 8], "width": 8, "depth": 10**12, "heads": 2}}}, "more layers"),
    ({"network": {"name": "unet", "unet": {"shape": [3, 8, 8], "blocks": 10**9}}}, "more layers"),
    ({"network": {"name": "mlp", "mlp": {"shape": "two"}}}, "cannot be built"),
    ({"network": {"name": "mlp", "mlp": [1, 2]}}, "cannot be built"),
    ({"network": [3]}, "cannot be built"),
    ({"network": {"name": ["mlp"]}}, "cannot be built"),
    ({"network": None}, "cannot be built"),
    ({"sde": {"name": "vp", "vp": {"beta_max": "x"}}}, "cannot be built"),
    ({"sde": 7}, "cannot be built"),
    ({"levels": 10**12}, "levels"),
    ({"levels": -3}, "levels"),
    ({"levels": "many"}, "levels"),
    ({"sigma_data": 0.0}, "sigma_data"),
    ({"sigma_data": "x"}, "cannot be built"),
    ({"data_spec": {"shape": [0]}}, "shape"),
    ({"data_spec": [1]}, "cannot be built"),
    ({"data_spec": nested(3)}, "cannot be built"),
    ({"surprise": 1}, "surprise"),
    ({"network": nested(500)}, "nested more than"),
]


@pytest.mark.parametrize(("change", "message"), HARMFUL)
def test_a_configuration_that_does_harm_is_one_sentence(tmp_path, small, change, message):
    """Before memory is taken and without a loop that does not end."""
    path = tmp_path / "m.safetensors"
    write_tensors(small.state_dict(), path, {**small.config(), **change})
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("parameterization", ["edm", "v"])
def test_sigma_data_is_a_positive_number(value, parameterization):
    with pytest.raises(ValueError, match="sigma_data"):
        ScoreModel.from_config({**config_of(), "sigma_data": value, "parameterization": parameterization})


def test_devices_that_are_not_there():
    assert usable_device("cpu").type == "cpu"
    for name in ("gpuu", "cuda:99", "", "meta:x"):
        with pytest.raises(ValueError, match="Cannot use device"):
            usable_device(name)


def test_folders_of_others_are_told_apart(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(FileNotFoundError, match="scoresde convert"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("config", "norm_num_groups", float("nan")),
        ("config", "layers_per_block", 10**12),
        ("config", "in_channels", 10**12),
        ("config", "block_out_channels", []),
        ("config", "down_block_types", {}),
        ("scheduler_config", "num_train_timesteps", 10**12),
        ("scheduler_config", "prediction_type", [1]),
        ("scheduler_config", "beta_start", None),
    ],
)
def test_folders_of_diffusers_that_do_harm_are_one_sentence(tmp_path, file, field, value):
    blocks = {"block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"] * 2, "norm_num_groups": 4}
    unet = {"_class_name": "UNet2DModel", "sample_size": 8, "up_block_types": ["UpBlock2D"] * 2, **blocks}
    texts = {"config": unet, "scheduler_config": {}}
    texts[file] = {**texts[file], field: value}
    for name, content in texts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    safetensors.torch.save_file({"conv_in.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError) as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


# --- texts ------------------------------------------------------------------------------------------------------------
def test_json_of_any_kind_is_a_value_or_a_sentence(tmp_path):
    assert parse_json('{"a": [1, {"b": null}]}', "it") == {"a": [1, {"b": None}]}
    for text in ("[" * 100_000 + "]" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000, "[" * 150 + "]" * 150):
        with pytest.raises(ValueError, match=r"^it is n(ested more|ot valid)"):
            parse_json(text, "it")
    for data in (b"", b"{", b"\xff\xfe\x00", b"nul", b"9" * 10_000):
        (tmp_path / "x.json").write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
            read_json(tmp_path / "x.json")


def test_a_failed_write_leaves_the_file(tmp_path, monkeypatch):
    write_whole(tmp_path / "deep" / "a.txt", "one\n")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "deep" / "a.txt", "two \ud800\n")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.txt"]
    assert (tmp_path / "deep" / "a.txt").read_text() == "one\n"


# --- rows -------------------------------------------------------------------------------------------------------------
def test_rows_are_kept_appended_and_whole(tmp_path):
    path = tmp_path / "rows.txt"
    seen = []

    def keep(lines):
        seen.append(lines)
        return lines or ["head"]

    with RowFile(path, keep) as rows:
        rows.add(["a", "b"])
        assert path.read_text() == "head\na\nb\n"  # on the disk before `add` returns
    with path.open("a") as file:
        file.write("half a l")
    with RowFile(path, keep) as rows:
        rows.add(["c"])
    assert seen == [[], ["head", "a", "b"]] and read_lines(path) == ["head", "a", "b", "c"]
    before = path.stat().st_ino
    with RowFile(path, keep):
        assert path.stat().st_ino == before  # what is as it should be is not written again
    assert [p.name for p in tmp_path.iterdir()] == ["rows.txt"]
    with pytest.raises(ZeroDivisionError), RowFile(path, lambda lines: [str(1 // 0)]):
        pass
    assert read_lines(path) == ["head", "a", "b", "c"] and not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_whole_rows(tmp_path, monkeypatch):
    """A limit on the size of files is a real full disk: the write is short, or fails."""
    import resource

    path = tmp_path / "rows.txt"
    with RowFile(path, lambda lines: ["head"]) as rows:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        try:
            rows.add(["1234"])
            with pytest.raises(OSError):
                rows.add(["a row that is too long for the disk"])
            rows.add(["5678"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
    assert read_lines(path) == ["head", "1234", "5678"]


# --- locks ------------------------------------------------------------------------------------------------------------
HOLD = """
import sys, time
from pathlib import Path
from scoresde.storage.locks import locked
with locked(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_by_one_and_dies_with_its_holder(tmp_path):
    path = tmp_path / "here" / ".lock"
    with locked(path, "The place"):
        held = rf"The place is in use by process {os.getpid()} on "
        with pytest.raises(LockedError, match=held), locked(path, "The place"):
            pass
    assert not path.exists()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {holder.pid} on "), locked(path, "it"):
            pass
        holder.kill()
        holder.wait()
    assert path.exists()
    with locked(path, "it"):
        pass
    assert not path.exists()


def test_alone_the_first_process_tells_itself():
    assert first_tells(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        first_tells(lambda: 1 // 0)
