"""What the loop hands to an objective: rows, mirrored and with conditions left out, as functions of the row."""

import pytest
import torch

from scoresde.config import ConfigError
from scoresde.data import Split
from scoresde.data.conditions import ConditionSpec
from scoresde.data.spec import DataSpec
from scoresde.streams import Streams
from scoresde.training.batches import batch_of, condition_dropout, placed
from scoresde.training.evaluation import shown

SPECS = {
    "class_label": ConditionSpec("class", classes=3, dropout=0.4),
    "mask": ConditionSpec("image", (1, 2, 4), dropout=0.0),
    "text": ConditionSpec("tokens", (5, 2)),
}
SPEC = DataSpec((1, 2, 4), levels=16, conditions=SPECS)
N = 400


def split():
    """Every value says which row it is of."""
    row = torch.arange(N)
    data = (row[:, None] + torch.arange(8)).reshape(N, 1, 2, 4) % 16
    tokens = {"tokens": row[:, None, None].expand(N, 5, 2).float(), "mask": torch.ones(N, 5, dtype=torch.bool)}
    return Split(data, {"class_label": row % 3, "mask": data.float() - 7.0, "text": tokens})


def streams(rows=range(N)):
    return Streams(1, rows if isinstance(rows, range) else torch.tensor(rows), N, key=("train", 0))


def batch(rows=range(N), **options):
    return batch_of(split(), SPEC, torch.tensor(rows), streams(rows), torch.device("cpu"), **options)


def test_images_are_mirrored_with_their_conditions_and_half_of_them():
    plain, found = batch(), batch(flip=True)
    mirrored = (found.data != plain.data).flatten(1).any(1)
    assert torch.equal(found.data[mirrored], plain.data[mirrored].flip(-1))
    assert torch.equal(found.condition["mask"], found.data.float() - 7.0)  # what belongs together stays together
    assert torch.equal(found.condition["text"]["tokens"], plain.condition["text"]["tokens"])
    assert abs(int(mirrored.sum()) - N / 2) < 4.5 * (N / 4) ** 0.5  # binomial


def test_conditions_are_left_out_independently_and_by_the_row_alone():
    dropout = condition_dropout("", SPECS)
    assert dropout == {"class_label": 0.4, "mask": 0.0, "text": 0.1}
    found, plain = batch(dropout=dropout), batch()
    without = found.condition["class_label"] == 3
    silent = ~found.condition["text"]["mask"].any(1)
    for gone, p in ((without, 0.4), (silent, 0.1), (without & silent, 0.04)):
        assert abs(int(gone.sum()) - N * p) < 4.5 * (N * p * (1 - p)) ** 0.5
    assert torch.equal(found.condition["class_label"][~without], plain.condition["class_label"][~without])
    assert torch.equal(found.condition["text"]["tokens"][~silent], plain.condition["text"]["tokens"][~silent])
    assert torch.equal(found.condition["mask"], plain.condition["mask"])
    some = batch([7, 3, 399], dropout=dropout)
    assert torch.equal(some.condition["class_label"], found.condition["class_label"][[7, 3, 399]])
    assert torch.equal(some.condition["text"]["mask"], found.condition["text"]["mask"][[7, 3, 399]])


def test_how_often_conditions_are_left_out_in_words():
    assert condition_dropout("0.2", SPECS) == dict.fromkeys(SPECS, 0.2)
    assert condition_dropout("text:0.5, mask:1", SPECS) == {"class_label": 0.4, "mask": 1.0, "text": 0.5}
    assert condition_dropout("0.2,text:0", SPECS) == {"class_label": 0.2, "mask": 0.2, "text": 0.0}
    for text, message in (
        ("label:0.1", "the data's conditions are class_label, mask, text"),
        ("2", "'2' is no fraction"),
        ("text:often", "'often' is no fraction"),
        ("nan", "'nan' is no fraction"),
    ):
        with pytest.raises(ConfigError, match=message):
            condition_dropout(text, SPECS)


def test_samples_to_show_have_one_class_after_the_other_and_other_conditions_of_held_out_samples():
    few = split().rows(slice(0, 2))
    found = shown(SPEC, 5, few)
    assert found["class_label"].tolist() == [0, 1, 2, 0, 1]
    assert found["text"]["tokens"][:, 0, 0].tolist() == [0, 1, 0, 1, 0]
    SPEC.check_condition(found, 5)


def test_a_split_lives_on_the_device_if_its_conditions_fit_there_too():
    """Expanded tensors take no memory; their sizes are those of what they stand for."""
    text = {"tokens": torch.zeros(()).expand(4, 2**26 + 1), "mask": torch.ones(4, dtype=torch.bool)}
    small, large = (Split(torch.zeros(4, 2), condition) for condition in ({"pose": torch.zeros(4, 3)}, {"text": text}))
    there = placed(small, torch.device("meta"))
    assert there.data.is_meta and there.condition["pose"].is_meta
    assert placed(large, torch.device("meta")) is large
