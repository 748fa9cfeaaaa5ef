"""The published experiments of score_sde_pytorch: which tensors their checkpoints hold, known without building them."""

from collections.abc import Mapping

from scoresde.pretrained.score_sde import Signature

EXPERIMENTS: Mapping[str, Signature] = {
    "subvp/cifar10_ddpm_continuous": Signature(308, 35218947, 3558741916),
    "subvp/cifar10_ddpmpp_continuous": Signature(564, 61804419, 1592124967),
    "subvp/cifar10_ddpmpp_deep_continuous": Signature(956, 106632579, 324994574),
    "subvp/cifar10_ncsnpp_continuous": Signature(570, 62693251, 2886290589),
    "subvp/cifar10_ncsnpp_deep_continuous": Signature(962, 107521411, 1174629003),
    "ve/bedroom_ncsnpp_continuous": Signature(645, 65574549, 2708829052),
    "ve/celeba_ncsnpp": Signature(570, 62693251, 1825604581),
    "ve/celebahq_256_ncsnpp_continuous": Signature(645, 65574549, 2708829052),
    "ve/celebahq_ncsnpp_continuous": Signature(553, 105785896, 2595166488),
    "ve/church_ncsnpp_continuous": Signature(645, 65574549, 2708829052),
    "ve/cifar10_ddpm": Signature(308, 35218947, 3558741916),
    "ve/cifar10_ncsnpp": Signature(570, 62693251, 2886290589),
    "ve/cifar10_ncsnpp_continuous": Signature(571, 62758915, 3501892073),
    "ve/cifar10_ncsnpp_deep_continuous": Signature(963, 107587075, 3057056902),
    "ve/ffhq_256_ncsnpp_continuous": Signature(645, 65574549, 2708829052),
    "ve/ffhq_ncsnpp_continuous": Signature(553, 105785896, 2595166488),
    "ve/ncsn/celeba": Signature(173, 30117635, 3625027478),
    "ve/ncsn/celeba_124": Signature(173, 51379715, 994668747),
    "ve/ncsn/celeba_1245": Signature(173, 51379715, 994668747),
    "ve/ncsn/celeba_5": Signature(173, 30117635, 3625027478),
    "ve/ncsn/cifar10": Signature(173, 30117635, 3625027478),
    "ve/ncsn/cifar10_124": Signature(173, 39750659, 821537295),
    "ve/ncsn/cifar10_1245": Signature(173, 39750659, 821537295),
    "ve/ncsn/cifar10_5": Signature(173, 30117635, 3625027478),
    "ve/ncsnv2/bedroom": Signature(191, 83445379, 509820040),
    "ve/ncsnv2/celeba": Signature(153, 29694083, 2750052577),
    "ve/ncsnv2/cifar10": Signature(153, 29694083, 2750052577),
    "vp/cifar10_ddpmpp": Signature(564, 61804419, 1592124967),
    "vp/cifar10_ddpmpp_continuous": Signature(564, 61804419, 1592124967),
    "vp/cifar10_ddpmpp_deep_continuous": Signature(956, 106632579, 324994574),
    "vp/cifar10_ncsnpp": Signature(570, 62693251, 2886290589),
    "vp/cifar10_ncsnpp_continuous": Signature(570, 62693251, 2886290589),
    "vp/cifar10_ncsnpp_deep_continuous": Signature(962, 107521411, 1174629003),
    "vp/ddpm/bedroom": Signature(430, 111569923, 569704325),
    "vp/ddpm/celebahq": Signature(430, 111569923, 569704325),
    "vp/ddpm/church": Signature(430, 111569923, 569704325),
    "vp/ddpm/cifar10": Signature(308, 35218947, 3558741916),
    "vp/ddpm/cifar10_continuous": Signature(308, 35218947, 3558741916),
}
"""Name of a shipped configuration -> signature of its checkpoints. A test makes them from the networks."""
