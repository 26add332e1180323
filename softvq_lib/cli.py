"""The command `softvq`: train, encode, decode, sample and evaluate on a terminal, each by the function of a notebook.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from softvq_lib import __version__
from softvq_lib.terminal import EXITS, finishing_the_step, run

_RUNS = "Folder of all runs.  [default: $SOFTVQ_RUNS, else runs/ of the checkout, else runs/ here]"


class _Commands(click.Group):
    """Commands in the order in which they are used; for one that is not known, the nearest."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        from softvq_lib.config import nearest

        if args and args[0] not in self.commands and not args[0].startswith("-"):
            known = list(self.commands)
            hint = nearest(args[0], known) or "."
            raise click.UsageError(f"no command {args[0]!r}{hint} Commands: {', '.join(known)}", ctx)
        return super().resolve_command(ctx, args)


def _debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.find_root().obj["debug"] |= value


_DEBUG = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_debug, help="Show the traceback of an error, and warnings."
)


def _options(*options: Callable) -> Callable:
    """Several options as one decorator, in this order."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_PARAMETERS = click.option(
    "-p",
    "given",
    nargs=2,
    multiple=True,
    metavar="NAME VALUE",
    help="One parameter of the function, VALUE as YAML has it (1.0e-4, true, null); may be repeated.",
)
_FILE = click.option(
    "-f",
    "file",
    type=click.Path(path_type=Path),
    metavar="PARAMS",
    help="YAML file of parameters; what is given beside it goes before.",
)
_PLACE = _options(
    click.option(
        "--device", metavar="NAME", help="auto (an accelerator if there is one), cpu, cuda, mps.  [default: auto]"
    ),
    click.option("--runs", metavar="FOLDER", help=_RUNS),
)
_OUT = _options(
    click.option(
        "-o",
        "--out",
        required=True,
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="Where to, a folder of this output alone.",
    ),
    click.option(
        "--overwrite",
        is_flag=True,
        help="Remove first what an earlier such command wrote there; a folder with other files is refused.",
    ),
)
_BATCH = click.option(
    "--batch-size", type=int, metavar="N", help="Images at once; more need more memory.  [default: 64]"
)
_CONVENTION = click.option(
    "--convention", metavar="NAME", help="How pixels become bytes: dit and repa cut off, mar rounds.  [default: dit]"
)


@click.group(
    cls=_Commands, epilog=EXITS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, "-V", "--version", prog_name="softvq")
@_DEBUG
def cli() -> None:
    """SoftVQ-VAE: images to a few latent tokens and back, and generators on these tokens.

    \b
    From a folder of images to new ones:
      softvq train train_tokenizer -p dataset photos -p image_size 64 -p run mine
      softvq encode mine photos -o latents
      softvq decode mine latents -o decoded
      softvq train train_generator -p dataset photos -p tokenizer mine -p run new
      softvq sample new -o samples
      softvq evaluate mine photos --generator new

    Every command may be given again: what is done is found, what was interrupted goes on and ends with the same
    bytes, and nothing is overwritten without --overwrite. Progress and errors go to standard error, results to
    standard output.
    """


@cli.command(
    epilog="""\b
Examples:
  softvq train train_tokenizer                                  # the defaults: digits, a minute or two
  softvq train params/mini/train_tokenizer/digits_32.yaml
  softvq train params/mini/train_tokenizer/digits_32.yaml -p steps 500 -p lr 1.0e-3
  accelerate launch -m softvq_lib.train params/paper/train_tokenizer/softvq_l_64.yaml"""
)
@click.argument("params")
@_PARAMETERS
@click.option(
    "--experiment",
    metavar="NAME",
    help="What to train: train_tokenizer, train_generator or distil_encoder.  [default: the name of the file's folder]",
)
@_DEBUG
def train(params: str, given: tuple, experiment: str | None) -> None:
    """Train a tokenizer, a generator or an encoder to start from.

    PARAMS is a YAML file of parameters, whose folder says what is trained (params/mini/train_generator/x.yaml), or
    the name of an experiment alone, for its defaults. A parameter that is not known is an error.

    A training is a folder in the folder of runs, named by its configuration or by `-p run NAME`. The same
    configuration twice is trained once. Ctrl-C finishes the step and saves; the same command then goes on there.
    """
    from softvq_lib.config import one_of
    from softvq_lib.distributed import rank
    from softvq_lib.train import experiments, read_parameters

    known, path = experiments(), Path(params)
    alone = params in known and not path.exists()
    name = params if alone else experiment or path.resolve().parent.name
    one_of("experiment", name, known)
    values = read_parameters(None if alone else path, given)
    try:
        with finishing_the_step():
            result = known[name](**values)
        if rank() == 0:
            click.echo(f"{result}\nrun {result.run.name}: {result.run.path}")
    finally:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


@cli.command(
    epilog="""\b
Examples:
  softvq encode mine photos -o latents
  softvq encode SoftVQVAE/softvq-l-64 photos -o latents --dtype float16 --device cuda
  softvq encode mine 'data/*.parquet' -o latents --split validation"""
)
@click.argument("tokenizer")
@click.argument("images")
@_OUT
@click.option("--split", metavar="NAME", help="all, train or validation.  [default: all]")
@click.option("--flips", is_flag=True, help="Encode the mirror image of each image too.")
@click.option("--dtype", metavar="NAME", help="How numbers are stored: float32 (exact) or float16.  [default: float32]")
@click.option(
    "--unreadable",
    type=float,
    metavar="SHARE",
    help="Largest share of the images, 0 to 1, that may be broken; they are named and left out.  [default: 0.01]",
)
@_BATCH
@click.option(
    "--shard-size",
    type=int,
    metavar="N",
    help="Images to a file; so many are lost at most by an interruption.  [default: 4096]",
)
@click.option("--workers", type=int, metavar="N", help="Processes that read images.  [default: chosen]")
@click.option("--precision", metavar="NAME", help="fp32, bf16 or auto.  [default: fp32]")
@_PLACE
@_DEBUG
def encode(tokenizer: str, images: str, out: Path, **options: object) -> None:
    """Encode images into latent tokens on the disk.

    TOKENIZER is the name of a run, a folder, or a hub name (owner/name). IMAGES is a folder of images (a folder a
    class, if there are classes), parquet or tar files, digits, shapes, or a hub name. Images are resized to the
    tokenizer's size and cropped in the centre.

    The output folder holds latents.json, which says what was encoded and whether it is all there (status), shards in
    safetensors with `latents` (images, 1 or 2 mirror images, tokens, channels), `labels` and `indices`, and for a
    folder of images names.json, their paths by index.
    """
    from softvq_lib.coding import encode_images

    cache = encode_images(tokenizer, images, out, **_asked(options), progress=sys.stderr.isatty())
    header = cache.header
    size = sum(entry["bytes"] for entry in header["shards"]) / 1e6
    left = f"; {len(header['left_out'])} unreadable left out" if header["left_out"] else ""
    latents = f"{cache.tokens} tokens x {cache.dim} channels, {header['dtype']}, {size:.1f} MB"
    click.echo(f"{len(cache):,} images in {out}: {latents}{left}")


@cli.command(
    epilog="""\b
Examples:
  softvq decode mine latents -o decoded
  softvq decode mine changed.safetensors -o decoded"""
)
@click.argument("tokenizer")
@click.argument("latents", type=click.Path(path_type=Path))
@_OUT
@_CONVENTION
@_BATCH
@_PLACE
@_DEBUG
def decode(tokenizer: str, latents: Path, out: Path, **options: object) -> None:
    """Decode latents into PNG files.

    TOKENIZER is the one that encoded them: the name of a run, a folder, or a hub name (owner/name). LATENTS is a
    folder that `softvq encode` wrote, whose pictures get the names of the images, or a safetensors file with a tensor
    `latents` (n, tokens, channels), made by any program.
    """
    from softvq_lib.coding import decode_latents

    click.echo(decode_latents(tokenizer, latents, out, **_asked(options), progress=sys.stderr.isatty()))


@cli.command(
    epilog="""\b
Examples:
  softvq sample new -o samples                                # 8 of each class
  softvq sample new -o samples --classes "hat,3" --each 20 --seed 1
  softvq sample new -o samples -p guidance_scale 2.0 -p guidance_high 0.7
  softvq sample new -o export --export 50000 -p npz true      # for an evaluator"""
)
@click.argument("generator", required=False)
@_OUT
@click.option("--classes", metavar="LIST", help="Numbers or names, separated by commas.  [default: all]")
@click.option("--each", type=int, metavar="N", help="Pictures of each class.  [default: 8]")
@click.option(
    "--export",
    "exported",
    type=int,
    metavar="N",
    help="In place of PNG files, so many images in shards of NumPy arrays, as evaluators of this field read them.",
)
@click.option("--seed", "sample_seed", type=int, metavar="N", help="The same seed makes the same images.  [default: 0]")
@click.option("--tokenizer", metavar="NAME", help="What decodes.  [default: the tokenizer that the generator names]")
@_CONVENTION
@_BATCH
@_PLACE
@_FILE
@_PARAMETERS
@_DEBUG
def sample(
    generator: str | None,
    out: Path,
    overwrite: bool,
    each: int | None,
    file: Path | None,
    given: tuple,
    **options: object,
) -> None:
    """Draw images from a finished generator, by class.

    GENERATOR is the name of a run, a folder, or a hub name (owner/name). The output folder gets a folder for
    each class. More of each class may be asked for later; the pictures that are there stay. All parameters of the
    sampler are those of sample_generator, given by -p.
    """
    from softvq_lib.sampling import sample_generator, sample_pictures

    values = _values(file, given, options | {"generator": generator})
    _needed(values, "generator")
    if not values.get("exported"):
        values.pop("exported", None)
        options = _asked({"each": each}) | {"overwrite": overwrite, "progress": sys.stderr.isatty()}
        click.echo(sample_pictures(out, **options, **values))
        return
    if overwrite or each:
        raise click.UsageError("--overwrite and --each go with PNG files: leave them out with --export")
    from softvq_lib.pictures import writable

    with writable(out):
        click.echo(sample_generator(**values | {"export": str(out)}))


@cli.command(
    epilog="""\b
Examples:
  softvq evaluate mine photos
  softvq evaluate mine photos --generator new --samples 1000
  softvq evaluate mine digits --results measured      # appends rows to measured/evaluate.jsonl
  softvq evaluate -f params/mini/evaluate/digits_32.yaml"""
)
@click.argument("tokenizer", required=False)
@click.argument("images", required=False)
@click.option("--generator", metavar="NAME", help="Judge samples too: of a generator, or a folder or .npz of images.")
@click.option("--split", metavar="NAME", help="validation or train.  [default: validation]")
@click.option(
    "--limit", type=int, metavar="N", help="Real images, the first of the split; all by -p limit null.  [default: 256]"
)
@click.option("--samples", type=int, metavar="N", help="Images generated.  [default: 256]")
@click.option(
    "--extractor",
    metavar="NAME",
    help="Network of the Fréchet distance and KID: efflite0, inception (FID), dinov2-b, ...  [default: efflite0]",
)
@click.option(
    "--perceptual",
    metavar="NAME",
    help="Network of the perceptual distance: efflite0, efflite1, efflite2, lpips or none.  [default: efflite1]",
)
@click.option(
    "--results", metavar="FOLDER", help="Append the numbers, with interval, n and origin, to FOLDER/evaluate.jsonl."
)
@_BATCH
@_PLACE
@_FILE
@_PARAMETERS
@_DEBUG
def evaluate(file: Path | None, given: tuple, images: str | None, **options: object) -> None:
    """Measure reconstructions, and a generator's samples.

    TOKENIZER is the name of a run, a folder, or a hub name (owner/name). IMAGES is a folder, files, digits,
    shapes or a hub name, as for `softvq encode`; held-out images are measured. Prints PSNR in dB, SSIM, a perceptual
    distance, Fréchet distance, KID, precision and recall, with 95 % intervals and the floor that real images have
    among themselves.
    """
    from softvq_lib.evaluate import evaluate as judge

    values = _values(file, given, options | {"dataset": images})
    _needed(values, "tokenizer", "dataset")
    click.echo(judge(**values))


@cli.command(
    epilog="""\b
Examples:
  softvq export mine -o mine-onnx
  softvq export mine -o mine-vae --to diffusers --statistics new
  softvq export SoftVQVAE/softvq-l-64 -o l64 --to diffusers"""
)
@click.argument("tokenizer")
@_OUT
@click.option("--to", metavar="FORMAT", help="onnx or diffusers.  [default: onnx]")
@click.option(
    "--statistics",
    metavar="NAME",
    help="Where mean and deviation of the latents are from: a generator that was trained on them, or a folder that "
    "`softvq encode` wrote.  [default: the tokenizer's own, else 0 and 1]",
)
@click.option(
    "--normalise", metavar="NAME", help="Of a folder of latents: scalar, or channel for each apart.  [default: scalar]"
)
@click.option(
    "--grid",
    nargs=2,
    type=int,
    metavar="ROWS COLUMNS",
    help="diffusers: how the tokens are laid out.  [default: the most nearly square]",
)
@click.option("--opset", type=int, metavar="N", help="ONNX: version of the operators.  [default: 18]")
@click.option(
    "--tolerance", type=float, metavar="X", help="Largest difference of outputs that passes.  [default: 1e-4]"
)
@click.option("--runs", metavar="FOLDER", help=_RUNS)
@_DEBUG
def export(tokenizer: str, out: Path, **options: object) -> None:
    """Write a tokenizer as ONNX files or as a model for diffusers.

    TOKENIZER is the name of a run, a folder, or a hub name (owner/name). What is written is run and compared with the
    tokenizer; if its output is not the same, the command fails and leaves nothing. Needs the extra `export` of the
    package: pip install 'softvq-book[export]'.
    """
    from softvq_lib.conversion import export as write

    click.echo(write(tokenizer, out, **_asked(options)))


@cli.command(
    epilog="""\b
Examples:
  softvq info                # all runs
  softvq info mine           # one run, model, folder of latents or of pictures"""
)
@click.argument("name", required=False)
@click.option("--runs", metavar="FOLDER", help=_RUNS)
@_DEBUG
def info(name: str | None, runs: str | None) -> None:
    """Say what a run, model or output is, and its status.

    Without NAME, list the runs.
    """
    from softvq_lib.describing import describe, list_runs

    click.echo(list_runs(runs) if name is None else describe(name, runs))


def _asked(options: dict[str, object]) -> dict[str, object]:
    """Options that were given; for the others the function's own defaults hold."""
    return {name: value for name, value in options.items() if value is not None}


def _values(file: Path | None, given: tuple, options: dict[str, object]) -> dict[str, object]:
    """Parameters of a file, then those of -p, then options and arguments."""
    from softvq_lib.train import read_parameters

    return read_parameters(file, given) | _asked(options)


def _needed(values: dict[str, object], *names: str) -> None:
    for name in names:
        if values.get(name) is None:
            word = "IMAGES" if name == "dataset" else name.upper()
            raise click.UsageError(
                f"{word} is missing: give it, or {name} in a file of parameters", click.get_current_context()
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run(cli, arguments)
