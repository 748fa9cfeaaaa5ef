"""Conditions on the command line: what a text stands for, and mistakes that are one sentence."""

import argparse

import numpy as np
import pytest
import torch

from scoresde.cli.conditions import condition_of_data, given_conditions, split_conditions, value_of
from scoresde.data import DataSpec, Split
from scoresde.data.conditions import ConditionSpec

CLASS = ConditionSpec("class", classes=3)
VECTOR = ConditionSpec("vector", (2,))
IMAGE = ConditionSpec("image", (1, 2, 2))
TOKENS = ConditionSpec("tokens", (4, 2))
WORDS = ConditionSpec("tokens", (4,), classes=5)


def saved(path, *arrays, **named):
    np.save(path, *arrays) if arrays else np.savez(path, **named)
    return str(path)


def test_classes_vectors_and_images(tmp_path):
    assert value_of("y", "2", CLASS, 3).tolist() == [2, 2, 2]
    assert value_of("y", "all", CLASS, 5).tolist() == [0, 1, 2, 0, 1]
    assert value_of("y", saved(tmp_path / "y.npy", np.array([2, 0])), CLASS, 2).tolist() == [2, 0]
    assert value_of("y", saved(tmp_path / "y.npy", np.uint8(1)), CLASS, 2).tolist() == [1, 1]
    one, each = np.array([0.5, -1.0]), np.arange(6.0).reshape(3, 2)
    assert value_of("v", saved(tmp_path / "v.npy", one), VECTOR, 3).tolist() == 3 * [[0.5, -1.0]]
    found = value_of("v", saved(tmp_path / "v.npz", other=each[::-1], v=each), VECTOR, 3)
    assert found.dtype == torch.float32 and found.tolist() == each.tolist()
    assert value_of("v", saved(tmp_path / "v.npz", only=each), VECTOR, 3).tolist() == each.tolist()
    image = np.arange(4, dtype=np.uint8).reshape(1, 2, 2)
    assert value_of("i", saved(tmp_path / "i.npy", image), IMAGE, 2)[1].flatten().tolist() == [0.0, 1.0, 2.0, 3.0]


def test_tokens_are_padded_to_the_length_of_the_model(tmp_path):
    each = np.arange(8.0).reshape(2, 2, 2)
    found = value_of("t", saved(tmp_path / "t.npz", tokens=each, mask=[[True, False], [True, True]]), TOKENS, 2)
    assert found["tokens"].shape == (2, 4, 2) and found["tokens"][:, :2].tolist() == each.tolist()
    assert found["mask"].tolist() == [[True, False, False, False], [True, True, False, False]]
    found = value_of("t", saved(tmp_path / "t.npy", each[0]), TOKENS, 3)  # one text for all, every token counts
    assert found["tokens"].shape == (3, 4, 2) and found["mask"].sum(1).tolist() == [2, 2, 2]
    words = value_of("w", saved(tmp_path / "w.npy", np.array([[4, 0, 1]])), WORDS, 1)
    assert words["tokens"].tolist() == [[4, 0, 1, 0]] and words["mask"].tolist() == [[True, True, True, False]]


REFUSALS = [
    (CLASS, "x", None, "a number or `all`"),
    (CLASS, "3", None, "0 to 2, got 3"),
    (CLASS, "-1", None, "0 to 2, got -1"),
    (CLASS, "a.npy", np.array([0.5, 1.0]), "whole numbers"),
    (CLASS, "a.npy", np.array([0, 1, 2]), "one for all, got (3,)"),
    (VECTOR, "0.5", None, ".npy or .npz file"),
    (VECTOR, "a.npy", np.zeros((3, 2)), "must have shape (2, 2), a value for each of the 2 samples, or (2,)"),
    (VECTOR, "a.npy", np.array([np.nan, 0.0]), "NaN"),
    (VECTOR, "a.npy", np.array(["a", "b"]), "must hold numbers"),
    (VECTOR, "a.npy", np.array([None, 1]), "no NumPy file of numbers"),
    (VECTOR, "a.npz", {"a": np.zeros(2), "b": np.zeros(2)}, "holds a, b; name one of them 'v'"),
    (VECTOR, "a.npz", {"tokens": np.zeros((1, 2))}, "no condition of tokens"),
    (TOKENS, "a.npy", np.zeros((2, 5, 2)), "at most 4"),
    (TOKENS, "a.npy", np.zeros((2, 3, 3)), "must have shape (2, 3, 2)"),
    (TOKENS, "a.npz", {"tokens": np.zeros((2, 3, 2)), "mask": np.ones((2, 2))}, "mask"),
    (WORDS, "a.npy", np.array([[0, 5], [1, 1]]), "0 … 4"),
]


@pytest.mark.parametrize(("spec", "text", "array", "message"), REFUSALS, ids=[r[3] for r in REFUSALS])
def test_what_is_no_value(spec, text, array, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(array, dict):
        np.savez(text, **array)
    elif array is not None:
        np.save(text, array)
    with pytest.raises(ValueError) as caught:
        value_of("v", text, spec, 2)
    assert message in str(caught.value) and "\n" not in str(caught.value) and "v" in str(caught.value)


def asked(**options):
    return argparse.Namespace(**{"condition": {}, "class_label": None, "given": None, "given_class": False, **options})


def test_conditions_of_data(tmp_path):
    """Those that the data come with, all or by name, beside those of the command line, one of each."""
    spec = DataSpec((2,), conditions={"y": CLASS, "v": VECTOR})
    split = Split(torch.zeros(2, 2), {"y": torch.tensor([2, 0]), "v": torch.ones(2, 2)})
    assert set(condition_of_data(asked(given=""), split, spec)) == {"y", "v"}
    assert condition_of_data(asked(), split, spec) == {}
    found = condition_of_data(asked(given="v", condition={"y": "1"}), split, spec)
    assert found["v"] is split.condition["v"] and found["y"].tolist() == [1, 1]
    for options, message in (
        ({"given": "w"}, "without a condition 'w', which --given asks for. They come with y, v."),
        ({"given": "v", "condition": {"v": "a.npy"}}, "Give --given or --condition.v, not both"),
        ({"given_class": True}, "class_label"),
        ({"condition": {"yy": "1"}}, "Did you mean 'y'"),
    ):
        with pytest.raises(ValueError) as caught:
            condition_of_data(asked(**options), split, spec)
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="these have none"):
        condition_of_data(asked(given=""), Split(torch.zeros(2, 2)), spec)
    labelled = Split(torch.zeros(1, 2), {"class_label": torch.tensor([3])})
    assert condition_of_data(asked(given_class=True), labelled, spec)["class_label"].tolist() == [3]


def test_they_are_split_off_and_given_once():
    texts, rest = split_conditions(["--condition.text=a.npz", "--config.seed=1", "--condition.y=3=4"])
    assert texts == {"text": "a.npz", "y": "3=4"} and rest == ["--config.seed=1"]
    for words in (["--condition.y"], ["--condition.=3"], ["--condition.y="], ["--condition.y=1", "--condition.y=2"]):
        with pytest.raises(ValueError, match=r"NAME=VALUE|twice"):
            split_conditions(words)
    named = argparse.Namespace(condition={"text": "a"}, class_label="3")
    assert given_conditions(named) == {"text": "a", "class_label": "3"}
    with pytest.raises(ValueError, match="not both"):
        given_conditions(argparse.Namespace(condition={"class_label": "1"}, class_label="3"))
