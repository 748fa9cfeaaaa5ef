"""Configurations: defaults from the tables, files by name and path, overrides, and one-line errors that help."""

import json

import pytest

from scoresde import config as configs
from scoresde.config import ConfigError
from scoresde.data import DATASETS
from scoresde.networks import NETWORKS
from scoresde.objectives import EDM, OBJECTIVES
from scoresde.objectives.times import LogNormalTimes
from scoresde.objectives.weightings import MinSNRWeighting
from sde_lib import SDES, VESDE, VPSDE, Chain
from solvers import GRIDS, SOLVERS, Heun, Karras

SECTIONS = [
    (lambda c: c.sde, SDES),
    (lambda c: c.network, NETWORKS),
    (lambda c: c.data, DATASETS),
    (lambda c: c.objective, OBJECTIVES),
    (lambda c: c.sampling.solver, SOLVERS),
    (lambda c: c.sampling.grid, GRIDS),
]


def test_every_table_entry_has_its_options_and_builds_from_them():
    config = configs.defaults()
    for section_of, table in SECTIONS:
        section = section_of(config)
        assert set(table) < set(section.keys())
        for name in table:
            if table in (NETWORKS, OBJECTIVES) or name == "tabulated":
                continue
            section.name = name
            assert configs.build(table, section, "entry") == table[name]()


def test_options_reach_the_constructors():
    c = configs.override(
        configs.defaults(),
        [
            "--config.sde.name=ve",
            "--config.sde.ve.sigma_max=9.0",
            "--config.sampling.solver.heun.s_churn=3",
            "--config.sampling.grid.name=karras",
            "--config.sampling.grid.karras.rho=5.0",
            "--config.network.unet.channels=8",
            "--config.network.unet.multipliers=(1,1,2)",
            "--config.network.unet.attention=()",
            "--config.model.parameterization=edm",
            "--config.model.sigma_data=0.7",
        ],
    )
    assert configs.make_law(c) == VESDE(sigma_max=9.0)
    assert configs.make_solver(c) == Heun(s_churn=3.0) and configs.make_grid(c) == Karras(rho=5.0)
    assert configs.make_grid(configs.override(configs.defaults(), ["--config.sampling.grid.name="])) is None
    model = configs.make_model(c, configs.make_data(c).spec)
    assert len(model.network.middle) == 2 and model.parameterization.sigma_data == 0.7
    assert model.network.condition.specs["class_label"].classes == 10 and model.law == VESDE(sigma_max=9.0)
    chain = configs.make_law(configs.override(configs.defaults(), ["--config.sde.chain=100"]))
    assert isinstance(chain, Chain) and chain.n == 100
    table = "--config.sde.tabulated.alphas_cumprod=(0.9,0.5,0.1)"
    assert configs.make_law(configs.override(configs.defaults(), ["--config.sde.name=tabulated", table])).t_max == 1.0


@pytest.mark.parametrize("name", [name for name in configs.known() if "/" not in name])
def test_every_shipped_configuration_builds(name):
    """Those of published experiments, which need data of one's own, are in test_published_configs.py."""
    config = configs.load(name)
    assert config.is_locked
    data = configs.make_data(config)
    model = configs.make_model(config, data.spec)
    configs.make_solver(config)
    from scoresde.training.settings import check

    check(config)
    assert model.data_spec == data.spec
    again = configs.load(name, ["--config.training.steps=7"])
    assert configs.differences(config, again) == ["training.steps"]


def test_shipped_configurations_state_only_what_differs():
    defaults = configs.defaults()
    for name in configs.known():
        assert configs.differences(configs.load(name), defaults) or name == "digits_vp"
        text = configs.find(name).read_text()
        assert text.startswith('"""') and "from configs" not in text


ERRORS = [
    ("--config.training.batchsize=3", "Did you mean 'batch_size'"),
    ("--config.sde.vp.beta_mx=3", "Did you mean 'beta_max'"),
    ("--config.training.lr=3", "config.training has no field 'lr'"),
    ("--config.training.weighting=likelihood", r"Did you mean config\.objective\.denoising\.weighting\.name"),
    ("--config.learning_rat=3", r"Did you mean config\.training\.learning_rate"),
    ("--config.training.steps=x", "invalid literal"),
    ("--config.training.steps=1.5", "invalid literal"),
    ("--config.objective.denoising.times.lognormal.men=0", "Did you mean 'mean'"),
    ("--config.objective.denoising.time.name=lognormal", "Did you mean 'times'"),
    ("--config.objective.denoising.times=lognormal", "is a section"),
    ("--config.network.Own.width=3", r"config\.network\.name=module:Own"),
    ("--config.sde=ve", "is a section"),
    ("--config.seed.x=3", "is a value"),
    ("--confg.seed=3", "Unknown argument"),
    ("seed=3", "Unknown argument"),
    ("--seed=3", "Unknown argument"),
]


@pytest.mark.parametrize(("override", "message"), ERRORS)
def test_bad_overrides_are_one_line_with_a_suggestion(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        configs.override(configs.defaults(), [override])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_the_objective_and_its_sections_reach_the_constructors():
    """Names and options two levels deep; the chosen ones alone are stored, and read again."""
    c = configs.override(
        configs.load("toy_ring"),
        [
            "--config.objective.name=edm",
            "--config.objective.edm.times.lognormal.mean=-0.4",
            "--config.objective.edm.weighting.name=min_snr",
            "--config.objective.edm.weighting.min_snr.gamma=3",
            "--config.objective.edm.uncertainty=True",
            "--config.objective.denoising.metric.name=l1",
        ],
    )
    spec = configs.make_data(c).spec
    found = configs.make_objective(c, configs.make_model(c, spec))
    assert type(found) is EDM and found.times == LogNormalTimes(mean=-0.4) and found.uncertainty is not None
    assert isinstance(found.weighting, MinSNRWeighting) and found.weighting.gamma == 3.0
    stored = configs.to_dict(c)["objective"]
    assert set(stored) == {"name", "edm"} and set(stored["edm"]["weighting"]) == {"name", "min_snr"}
    back = configs.from_dict(configs.to_dict(c))
    assert configs.differences(c, back) == [] and configs.to_dict(back) == configs.to_dict(c)
    other = configs.override(back, ["--config.objective.edm.weighting.min_snr.gamma=4"])
    assert configs.differences(c, other) == ["objective.edm.weighting.min_snr.gamma"]


def test_booleans_floats_and_infinities():
    arguments = ["--noconfig.training.tensorboard", "--config.training.cpu=True", "--config.training.clip=2"]
    arguments.append("--config.sampling.solver.heun.s_max=inf")
    c = configs.override(configs.defaults(), arguments)
    assert c.training.tensorboard is False and c.training.cpu is True and c.training.clip == 2.0
    assert isinstance(c.training.clip, float) and c.sampling.solver.heun.s_max == float("inf")


def test_json_round_trip(tmp_path):
    c = configs.override(
        configs.defaults(),
        ["--config.network.unet.multipliers=(1,2,3)", "--config.training.max_seconds=10", "--config.sde.chain=5"],
    )
    configs.save(c, tmp_path / "c.json")
    stored = json.loads((tmp_path / "c.json").read_text(), parse_constant=pytest.fail)  # strict JSON: no Infinity
    assert set(stored["network"]) == {"name", "unet"} and set(stored["sde"]) == {"name", "vp", "chain"}
    assert set(stored["sampling"]["grid"]) == {"name", "blended"}  # of a table only what is chosen
    back = configs.load(str(tmp_path / "c.json"))
    assert dict(configs.flatten(back)) == dict(configs.flatten(c)) and back.is_locked
    assert back.network.unet.multipliers == (1, 2, 3) and [p.name for p in tmp_path.iterdir()] == ["c.json"]
    for text, message in (
        ('{"sdee": {}}', "Did you mean 'sde'"),
        ('{"seed": "x"}', "config.seed"),
        ('{"sde": 3}', "section"),
        ("{", "Cannot read"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            configs.load(str(tmp_path / "bad.json"))


def test_files_of_the_user(tmp_path):
    def written(body):
        path = tmp_path / "mine.py"
        path.write_text(f"from scoresde.config import defaults\n\ndef get_config():\n    c = defaults()\n{body}\n")
        return str(path)

    c = configs.load(written("    c.seed = 7\n    return c"), ["--config.training.steps=9"])
    assert (c.seed, c.training.steps) == (7, 9)
    for body, message in (
        ("    c.training.batchsize = 3\n    return c", "no field 'batchsize'. Did you mean 'batch_size'"),
        ("    c.seed = 'x'\n    return c", "TypeError"),
        ("    return 3", "must return a ConfigDict"),
        ("    return c.nothing", "mine.py"),
        ("    import nowhere_at_all", "nowhere_at_all"),
        ("    return (", "SyntaxError"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            configs.load(written(body))
        assert "\n" not in str(caught.value)


def test_unknown_names_list_the_close_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"Did you mean 'digits_vp'"):
        configs.load("digit_vp")
    with pytest.raises(ConfigError, match="digits_ve"):
        configs.load(str(tmp_path / "none.py"))
    for name in ("digits_vp", "digits_vp.py"):
        assert configs.find(name).name == "digits_vp.py"


def test_differences_ignore_options_that_are_not_used():
    a = configs.defaults()
    b = configs.override(configs.defaults(), ["--config.sde.ve.sigma_max=3", "--config.sampling.solver.ddim.eta=1"])
    assert configs.differences(a, b) == []
    b.sde.name = "ve"
    assert configs.differences(a, b) == ["sde.name", "sde.ve.sigma_max"]


def test_constructor_refusals_become_configuration_errors():
    bad = configs.override(configs.defaults(), ["--config.sde.vp.beta_min=-1"])
    with pytest.raises(ConfigError, match="beta_min"):
        configs.make_law(bad)
    with pytest.raises(ConfigError, match="alphas_cumprod"):
        configs.make_law(configs.override(configs.defaults(), ["--config.sde.name=tabulated"]))
    assert configs.make_law(configs.defaults()) == VPSDE()
