"""Classes of one's own by command line: a module that --import names, its options as fields, saved and read again."""

import json
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from scoresde import config as configs
from scoresde import load_model
from scoresde.cli import main
from scoresde.comparison.specs import Entry, parse_spec
from scoresde.config import ConfigError
from sde_lib import SDES, Table, build, lookup
from solvers import DDIM, Ancestral, Karras

MODULE = '''
import torch
from torch import nn

from scoresde.codecs import Codec
from scoresde.data import ConditionSpec, Dataset, DataSpec, Source, Split, classes
from scoresde.models import ScoreModel
from scoresde.objectives import TIMES, Objective
from scoresde.objectives.clocks import Times


class OwnNet(nn.Module):
    def __init__(self, shape, conditions=None, width: int = 8, scale: float = 1):
        super().__init__()
        self.scale = scale
        self.layers = nn.Sequential(nn.Linear(shape[0] + 1, width), nn.SiLU(), nn.Linear(width, shape[0]))

    def forward(self, x, noise_level, *, class_label=None):
        level = noise_level.reshape(-1, 1)
        return self.scale * self.layers(torch.cat([x, level.expand(len(x), 1)], 1))


class Careful(ScoreModel):
    """A kind of model."""


class Halves(Codec):
    def __init__(self, data_shape, factor: float = 2.0):
        super().__init__(data_shape, data_shape)
        self.factor = factor

    @classmethod
    def fit(cls, spec, data, factor: float = 2.0):
        return cls(spec.shape, factor)

    def encode(self, z, draw=None):
        return z / self.factor

    def decode(self, x):
        return x * self.factor

    def config(self):
        return {"data_shape": list(self.data_shape), "factor": self.factor}


class Wide(Times):
    def __init__(self, power: float = 1.0):
        self.power = power

    def clock(self, knot):
        return knot.t ** self.power

    def rate(self, knot):
        return self.power * knot.t ** (self.power - 1.0)

    def time_at(self, law, clock):
        return clock ** (1.0 / self.power)


class Robust(Objective):
    """A generator of points on a circle, no score at all: two parts, two phases."""

    tables = {"times": TIMES}
    phases = {"radius": ("radius",), "train": ("model",)}

    def __init__(self, model, times="uniform", weight: float = 1.0):
        super().__init__()
        self.model, self.times, self.weight = model, times, weight
        self.radius = nn.Linear(1, 1)

    def forward(self, phase, batch, at):
        if phase == "radius":
            size = batch.data.norm(dim=1, keepdim=True)
            return (self.radius(torch.ones_like(size)) - size).square().mean(1)
        u = at.streams.uniform("times", dtype=torch.float64)
        knot = self.model.law.knot(self.times.on(self.model.law).draw(u), ndim=2)
        noise = at.streams.normal("noise", batch.data.shape[1:])
        x = knot.alpha.float() * batch.data + knot.sigma.float() * noise
        return self.weight * (self.model.predict(x, knot, **batch.condition).noise - noise).abs().mean(1)


class Told(Source):
    """Points with a vector and with words of which some are missing."""

    def load(self):
        x, mask = torch.linspace(-1.0, 1.0, 24).reshape(12, 2), torch.arange(12).reshape(12, 1) > torch.arange(3)
        told = {"at": x.flip(1), "text": {"tokens": torch.arange(36).reshape(12, 3) % 5, "mask": mask}}
        specs = {"at": ConditionSpec("vector", (2,)), "text": ConditionSpec("tokens", (3,), classes=5)}
        everything = Split(x, told)
        train, held_out = everything.rows(slice(8)), everything.rows(slice(8, None))
        return Dataset("told", train, held_out, DataSpec((2,), conditions=specs))


class Line(Source):
    """Points on a line, with where they are as a condition."""

    def __init__(self, n: int = 30, slope: float = 1.0):
        self.n, self.slope = n, slope

    def load(self):
        at = torch.linspace(-1.0, 1.0, self.n)
        everything = Split(torch.stack([at, self.slope * at], 1), {"class_label": (at > 0).long()})
        return Dataset("line", everything.rows(slice(0, None, 2)), everything.rows(slice(1, None, 2)),
                       DataSpec((2,), conditions=classes(2)))
'''
TINY = ["--config.training.steps=2", "--config.training.batch_size=8", "--config.training.sample_every=0"]
TINY += ["--config.training.tensorboard=False", "--config.training.cpu=True"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module of one's own in the current folder, which is forgotten again."""
    (tmp_path / "own_module_of_tests.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield "own_module_of_tests"
    sys.modules.pop("own_module_of_tests", None)
    assert str(tmp_path) not in sys.path


def test_an_own_network_trains_is_saved_and_read_again_and_needs_its_import(module, tmp_path, capsys):
    name = f"--config.network.name={module}:OwnNet"
    call = ["train", "--config=toy_ring", "--workdir=run", *TINY, name]
    options = ["--config.network.OwnNet.scale=0.5", "--config.network.OwnNet.width=5"]
    assert main([*call, *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--import own_module_of_tests" in error and not (tmp_path / "run").exists()
    assert main([*call, *options, f"--import={module}"]) == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["network"]
    assert stored == {"name": f"{module}:OwnNet", "OwnNet": {"width": 5, "scale": 0.5}}
    network = load_model(tmp_path / "run").network
    assert type(network).__name__ == "OwnNet" and network.scale == 0.5 and network.layers[0].out_features == 5

    again = ["sample", "--workdir=run", "--out=a.npy", "--config.sampling.n=3", "--config.sampling.steps=2"]
    sys.modules.pop(module)
    capsys.readouterr()
    for command in (again, ["train", "--config=run/config.json", "--workdir=run"]):
        assert main(command) == 2  # a file does not import anything
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--import own_module_of_tests" in error and module not in sys.modules
    assert main([*again, "--import", module]) == 0 and np.load("a.npy").shape == (3, 2)


def test_own_data_an_own_codec_and_an_own_kind_of_model_train_and_are_read_again(module, tmp_path, capsys):
    names, kind = {"data": "Line", "codec": "Halves"}, f"--config.model.kind={module}:Careful"
    call = ["train", "--config=toy_ring", "--workdir=run", *TINY, "--import", module]
    call += [f"--config.{section}.name={module}:{name}" for section, name in names.items()]
    assert main([*call, "--config.data.Line.slope=3", "--config.codec.Halves.factor=4", kind]) == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["data"] == {"name": f"{module}:Line", "Line": {"n": 30, "slope": 3.0}, "shape": None}
    model = load_model(tmp_path / "run")
    assert type(model).__name__ == "Careful" and model.codec.factor == 4.0 and model.data_spec.num_classes == 2
    assert model.encode(torch.full((1, 2), 2.0)).tolist() == [[0.5, 0.5]]
    call = ["sample", "--workdir=run", "--out=a.npz", "--config.sampling.n=3", "--config.sampling.steps=2"]
    assert main([*call, "--class=1", f"--import={module}"]) == 0
    with np.load("a.npz") as file:
        assert file["data"].shape == (3, 2) and file["labels"].tolist() == [1, 1, 1]
    capsys.readouterr()
    sys.modules.pop(module)
    assert main(call) == 2 and f"--import {module}" in capsys.readouterr().err


def test_vectors_and_tokens_go_from_the_data_to_every_command(module, tmp_path, capsys):
    """Training drops them; sampling, scores and comparisons take them from files or from the data, or go without."""
    own = ["--import", module]
    call = ["train", "--config=toy_ring", "--workdir=run", *TINY, *own, f"--config.data.name={module}:Told"]
    assert main([*call, "--config.training.condition_dropout=at:0.5,text:0.2"]) == 0
    np.save("at.npy", np.array([0.5, -0.5]))
    np.savez("text.npz", tokens=np.array([[1, 2], [3, 4], [0, 1]]), mask=np.array([[1, 1], [1, 0], [0, 0]], dtype=bool))
    told = ["--condition.at=at.npy", "--condition.text", "text.npz"]
    few = ["--workdir=run", "--config.sampling.steps=2", "--config.likelihood.steps=4", *own]
    assert main(["sample", *few, "--n=3", "--out=a.npz", "--guidance=2", *told]) == 0
    with np.load("a.npz") as file:
        assert file["at"].tolist() == 3 * [[0.5, -0.5]] and file["text.tokens"].shape == (3, 3)
        assert file["text.mask"].sum(1).tolist() == [2, 1, 0]
    assert main(["sample", *few, "--n=4", "--out=b.npz", *told]) == 2
    assert "(4, 2), a value for each of the 4 samples" in capsys.readouterr().err
    assert main(["likelihood", *few, "--n=3", "--given=text", told[0]]) == 0
    assert np.isfinite(json.loads((tmp_path / "run" / "likelihood" / "likelihood.json").read_text())["mean"])
    compared = ["compare", *few, "--solvers=ddim", "--nfe=4", "--n=3", "--repetitions=1", "--guidance=2"]
    assert main([*compared, *told]) == 0
    assert main(compared) == 2 and "needs a condition" in capsys.readouterr().err


def test_an_own_objective_of_two_phases_with_own_times_trains_and_goes_on(module, tmp_path, capsys):
    call = ["train", "--config=toy_ring", "--workdir=run", *TINY, f"--config.objective.name={module}:Robust"]
    call += [f"--config.objective.Robust.times.name={module}:Wide", "--config.objective.Robust.weight=0.5"]
    call += ["--config.objective.Robust.times.Wide.power=2"]
    assert main([*call, "--import", module]) == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["objective"]
    times = {"name": f"{module}:Wide", "Wide": {"power": 2.0}}
    assert stored == {"name": f"{module}:Robust", "Robust": {"times": times, "weight": 0.5}}
    again = ["train", "--config=run/config.json", "--workdir=run"]
    sys.modules.pop(module)
    capsys.readouterr()
    assert main(again) == 2 and f"--import {module}" in capsys.readouterr().err
    assert main([*again, "--import", module]) == 0 and "2 steps" in capsys.readouterr().out
    assert type(load_model(tmp_path / "run")).__name__ == "ScoreModel"  # what was trained needs no module of one's own


def test_own_classes_in_a_configuration_file_and_by_use(module, tmp_path):
    (tmp_path / "mine.py").write_text(
        f"from scoresde.config import defaults, use\nimport {module}\n\n\ndef get_config():\n    c = defaults()\n"
        f"    use(c, 'network', {module}.OwnNet, width=4)\n    return c\n"
    )
    sys.path.append(str(tmp_path))
    try:
        config = configs.load("mine.py", ["--config.network.OwnNet.scale=2"])
    finally:
        sys.path.remove(str(tmp_path))
    assert config.network.OwnNet.width == 4 and config.network.OwnNet.scale == 2.0
    again = configs.from_dict(configs.to_dict(config))
    assert configs.differences(config, again) == [] and again.network.OwnNet.width == 4
    differ = ["network.OwnNet.scale", "network.OwnNet.width", "network.name"]
    assert configs.differences(config, configs.defaults()) == differ
    configs.use(config, "sampling.solver", "ddim", eta=0.5)
    assert configs.make_solver(config).eta == 0.5
    configs.use(config, "sampling.solver", Ancestral)
    assert config.sampling.solver.name == "ancestral"
    with pytest.raises(ConfigError, match="Did you mean 'eta'"):
        configs.use(config, "sampling.solver", "ddim", et=0.5)
    with pytest.raises(ConfigError, match="no field 'netwrk'"):
        configs.use(config, "netwrk", "mlp")


@dataclass(frozen=True)
class Calm(DDIM):
    """A solver of one's own."""

    calm: float = 1.0


def test_own_solvers_are_sampled_with_and_compared_by_name():
    name = f"{__name__}:Calm"
    fields = [f"--config.sampling.solver.{field}" for field in (f"name={name}", "Calm.calm=3", "Calm.eta=0.5")]
    assert configs.make_solver(configs.override(configs.defaults(), fields)) == Calm(eta=0.5, calm=3.0)
    assert parse_spec(f"{name}(calm=2.0)@karras(rho=5)") == Entry(
        f"{name}(calm=2.0)@karras(rho=5)", Calm(calm=2.0), Karras(rho=5), False
    )
    assert parse_spec(name).solver == Calm()
    for text, message in (
        (f"{__name__}:Calmer", "Did you mean 'Calm'"),
        ("nowhere:Calm(calm=1)", "import nowhere first"),
        (f"{name}(clam=1)", "Did you mean 'calm'"),
        (f"{name}(", "Cannot read the solver"),
        ("a b:c", "must be a name of the table, or module:Class"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_spec(text)


class Small(nn.Module):
    """Of the tests."""


class unet(nn.Module):
    """Called like an entry of the table."""


def refusals():
    return [
        ("nowhere_at_all:Net", "import nowhere_at_all first, or give --import nowhere_at_all"),
        (f"{__name__}:Smal", "Did you mean 'Small'"),
        (f"{__name__}:refusals", "it has to be a subclass of torch.nn"),
        ("subprocess:Popen", "it has to be a subclass of torch.nn"),
        ("os:system", "it has to be a subclass of torch.nn"),
        (f"{__name__}:unet", "rename the class"),
        (f"{__name__}:", "module:Class"),
    ]


@pytest.mark.parametrize(("name", "message"), refusals())
def test_what_a_name_may_not_be(name, message):
    """A file that names a function or another class of a module that is there must not get it called."""
    with pytest.raises(ConfigError, match=message) as caught:
        configs.from_dict({"network": {"name": name}})
    assert "\n" not in str(caught.value)


class Inner:
    """An entry of a table of values."""

    def __init__(self, value: float = 1.0):
        self.value = value


class Other(Inner):
    """Another one."""


INNER = Table(Inner, {"inner": Inner, "other": Other})


class Odd(Inner):
    """In no table."""


SEVEN, ODD = Inner(7.0), Odd()


class Outer:
    """An entry whose options are entries of a table themselves."""

    tables = {"times": INNER, "second": INNER, "third": INNER, "fourth": INNER}  # noqa: RUF012

    def __init__(self, times: Inner | str = "inner", second: Inner | None = None, third=SEVEN, fourth=ODD, n: int = 3):
        self.times, self.second, self.third, self.fourth, self.n = times, second, third, fourth, n


def test_build_recurses_into_the_tables_of_a_class():
    table = Table(Outer, {"outer": Outer})
    inner = {"name": "other", "other": {"value": 4.0}}
    built = build(table, {"name": "outer", "outer": {"times": inner, "second": {"name": ""}}}, "thing")
    assert type(built.times) is Other and built.times.value == 4.0 and built.second is None
    own = build(table, {"name": f"{__name__}:Outer", "Outer": {"times": {"name": f"{__name__}:Other"}}}, "thing")
    assert type(own.times) is Other and own.n == 3
    given = build(table, {"name": "outer"}, "thing", times=Inner(7.0))
    assert given.times.value == 7.0
    with pytest.raises(ValueError, match=r"thing\.times 'inner' has no option 'valu'.*Did you mean 'value'"):
        build(table, {"name": "outer", "outer": {"times": {"name": "inner", "inner": {"valu": 3}}}}, "thing")
    with pytest.raises(ValueError, match=r"Unknown thing\.times 'oter'.*Did you mean 'other'"):
        build(table, {"name": "outer", "outer": {"times": {"name": "oter"}}}, "thing")
    assert lookup(SDES, "vp", "sde") is SDES["vp"]


def test_sections_in_sections(monkeypatch):
    """Their names and options are fields; those of entries that are not named are not stored."""
    from scoresde.config import sections

    place = sections.Place(Table(Outer, {"outer": Outer}), "thing", "outer")
    monkeypatch.setattr(sections, "places", lambda: {"thing": place})
    config = configs.defaults()
    with config.unlocked():
        config.thing = place.section()
    config.lock()
    assert config.thing.outer.times.name == "inner" and config.thing.outer.second.name == ""
    changed = configs.override(
        config,
        [
            f"--config.thing.outer.times.name={__name__}:Other",
            "--config.thing.outer.times.Other.value=2",
            "--config.thing.outer.second.other.value=9",
            "--config.thing.outer.n=5",
        ],
    )
    built = configs.build(place.table, changed.thing, "thing")
    assert type(built.times) is Other and built.times.value == 2.0 and built.second is None and built.n == 5
    assert built.third.value == 7.0 and built.fourth is ODD  # objects as defaults: what they say, or themselves
    stored = configs.to_dict(changed)["thing"]
    inner = {"times": {"name": f"{__name__}:Other", "Other": {"value": 2.0}}, "second": {"name": ""}}
    inner |= {"third": {"name": "inner", "inner": {"value": 7.0}}, "fourth": {"name": ""}}
    assert stored == {"name": "outer", "outer": {**inner, "n": 5}}
    with pytest.raises(ConfigError, match="Did you mean 'times'"):
        configs.override(config, ["--config.thing.outer.time.name=inner"])
