"""What the published weights of NCSN and NCSNv2 are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from scoresde.networks.ncsn import RefineNet

STAGE_NAMES: Mapping[int, tuple[str, str]] = {
    4: ("1 2 3 4", "1 2 3 4"),
    5: ("1 2 3 4 5", "1 2 3 4 5"),
    6: ("1 2 3 31 4 5", "1 2 31 3 4 5"),
}
"""Number of stages -> what follows "res" in the published names, from fine to coarse, and "refine", from coarse to
fine."""

PARAMETER_NAMES = {"scale": "gamma", "mean_scale": "alpha", "shift": "beta", "table.weight": "embed.weight"}


def published_names(network: RefineNet) -> Iterator[tuple[str, str]]:
    """(name here, published name) of every parameter, each once; the tensors are equal as they are.

    The names are those of score_sde_pytorch without the prefix ``module.``, and of the networks of the two papers
    (ermongroup/ncsn, ermongroup/ncsnv2). Its buffer ``sigmas`` has no counterpart.

    Args:
        network: NCSN or NCSNv2 with 4, 5 or 6 stages.

    Raises:
        ValueError: for another number of stages, which was never published.
    """
    for ours, theirs in _published_modules(network):
        for name, _ in network.get_submodule(ours).named_parameters():
            yield f"{ours}.{name}", f"{theirs}.{PARAMETER_NAMES.get(name, name)}"


def _published_modules(network: RefineNet) -> Iterator[tuple[str, str]]:
    """(name here, published name) of every convolution and norm; some have no parameters."""
    count = len(network.stages)
    if count not in STAGE_NAMES:
        raise ValueError(f"Published networks have 4, 5 or 6 stages; this one has {count}.")
    stages, refine = (numbers.split() for numbers in STAGE_NAMES[count])
    yield from (("inlet", "begin_conv"), ("norm", "normalizer"), ("outlet", "end_conv"))
    for i, number in enumerate(stages):
        for j in range(2):
            ours, theirs = f"stages.{i}.{j}", f"res{number}.{j}"
            # a convolution and the mean after it are one published module
            inner = ".conv" if network.get_submodule(ours).halve else ""
            yield from ((f"{ours}.norm{k}", f"{theirs}.normalize{k}") for k in (1, 2))
            yield from ((f"{ours}.conv1", f"{theirs}.conv1"), (f"{ours}.conv2", f"{theirs}.conv2{inner}"))
            yield f"{ours}.skip", f"{theirs}.shortcut{inner}"
    for i, number in enumerate(refine):
        ours, theirs = f"refine.{i}", f"refine{number}"
        series = [(f"{ours}.adapt.{j}", f"{theirs}.adapt_convs.{j}", 2) for j in range(1 if i == 0 else 2)]
        series.append((f"{ours}.final", f"{theirs}.output_convs", 3 if i == count - 1 else 1))
        for own, published, units in series:
            for j in range(units):
                for kind in ("norm", "conv"):
                    yield from ((f"{own}.{j}.{kind}{k}", f"{published}.{j + 1}_{k}_{kind}") for k in (1, 2))
        parts = [("pooling", "crp")] if i == 0 else [("fusion", "msf"), ("pooling", "crp")]
        for own, published in parts:
            for kind in ("norms", "convs"):
                yield from ((f"{ours}.{own}.{kind}.{j}", f"{theirs}.{published}.{kind}.{j}") for j in (0, 1))
