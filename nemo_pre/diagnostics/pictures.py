"""A few pictures of visual tokens: what is like a patch, layer by layer, and t-SNE of tokens by class."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F

from nemo_pre.diagnostics.patches import NOTHING
from nemo_pre.diagnostics.samples import DiagnosticSample
from nemo_pre.diagnostics.states import Grid, VisualStates

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 3  # pictures with heat maps
COLUMNS = 5  # layers, evenly from the first to the last
MAP_SIDE = 160  # pixels
MOST_CLICKED = 1000  # patches of a picture that any of them can be asked for: a byte for each pair and layer
TSNE_TOKENS, TSNE_LAYERS = 1000, 3


@dataclass
class KeptTokens:
    """The tokens of the first pictures at a few layers; what a rank keeps travels to the first as it is.

    Attributes:
        shown: a sample's picture as the model sees it, cut and resized, so that the grid of patches lies on it.
        tokens: by layer, float32 ``[n, d]`` of each picture.
        grids, classes: of each picture; ``pictures``: the first few.
    """

    num_layers: int
    shown: Callable[[DiagnosticSample], Image]
    pictures: list[Image] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    classes: list[np.ndarray | None] = field(default_factory=list)
    tokens: dict[int, list[np.ndarray]] = field(default_factory=dict)
    num_tokens: int = 0

    @property
    def layers(self) -> list[int]:
        steps = min(COLUMNS, self.num_layers + 1) - 1
        return [round(step * self.num_layers / steps) for step in range(steps + 1)]

    def __call__(self, samples: list[DiagnosticSample], states: VisualStates) -> None:
        for number, sample in enumerate(samples):
            if self.num_tokens >= TSNE_TOKENS and len(self.grids) >= SHOWN:
                return
            inside = (states.image == number).cpu()
            self.num_tokens += int(inside.sum())
            if len(self.pictures) < SHOWN:
                self.pictures.append(self.shown(sample))
            self.grids.append(states.grids[number])
            self.classes.append(None if states.classes is None else states.classes[inside].numpy())
            for layer in {*self.layers} & states.layers.keys():
                tokens = states.layers[layer]
                self.tokens.setdefault(layer, []).append(tokens[inside.to(tokens.device)].float().cpu().numpy())


@dataclass(frozen=True)
class HeatMaps:
    """A picture of ``rows`` x ``columns`` patches, and what is like its patch ``asked``; images are data URIs.

    Attributes:
        shows: what the asked patch shows.
        maps: by layer, the cosine of the asked patch to every patch, as colours.
        ranges: the smallest and the largest cosine of each map, which are its darkest and its brightest colour.
        cosines: by layer, those of every patch to every patch, one byte each (0: -1, 255: 1), row by row in base64;
            empty for more than ``MOST_CLICKED`` patches.
    """

    shows: str
    picture: str
    rows: int
    columns: int
    asked: int
    maps: dict[int, str]
    ranges: dict[int, tuple[float, float]]
    cosines: dict[int, str]


def heat_maps(kept: KeptTokens, class_names: dict[int, str]) -> list[HeatMaps]:
    """Heat maps of the first pictures; the asked patch is the first of a picture's most frequent object, or the middle
    one."""
    import torch
    from PIL import Image

    shown = []
    for number, picture in enumerate(kept.pictures):
        grid, classes = kept.grids[number], kept.classes[number]
        asked, shows = _asked_patch(grid, classes, class_names)
        side = (MAP_SIDE, round(MAP_SIDE * grid.rows / grid.columns))
        maps, ranges, every = {}, {}, {}
        for layer in sorted(kept.tokens):
            patches = torch.from_numpy(kept.tokens[layer][number])[grid.first : grid.first + grid.size]
            units = F.normalize(patches.double(), dim=-1)
            cosines = (units @ units[asked]).numpy()
            low, high = float(cosines.min()), float(cosines.max())
            scaled = (cosines - low) / ((high - low) or 1.0)
            colours = _colours()[(scaled.reshape(grid.rows, grid.columns) * 255).round().astype(int)]
            maps[layer] = _data_uri(Image.fromarray(colours).resize(side, Image.Resampling.NEAREST))
            ranges[layer] = (low, high)
            if grid.size <= MOST_CLICKED:
                of_all = ((units @ units.T + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
                every[layer] = base64.b64encode(of_all.tobytes()).decode()
        small = picture.resize(side, Image.Resampling.NEAREST)
        shown.append(HeatMaps(shows, _data_uri(small), grid.rows, grid.columns, asked, maps, ranges, every))
    return shown


def colour_bytes() -> str:
    """The 256 colours of the maps, three bytes each, in base64."""
    return base64.b64encode(_colours().tobytes()).decode()


def _colours() -> np.ndarray:
    from matplotlib import colormaps

    return (colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def tsne_pictures(kept: KeptTokens, class_names: dict[int, str], seed: int = 0) -> dict[int, str]:
    """t-SNE of the kept tokens at the first, the middle and the last of the kept layers, coloured by class, as data
    URIs; tokens without a class are grey. Empty with fewer than 10 tokens.

    Source: van der Maaten and Hinton (2008); LaVer (arXiv 2512.06281) shows it layer by layer.
    """
    from sklearn.manifold import TSNE

    known = [of for of in kept.classes if of is not None]
    layers = sorted(kept.tokens)
    chosen = sorted({layers[0], layers[len(layers) // 2], layers[-1]})[:TSNE_LAYERS] if layers else []
    drawn = {}
    for layer in chosen:
        tokens = np.concatenate(kept.tokens[layer])[:TSNE_TOKENS]
        if len(tokens) < 10:
            return {}
        classes = np.concatenate(known)[: len(tokens)] if known else np.full(len(tokens), NOTHING)
        perplexity = min(30.0, (len(tokens) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(_normalised(tokens))
        drawn[layer] = _scatter(points, classes, class_names)
    return drawn


def _normalised(tokens: np.ndarray) -> np.ndarray:
    """The tokens at length 1: distances then follow cosines, which is what the other measures compare."""
    return tokens / np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), 1e-12)


def _asked_patch(grid: Grid, classes: np.ndarray | None, names: dict[int, str]) -> tuple[int, str]:
    middle = (grid.rows // 2) * grid.columns + grid.columns // 2
    if classes is None:
        return middle, "the middle patch"
    patches = classes[grid.first : grid.first + grid.size]
    objects = patches[(patches != NOTHING) & np.array([names.get(int(n)) != "background" for n in patches])]
    if not len(objects):
        return middle, "the middle patch"
    numbers, counts = np.unique(objects, return_counts=True)
    number = int(numbers[counts.argmax()])
    return int(np.flatnonzero(patches == number)[0]), names.get(number, f"class {number}")


def _scatter(points: np.ndarray, classes: np.ndarray, names: dict[int, str]) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axis_off()
    numbers, counts = np.unique(classes, return_counts=True)
    frequent = [int(n) for n in numbers[np.argsort(-counts)] if n != NOTHING][:12]
    others = ~np.isin(classes, frequent)
    axes.scatter(*points[others].T, s=5, color="#b8bec6", linewidths=0)
    for place, number in enumerate(sorted(frequent)):
        plain = names.get(number) == "background"
        chosen: Any = classes == number
        colour = "#b8bec6" if plain else f"C{place % 10}"
        label = names.get(number, f"class {number}")
        axes.scatter(*points[chosen].T, s=5 if plain else 14, color=colour, linewidths=0, label=label)
    if frequent:
        figure.legend(loc="outside lower center", ncols=4, fontsize=7, frameon=False, handletextpad=0.1)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return _as_uri(file.getvalue())


def _data_uri(image: Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return _as_uri(file.getvalue())


def _as_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
