"""The command `scoresde`. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_EPILOG = """\
Any field of the configuration can be set: --config.training.batch_size=64 --config.sde.name=ve.
`scoresde configs` lists the shipped configurations; `scoresde COMMAND --help` explains a command.
"""


class _Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The command line, without the `--config.…` overrides, which go to ml_collections."""
    shape: Any = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": _EPILOG}
    top = _Parser(prog="scoresde", description="Score-based generative models in continuous time.", **shape)
    top.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace, list[str]], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, **shape)
        added.set_defaults(run=run)
        return added

    p = command("train", _train, "Train a model, or continue a run.")
    p.add_argument("--config", required=True, metavar="NAME", help="shipped configuration, or a .py or .json file")
    p.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run; continued if it holds one")
    p.add_argument("--no-resume", action="store_true", help="refuse a folder that holds a run")

    p = command("sample", _sample, "Draw samples from a trained model.")
    _from_run(p)
    p.add_argument("--out", metavar="FILE", help=".png, .npy or .npz (default: samples.png in the run, or here)")
    p.add_argument("--solver", metavar="NAME", help="solver (sampling.solver.name)")
    p.add_argument("--steps", type=int, metavar="N", help="number of steps (sampling.steps)")
    p.add_argument("--nfe", type=int, metavar="N", help="budget of network calls per sample, instead of --steps")
    p.add_argument("--n", type=int, metavar="N", help="number of samples (sampling.n)")
    p.add_argument("--seed", type=int, metavar="N", help="noise (sampling.seed)")
    p.add_argument("--class", dest="class_label", metavar="C", help="class of the samples: a number, or `all` in turn")
    p.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance scale (sampling.guidance)")

    p = command("likelihood", _likelihood, "Score held-out data under a trained model, in bits/dim.")
    _from_run(p)
    p.add_argument("--n", type=int, metavar="N", help="number of held-out samples (likelihood.n; default: all)")
    p.add_argument("--seed", type=int, metavar="N", help="noise (likelihood.seed)")
    p.add_argument("--given-class", action="store_true", help="condition on the classes: log p(x | class)")
    p.add_argument("--elbo", action="store_true", help="the variational bound, too (on a chain it is the only figure)")
    p.add_argument("--convergence", action="store_true", help="how 8 samples settle with steps and with probes, too")
    p.add_argument("--out", metavar="DIR", help="folder of the results (default: `likelihood` in the run, or here)")
    p.add_argument("--restart", action="store_true", help="score anew what the folder holds already")

    p = command("compare", _compare, "Compare solvers on a trained model, or on a toy whose score is known exactly.")
    _from_run(p, required=False)
    p.add_argument("--solvers", required=True, metavar="LIST", help=_SOLVERS)
    p.add_argument("--nfe", default="5,10,20,50", metavar="LIST", help="budgets of network calls (default: 5,10,20,50)")
    p.add_argument("--rtol", default="1e-1,1e-2,1e-3", metavar="LIST", help="tolerances of adaptive solvers")
    p.add_argument("--grid", metavar="GRID", help=_GRID)
    p.add_argument("--n", type=int, default=256, metavar="N", help="samples per repetition (default: 256)")
    p.add_argument("--batch-size", type=int, metavar="N", help="samples at a time (default: all)")
    p.add_argument("--repetitions", type=int, default=3, metavar="N", help="with other noise each (default: 3)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="starts and noise")
    p.add_argument("--float64", action="store_true", help="double precision states (networks stay as they are)")
    p.add_argument("--class", dest="class_label", metavar="C", help="class of the samples: a number, or `all` in turn")
    p.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance scale; needs --class")
    p.add_argument("--metrics", metavar="LIST", help="distances between samples (default: all)")
    p.add_argument("--features", metavar="NAME", help=_FEATURES)
    p.add_argument("--out", metavar="DIR", help="where results go (default: compare in the run, or here)")
    p.add_argument("--restart", action="store_true", help="start anew instead of going on with what DIR holds")

    p = command("demo", _demo, "Train on handwritten digits, then sample, compare solvers and score held-out data.")
    p.add_argument("--config", default="digits_vp", metavar="NAME", help="configuration (default: digits_vp)")
    p.add_argument("--workdir", default="runs/demo", metavar="DIR", help="where results go (default: runs/demo)")

    p = command("convert", _convert, "Write a published checkpoint as one file of this library's own format.")
    p.add_argument("source", metavar="SOURCE", help="checkpoint file or folder; of EDM also its network pickles")
    p.add_argument("out", metavar="OUT.safetensors", help="file to write")
    p.add_argument("--config", metavar="NAME", help="experiment of a score_sde_pytorch checkpoint")
    p.add_argument("--preconditioning", metavar="KIND", help="of an EDM state dict: edm, vp, ve or iddpm")
    p.add_argument("--size", type=int, metavar="N", help="side of the images, where the checkpoint does not say it")
    p.add_argument("--raw-weights", action="store_true", help="last weights instead of averaged ones")
    p.add_argument("--continuous", action="store_true", help="the SDE through the levels of a discrete chain")

    command("configs", _configs, "List the shipped configurations.")
    return top


_SOLVERS = (
    "comma-separated names with options and grids: heun,dpmpp_3m@uniform_half_log_snr,ddim(eta=0.5)@karras(rho=5); "
    "`recommended` is the best measured one for each budget"
)


_GRID = "grid of solvers without one of their own (default: blended; on a chain, its levels)"
_FEATURES = "of the Fréchet distance: identity, random_relu, or your own function as package.module:function"


def _from_run(p: argparse.ArgumentParser, required: bool = True) -> None:
    source = p.add_mutually_exclusive_group(required=required)
    source.add_argument("--workdir", metavar="DIR", help="folder of a run: its newest checkpoint")
    source.add_argument("--checkpoint", metavar="PATH", help="a checkpoint folder, or a .safetensors file")
    p.add_argument("--config", metavar="NAME", help="configuration (default: the one of the run)")
    p.add_argument("--raw-weights", action="store_true", help="last weights instead of averaged ones")
    p.add_argument("--device", default=None, metavar="DEV", help="cpu, cuda, … (default: cuda if there is one)")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, 2 for a mistake of the user, 1 for what should not happen, 130 after
    Ctrl-C; training that was ended by another signal exits with 128 + its number."""
    arguments, rest = parser().parse_known_args(argv)
    named = f"scoresde {arguments.command}"
    try:
        if _processes() > 1 and arguments.command not in ("train", "likelihood"):
            raise ValueError("this command runs in one process: start it without torchrun.")
        arguments.run(arguments, _joined(rest))
    except KeyboardInterrupt:
        print(f"{named}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.traceback:
            raise
        text = " ".join(str(error).split())
        # what the library raises for bad input
        if isinstance(error, ArithmeticError | ImportError | OSError | TypeError | ValueError):
            print(f"{named}: error: {text}", file=sys.stderr)
            return 2
        print(f"{named}: {type(error).__name__}: {text[:400]} (`scoresde --traceback` shows where)", file=sys.stderr)
        return 1
    return 0


def _processes() -> int:
    """How many processes torchrun started, 1 without it."""
    count = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    return int(count) if count.isdigit() else 1


def _joined(rest: list[str]) -> list[str]:
    """``--config.a 1`` as ``--config.a=1``."""
    joined: list[str] = []
    for word in rest:
        if joined and joined[-1].startswith("--config.") and "=" not in joined[-1] and not word.startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _train(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from scoresde import config
    from scoresde.training import train

    settings = config.load(arguments.config, overrides)
    result = train(settings, arguments.workdir, resume=not arguments.no_resume)
    print(f"{result.step} steps in {result.seconds:.0f} s; checkpoints in {Path(arguments.workdir) / 'checkpoints'}")


def _run(arguments: argparse.Namespace, overrides: list[str]) -> tuple[ConfigDict, Any, Path]:
    """Configuration and model of a trained run, and the model's file."""
    import torch

    from scoresde import config
    from scoresde.storage import find_model, load_model

    ema = not arguments.raw_weights
    source = arguments.checkpoint or arguments.workdir
    file = find_model(source, ema)
    saved = next((p for p in (file.parent / "config.json", *_above(file)) if p.is_file()), None)
    if arguments.config:
        settings = config.load(arguments.config, overrides)
    else:
        settings = config.override(config.restore(saved) if saved else config.defaults(), overrides)
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # one for every process that torchrun starts
    device = arguments.device or (own if torch.cuda.is_available() else "cpu")
    model = load_model(file, device=device)
    if model.data_spec is None:
        raise ValueError(f"The model in {file} has no data specification, so its samples have no shape.")
    return settings, model, file


def _above(file: Path) -> list[Path]:
    """config.json of the run that a checkpoint folder lies in: workdir/checkpoints/step_…/ema.safetensors."""
    return [file.resolve().parents[2] / "config.json"] if len(file.resolve().parents) > 2 else []


def _sample(arguments: argparse.Namespace, overrides: list[str]) -> None:
    import numpy as np
    import torch

    from scoresde.images import picture, save_png
    from scoresde.training import draw_samples

    settings, model, file = _run(arguments, overrides)
    s = settings.sampling
    for name in ("steps", "nfe", "n", "seed", "guidance"):
        if getattr(arguments, name) is not None:
            s[name] = getattr(arguments, name)
    if arguments.steps is not None and arguments.nfe is not None:
        raise ValueError("Give --steps or --nfe, not both.")
    if arguments.steps is not None:
        s.nfe = None
    if arguments.solver is not None:
        s.solver.name = arguments.solver
    spec = model.data_spec
    out = Path(arguments.out or Path(arguments.workdir or ".") / "samples.png")
    if out.suffix not in (".png", ".npy", ".npz"):
        raise ValueError(f"--out must end in .png, .npy or .npz, got {out.name!r}.")
    if out.suffix == ".png" and picture(torch.zeros(1, *spec.shape), spec) is None:
        raise ValueError(f"Samples of shape {tuple(spec.shape)} have no picture: use --out=samples.npy.")
    labels = _class_labels(arguments.class_label, s.n, spec.num_classes)
    samples = draw_samples(model, settings, class_label=labels, progress=None)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        image = picture(samples.data, spec)
        if image is not None:
            save_png(image, out)
    elif out.suffix == ".npy":
        np.save(out, samples.data.numpy())
    else:
        arrays: dict[str, Any] = {"data": samples.data.numpy()}
        if labels is not None:
            arrays["labels"] = torch.as_tensor(labels).expand(s.n).numpy()
        np.savez(out, **arrays)
    print(
        f"{s.n} samples by {s.solver.name}, {samples.nfe.double().mean():.4g} network calls each, "
        f"{samples.seconds:.1f} s, from {file}: {out}"
    )


def _class_labels(text: str | None, n: int, classes: int) -> Any:
    if text is None:
        return None
    import torch

    if text == "all":
        if not classes:
            raise ValueError("This model was trained without classes.")
        return torch.arange(n) % classes
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--class must be a number or `all`, got {text!r}.") from None


def _likelihood(arguments: argparse.Namespace, overrides: list[str]) -> None:
    import json

    from scoresde import config
    from scoresde.likelihood import bits_per_dim, elbo_of_data
    from scoresde.likelihood.pictures import budget, convergence, histogram
    from scoresde.storage.files import write_whole
    from sde_lib import Chain

    settings, model, _ = _run(arguments, overrides)
    options = {k: v for k, v in settings.likelihood.items() if v is not None}
    for name in ("n", "seed"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    n = options.pop("n", None)
    held_out = config.make_data(settings).held_out
    if n is not None and not 1 <= n <= len(held_out):
        raise ValueError(f"likelihood.n must be in 1 … {len(held_out)} (the held-out samples), got {n}.")
    data, labels = held_out.data[:n], None
    if arguments.given_class:
        if held_out.labels is None:
            raise ValueError("--given-class needs data with classes.")
        labels = held_out.labels[:n]
    out = Path(arguments.out or Path(arguments.workdir or ".") / "likelihood")
    summary: dict[str, Any] = {}
    pictures: dict[str, Callable[[Path], object]] = {}
    with _process_group() as first:
        if not isinstance(model.law, Chain):
            result = bits_per_dim(
                model, data, labels=labels, path=out / "likelihood.csv", resume=not arguments.restart, **options
            )
        if not first:
            return
        if not isinstance(model.law, Chain):
            print(f"{len(data)} held-out samples: {result}")
            summary = result.summary()
            pictures["likelihood.png"] = lambda path: histogram(result, path)
            pictures["budget.png"] = lambda path: budget(result, path)
            if arguments.convergence:
                condition = {} if labels is None else {"class_label": labels[:8].to(model.device)}
                x = model.data_spec.encode(data[:8]).to(model.device, model.dtype)
                settled = convergence(model.reverse(condition), x, seed=options["seed"], sigma_data=model.sigma_data)
                print(settled.table())
                summary["convergence"] = vars(settled)
                pictures["convergence.png"] = settled.plot
        if arguments.elbo or isinstance(model.law, Chain):
            bound = elbo_of_data(model, data, labels=labels, seed=options["seed"], batch_size=options["batch_size"])
            print(f"{len(data)} held-out samples: {bound}")
            summary["elbo"] = bound.summary()
        write_whole(out / "likelihood.json", json.dumps(summary, indent=1) + "\n")
        written = ["likelihood.json", *(["likelihood.csv"] if pictures else []), *_drawn(pictures, out)]
        print(f"written to {out}: {', '.join(written)}")


@contextmanager
def _process_group() -> Iterator[bool]:
    """The processes that torchrun started, if it did, as one group; gives whether this is the first of them."""
    import torch

    d = torch.distributed
    if _processes() == 1 or d.is_initialized():
        yield not d.is_initialized() or d.get_rank() == 0
        return
    d.init_process_group("gloo")  # rows of figures are exchanged: they lie on the CPU
    try:
        yield d.get_rank() == 0
    finally:
        d.destroy_process_group()


def _drawn(pictures: Mapping[str, Callable[[Path], object]], out: Path) -> list[str]:
    """Names of the pictures that could be drawn into a folder; the others cost a line each, not the figures."""
    written = []
    for name, draw in pictures.items():
        try:
            draw(out / name)
            written.append(name)
        except Exception as error:
            print(f"no {name}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    return written


def _compare(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from scoresde.comparison import compare
    from scoresde.comparison.specs import parse_grid

    trained = arguments.workdir or arguments.checkpoint
    problem, options = (_trained if trained else _toy)(arguments, overrides)
    out = Path(arguments.out or Path(arguments.workdir or ".") / "compare")
    result = compare(
        problem,
        arguments.solvers,
        nfe=_numbers("--nfe", arguments.nfe, int),
        rtol=_numbers("--rtol", arguments.rtol, float),
        grid=None if arguments.grid is None else parse_grid(arguments.grid),
        n=arguments.n,
        repetitions=arguments.repetitions,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        metrics=None if arguments.metrics is None else arguments.metrics.split(","),
        features=_features(arguments.features),
        path=out,
        resume=not arguments.restart,
        **options,
    )
    result.to_csv(out / "compare.csv")
    result.to_json(out / "compare.json")
    print(result.table())
    drawn = _drawn({"compare.png": result.plot, "samples.png": result.sheet}, out)
    print(f"{', '.join(['compare.csv', 'compare.json', *drawn])} in {out}")


def _trained(arguments: argparse.Namespace, overrides: list[str]) -> tuple[Any, dict[str, Any]]:
    """A trained model, perhaps under a class and guidance, and what its samples should be like."""
    import torch

    from scoresde import config
    from scoresde.guidance import ClassifierFreeGuidance
    from scoresde.training.samples import _labels

    settings, model, _ = _run(arguments, overrides)
    spec, data = model.data_spec, config.make_data(settings)
    held_out, train = data.held_out.data, data.train.data
    options: dict[str, Any] = {"dtype": torch.float64 if arguments.float64 else torch.float32}
    label = _class_labels(arguments.class_label, arguments.n, spec.num_classes)
    if label is None:
        if arguments.guidance is not None:
            raise ValueError("--guidance needs a class to guide to: give --class too.")
        return model, {**options, "samples": held_out, "floor": train}
    labels = _labels(label, arguments.n, spec.num_classes)
    assert labels is not None
    problem = model.reverse({"class_label": labels.to(model.device)})
    if arguments.guidance is not None:
        problem = ClassifierFreeGuidance(problem, arguments.guidance)
    if isinstance(label, int) and data.held_out.labels is not None and data.train.labels is not None:
        held_out, train = held_out[data.held_out.labels == label], train[data.train.labels == label]
    options |= {"shape": spec.shape, "decode": spec.decode, "device": model.device}
    return problem, {**options, "samples": held_out, "floor": train}


def _toy(arguments: argparse.Namespace, overrides: list[str]) -> tuple[Any, dict[str, Any]]:
    """A density whose score is known, in double precision."""
    import torch

    from scoresde import config
    from scoresde.storage import usable_device

    if arguments.config is None:
        raise ValueError("Give a trained model (--workdir or --checkpoint), or --config of a toy with a known density.")
    if arguments.class_label is not None or arguments.guidance is not None:
        raise ValueError("--class and --guidance are for trained models (--workdir or --checkpoint).")
    problem, shape, draw = config.make_exact(config.load(arguments.config, overrides))
    device = usable_device(arguments.device or "cpu")
    return problem, {"shape": shape, "samples": draw, "dtype": torch.float64, "device": device}


def _features(text: str | None) -> Any:
    """A name, or the function that ``package.module:function`` says."""
    if text is None or ":" not in text:
        return text
    from importlib import import_module

    module, _, name = text.partition(":")
    sys.path.append(str(Path.cwd()))  # last: a file here hides nothing
    try:
        return getattr(import_module(module), name)
    except (AttributeError, ImportError, ValueError) as error:
        raise ValueError(f"--features={text} cannot be imported: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))


def _numbers(flag: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} takes numbers separated by commas, got {text!r}.") from None


def _demo(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from scoresde import config, demo

    demo.main(Path(arguments.workdir), config.load(arguments.config, overrides))


def _convert(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from scoresde.pretrained.load import from_edm_pickle, load_pretrained
    from scoresde.storage import save_model

    if Path(arguments.source).suffix == ".pkl":
        model = from_edm_pickle(arguments.source, arguments.continuous)
    else:
        model = load_pretrained(
            arguments.source,
            config=arguments.config,
            overrides=overrides,
            ema=not arguments.raw_weights,
            preconditioning=arguments.preconditioning,
            size=arguments.size,
            continuous=arguments.continuous,
        )
    path = save_model(model, arguments.out)
    config = model.config()
    count = sum(p.numel() for p in model.parameters())
    print(f"{path}: {config['network']['name']}, {count:,} parameters, SDE {config['sde']['name']}")


def _configs(arguments: argparse.Namespace, overrides: list[str]) -> None:
    import ast

    from scoresde import config

    if overrides:
        raise ValueError(f"Unknown argument {overrides[0]!r}.")
    names = config.known()
    for name in names:
        text = ast.get_docstring(ast.parse(config.find(name).read_text(encoding="utf-8"))) or ""
        print(f"{name:<{max(map(len, names))}}  {text.splitlines()[0] if text else ''}".rstrip())
