"""Figures of generators: what stands where, and what is refused."""

import numpy as np
import pytest
import torch

from softvq_lib.generator_figures import beside_nearest, class_grid, learning_curve, short_name


def flat(*values, size=4):
    """Images (b, 3, size, size), each of one value."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, size, size).clone()


def sheet(figure):
    """The picture on a figure's only axes, one number for each image of 4 x 4 pixels."""
    picture = figure.axes[0].images[0].get_array()
    return np.asarray(picture)[2::5, 2::5, 0]


def test_a_grid_has_a_row_for_each_class_in_order():
    images, labels = flat(0.5, -1.0, -0.5, 0.0, 3.0), torch.tensor([7, 2, 7, 7, 2])
    figure = class_grid(images, labels, [f"class_{i}" for i in range(10)], columns=3)
    white = 1.0  # clamped, or no image
    assert np.allclose(sheet(figure), [[0.0, 1.0, white], [0.75, 0.25, 0.5]])
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["class 2", "class 7"]
    assert axis.get_yticks().tolist() == [2, 7]
    assert [text.get_text() for text in class_grid(images, labels).axes[0].get_yticklabels()] == ["2", "7"]
    figure.draw_without_rendering()


def test_a_grid_needs_labels_that_fit():
    with pytest.raises(ValueError, match="2 labels for 3 images"):
        class_grid(flat(0.0, 0.0, 0.0), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels \[0, 4\] do not fit 4 names"):
        class_grid(flat(0.0, 0.0), torch.tensor([0, 4]), list("abcd"))


def test_pairs_stand_over_each_other():
    figure = beside_nearest(flat(-1.0, 0.0), flat(1.0, 0.5), torch.tensor([2.0, 0.5]))
    assert np.allclose(sheet(figure), [[0.0, 0.5], [1.0, 0.75]])
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["2.00", "0.50"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["generated", "nearest"]
    figure.draw_without_rendering()
    with pytest.raises(ValueError, match="are no pairs"):
        beside_nearest(flat(0.0), flat(0.0, 1.0))


def test_a_learning_curve_is_that_of_the_rows():
    rows = [{"step": 10, "val_loss": 0.5}, {"step": 5, "loss": 3.0}, {"step": 0, "val_loss": 1.0}]
    figure = learning_curve({"SiT": rows, "DiT": [{"step": 0, "val_loss": 2.0}]})
    first, second = figure.axes
    assert first.lines[0].get_xydata().tolist() == [[0, 1.0], [10, 0.5]]
    assert second.lines[0].get_xydata().tolist() == [[0, 2.0]]
    assert [axis.get_title() for axis in figure.axes] == ["SiT", "DiT"]
    assert learning_curve({"SiT": rows, "DiT": []}).axes[0].get_title() == ""
    with pytest.raises(ValueError, match="none of the runs SiT has 'val_mse'"):
        learning_curve({"SiT": rows}, "val_mse")


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("7", "7"),
        ("T-Shirt", "T-Shirt"),
        ("n01983481 American lobster, Northern lobster", "American lobster"),
        ("n01983481", "n01983481"),
        ("blue_circle", "blue circle"),
        ("a name of more than eighteen letters", "a name of more th…"),
    ],
)
def test_names_of_classes_fit_beside_a_grid(name, short):
    assert short_name(name) == short
