"""`a2k train`: its flags, and the config file that may stand in for them."""

import argparse
import difflib
from dataclasses import fields, replace

from a2k.train_options import RECIPES, Recipe, TrainOptions

FOLDER = """\
The folder of the run gets
  weights.safetensors   the averaged weights: for `a2k stylize --weights`
  best.safetensors      those with the lowest sum of the two validation losses so far
  states/               the last states, to resume from
  log.jsonl, loss.png   losses of every step; tensorboard/ too where tensorboard is installed
  samples/              some held-out photos in the manner of some held-out paintings
  options.json          all options, in the form of a config file, ready for -c
  *_files.json          names of the pictures that the run draws from

On several GPUs: torchrun --nproc-per-node=8 -m a2k train ...
"""


class ConfigError(ValueError):
    """A config file cannot be used; the message is one line."""


def add_train(commands) -> None:
    parser = commands.add_parser(
        "train",
        usage="a2k train --content-dir D --style-dir D --perceptual F -o RUN [options]",
        help="train a network on two folders",
        description="Train a StyA2K network on a folder of photos and a folder of paintings.",
        epilog=FOLDER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # with_config_file must find its flag
    )
    parser.add_argument(
        "-c", "--config-file", metavar="F", help="YAML file of options, such as `batch_size: 4`; flags override it"
    )
    add_data_options(parser.add_argument_group("data"))
    add_network_options(parser.add_argument_group("network"))
    add_loss_options(parser.add_argument_group("losses", "Weights and start; the defaults depend on --config."))
    add_step_options(parser.add_argument_group("steps"))
    add_run_options(parser.add_argument_group("run"))
    add_speed_options(parser.add_argument_group("speed and memory"))
    parser.set_defaults(run=run_train)


def add_data_options(group) -> None:
    group.add_argument("--content-dir", required=True, metavar="D", help="folder of photos")
    group.add_argument("--style-dir", required=True, metavar="D", help="folder of paintings")
    group.add_argument(
        "--crop",
        type=int,
        nargs="+",
        default=[256],
        metavar="PX",
        help="side of the crops (256); steps take several in turn, and fewer pairs of the larger ones",
    )
    group.add_argument(
        "--scale",
        type=float,
        nargs=2,
        default=(2.0, 2.0),
        metavar=("MIN", "MAX"),
        help="short side of the resized pictures as a multiple of the crop, drawn for each pair (2 2)",
    )
    group.add_argument("--holdout", type=int, default=40, metavar="N", help="last files kept back (%(default)s)")
    group.add_argument("--workers", type=int, default=1, metavar="N", help="processes that read (%(default)s)")


def add_network_options(group) -> None:
    group.add_argument(
        "--config", choices=("styled", "lite", "vgg16", "vgg19"), default="styled", help="shape (%(default)s)"
    )
    group.add_argument("--perceptual", required=True, metavar="F", help="VGG encoder file, see `a2k convert --vgg`")
    group.add_argument("--weights", metavar="W", help="start from these weights: bundled model or file")


def add_loss_options(group) -> None:
    group.add_argument("--global-weight", type=float, metavar="W", help="of the global style loss")
    group.add_argument(
        "--robust",
        action=argparse.BooleanOptionalAction,
        help="global style loss in which channels that rarely fire cannot drown the rest",
    )
    group.add_argument("--local-weight", type=float, metavar="W", help="of the local feature loss")
    group.add_argument("--content-weight", type=float, metavar="W", help="of the content loss")
    group.add_argument("--sharpness-weight", type=float, metavar="W", help="of the loss of grain and fine strokes")
    group.add_argument("--identity-weight", type=float, metavar="W", help="of the identity loss")
    group.add_argument("--keys", choices=("cumulative", "own"), help="features that the local loss compares")
    group.add_argument("--autoencode-steps", type=int, metavar="N", help="first steps that only copy the photo")


def add_step_options(group) -> None:
    group.add_argument("--steps", type=int, default=160_000, metavar="N", help="in all (%(default)s)")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="pairs of a batch (%(default)s)")
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches of a step (%(default)s)")
    group.add_argument("--lr", type=float, help="learning rate (5e-4 for lite and styled, else 2e-4)")
    group.add_argument(
        "--schedule",
        choices=("linear", "constant", "cosine", "published"),
        help="of the learning rate: linear falls over the last 40%% of the steps (lite), cosine all along (styled), "
        "published is 1, 1, 0.3, 0.09, 0.027 over fifths of the steps (vgg16, vgg19); all but published warm up",
    )
    group.add_argument("--clip", type=float, metavar="X", help="largest norm of the gradient (1)")
    group.add_argument("--ema-decay", type=float, metavar="D", help="of the averaged weights; 0 saves the last ones")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and data (%(default)s)")


def add_run_options(group) -> None:
    group.add_argument("-o", "--output", required=True, metavar="RUN", help="folder of the run")
    group.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False, help="go on with the run")
    group.add_argument("--checkpoint-steps", type=int, default=1000, metavar="N", help="between states (%(default)s)")
    group.add_argument("--checkpoint-minutes", type=float, default=10, metavar="M", help="at most (%(default)s)")
    group.add_argument("--keep", type=int, default=3, metavar="N", help="states kept (%(default)s)")
    group.add_argument(
        "--validate-steps", type=int, default=1000, metavar="N", help="between validations (%(default)s)"
    )


def add_speed_options(group) -> None:
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (%(default)s)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    group.add_argument("--backend", choices=("triton", "torch", "reference"), help="of the attention (automatic)")
    group.add_argument(
        "--checkpoint-activations",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compute some activations twice instead of keeping them, for large crops",
    )


def run_train(arguments: argparse.Namespace) -> None:
    from a2k import train
    from a2k.checkpoint import find_weights
    from a2k.stylize import choose_device

    options = vars(arguments).copy()
    for name in ("run", "config_file"):
        options.pop(name)
    given = {field.name: options.pop(field.name, None) for field in fields(Recipe)}
    changes = {name: value for name, value in given.items() if value is not None}
    options["recipe"] = replace(RECIPES[arguments.config], **changes)
    for name in ("crop", "scale"):
        options[name] = tuple(options[name])
    options["device"] = str(choose_device(arguments.device))
    if arguments.weights and not arguments.resume:
        options["weights"] = str(find_weights(arguments.weights))
    train.main(TrainOptions(**options))


# ---- config file


def with_config_file(argv: list[str]) -> list[str]:
    """The command line with the options of its config file, if any, before its own, which so override them.

    Raises ConfigError.
    """
    if argv[:1] != ["train"]:
        return argv
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("-c", "--config-file")
    path = finder.parse_known_args(argv[1:])[0].config_file
    return argv if path is None else ["train", *arguments_of(path), *argv[1:]]


def arguments_of(path: str) -> list[str]:
    """The options in a YAML file as command-line arguments; null is the same as leaving an option out."""
    arguments = []
    known = [field.name for field in (*fields(TrainOptions), *fields(Recipe)) if field.name != "recipe"]
    for key, value in read_config(path).items():
        name = str(key).replace("-", "_")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, cutoff=0)[0]
            raise ConfigError(f"{path} has an unknown option {key!r}; did you mean {nearest!r}?")
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(flag if value else flag.replace("--", "--no-"))
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)]
        elif value is not None:
            arguments.append(f"{flag}={value}")
    return arguments


def read_config(path: str) -> dict:
    try:
        import yaml
    except ImportError:
        raise ConfigError("a config file is read with PyYAML; pip install 'a2k[train]'") from None
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"cannot read the config file {path}: {reason}; give a YAML file") from None
    if not isinstance(config, dict):
        raise ConfigError(f"config file {path} holds no options; give lines such as `batch_size: 4`")
    return config
