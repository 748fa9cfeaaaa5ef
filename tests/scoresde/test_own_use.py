"""A model in the user's own code: a training loop, pickling, export; class labels."""

import copy
import pickle

import pytest
import torch
from torch import nn

from scoresde import (
    MLP,
    VPSDE,
    ClassifierFreeGuidance,
    DataSpec,
    DenoisingScoreMatching,
    GaussianMixture,
    ScoreModel,
    bits_per_dim,
    config,
    divergence,
    from_pretrained,
    inpaint,
    interpolate,
    load_model,
    load_pretrained,
    sample,
    save_model,
    sliced_wasserstein,
    train,
)
from scoresde.data.conditions import classes

LAWS = [VPSDE(), VPSDE().discretize(50)]


def mlp(law):
    torch.manual_seed(0)
    network = MLP((2,), width=16, depth=1)
    for p in network.parameters():  # the last layer starts at zero
        nn.init.normal_(p, std=0.5)
    return ScoreModel(network, law, "v", data_spec=DataSpec((2,))).eval()


@pytest.mark.parametrize("law", LAWS, ids=["sde", "chain"])
def test_models_and_their_reverses_pickle(law):
    model = mlp(law)
    t = 7 if law is LAWS[1] else 0.3
    x = torch.randn(4, 2)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(again(x, t).data, model(x, t).data)
        assert again.network is not model.network
    again = pickle.loads(pickle.dumps(model.reverse({"class_label": None})))
    torch.testing.assert_close(again(x, t).data, model(x, t).data)
    of_a_mixture = GaussianMixture([[-1.0, 0.3], [0.8, -0.5]], std=0.2).reverse(law)
    again = pickle.loads(pickle.dumps(of_a_mixture))
    torch.testing.assert_close(again(x, t).score, of_a_mixture(x, t).score)


class Denoiser(nn.Module):
    """E[x_0 | x_t] as a module of tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t):
        return self.model(x, t).data


@pytest.mark.parametrize("law", LAWS, ids=["sde", "chain"])
def test_a_denoiser_is_exported(law):
    """A graph of torch's operators alone, for any batch size, that answers as the model does."""
    module = Denoiser(mlp(law))
    x = torch.randn(4, 2)
    t = torch.tensor([0.9, 0.1, 0.5, 0.01]) if law is LAWS[0] else torch.tensor([49, 0, 7, 3])
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (x, t), dynamic_shapes=({0: batch}, {0: batch}))
    torch.testing.assert_close(program.module()(x[:3], t[:3]), module(x[:3], t[:3]))


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (torch.tensor([0, 1, 99]), ValueError, r"0 … 2 \(3 stands for none\), got values from 0 to 99"),
        (torch.tensor([0, -1, 2]), ValueError, "from -1 to 2"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, "int64"),
        ([0, 1, 2], TypeError, "torch.tensor"),
        (1, TypeError, "int64"),
    ],
)
def test_classes_that_are_none_are_refused(labels, error, words):
    """At every door: reverse, given, sample, and the loss."""
    spec = DataSpec((2,), conditions=classes(3))
    model = ScoreModel(MLP((2,), classes(3), width=8, depth=1), VPSDE(), data_spec=spec)
    condition = {"class_label": labels}
    for door in (
        lambda: model.reverse(condition),
        lambda: model.reverse().given(**condition),
        lambda: sample(model.reverse(), (3, 2), "ddim", steps=2, condition=condition),
        lambda: model.sample(3, "ddim", steps=2, condition=condition),
        lambda: DenoisingScoreMatching(model).loss(torch.zeros(3, 2), condition),
    ):
        with pytest.raises(error, match=words):
            door()
    model.sample(3, "ddim", steps=2, condition={"class_label": torch.tensor([0, 2, 3])})  # 3 is none


X = torch.zeros(3, 5)
MODEL = ScoreModel(MLP((2,), width=8, depth=1), VPSDE(), data_spec=DataSpec((2,)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: train("digits_vp", "run"), TypeError, "config.load"),
        (lambda: config.load(None), TypeError, "named by a text"),
        (lambda: config.load("digits_vp", [7]), ValueError, "Unknown argument 7"),
        (lambda: load_model(None), TypeError, "`path`"),
        (lambda: load_pretrained(3), TypeError, "`path`"),
        (lambda: save_model(None, "m.safetensors"), TypeError, "ScoreModel"),
        (lambda: from_pretrained("a name with spaces", local_files_only=True), ValueError, "OWNER/NAME"),
        (lambda: bits_per_dim(MODEL.reverse(), torch.zeros(1, 2)), TypeError, "ScoreModel"),
        (lambda: bits_per_dim(MODEL, torch.zeros(1, 2), devices=[]), ValueError, "`devices`"),
        (lambda: bits_per_dim(MODEL, torch.zeros(1, 2), devices=["gpu"]), ValueError, "gpu"),
        (lambda: sliced_wasserstein(torch.zeros(3, 2), torch.zeros(3, 2), projections=0), ValueError, "`projections`"),
        (lambda: inpaint(torch.zeros(5), torch.ones(2)), ValueError, "must fit each other"),
        (lambda: MODEL.sample(3, "ddim", steps=2, project=inpaint(X, X)), ValueError, "must fit states"),
        (lambda: divergence(3, torch.zeros(1, 2)), TypeError, "function"),
        (lambda: interpolate(torch.zeros(1, 2), torch.zeros(1, 2), "0.5"), TypeError, "`weight`"),
        (lambda: ClassifierFreeGuidance(MODEL, 2.0), TypeError, "reverse SDE"),
        (lambda: ClassifierFreeGuidance(MODEL.reverse(), "2"), TypeError, "`scale`"),
        (lambda: MODEL.sample(3, "ddim", steps=2, device="cpu"), ValueError, "model.to"),
        (lambda: ScoreModel(None, VPSDE()), TypeError, "`network`"),
        (lambda: ScoreModel(MODEL.network, "vp"), TypeError, "`law`"),
        (lambda: ScoreModel(MODEL.network, VPSDE(), data_spec=(2,)), TypeError, "DataSpec"),
        (lambda: ScoreModel.from_config({}), ValueError, "lacks network, sde"),
        (lambda: ScoreModel.from_config({"network": {}, "sde": {}, "leves": 3}), ValueError, "'leves'"),
        (lambda: DataSpec(3), ValueError, "`shape`"),
        (lambda: DataSpec((2,), levels=2.5), ValueError, "`levels`"),
        (lambda: DataSpec((2,)).check(torch.zeros(0, 2)), ValueError, "empty"),
    ],
)
def test_doors(call, error, words):
    with pytest.raises(error, match=words):
        call()
