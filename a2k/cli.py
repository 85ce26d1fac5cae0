"""The command line, `a2k`: stylize, train, evaluate, convert, info."""

import argparse
import io
import json
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from fractions import Fraction
from functools import cache, lru_cache
from pathlib import Path

from a2k.allocator import keep_freed_tiles, restart_without_thread_caches
from a2k.cli_train import add_train, with_config_file
from a2k.version import __version__

USAGE_ERROR = 2
WRITABLE = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
WRITTEN_AS = {".heic": ".jpg", ".heif": ".jpg"}  # others that we cannot write become PNG


def main(argv: list[str] | None = None) -> int:
    """Run the command line, by default this program's. Returns the exit code: 0; 2 with one line on stderr; or 130
    after Ctrl-C.
    """
    if sys.stderr is None:  # closed, as for a daemon
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be one that its encoding lacks
    if argv is None:
        warnings.showwarning = print_warning
        leave_on_signals()
        if sys.argv[1:2] == ["train"]:
            restart_without_thread_caches()  # before a config file is read, which may be a pipe
    try:
        arguments = build_parser().parse_args(with_config_file(sys.argv[1:] if argv is None else argv))
        return arguments.run(arguments) or 0
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print_error(error)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return 130


def leave_on_signals() -> None:
    """SIGTERM and SIGHUP end the program as Ctrl-C does, so that no half-written file stays."""

    def leave(number, _frame) -> None:
        raise SystemExit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) == signal.SIG_DFL:  # nohup has a process ignore the latter
            signal.signal(number, leave)


def print_error(error: Exception) -> None:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    print(f"a2k: error: {lines[0]}", file=sys.stderr)


def print_warning(warning: Warning | str, *_place: object) -> None:
    from tqdm import tqdm

    with tqdm.external_write_mode():
        print(f"a2k: warning: {warning}", file=sys.stderr)


def prepare_process() -> None:
    """What redrawing is faster with, before PyTorch starts its threads."""
    import torch

    keep_freed_tiles()
    torch.set_flush_denormal(True)  # attention makes many, and processors take long for them


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="a2k", description="Redraw photos in the manner of paintings.")
    parser.add_argument("--version", action="version", version=f"a2k {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_stylize(commands)
    add_train(commands)
    add_evaluate(commands)
    add_convert(commands)
    info = commands.add_parser("info", help="print versions, devices, backends and weights")
    info.set_defaults(run=run_info)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", default="a2k-lite", metavar="W", help="bundled model or file (%(default)s)")
    add_computing_options(parser)


def add_computing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (%(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the computation (float32; for bundled models bfloat16 on processors that multiply it)",
    )
    parser.add_argument("--backend", choices=("triton", "torch", "reference"), help="of the attention (automatic)")


# ---- stylize


def add_stylize(commands) -> None:
    parser = commands.add_parser(
        "stylize",
        help="redraw photos in the manner of paintings",
        description="Redraw every photo in the manner of every painting.",
    )
    several = {"nargs": "+", "action": "extend", "required": True, "help": "files or folders; - is stdin"}
    parser.add_argument("--content", metavar="PHOTO", **several)
    parser.add_argument("--style", metavar="PAINTING", **several)
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="file (for one pair), folder, or - for a PNG on stdout",
    )
    parser.add_argument("--size", type=int, metavar="PX", help="short side of the photo (as it is)")
    parser.add_argument("--style-size", type=int, metavar="PX", help="short side of the painting (as it is)")
    parser.add_argument("--strength", type=float, default=1.0, metavar="T", help="0 to 1 (%(default)s)")
    parser.add_argument("--preserve-color", action="store_true", help="keep the photo's colours")
    parser.add_argument("--quality", type=int, default=95, help="of JPEG, WebP and AVIF, 1 to 100 (%(default)s)")
    parser.add_argument("--max-pixels", type=int, default=100_000_000, help="refuse larger pictures (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per picture")
    add_model_options(parser)
    parser.add_argument(
        "--max-memory",
        type=memory_size,
        metavar="M",
        help="of feature maps, such as 6G; beyond that they go to temporary files (what is free)",
    )
    parser.add_argument("--compile", action="store_true", help="use torch.compile: for many pictures of few sizes")
    parser.set_defaults(run=run_stylize)


def memory_size(text: str) -> int:
    """Bytes, from a number with K, M, G or T behind it, or nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; give bytes, or a number like 500M or 6G")
    return int(Fraction(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def run_stylize(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from a2k.stylize import StyleTransfer

    prepare_process()
    jobs = list(plan_pictures(arguments.content, arguments.style, arguments.output))
    check_numbers(arguments)
    transfer = StyleTransfer(
        arguments.weights,
        device=arguments.device,
        dtype=arguments.dtype,
        backend=arguments.backend,
        max_pixels=arguments.max_pixels,
        max_memory=arguments.max_memory,
        compile=arguments.compile,
    )
    failed = False
    lines = sys.stderr if arguments.output == "-" else sys.stdout
    several = len(jobs) > 1
    for report in tqdm(redraw(transfer, jobs, arguments), total=len(jobs), unit="picture", disable=not several or None):
        if isinstance(report, Exception):  # the other pictures may be fine
            with tqdm.external_write_mode():
                print_error(report)
            failed = True
            continue
        with tqdm.external_write_mode(file=lines):
            print(json.dumps(report) if arguments.json else describe(report), file=lines, flush=True)
    return USAGE_ERROR if failed else 0


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a number out of range, before the network is loaded and a picture computed."""
    from a2k.images import check_quality, check_size
    from a2k.stylize import check_strength

    check_size(arguments.size)
    check_size(arguments.style_size, "style_size")
    check_strength(arguments.strength)
    check_quality(arguments.quality)


def redraw(transfer, jobs: list[tuple], arguments: argparse.Namespace) -> Iterator:
    """Reports of the (photo, painting, target) jobs, or their ImageErrors, in order.

    The next photo is read, and the last result written, beside the computation.
    """
    from concurrent.futures import ThreadPoolExecutor

    from a2k.images import ImageError, check_sides, read_image, with_short_side

    @cache  # of any number of sources
    def whole(source):
        """A pipe's content, read once for all its pairs."""
        if source != "-" and not Path(source).is_fifo():
            return source
        data = io.BytesIO(sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes())
        data.name = "standard input" if source == "-" else source
        return data

    def read(source):
        return read_image(whole(source), max_pixels=arguments.max_pixels)

    def check_result(sides, target):
        if target != "-":
            check_sides(with_short_side(sides, arguments.size or min(sides)), target)

    def outcome(future):
        try:
            return future.result()
        except ImageError as error:
            return error

    @lru_cache(1)
    def encode(painting):
        return transfer.encode_style(read(painting), style_size=arguments.style_size, progress=show_bars)

    show_bars = len(jobs) == 1 and sys.stderr.isatty()
    written = None
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        photo = reader.submit(read, jobs[0][0])
        for job, following in zip(jobs, [*jobs[1:], None], strict=True):
            started, content = time.perf_counter(), photo
            photo = following and reader.submit(read, following[0])
            try:
                picture = content.result()
                check_result(picture.rgb.size, job[2])
                out = transfer.stylize(
                    picture,
                    encode(job[1]),
                    strength=arguments.strength,
                    size=arguments.size,
                    preserve_color=arguments.preserve_color,
                    progress=show_bars,
                )
                result = writer.submit(write_one, out, job, time.perf_counter() - started, arguments.quality)
            except (ImageError, RuntimeError, MemoryError) as error:
                told = of_one_picture(error, job[0])
                result = writer.submit(lambda told=told: told)
            if written:
                yield outcome(written)
            written = result
        yield outcome(written)


def of_one_picture(error: Exception, photo: str | Path) -> Exception:
    """What to tell of the photo that an error is of. Raises the error if others would meet it too."""
    import torch

    from a2k.images import ImageError

    if isinstance(error, ImageError):
        return error
    of_torch = isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
    if not (isinstance(error, MemoryError) or of_torch):
        raise error
    reason = "" if of_torch else str(error)
    reason = reason or "it does not fit in memory; make it smaller (--size) or set --max-memory"
    return ImageError(f"cannot redraw {photo}: {reason}")


def write_one(out, job: tuple, seconds: float, quality: int) -> dict:
    """Write one result; returns what to report of it."""
    from a2k.images import write_image

    photo, painting, target = job
    alpha = out.getchannel("A") if out.mode == "RGBA" else None
    place = {"target": sys.stdout.buffer, "format": "png"} if target == "-" else {"target": target}
    write_image(out.convert("RGB"), **place, alpha=alpha, quality=quality)
    return {
        "content": str(photo),
        "style": str(painting),
        "output": str(target),
        "width": out.width,
        "height": out.height,
        "seconds": round(seconds, 3),
    }


def describe(report: dict) -> str:
    return f"{report['output']}  {report['width']}x{report['height']}  {report['seconds']:.2f} s"


def plan_pictures(content: list[str], style: list[str], output: str) -> Iterator[tuple]:
    """(photo, painting, target) for all pairs.

    Raises ImageError where names collide, inputs would be lost, or a target's format is not known.
    """
    from a2k.images import ImageError, check_suffix, find_images

    def sources(paths: list[str]) -> list:
        return ["-"] * paths.count("-") + find_images(path for path in paths if path != "-")

    if not output:
        raise ImageError("-o is empty; give a file or a folder")
    photos, paintings = sources(content), sources(style)
    pairs = [(photo, painting) for painting in paintings for photo in photos]  # so that a painting is encoded once
    if [*photos, *paintings].count("-") > 1:
        raise ImageError("- is given more than once; standard input holds one picture")
    is_folder = Path(output).is_dir() or output.endswith(("/", os.sep))
    for paths, stream, name in (([*photos, *paintings], sys.stdin, "input"), ([output], sys.stdout, "output")):
        if "-" in paths and stream is None:
            raise ImageError(f"- is standard {name}, which is closed; give a file")
    single = len(pairs) == 1 and (output == "-" or (Path(output).suffix and not is_folder))
    if output == "-" and not single:
        raise ImageError(f"-o - takes one picture but {len(pairs)} would be made; give a folder")
    is_file = Path(output).exists() or (Path(output).suffix.lower() in WRITABLE and not is_folder)
    if not single and is_file and not Path(output).is_dir():
        if len(pairs) == 1:
            raise ImageError(f"-o {output} is a file; give a folder, or a file name with a picture's extension")
        raise ImageError(f"-o {output} is a file but {len(pairs)} pictures would be made; give a folder")

    inputs = {Path(source).resolve() for source in (*photos, *paintings) if source != "-"}
    targets: dict[Path, tuple] = {}
    for photo, painting in pairs:
        target = output if single else Path(output) / picture_name(photo, painting)
        if target != "-":
            resolved = Path(target).resolve()
            if resolved in inputs:
                raise ImageError(f"output {target} is one of the inputs; choose another -o")
            if resolved in targets:
                clash = " and ".join(f"{a} with {b}" for a, b in (targets[resolved], (photo, painting)))
                raise ImageError(f"{clash} would both be written to {target}; rename one")
            targets[resolved] = photo, painting
            check_suffix(target)
        yield photo, painting, target


def picture_name(photo: str | Path, painting: str | Path) -> str:
    """{content}_stylized_{style}.{ext}, with the photo's extension if we write it; HEIC becomes JPEG, others PNG."""
    from a2k.images import result_stem

    names = ["stdin" if source == "-" else Path(source).stem for source in (photo, painting)]
    suffix = "" if photo == "-" else Path(photo).suffix.lower()
    return result_stem(*names) + (suffix if suffix in WRITABLE else WRITTEN_AS.get(suffix, ".png"))


# ---- evaluate


def add_evaluate(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="score networks and results on held-out pairs",
        description="Mean scores over fixed pairs of a photo and a painting, each cut to its central square: of "
        "networks, of folders of results that any tool made, and of the photos unchanged.",
    )
    parser.add_argument("--content-dir", required=True, metavar="D", help="folder of photos")
    parser.add_argument("--style-dir", required=True, metavar="D", help="folder of paintings")
    parser.add_argument("--perceptual", required=True, metavar="F", help="VGG encoder file")
    parser.add_argument("--weights", nargs="*", action="extend", metavar="W", help="bundled models or files (a2k-lite)")
    parser.add_argument(
        "--results",
        nargs="+",
        action="extend",
        default=[],
        metavar="D",
        help="folders of results, named as stylize names them: {photo}_stylized_{painting}, any extension",
    )
    parser.add_argument("--size", type=int, default=256, metavar="PX", help="side of the squares (%(default)s)")
    parser.add_argument("--pairs", type=int, default=200, metavar="N", help="fixed choice of pairs (%(default)s)")
    parser.add_argument("--holdout", type=int, default=0, metavar="N", help="only the last N files (0: all)")
    parser.add_argument("--sheet", metavar="F", help="picture to write: some pairs with all results side by side")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    add_computing_options(parser)
    parser.set_defaults(run=run_evaluate)


def run_evaluate(arguments: argparse.Namespace) -> None:
    from a2k.evaluate import check_names, evaluate
    from a2k.images import check_suffix, write_image
    from a2k.stylize import StyleTransfer

    prepare_process()
    if arguments.sheet:
        check_suffix(arguments.sheet)
    networks = ["a2k-lite"] if arguments.weights is None else arguments.weights
    check_names([*networks, *arguments.results])
    options = {"device": arguments.device, "dtype": arguments.dtype, "backend": arguments.backend}
    report, sheet = evaluate(
        arguments.content_dir,
        arguments.style_dir,
        arguments.perceptual,
        {weights: StyleTransfer(weights, **options) for weights in networks},
        results=arguments.results,
        size=arguments.size,
        pairs=arguments.pairs,
        holdout=arguments.holdout,
    )
    print(json.dumps(asdict(report)) if arguments.json else report.table())
    if arguments.sheet:
        write_image(sheet, arguments.sheet)


# ---- convert


def add_convert(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert official weights",
        description="Convert the four official StyA2K files to one; --vgg alone (the official VGG19 or torchvision's "
        "VGG19/VGG16) writes an encoder file for training.",
    )
    parser.add_argument("--vgg", required=True, metavar="F", help="vgg_normalised.pth, or torchvision's vgg*.pth")
    parser.add_argument("--a2k", metavar="F", help="latest_net_A2K.pth")
    parser.add_argument("--transform", metavar="F", help="latest_net_transform.pth")
    parser.add_argument("--decoder", metavar="F", help="latest_net_decoder.pth")
    parser.add_argument("-o", "--output", required=True, metavar="F", help="safetensors file to write")
    parser.set_defaults(run=run_convert)


def run_convert(arguments: argparse.Namespace) -> None:
    from a2k.checkpoint import WeightsError, save_encoder, save_model
    from a2k.convert import stya2k, vgg_encoder

    parts = {name: getattr(arguments, name) for name in ("a2k", "transform", "decoder")}
    if Path(arguments.output).resolve() in {Path(path).resolve() for path in (arguments.vgg, *parts.values()) if path}:
        raise WeightsError(f"output {arguments.output} is one of the inputs; choose another -o")
    missing = [f"--{name}" for name, path in parts.items() if path is None]
    if missing and len(missing) < len(parts):
        raise WeightsError(f"{' and '.join(missing)} missing; give --vgg alone, or all four files")
    if missing:
        encoder, kind = vgg_encoder(arguments.vgg)
        save_encoder(encoder, kind, arguments.output)
        print(f"{arguments.output}  {kind} encoder")
    else:
        save_model(stya2k(vgg=arguments.vgg, **parts), arguments.output)
        print(f"{arguments.output}  StyA2K (vgg19)")


# ---- info


def run_info(_arguments: argparse.Namespace) -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from a2k.checkpoint import bundled_names
    from a2k_kernels.products import multiplies_bfloat16

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    packages = ("torch", "triton", "numpy", "pillow", "safetensors")
    cpu = f"cpu ({torch.get_num_threads()} threads{', bfloat16' if multiplies_bfloat16() else ''})"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = [
        ("a2k", __version__),
        ("python", platform.python_version()),
        *((package, installed(package)) for package in packages),
        ("devices", ", ".join([cpu, *gpus])),
        ("backends", "torch, reference" if installed("triton") == "not installed" else "triton, torch, reference"),
        ("weights", ", ".join(bundled_names()) or "none"),
    ]
    print("\n".join(f"{name:<12}{value}" for name, value in rows))
