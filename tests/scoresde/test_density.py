"""What has a likelihood: the score of a density, however it is wrapped. Guided fields and maps are refused."""

import pytest
import torch

from scoresde import (
    VPSDE,
    ClassifierFreeGuidance,
    ClipData,
    DataSpec,
    GaussianMixture,
    ScoreModel,
    bits_per_dim,
    elbo,
    elbo_of_data,
    log_likelihood,
)
from sde_lib import Wrapper

CLASSES = GaussianMixture([[-0.5], [0.5]], std=[0.2, 0.3])
X = torch.tensor([[-0.6], [0.1], [0.7]], dtype=torch.float64)


def classes(law):
    """The score of one Gaussian of two by its class, of the mixture for class 2."""
    parts = [GaussianMixture([[-0.5]], std=0.2), GaussianMixture([[0.5]], std=0.3), CLASSES]

    def noise(x, t, class_label):
        knot = law.knot(t, x.ndim)
        found = torch.stack([part.reverse(law)(x, knot).noise for part in parts])
        return found[class_label, torch.arange(len(x))]

    return law.reverse(noise=noise, condition={"class_label": torch.zeros(len(X), dtype=torch.int64)})


NULL = {"class_label": torch.full((len(X),), 2)}


class Map(Wrapper):
    describes = "map"


@pytest.mark.parametrize(
    "wrap",
    [lambda r: r, Wrapper, lambda r: Wrapper(ClipData(Wrapper(r))), lambda r: Wrapper(r).given(**NULL),
     lambda r: ClipData(r).select(torch.arange(len(X)))],
    ids=["itself", "wrapped", "wrapped three times", "given", "selected"],
)  # fmt: skip
@pytest.mark.parametrize("kind, says", [("guided", "guided field.*without its guidance"), ("map", "a map.*no score")])
def test_what_is_no_density_has_no_likelihood(kind, says, wrap):
    """Deep inside wrappers too, and before the network is asked once."""
    for law in (VPSDE(), VPSDE().discretize(100)):
        calls = []

        def counted(x, t, class_label, calls=calls):
            calls.append(t)
            return x

        rev = law.reverse(noise=counted, condition=NULL)
        none = wrap(ClassifierFreeGuidance(rev, 1.5, null=NULL) if kind == "guided" else Map(rev))
        for function in (elbo, log_likelihood):
            with pytest.raises(ValueError, match=f"{function.__name__} needs the score of a density.*{says}"):
                function(none, X)
        assert not calls


def test_guidance_by_nothing_or_all_is_a_model_again():
    """At w = 1 the conditional density, at w = 0 the one under the null: the closed forms, at t_min."""
    law = VPSDE()
    knot = law.knot(law.t_min)
    for scale, data in ((1.0, GaussianMixture([[-0.5]], std=0.2)), (0.0, CLASSES)):
        guided = Wrapper(ClassifierFreeGuidance(classes(law), scale, null=NULL))
        known = {"prior": lambda z, data=data: data.log_prob(z, law.knot(law.t_max))}
        found = log_likelihood(guided, X, tol=1e-5, **known).log_prob
        torch.testing.assert_close(found, data.log_prob(X, knot), rtol=0, atol=2e-5)


@pytest.mark.parametrize("law", [VPSDE(), VPSDE().discretize(100)], ids=["sde", "chain"])
def test_clipping_tightens_the_bound_of_data_within(law):
    """|x - clip(x_hat)| <= |x - x_hat| for x within the bounds, element by element, and every term of the bound is a
    positive multiple of the square. The model believes in data elsewhere, so that much is clipped."""
    far_off = GaussianMixture([[3.0]], std=1.0).reverse(law)
    options = {"times": 32, "draws": 4, "rng": [1, 2, 3]}
    loose, tight = elbo(far_off, X, **options), elbo(ClipData(far_off), X, **options)
    assert bool((tight.diffusion < loose.diffusion - 1e-3).all())
    assert bool((tight.reconstruction <= loose.reconstruction + 1e-9).all())
    unclipped = elbo(ClipData(far_off, -50.0, 50.0), X, **options)  # nothing is clipped
    torch.testing.assert_close(unclipped.nats, loose.nats)


def test_scores_of_data_sets_ask_the_model():
    class Consistency(ScoreModel):
        describes = "map"

    model = Consistency(torch.nn.Identity(), VPSDE(), data_spec=DataSpec((1,)))
    for function in (bits_per_dim, elbo_of_data):
        with pytest.raises(ValueError, match=f"{function.__name__} needs the score of a density.*a map"):
            function(model, X)


def test_a_description_that_is_none_is_refused():
    """A misspelt one would otherwise be taken for any other."""
    rev = CLASSES.reverse(VPSDE())
    rev.describes = "guid"
    with pytest.raises(ValueError, match="must be one of density, guided, map, got 'guid'"):
        log_likelihood(rev, X)
