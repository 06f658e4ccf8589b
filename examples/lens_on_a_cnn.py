"""The lenses of a GPT put to a small CNN, where nothing is predicted iteratively: `python examples/lens_on_a_cnn.py FOLDER`.

A plain CNN of equally wide layers tells gratings of eight orientations apart. Its readout is linear in the mean over positions, so
that it reads the mean state of any layer, as a GPT's unembedding reads any residual state. The same network with residual
connections stands beside it: there the layers have one basis. What it shows is in docs/examples/lens-on-a-cnn.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

import actcache as ac

CLASSES, SIDE, WIDTH, DEPTH = 8, 12, 32, 6
IMAGES, FITTED = 8000, 6000
"""Images that are cached, and those that lenses are fitted on; the others measure them."""


def gratings(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy gratings (image, 1, side, side) and the class of each one's orientation (image,)."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (count,), generator=generator)
    angle = label * torch.pi / CLASSES
    phase = 2 * torch.pi * torch.rand(count, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    along = angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y
    image = torch.sin(along + phase[:, None, None]) + 1.5 * torch.randn(count, SIDE, SIDE, generator=generator)
    return image[:, None], label


class Layer(nn.Module):
    """A convolution, normalised and rectified; with `residual`, added to what came in."""

    def __init__(self, before: int, residual: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, WIDTH, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(image, width, side, side) in and out."""
        new = self.norm(self.conv(x)).relu()
        return x + new if self.residual else new


class EvenCNN(nn.Module):
    """Equally wide layers, a mean over positions, and a linear readout."""

    def __init__(self, residual: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(WIDTH if number else 1, residual and number > 0) for number in range(DEPTH))
        self.readout = nn.Linear(WIDTH, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits (image, class) of images (image, 1, side, side)."""
        for layer in self.layers:
            image = layer(image)
        return self.readout(image.mean((2, 3)))


def trained(residual: bool, steps: int) -> EvenCNN:
    """The network after a short training, every batch of new images."""
    torch.manual_seed(0)
    model = EvenCNN(residual)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        image, label = gratings(64, seed=1000 + step)
        loss = nn.functional.cross_entropy(model(image), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def cached(residual: bool, steps: int, folder: Path) -> tuple[ac.lens.States, ac.lens.States]:
    """Each layer's mean over positions of every image, in a dataset: to fit on, and to measure on."""
    model = trained(residual, steps)
    image, label = gratings(IMAGES, seed=0)
    sites = {f"layer{number}": f"layers.{number}" for number in range(DEPTH)}
    name = "residual-cnn" if residual else "plain-cnn"
    capturable = ac.Capturable(name=name, module=model, inputs=image, sites=sites)
    ac.build(ac.Spec(model=capturable, sites="all"), folder / f"{name}.zarr")
    ds = ac.open(folder / f"{name}.zarr")
    head = ac.lens.Head(
        [{"op": "linear", "weight": "w", "bias": "b"}],
        {"w": model.readout.weight.detach().numpy(), "b": model.readout.bias.detach().numpy()},
    )
    parts = (ds.where(document__lt=FITTED), ds.where(document__ge=FITTED))
    fitted, measured = (ac.lens.states(part, sites=list(sites), head=head, targets=label.numpy()) for part in parts)
    return fitted, measured


def main(folder: Path, steps: int, fit: bool) -> None:
    """Train, cache and measure both networks."""
    for residual in (False, True):
        fitted, measured = cached(residual, steps, folder)
        print(f"\n## {'with residual connections' if residual else 'plain'}\n")
        print(f"chance: {np.log(CLASSES):.4f} nats\n")
        print(ac.lens.logit(measured))
        if fit:
            lens = ac.lens.fit(fitted, kind="tuned", held_out=0.1, seed=0)
            print(f"\n{ac.lens.evaluate(lens, measured)}")
            show("penalty, nats", ac.lens.transfer(lens, measured)["penalty"])
        alike = ac.geometry.similarity(measured)
        for name in ("cka", "cka_shuffled", "covariance_cosine", "covariance_cosine_rotated"):
            show(name, alike[name])


def show(title: str, matrix: np.ndarray) -> None:
    """Print a matrix."""
    print(f"\n{title}\n{np.array2string(matrix, precision=3, suppress_small=True)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=200, help="steps of training")
    parser.add_argument("--no-fit", action="store_true", help="the logit lens and the geometry alone")
    given = parser.parse_args()
    torch.set_num_threads(1)  # such small products take longer on several
    main(given.folder, given.steps, not given.no_fit)
