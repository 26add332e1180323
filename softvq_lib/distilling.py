"""Distil an encoder for tokenizers to start from, and record how well it predicts its teacher (Tab. 4)."""

from dataclasses import dataclass
from pathlib import Path

from softvq_lib import config as strictly
from softvq_lib import results as rows_of
from softvq_lib.data import DataSplits
from softvq_lib.distributed import rank
from softvq_lib.training import Run
from softvq_lib.training.distillation import CONFIGS, distil


@dataclass(frozen=True)
class ResultsConfig:
    """What is kept of an experiment without pictures.

    Attributes:
        results: Folder whose `distil_encoder.jsonl` the measured rows are appended to. None: nothing is recorded.
    """

    results: str | None = None


DISTIL_EXPERIMENT = (*CONFIGS, ResultsConfig)


@dataclass
class DistilExperiment:
    """A distilled encoder.

    Attributes:
        run: The run on the disk; its name is what `encoder_start` of `train_tokenizer` takes.
        data: The data set that it was distilled on.
    """

    run: Run
    data: DataSplits

    @property
    def curve(self) -> list[list[float]]:
        """[step, cosine with the teacher's features of held-out images]."""
        return [[row["step"], row["val_cosine"]] for row in self.run.metrics if "val_cosine" in row]

    @property
    def constant(self) -> float:
        """Cosine of the best prediction that is the same for all images: features of all of them share much."""
        return self.run.manifest["constant_cosine"]

    @property
    def gain(self) -> float:
        """Held-out cosine above that of the best constant prediction."""
        return self.curve[-1][1] - self.constant

    def __str__(self) -> str:
        identity = self.run.identity
        size, patch = (identity["distilled"][name] for name in ("image_size", "patch_size"))
        return (
            f"{self.run.name}: {size} px in patches of {patch}, {identity['steps']} steps; held-out cosine with "
            f"{identity['teacher']} {self.curve[-1][1]:.3f}, at the start {self.curve[0][1]:.3f}, of the best constant "
            f"{self.constant:.3f}"
        )


def distil_encoder(**values: object) -> DistilExperiment | None:
    """Distil (or load) an encoder, and record how near it comes to its teacher on held-out images if asked to.

    Of several processes that train together the first returns the experiment; the others return None.

    Args:
        values: Fields of `DistilConfig`, `DataConfig`, `TrainConfig` and `ResultsConfig`.

    Raises:
        ValueError: for a parameter that is unknown (the nearest is named) or out of range, and for data, teachers or
            folders that cannot be used.
    """
    *_, record = strictly.split(values, *DISTIL_EXPERIMENT)
    run = distil(**{name: value for name, value in values.items() if name not in strictly.fields_of(ResultsConfig)})
    if rank():
        return None
    experiment = DistilExperiment(run, run.data)
    if record.results:
        rows_of.append(Path(record.results) / "distil_encoder.jsonl", _rows(experiment))
    return experiment


def _rows(experiment: DistilExperiment) -> list[dict[str, object]]:
    run = experiment.run
    manifest = run.manifest
    last = [row for row in run.metrics if "val_cosine" in row][-1]
    value, error = last["val_cosine"], last.get("val_cosine_error")
    interval = none = {"low": None, "high": None, "interval": ""}
    if error is not None:
        low, high = value - 1.96 * error, value + 1.96 * error
        interval = {"low": low, "high": high, "interval": "95 % normal over images"}
    common = rows_of.of_run("distil_encoder", run) | {"n": manifest["held_out"]}
    measured = {"metric": "val_cosine", "value": value, **interval}
    constant = {"metric": "val_cosine_constant", "value": experiment.constant, **none}
    return [
        common | measured | {"curve": experiment.curve, "train_seconds": run.seconds},
        common | constant,
    ]
