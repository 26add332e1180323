"""Train from a parameter file without a notebook: `python -m softvq_lib.train`, also under a distributed launcher.

It calls the very function that the notebook of that experiment calls, so either finds the other's runs:

    torchrun --nproc-per-node 8 -m softvq_lib.train params/paper/train_tokenizer/softvq_l_64.yaml
    accelerate launch -m softvq_lib.train params/paper/train_tokenizer/softvq_l_64.yaml -p seed 1
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from softvq_lib.config import one_of


def experiments() -> dict:
    """The experiments that train, by the name of the folder that their parameter files lie in."""
    from softvq_lib.distilling import distil_encoder
    from softvq_lib.experiments import train_tokenizer
    from softvq_lib.generation import train_generator

    return {
        "train_tokenizer": train_tokenizer,
        "train_generator": train_generator,
        "distil_encoder": distil_encoder,
    }


def read_parameters(path: Path, given: Sequence[tuple[str, str]] = ()) -> dict[str, object]:
    """Read a flat YAML file of parameters; single ones may be given beside it, as text in YAML's notation.

    Raises:
        ValueError: for a file that is missing or no flat mapping.
    """
    import yaml

    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        listed = f" There are: {', '.join(near)}." if near else ""
        raise ValueError(f"{path} is no file: give a YAML file of parameters.{listed}")

    def read(text: str, place: object) -> object:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{place} cannot be read as YAML ({' '.join(str(error).split())}).") from None

    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from None
    values = read(text, path)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} holds no parameters: write one `name: value` a line.")
    return values | {name: read(value, f"-p {name} {value}") for name, value in given}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, and print what the notebook would show as a table."""
    parser = argparse.ArgumentParser(prog="python -m softvq_lib.train", description=__doc__.splitlines()[0])
    parser.add_argument("params", type=Path, help="YAML file of parameters, such as params/mini/train_tokenizer/x.yaml")
    parser.add_argument(
        "-p",
        dest="given",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="one parameter, in place of the file's; may be repeated",
    )
    parser.add_argument("--experiment", help="what to train; by default the name of the file's folder")
    asked = parser.parse_args(arguments)
    from softvq_lib.distributed import rank

    try:
        name = asked.experiment or asked.params.resolve().parent.name
        one_of("experiment", name, experiments())
        result = experiments()[name](**read_parameters(asked.params, asked.given))
        if rank() == 0:
            print(result)
    except (ValueError, FloatingPointError, MemoryError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
