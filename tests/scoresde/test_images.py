"""Grids and histograms as pictures: where every pixel goes."""

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde.data.spec import DataSpec
from scoresde.images import image_grid, picture, point_density, save_png


def test_grid_places_every_image_and_scales_its_values():
    data = torch.arange(3).reshape(3, 1, 1, 1) * torch.ones(3, 1, 2, 4, dtype=torch.int64)
    grid = image_grid(data, 0, 2, columns=2, zoom=2, pad=1)
    assert grid.shape == (2 * 5, 2 * 9, 1) and grid.dtype == torch.uint8
    assert int(grid[0, 0]) == 0 and int(grid[3, 17]) == 128 and int(grid[9, 7]) == 255
    assert int(grid[0, 8]) == int(grid[4, 0]) == 96  # the gaps
    colour = image_grid(torch.tensor([[[[0.0]], [[5.0]], [[-5.0]]]]), -1.0, 1.0)
    assert colour[0, 0].tolist() == [128, 255, 0]


def test_density_counts_points_with_y_upwards():
    points = torch.tensor([[0.9, 0.9], [0.9, 0.9], [0.9, 0.9], [0.9, 0.9], [-0.9, -0.9], [5.0, 0.0]])
    image = point_density(points, -1.0, 1.0, bins=4)[..., 0]
    assert int(image[0, 3]) == 255 and int(image[3, 0]) == 128 and int(image.long().sum()) == 383


def test_picture_knows_the_shapes_it_can_show(tmp_path):
    assert picture(torch.zeros(4, 1, 8, 8), DataSpec((1, 8, 8), 17)).shape[2] == 1
    assert picture(torch.zeros(4, 3, 8, 8), DataSpec((3, 8, 8))).shape[2] == 3
    assert picture(torch.zeros(4, 2), DataSpec((2,))).ndim == 3
    assert picture(torch.zeros(4, 5), DataSpec((5,))) is None
    image = picture(torch.full((4, 1, 8, 8), 16), DataSpec((1, 8, 8), 17), columns=4)
    save_png(image, tmp_path / "a" / "x.png")
    with Image.open(tmp_path / "a" / "x.png") as back:
        assert np.array_equal(np.asarray(back), image[..., 0].numpy())
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.png"]


def test_bad_pictures_are_refused():
    for shape, high in (((2, 2, 4, 4), 1), ((4, 4), 1), ((1, 1, 2, 2), 0)):
        with pytest.raises(ValueError, match=r"shape|low"):
            image_grid(torch.zeros(shape), 0, high)
    with pytest.raises(ValueError, match=r"\(N, 2\)"):
        point_density(torch.zeros(3, 3), -1.0, 1.0)
