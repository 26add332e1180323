"""Training from a parameter file, in one process or two: the command line, DDP and FSDP beside a single process.

Run as a program, by torchrun, this file trains with FSDP on the CPU, for which Accelerate has no switch.
"""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from softvq_lib import train_tokenizer
from softvq_lib.train import main, read_parameters
from softvq_lib.training import train

# All terms of Eq. 7; every statistic over the batch that processes must share is in them.
ALL = {
    "dataset": "digits",
    "limit": 64,
    "tokens": 4,
    "batch_size": 8,
    "steps": 4,
    "log_every": 1,
    "val_images": 16,
    "workers": 0,
    "flip": True,
    "crop": 1.2,
    "precision": "fp32",
    "perceptual": "efflite0",
    "adversarial": "patch",
    "adversarial_adaptive": True,
    "alignment": "efflite0",
    "alignment_width": 16,
}


def two_processes(*arguments: str) -> subprocess.CompletedProcess:
    """Start a program twice, as processes that train together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def assert_close_metrics(found: list[dict], expected: list[dict]) -> None:
    """They differ by rounding, which training enlarges, and codes that few tokens choose most of all."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2 if "val_psnr" in theirs else 1e-3, abs=1e-4)


def parameter_file(tmp_path, text: str, experiment: str = "train_tokenizer"):
    path = tmp_path / experiment / "x.yaml"
    path.parent.mkdir()
    path.write_text(text)
    return path


def test_two_processes_train_what_one_would_and_the_notebook_finds_it(tmp_path):
    values = {**ALL, "runs": str(tmp_path / "two")}
    path = parameter_file(tmp_path, "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
    done = two_processes("-m", "softvq_lib.train", str(path))
    assert done.stdout.count("PSNR, dB") == 1, "the first process alone reports"
    experiment = train_tokenizer(**read_parameters(path))
    run = experiment.run
    assert run.trained == 0 and run.manifest["processes"] == 2 and run.manifest["distribution"] == "MULTI_CPU"
    alone = train(**{**values, "runs": str(tmp_path / "one")})
    assert alone.trained == 4 and alone.manifest["processes"] == 1 and alone.name == run.name
    assert {"lecam", "consistency", "adversarial_weight", "kl", "alignment"} <= set(run.metrics[1])
    assert_close_metrics(run.metrics, alone.metrics)


def test_sharded_processes_train_what_one_would_and_one_goes_on(tmp_path):
    """FSDP; its checkpoints hold whole tensors."""
    values = {**ALL, "alignment": "none", "perceptual": "none", "run": "mine", "steps": 2}
    two_processes(__file__, json.dumps({**values, "runs": str(tmp_path / "two")}))
    expected = train(**values, runs=str(tmp_path / "one"))
    run = train(**values, runs=str(tmp_path / "two"))
    assert run.trained == 0 and run.manifest["processes"] == 2 and run.manifest["distribution"] == "FSDP"
    assert_close_metrics(run.metrics, expected.metrics)
    shapes = []
    for each in (run, expected):
        tensors = load_file(each.path / "checkpoints" / "step-00000002.safetensors")
        shapes.append({name: tensor.shape for name, tensor in tensors.items()})
    assert shapes[0] == shapes[1]
    longer = {**values, "steps": 4, "change": True}
    run, expected = (train(**longer, runs=str(tmp_path / name)) for name in ("two", "one"))
    assert run.trained == 2 and run.manifest["processes"] == 1
    assert_close_metrics(run.metrics, expected.metrics)


# -- the command line ------------------------------------------------------------------------------------------------


def test_the_command_trains_and_prints_the_table(tmp_path, capsys):
    path = parameter_file(tmp_path, f"dataset: digits\nlimit: 64\ntokens: 4\nval_images: 40\nruns: {tmp_path}\n")
    main([str(path), "-p", "steps", "2", "-p", "batch_size", "8", "-p", "lr", "1.0e-3", "-p", "dim", "null"])
    printed = capsys.readouterr().out
    assert "PSNR, dB" in printed and "PCA, 16 components" in printed
    (run,) = (path.parent.parent / name for name in os.listdir(tmp_path) if name.startswith("digits"))
    requested = json.loads((run / "config.json").read_text())["requested"]
    assert (requested["steps"], requested["lr"], requested["dim"]) == (2, 1e-3, None)


def test_help_names_the_parameters(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    assert "-p NAME VALUE" in printed and "--experiment" in printed


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("tokkens: 4", [], "unknown parameter 'tokkens', did you mean 'tokens'?"),
        ("tokens: four", [], "tokens='four' is of type str, but int is wanted"),
        ("lr: 1e-3", [], "write 1.0e-4"),
        ("tokens: [4", [], "x.yaml cannot be read as YAML"),
        ("- tokens", [], "x.yaml holds no parameters"),
        ("", [], "x.yaml holds no parameters"),
        ("4: tokens", [], "x.yaml holds no parameters"),
        ("tokens: 4", ["-p", "steps", "[2"], "-p steps [2 cannot be read as YAML"),
        ("tokens: 4", ["-p", "stepz", "2"], "unknown parameter 'stepz', did you mean 'steps'?"),
        ("tokens: 4", ["--experiment", "train_tokeniser"], "did you mean 'train_tokenizer'?"),
        ("dataset: no/such/folder", [], "no/such/folder"),
    ],
)
def test_a_mistake_is_told_in_one_line(text, arguments, words, tmp_path, capsys):
    message = told(capsys, str(parameter_file(tmp_path, text)), *arguments)
    assert words in message


def told(capsys, *arguments: str) -> str:
    """The one line on standard error of a command that is refused."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    return message


def test_a_missing_file_and_a_folder_that_is_no_experiment_are_told(tmp_path, capsys):
    path = parameter_file(tmp_path, "tokens: 4")
    other = parameter_file(tmp_path, "tokens: 4", experiment="efficiency")
    for given, words in ((path.with_name("y.yaml"), ["y.yaml is no file", "There are: ", "x.yaml"]),
                         (tmp_path / "nowhere.yaml", ["is not known"]),
                         (other, ["experiment='efficiency' is not known", "'train_tokenizer'"])):  # fmt: skip
        message = told(capsys, str(given))
        assert all(word in message for word in words)


def test_the_exit_code_of_a_mistake_is_2(tmp_path):
    command = [sys.executable, "-m", "softvq_lib.train", str(tmp_path / "train_tokenizer" / "x.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "is no file" in done.stderr


def sharded() -> None:
    """Train with FSDP over the processes that torchrun started, on the CPU."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    from softvq_lib.training import engine

    def accelerator(device):
        made = Accelerator(cpu=True, mixed_precision="no")
        made.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            reshard_after_forward=True,
        )
        return made

    engine.accelerator = accelerator
    train(**json.loads(sys.argv[1]))


if __name__ == "__main__":
    sharded()
