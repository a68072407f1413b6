# %% [markdown]
# # Look inside a net
#
# Kernels of conv1 (figure 3 of the paper), maps of one photo, and the nearest neighbours by fc7 (figure 4). Cells as in
# a notebook: open it in an editor that knows `# %%`, or run it as a script:
#
#     python docs/look_inside.py runs/photos photos/ pictures/
#
# Arguments: a run, a folder of photos, and a folder for three PNG files.

# %%
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from trainer.inference import load

run, photos, output = map(Path, sys.argv[1:4])
output.mkdir(parents=True, exist_ok=True)
files = sorted(path for path in photos.rglob("*") if path.is_file())
net = load(run)
print(f"{net.config.model.towers} towers, step {net.step}, {len(net.classes)} classes, {len(files)} photos")


# %%
def draw(name: str, pictures: list[np.ndarray], titles: list[str], columns: int) -> None:
    """Pictures (H, W), (H, W, 1) or (H, W, 3) in rows."""
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.2 * columns, 1.35 * rows), layout="constrained")
    for axes, picture, title in zip(figure.subplots(rows, columns, squeeze=False).flat, pictures, titles, strict=False):
        axes.imshow(picture.squeeze(), cmap="gray")
        axes.set_title(title, fontsize=7)
    for axes in figure.axes:
        axes.axis("off")
    figure.savefig(output / name, dpi=130)


# %% [markdown]
# ## Kernels of conv1
# Tower a's half first. Each kernel is shown from its darkest to its brightest weight.

# %%
kernels = net.kernels()  # (kernels, k, k, C)
low, high = kernels.min(axis=(1, 2, 3), keepdims=True), kernels.max(axis=(1, 2, 3), keepdims=True)
draw("kernels.png", list((kernels - low) / np.maximum(high - low, 1e-12)), [""] * len(kernels), columns=16)

# %% [markdown]
# ## Maps of one photo
# What conv1 hands to conv2, after ReLU, normalization and pooling.

# %%
maps = net.features(files[0], "conv1")[0]  # (maps, H, W)
draw("maps.png", [net.crop(files[0]), *maps[:31]], ["the photo"] + [f"map {number}" for number in range(31)], columns=8)

# %% [markdown]
# ## Nearest neighbours by fc7
# Photos whose 4,096 numbers (fewer in a smaller net) are nearest, whatever their pixels. The first column is the photo
# asked about.

# %%
codes = net.features(files, "fc7")  # (N, units)
crops = [net.crop(path) for path in files]
shown, titles = [], []
for number in np.linspace(0, len(files) - 1, min(5, len(files))).astype(int):
    distances = np.linalg.norm(codes - codes[number], axis=1)
    nearest = [place for place in np.argsort(distances, kind="stable") if place != number][:6]
    shown += [crops[place] for place in (number, *nearest)]
    titles += [files[number].stem, *(f"{distances[place]:.3g}" for place in nearest)]
draw("neighbours.png", shown, titles, columns=1 + min(6, len(files) - 1))
print(*sorted(path.name for path in output.glob("*.png")))
