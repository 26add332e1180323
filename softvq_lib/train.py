"""Parameter files, and what trains from them: `python -m softvq_lib.train` is `softvq train` for distributed launchers.

It calls the very function that the notebook of that experiment calls, so either finds the other's runs:

    torchrun --nproc-per-node 8 -m softvq_lib.train params/paper/train_tokenizer/softvq_l_64.yaml
    accelerate launch -m softvq_lib.train params/paper/train_tokenizer/softvq_l_64.yaml -p seed 1
"""

import sys
from collections.abc import Sequence
from pathlib import Path


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


def read_parameters(path: Path | None, given: Sequence[tuple[str, str]] = ()) -> dict[str, object]:
    """Read a flat YAML file of parameters; single ones may be given beside it, or alone, as text in YAML's notation.

    Raises:
        ValueError: for a file that is missing or no flat mapping.
    """
    import yaml

    if path is not None and not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        listed = f" There are: {', '.join(near)}." if near else ""
        raise ValueError(f"{path} is no file: give a YAML file of parameters.{listed}")

    def read(text: str, place: object) -> object:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{place} cannot be read as YAML ({' '.join(str(error).split())}).") from None

    try:
        values = {} if path is None else read(path.read_text(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} holds no parameters: write one `name: value` a line.")
    return values | {name: read(value, f"-p {name} {value}") for name, value in given}


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what `softvq train` does; leave with its exit code unless that is 0."""
    from softvq_lib.cli import main as softvq

    if code := softvq(["train", *(sys.argv[1:] if arguments is None else arguments)]):
        sys.exit(code)


if __name__ == "__main__":
    main()
