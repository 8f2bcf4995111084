"""The command line. Exit codes: 0 done, 1 a disk or device failed, 2 bad input (one line says what to do), 130 Ctrl-C."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyfold import __version__
from pyfold.errors import PyfoldError
from pyfold.recipe import WIDTHS, read_recipe, recipe_text

if TYPE_CHECKING:
    from pyfold.progress import Progress

# Options of a fold that its plan has too, beside those that say how much goes.
_PLANNED = (
    "heads_ratio",
    "allocate",
    "profile",
    "layers",
    "multiple_of",
    "dtype",
    "host_memory",
    "device",
    "gpu_memory",
    "backend",
    "metric",
    "calibration",
    "repair",
    "seed",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        if getattr(args, "recipe", None) is not None:
            args = _with_recipe(args, argv)
        args.run(args)
        sys.stdout.flush()
        return 0
    except PyfoldError as error:
        print(f"pyfold: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"pyfold: {where}{error.strerror or error}{_how_to_go_on(args)}", file=sys.stderr)
        return 1
    except MemoryError as error:
        what = error or "one fold group and its Gram matrix must fit"
        print(f"pyfold: not enough memory: {what}{_how_to_go_on(args)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        from pyfold.streams import device_failed

        failure = device_failed(error)
        if failure is None:
            raise
        print(f"pyfold: the device failed: {failure}{_how_to_go_on(args)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"pyfold: interrupted{_how_to_go_on(args)}", file=sys.stderr)
        return 130


def _how_to_go_on(args: argparse.Namespace) -> str:
    """What to say after a failure that left finished work."""
    from pyfold.io.destination import resumable

    try:
        return "; the same command continues from here" if resumable(Path(args.destination)) else ""
    except (AttributeError, OSError, TypeError):  # no destination, or none given
        return ""


def _widths(args: argparse.Namespace) -> dict[str, Any]:
    """What says how much goes."""
    given = {name: getattr(args, name) for name in WIDTHS}
    if all(value is None for value in given.values()):
        if args.ratio_by_default is None:
            raise PyfoldError("how much is to go? give --ratio, --width, --target-params, --target-bytes, or --recipe")
        given["ratio"] = args.ratio_by_default
    return given


def _with_recipe(args: argparse.Namespace, argv: Sequence[str] | None) -> argparse.Namespace:
    """What the flags do not say is as the recipe has it."""
    recipe = read_recipe(args.recipe)
    if any(getattr(args, name) is not None for name in WIDTHS):
        if isinstance(recipe.get("ratio"), dict) and args.layers is None:
            raise PyfoldError(f"{args.recipe}: its ratio says which layers; with another width, name them by --layers")
        recipe = {name: value for name, value in recipe.items() if name not in WIDTHS}
    return _parser(recipe).parse_args(argv)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What a fold and its plan have in common."""
    return _widths(args) | {name: getattr(args, name) for name in _PLANNED}


def _fold(args: argparse.Namespace) -> None:
    from pyfold.budget import return_memory_at_once
    from pyfold.pipeline import fold_checkpoint
    from pyfold.report import summary

    if args.print_recipe:
        print(recipe_text({**vars(args), **_widths(args)}), end="")
        return

    def planned(profile: str) -> None:
        if not args.quiet and not args.json:
            _print_engines(profile, Path(args.destination))

    return_memory_at_once()
    with _progress_bar(args, "B") as progress:
        report = fold_checkpoint(
            args.source,
            args.destination,
            **_options(args),
            max_shard_size=args.max_shard_size,
            overwrite=args.overwrite,
            trace=args.trace,
            ray=args.ray,
            progress=progress,
            planned=planned,
        )
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    elif not args.quiet:
        print(summary(report))


def _inspect(args: argparse.Namespace) -> None:
    from pyfold.families import family_of
    from pyfold.families.attention import differ
    from pyfold.io.checkpoint import open_checkpoint
    from pyfold.plan import make_plan

    checkpoint = open_checkpoint(args.source)
    family = family_of(checkpoint)
    groups = family.fold_groups(checkpoint)
    plan = make_plan(
        checkpoint,
        groups,
        family.attention(checkpoint) if differ(checkpoint.config) else [],
        **_widths(args),
        layers=args.layers,
        multiple_of=args.multiple_of,
        dtype="keep",
        max_shard_size="5GB",
    )
    folded = {group.name: width for group, width in plan.groups}
    keys = ("group", "width", "parameters", "folded_width", "folded_parameters")
    rows = [
        (
            group.name,
            group.width,
            sum(checkpoint.tensors[name].n_parameters for name in group.tensors),
            folded.get(group.name, group.width),
            sum(prod(plan.tensors[name][1]) for name in group.tensors),
        )
        for group in groups
    ]
    dtypes = sorted({info.dtype for info in checkpoint.tensors.values()})
    files = len({info.path for info in checkpoint.tensors.values()})
    profile = "stock" if plan.uniform else "per-layer"
    if args.json:
        print(
            json.dumps(
                {
                    "source": str(checkpoint.path),
                    "architecture": family.model_type,
                    "dtypes": dtypes,
                    "files": files,
                    "bytes": checkpoint.nbytes,
                    "parameters": checkpoint.n_parameters,
                    "folded_parameters": plan.n_parameters,
                    "profile": profile,
                    "notes": plan.notes,
                    "groups": [dict(zip(keys, row, strict=True)) for row in rows],
                },
                indent=2,
            )
        )
        return
    print(f"{checkpoint.path}: {family.model_type}, {', '.join(dtypes)}, {files} files, {checkpoint.nbytes:,} bytes")
    print(f"{'group':<16}{'width':>7}{'parameters':>16}{'folded':>8}{'parameters':>16}")
    for name, width, parameters, folded_width, folded_parameters in rows:
        print(f"{name:<16}{width:>7}{parameters:>16,}{folded_width:>8}{folded_parameters:>16,}")
    other = checkpoint.n_parameters - sum(row[2] for row in rows)
    print(f"{'other weights':<16}{'':>7}{other:>16,}{'':>8}{other:>16,}")
    removed = 1 - plan.n_parameters / checkpoint.n_parameters
    print(f"{'all':<16}{'':>7}{checkpoint.n_parameters:>16,}{'':>8}{plan.n_parameters:>16,}  {removed:.2%} removed")
    for note in plan.notes:
        print(f"note: {note}")
    print(f"profile of the result: {profile}")


def _plan(args: argparse.Namespace) -> None:
    from pyfold.budget import return_memory_at_once
    from pyfold.forecast import forecast
    from pyfold.pipeline import prepare
    from pyfold.plan import parse_time
    from pyfold.report import forecast_table

    return_memory_at_once()
    max_seconds = float("inf") if args.max_time is None else parse_time(args.max_time, "max_time")
    prepared = prepare(args.source, **_options(args), max_shard_size="5GB")
    found = forecast(prepared, Path(args.destination) if args.destination else None)
    notes = prepared.plan.notes + found.beyond(max_seconds)
    if args.json:
        print(json.dumps({**found.to_dict(), "notes": notes}, indent=2))
    elif not args.quiet:
        print(forecast_table(found))
        for note in notes:
            print(f"note: {note}")


def _eval(args: argparse.Namespace) -> None:
    from pyfold.compare import compare
    from pyfold.report import comparison_table

    if args.tasks_folder and args.tasks is None:
        raise PyfoldError("--tasks-folder: which tasks? name them by --tasks")
    if args.picture:
        from pyfold.picture import Picture

        picture = Picture(args.picture)
    text = None
    if args.text:
        try:
            text = Path(args.text).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PyfoldError(f"{args.text}: not UTF-8 text ({error})") from None
    with _progress_bar(args, "") as progress:
        rows = compare(
            args.sources,
            text=text,
            max_tokens=args.tokens,
            context=args.context,
            windows=args.windows,
            tasks=() if args.tasks is None else args.tasks.split(","),
            tasks_folder=args.tasks_folder,
            progress=progress,
        )
    print(json.dumps([vars(row) for row in rows], indent=2) if args.json else comparison_table(rows))
    if args.picture:
        picture.draw(rows)


def _print_engines(profile: str, path: Path, tp: int | None = None) -> None:
    """Before a weight is read: what will serve the result, by which command, and what will not, and why."""
    from pyfold.deliver.engines import engines, lines

    print(f"profile {profile}, to be served by", *lines(engines(profile, path, tp)), sep="\n  ", end="\n\n", flush=True)


def _export(args: argparse.Namespace) -> None:
    from pyfold.export import export_checkpoint

    if not args.quiet and not args.json:
        _print_engines(args.to.removeprefix("hf-"), Path(args.destination), args.tp)
    with _progress_bar(args, "B") as progress:
        report = export_checkpoint(
            args.source,
            args.destination,
            to=args.to,
            dtype=args.dtype,
            multiple_of=args.multiple_of,
            tp=args.tp,
            max_shard_size=args.max_shard_size,
            overwrite=args.overwrite,
            progress=progress,
        )
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    elif not args.quiet:
        types = ", ".join(f"{count} {kind}" for kind, count in report.types.items())
        print(f"{report.path}: {report.architecture}, {types}, {report.n_bytes:,} bytes in {report.seconds:.1f} s")
        for note in report.notes:
            print(f"note: {note}")


def _verify(args: argparse.Namespace) -> None:
    from pyfold.verify import verify_checkpoint

    with _progress_bar(args, "B") as progress:
        found = verify_checkpoint(args.folder, progress=progress)
    if args.json:
        print(json.dumps({"folder": str(args.folder), **vars(found)}, indent=2))
    elif not args.quiet:
        print(f"{args.folder}: {found.n_tensors} tensors, {found.n_bytes:,} bytes, as they were folded; it loads")


@contextmanager
def _progress_bar(args: argparse.Namespace, unit: str) -> Iterator[Progress | None]:
    """A bar on stderr with rate and ETA; none for --quiet, --json or where stderr is no terminal."""
    if args.quiet or args.json or not sys.stderr.isatty():
        yield None
        return
    from pyfold.progress import bar

    with bar(unit) as show:
        yield show


def _parser(defaults: dict[str, Any] | None = None) -> argparse.ArgumentParser:
    """``defaults``: of options of a fold and its plan."""
    parser = argparse.ArgumentParser(
        prog="pyfold",
        description="Make a trained network smaller without data or fine-tuning: fold similar units into one.",
        epilog="Exit codes: 0 done, 1 I/O failure, 2 bad input, 130 interrupted. `pyfold COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"pyfold {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    fold = commands.add_parser(
        "fold",
        help="fold a checkpoint and write a smaller one",
        description="Fold the feed-forward layers of SRC and write the result to DST. All layers folded to one width: DST is "
        "an ordinary checkpoint of the same architecture. Otherwise each layer's width is in config.json and DST loads with "
        "trust_remote_code=True.",
        epilog="Example: pyfold fold ./model ./model-folded --ratio 0.2 --layers 14-17",
    )
    fold.add_argument("source", metavar="SRC", help="checkpoint folder or Hugging Face model id")
    fold.add_argument("destination", metavar="DST", help="folder to write; must be absent or empty")
    _width_options(fold, required=True)
    fold.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file of weights, as in 5GB (default)")
    fold.add_argument("--overwrite", action="store_true", help="replace the checkpoint at DST once the new one is complete")
    _recipe_option(fold)
    fold.add_argument("--print-recipe", action="store_true", help="print what the options ask for as a recipe, and do nothing")
    _run_options(fold)
    _metric_options(fold)
    fold.add_argument(
        "--ray",
        nargs="?",
        const=True,
        metavar="ADDRESS",
        help="fold the groups as tasks on Ray, to the same result: on the cluster at ADDRESS, or that RAY_ADDRESS names, or "
        "that runs here, else on this machine alone. All nodes need this version of pyfold, and SRC and DST on a file system "
        "that they share; --host-memory is then for each task. Write it after SRC and DST, or as --ray=ADDRESS",
    )
    fold.add_argument(
        "--trace", metavar="FILE", help="write a timeline of reading, computing and writing, which ui.perfetto.dev opens"
    )
    _common_options(fold)
    fold.set_defaults(run=_fold)

    plan = commands.add_parser(
        "plan",
        help="show what a fold would take: memory, work, bytes, seconds",
        description="Show what pyfold fold with the same options would take, and what limits it. Reads headers, and probes the "
        "speed of this machine, and of DST's disk where it is named, for at most 3 seconds. Exit code 2 where the memory does "
        "not do, with the least that would.",
        epilog="Example: pyfold plan ./model --ratio 0.2 --host-memory 2GiB",
    )
    plan.add_argument("source", metavar="SRC", help="checkpoint folder or Hugging Face model id")
    plan.add_argument("destination", metavar="DST", nargs="?", help="folder that the fold would write")
    _width_options(plan, required=False)
    _recipe_option(plan)
    _run_options(plan)
    _metric_options(plan)
    plan.add_argument(
        "--max-time",
        metavar="TIME",
        help="how long the model may take to write its text, as in 10min; says what to do where it takes longer",
    )
    _common_options(plan)
    plan.set_defaults(run=_plan)

    inspect = commands.add_parser(
        "inspect",
        help="show what can be folded; reads headers only (a model id is downloaded first)",
        description="Show the architecture of SRC, its fold groups with widths and parameters, and what a fold would leave.",
        epilog="Example: pyfold inspect ./model --ratio 0.2 --multiple-of 256",
    )
    inspect.add_argument("source", metavar="SRC", help="checkpoint folder or Hugging Face model id")
    _width_options(inspect, required=False)
    _common_options(inspect)
    inspect.set_defaults(run=_inspect)

    export = commands.add_parser(
        "export",
        help="write a checkpoint as what a serving stack reads",
        description="Write SRC, folded or not, for engines, and say first which take it, by which command. hf-stock: an "
        "ordinary checkpoint without custom code; layers that differ are made alike by zeros, without loss. gguf: a file for "
        "llama.cpp; layers that differ are its deci. One tensor at a time is in memory.",
        epilog="Example: pyfold export ./model-folded model-folded.gguf --to gguf --dtype q8_0",
    )
    export.add_argument("source", metavar="SRC", help="checkpoint folder or Hugging Face model id")
    export.add_argument("destination", metavar="OUT", help="folder to write; of gguf the file")
    export.add_argument("--to", choices=("hf-stock", "gguf"), required=True, help="format")
    export.add_argument(
        "--dtype",
        choices=("keep", "float32", "float16", "bfloat16", "q8_0"),
        default="keep",
        help="of the weights (default: as in SRC); q8_0 for gguf, whose vectors are always float32",
    )
    export.add_argument("--multiple-of", type=int, metavar="M", help="hf-stock: make the width a multiple of M by zeros")
    export.add_argument("--tp", type=int, metavar="N", help="hf-stock: for N devices, a multiple of 128 N by zeros")
    export.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="hf-stock: largest file (default 5GB)")
    export.add_argument("--overwrite", action="store_true", help="replace what is at OUT once the new one is complete")
    _common_options(export)
    export.set_defaults(run=_export)

    verify = commands.add_parser(
        "verify",
        help="check a folded checkpoint against what its fold recorded",
        description="Check the hash of every tensor of DST, its names and shapes, index and config, and that transformers can "
        "load it. Exit code 2 and one line for the first thing that is wrong.",
        epilog="Example: pyfold verify ./model-folded",
    )
    verify.add_argument("folder", metavar="DST", help="a folder that pyfold fold has written")
    _common_options(verify)
    verify.set_defaults(run=_verify)

    evaluate = commands.add_parser(
        "eval",
        help="measure and compare perplexity and accuracies",
        description="Perplexity of each SRC by sliding window, in fp32 on the CPU through transformers; several in a table, "
        "loaded one at a time, against the first.",
        epilog="Example: pyfold eval ./model ./folded --text wiki.txt --windows 32",
    )
    evaluate.add_argument("sources", metavar="SRC", nargs="+", help="checkpoint folder or Hugging Face model id")
    evaluate.add_argument(
        "--text", metavar="FILE", help="UTF-8 text; by default the documentation topics that ship with Python"
    )
    evaluate.add_argument("--tokens", type=int, metavar="N", help="use the first N tokens of the text (default: all)")
    evaluate.add_argument(
        "--context", type=int, default=1024, metavar="N", help="tokens a window (default 1024), half of them new"
    )
    evaluate.add_argument(
        "--windows",
        type=int,
        metavar="N",
        help="N windows spread evenly over the text, each scored on its own, instead of one that slides over all of it",
    )
    evaluate.add_argument(
        "--tasks",
        metavar="LIST",
        help="accuracies by lm-evaluation-harness too, as in arc_easy,hellaswag; needs pip install 'pyfold[tasks]', and the "
        "tasks' data are downloaded",
    )
    evaluate.add_argument("--tasks-folder", metavar="DIR", help="folder of task files (YAML) besides the harness's own")
    evaluate.add_argument(
        "--picture",
        metavar="FILE.png",
        help="draw perplexity against parameters, a point a checkpoint; needs pip install 'pyfold[plot]'",
    )
    _common_options(evaluate)
    evaluate.set_defaults(run=_eval)
    for command in (fold, plan):
        command.set_defaults(**(defaults or {}))
    return parser


def _width_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    width = parser.add_mutually_exclusive_group()
    parser.set_defaults(ratio_by_default=None if required else 0.2)
    width.add_argument(
        "--ratio",
        type=float,
        metavar="R",
        help="share of the units of each folded group to remove, 0 <= R < 1" + ("" if required else " (default 0.2)"),
    )
    width.add_argument("--width", type=int, metavar="K", help="units to keep in each folded group, instead of --ratio")
    width.add_argument("--target-params", metavar="N", help="parameters that the result may have at most, as in 110M")
    width.add_argument("--target-bytes", metavar="SIZE", help="bytes that its weights may take at most, as in 220MB")
    parser.add_argument("--layers", metavar="LIST", help="layers to fold, as in 5-27 or 0,2,5-9 (default: all)")
    parser.add_argument("--multiple-of", type=int, metavar="M", help="round each width to the nearest multiple of M")


def _recipe_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        metavar="FILE.yaml",
        help="options from a file, as --print-recipe writes them; ratio may be by layers there, as in {0-9: 0.1, 10-29: 0.3}. "
        "Options given beside it are taken instead of its own",
    )


def _metric_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metric",
        default="weight",
        help="weight (default): units are alike if their weights are; function: if what they say on some tokens is, and "
        "consumers make up for what is lost",
    )
    parser.add_argument(
        "--calibration",
        default="self",
        metavar="FILE",
        help="of the function metric: self (default), text that the model writes itself, a file of text, or none, Gaussian "
        "noise through the norm before the units; the weight metric has none",
    )
    parser.add_argument(
        "--repair",
        help="of the function metric: ridge (default) or none; of the weight metric: none (default) or variance, which scales "
        "the consumer so that its output's variance stays",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the text that the model writes, or of the noise (default 0)"
    )
    parser.add_argument(
        "--heads-ratio",
        type=float,
        default=0,
        metavar="R",
        help="share of the KV heads of each layer to fold too, with their query heads: floor((1 - R) n) stay (metric "
        "function, on the CPU)",
    )
    parser.add_argument(
        "--allocate",
        default="uniform",
        help="uniform (default): the same share of every group; auto: what has to go goes where it does the least harm, by the "
        "KL divergence that is measured with each group folded alone (metric function)",
    )
    parser.add_argument(
        "--profile",
        default="per-layer",
        help="per-layer (default): widths may differ; stock: one width for all layers, which loads without custom code",
    )


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="keep", help="keep (default), float32, float16 or bfloat16")
    parser.add_argument(
        "--host-memory",
        metavar="SIZE",
        help="what the process may take at most, as in 2GiB (default: what is free); weights that do not fit are read in "
        "pieces, to the same result",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="what computes: cpu (default: the result then does not depend on the machine), cuda or cuda:N",
    )
    parser.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="what tensors may take of the GPU at most, as in 1GiB (default: what is free); a Gram matrix that does not fit is "
        "computed there and clustered on the host (by function: refused)",
    )
    parser.add_argument(
        "--backend",
        default="auto",
        help="of what computes on the host: auto (default), cpu, cpu:LEVEL (amx, avx512bf16, avx512, avx2, baseline) or "
        "reference",
    )


def _common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bar, and for fold no summary")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
