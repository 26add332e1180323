"""The capacity plan: operations of a training step against sums by hand, and the hours that follow from them."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from softvq_lib.evaluation import capacity
from softvq_lib.losses import LossConfig
from softvq_lib.tokenizers import Tokenizer, TokenizerConfig

NONE = LossConfig()
SMALL = {"preset": "mini", "tokens": 16, "steps": 100, "batch_size": 10}


def config(preset: str = "mini", **values) -> TokenizerConfig:
    return TokenizerConfig(preset=preset, **values).resolved()


def plan(**values) -> dict:
    return capacity.capacity_plan({"it": SMALL | values})[0]


@pytest.mark.parametrize("quantizer", ["softvq", "vq", "ae", "kl"])
def test_counting_one_block_and_two_gives_what_counting_all_gives(quantizer):
    small = config(tokens=16, quantizer=quantizer)
    with torch.device("meta"):
        tokenizer = Tokenizer(small).train()
    with FlopCounterMode(display=False) as counter:
        reconstructions, code = tokenizer(torch.empty(1, 3, 32, 32, device="meta"))
        torch.autograd.backward([reconstructions.sum(), *code.losses.values()])
    assert capacity.step_flops(small, NONE)["tokenizer"] == counter.get_total_flops()


def test_the_transformers_of_size_s_by_hand():
    tokens, width, blocks = 1 + 256 + 64, 384, 12 + 12
    block = 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width  # four projections and the MLP, then attention
    pixels = 2 * 256 * width * 3 * 16**2
    forward = blocks * block + 2 * pixels  # a patch embedding, a pixel head
    assert forward / 1e9 == pytest.approx(31.4, abs=0.05)
    counted = capacity.step_flops(config("s", tokens=64), NONE)["tokenizer"]
    assert counted == pytest.approx(3 * forward, rel=0.005)  # the way back costs twice the way there


def test_lpips_by_hand():
    channels = [(3, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 2), (128, 256, 4), *[(256, 256, 4)] * 2]
    channels += [(256, 512, 8), *[(512, 512, 8)] * 2, *[(512, 512, 16)] * 3]
    vgg = sum(2 * 9 * before * after * (64 // shrunk) ** 2 for before, after, shrunk in channels)
    loss = replace(NONE, perceptual="lpips")
    counted = capacity.step_flops(config(image_size=64), loss)
    assert counted["perceptual"] == 3 * vgg  # the image, its reconstruction, and back to the pixels


def test_the_discriminator_looks_at_four_views_or_two():
    loss = replace(NONE, adversarial="patch")
    four = capacity.step_flops(config(), loss)
    two = capacity.step_flops(config(), replace(loss, consistency_weight=0.0))
    assert four["discriminator"] == 2 * two["discriminator"] > 0
    # One view there and back to the pixels; in its own training, back to the weights as well, but not to the pixels.
    assert two["adversarial"] == four["adversarial"]
    assert 0.5 < two["adversarial"] / (two["discriminator"] / 2) < 1.5


def test_the_teacher_goes_forward_only():
    loss = replace(NONE, alignment="dinov2-s")
    one = capacity.step_flops(config(image_size=64, patch_size=8, tokens=16), loss)["alignment"]
    tokens, width, dim = 1 + 64, 384, 16
    teacher = 12 * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width) + 2 * 64 * width * 3 * 8**2
    projector = 3 * 2 * 16 * (dim * 1024 + 1024 * 1024 + 1024 * width)
    assert one == pytest.approx(teacher + projector, rel=0.01)


def test_hours_follow_from_operations_peak_and_utilisation():
    row = plan()
    assert row["images"] == 1000
    assert row["step"] == sum(row[part] for part in capacity.PARTS) == row["tokenizer"]
    assert row["exaflop"] == pytest.approx(1000 * row["step"] * 1e9 / 1e18)
    assert row["gpu_hours"] == pytest.approx(row["exaflop"] * 1e18 / (0.4 * 989e12) / 3600)
    assert row["images_per_second"] == pytest.approx(row["images"] / (row["gpu_hours"] * 3600))
    half = capacity.capacity_plan({"it": SMALL}, peak_tflops=989 / 4, utilisation=0.8)[0]
    assert half["gpu_hours"] == pytest.approx(2 * row["gpu_hours"])


def test_a_discriminator_costs_from_its_start_on():
    row, late = plan(adversarial="patch"), plan(adversarial="patch", adversarial_start=75)
    assert late["step"] == row["step"]
    judged = row["adversarial"] + row["discriminator"]
    assert late["exaflop"] == pytest.approx(1000 * (row["tokenizer"] + 0.25 * judged) / 1e9)
    assert plan(adversarial="patch", adversarial_start=200)["exaflop"] == plan()["exaflop"]


def test_the_state_is_weights_gradients_moments_and_average():
    row = plan()
    assert row["parameters"] == sum(parameter.numel() for parameter in Tokenizer(config(tokens=16)).parameters())
    assert row["state_gb"] == pytest.approx(row["parameters"] * 4 * 5 / 1e9)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"utilisation": 1.5}, "utilisation=1.5 is a share"), ({"peak_tflops": 0}, "peak_tflops=0 is not allowed")],
)
def test_a_peak_or_share_that_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        capacity.capacity_plan({"it": SMALL}, **values)


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="unknown parameter 'tokkens'"):
        plan(tokkens=3)


def test_the_table_has_a_line_a_recipe():
    rows = capacity.capacity_plan({"one": SMALL, "two": SMALL | {"tokens": 8}})
    head, rule, *lines = capacity.table(rows).splitlines()
    assert len({line.count("|") for line in (head, rule, *lines)}) == 1
    assert [line.split(" | ")[0] for line in lines] == ["| one", "| two"]
    assert lines[0].startswith("| one | 32 px | 0.51 | 0 | 0 | 0 | 0 | 0.51 |")
