"""A small CNN whose layers are cached per image, the control for what a lens claims: `python examples/cnn.py OUT.zarr`.

A claim about language models, say that predictions are refined layer by layer, should be put to a network in which nothing
of the kind is expected too. Here gratings of four orientations are told apart, and a linear probe is fitted to each layer.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import nn

import actcache as ac

CLASSES, SIDE = 4, 16


def gratings(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy gratings (image, 1, side, side) and the class of each one's orientation (image,)."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (count,), generator=generator)
    angle = label * torch.pi / CLASSES
    phase = 2 * torch.pi * torch.rand(count, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    along = angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y
    image = torch.sin(along + phase[:, None, None]) + 2.5 * torch.randn(count, SIDE, SIDE, generator=generator)
    return image[:, None], label


class CNN(nn.Module):
    """Three convolutions, a mean over positions, and a linear readout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.BatchNorm2d(after), nn.ReLU())
            for before, after, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.readout = nn.Linear(64, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits (image, class) of images (image, 1, side, side)."""
        for layer in self.layers:
            image = layer(image)
        return self.readout(image.mean((2, 3)))


def trained(steps: int = 150) -> CNN:
    """The network after a short training."""
    torch.manual_seed(0)
    model = CNN()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        image, label = gratings(64, seed=1000 + step)
        loss = nn.functional.cross_entropy(model(image), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def main(out: str) -> None:
    """Train, cache every layer of 2,000 images, and probe each from the dataset."""
    image, label = gratings(2000)
    sites = {"conv1": "layers.0", "conv2": "layers.1", "conv3": "layers.2", "logits": "readout"}
    capturable = ac.Capturable(name="gratings-cnn", module=trained(), inputs=image, sites=sites)
    ac.build(ac.Spec(model=capturable, sites="all"), out)
    ds = ac.open(out)
    print(ds)
    target = np.eye(CLASSES)[label.numpy()]
    for site in ds.sites:
        x = np.column_stack([ds[site].compute(), np.ones(ds.n_tokens)])
        weights, *_ = np.linalg.lstsq(x[:1000], target[:1000], rcond=None)
        right = (x[1000:] @ weights).argmax(1) == label.numpy()[1000:]
        print(f"{site}: a linear probe is right for {right.mean():.1%} of the images")


if __name__ == "__main__":
    main(sys.argv[1])
