"""Segments grey and white matter in a brain, with jaxconv as the upsampling of a 3D U-Net.

    pip install "jaxconv[examples]"      # nilearn, nibabel, optax, tqdm, matplotlib
    python examples/segment_brain.py

The image is the ICBM 152 T1 template at 1 mm; the truth is, in each voxel, the likeliest of grey
matter, white matter and anything else in the template's tissue maps. nilearn carries all three as
NIfTI files, so nothing is downloaded. The U-Net is plain JAX: its parameters are a pytree, and one
function argument, `upsample`, puts lax in the place of `jaxconv.conv_transpose3d`.

Two coronal slabs are held out. (Left and right would not do: the template is symmetric.) No
training input holds a voxel of theirs, and the few planes beside them are neither trained on nor
scored, since neighbouring planes look alike. The script prints

- the time of a training step with jaxconv and with lax in its place, from the same parameters on
  the same data, and how far apart the losses are;
- the Dice score of each tissue in the held-out slabs, beside that of the two intensity thresholds
  that are the best ones for the voxels trained on;

and it writes a picture of the T1, the truth and the prediction in three planes. A CPU trains on
patches, in one or two minutes on two cores; a GPU trains on the full volume in every step.
"""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from matplotlib import colors, patches
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from nibabel.affines import apply_affine
from nilearn import datasets

import jaxconv

TISSUES = ("other", "grey matter", "white matter")
SLAB, GUARD = 20, 4  # planes that a slab holds out, and planes on either side of it left unused
PATCH = 24  # voxels along each axis of a patch
MULTIPLE = 4  # the network halves the volume twice, so this divides its sizes
CHANNELS = (8, 16, 32)  # at full, half and quarter resolution
GROUPS = 4  # of the finest upsampling
TIMED_STEPS = 6
HIDDEN = 16  # channels of the last hidden layer

Params = dict[str, dict[str, jax.Array]]
Step = Callable[..., tuple[Params, optax.OptState, jax.Array]]


# ---- Data -------------------------------------------------------------------------------------


class Brain(NamedTuple):
    t1: np.ndarray  # [x, y, z] float32, 0 to 1
    truth: np.ndarray  # [x, y, z] int32, an index into TISSUES
    held_out: np.ndarray  # [y] bool: the coronal planes that are scored
    trained: np.ndarray  # [y] bool: the coronal planes whose truth is trained on
    affine: np.ndarray  # [4, 4], from voxels to mm


class Batch(NamedTuple):
    image: np.ndarray | jax.Array  # [1, 1, x, y, z]
    truth: np.ndarray | jax.Array  # [1, x, y, z]
    counts: np.ndarray | jax.Array  # [1, x, y, z] bool: the voxels that count in the loss


def load_brain(crop: bool) -> Brain:
    """Returns the template, its tissues and the split, cut to the brain's box where `crop` says so,
    and with sizes that the network can halve."""
    t1_image = datasets.load_mni152_template()
    images = (t1_image, datasets.load_mni152_gm_template(), datasets.load_mni152_wm_template())
    t1, grey, white = (np.asarray(image.dataobj, np.float32) for image in images)
    truth = np.argmax([1 - grey - white, grey, white], axis=0).astype(np.int32)

    low, high = np.zeros(3, int), np.array(t1.shape)
    if crop:
        inside = np.argwhere(t1 > 0)
        low, high = inside.min(0), inside.max(0) + 1
    margins = [(0, -(b - a) % MULTIPLE) for a, b in zip(low, high, strict=True)]
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    t1, truth = np.pad(t1[box], margins), np.pad(truth[box], margins)
    affine = t1_image.affine.copy()
    affine[:3, 3] = apply_affine(t1_image.affine, low)

    planes = np.arange(t1.shape[1])
    in_brain = np.flatnonzero(truth.any(axis=(0, 2)))
    thirds = in_brain[0] + len(in_brain) * np.array([1, 2]) // 3
    distance = np.abs(planes[:, None] + 0.5 - thirds).min(axis=1)
    return Brain(t1, truth, distance < SLAB / 2, distance > SLAB / 2 + GUARD, affine)


def held_out_slabs(brain: Brain) -> np.ndarray:
    """Returns where each slab starts and ends along y, [slab, 2] in mm."""
    ends = np.flatnonzero(np.diff(brain.held_out, prepend=False, append=False))
    return ends.reshape(-1, 2) + brain.affine[1, 3] - 0.5  # a voxel's centre has its coordinate


def batch(brain: Brain, start: np.ndarray, size: np.ndarray) -> Batch:
    """Returns the box of `size` at `start` to train on: without the T1 of held-out planes."""
    x, y, z = (slice(a, a + s) for a, s in zip(start, size, strict=True))
    image = np.where(brain.held_out[y, None], 0, brain.t1[x, y, z])
    counts = np.broadcast_to(brain.trained[y, None], image.shape)
    return Batch(image[None, None], brain.truth[x, y, z][None], counts[None])


def full_volume(brain: Brain) -> Iterator[Batch]:
    whole = batch(brain, np.zeros(3, int), np.array(brain.t1.shape))
    return itertools.repeat(jax.device_put(whole))


def random_patches(brain: Brain, seed: int) -> Iterator[Batch]:
    """Yields patches around random voxels of grey or white matter, beside the held-out slabs."""
    rng = np.random.default_rng(seed)
    size = np.full(3, PATCH)
    last = np.array(brain.t1.shape) - size
    beside = [y for y in range(last[1] + 1) if not brain.held_out[y : y + PATCH].any()]
    centres = np.argwhere((brain.truth > 0) & brain.trained[:, None])
    while True:
        start = np.clip(rng.choice(centres) - size // 2, 0, last)
        start[1] = min(beside, key=lambda y: abs(y - start[1]))
        yield batch(brain, start, size)


# ---- Network ----------------------------------------------------------------------------------


class Upsample(Protocol):
    def __call__(
        self,
        x: jax.Array,
        weight: jax.Array,
        bias: jax.Array,
        stride: int,
        padding: int = 0,
        output_padding: int = 0,
        groups: int = 1,
    ) -> jax.Array: ...


def lax_conv_transpose3d(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    stride: int,
    padding: int = 0,
    output_padding: int = 0,
    groups: int = 1,
) -> jax.Array:
    """Is `jaxconv.conv_transpose3d` in terms of lax: a convolution of the input, dilated by the
    stride, with the kernel flipped and its channels swapped within each group."""
    c_in, c_out, *kernel = weight.shape
    weight = weight.reshape(groups, c_in // groups, c_out, *kernel).swapaxes(1, 2)
    y = jax.lax.conv_general_dilated(
        x,
        jnp.flip(weight.reshape(groups * c_out, c_in // groups, *kernel), (2, 3, 4)),
        window_strides=(1, 1, 1),
        padding=[(k - 1 - padding, k - 1 - padding + output_padding) for k in kernel],
        lhs_dilation=(stride,) * 3,
        feature_group_count=groups,
    )
    return y + bias[:, None, None, None]


UPSAMPLINGS: dict[str, Upsample] = {
    "jaxconv": jaxconv.conv_transpose3d,
    "lax": lax_conv_transpose3d,
}


def init_params(seed: int) -> Params:
    """Returns the U-Net's parameters, scaled for ReLUs (He et al., 2015)."""
    c0, c1, c2 = CHANNELS
    # Of an upsampling's k³ taps, (k / 2)³ reach an output voxel on average: the 8 in its fan-in.
    layers = {  # the weight's shape, and how many inputs each output sums
        "stem": ((c0, 1, 3, 3, 3), 27),
        "down1": ((c1, c0, 2, 2, 2), 8 * c0),
        "encode1": ((c1, c1, 3, 3, 3), 27 * c1),
        "down2": ((c2, c1, 2, 2, 2), 8 * c1),
        "bottom": ((c2, c2, 3, 3, 3), 27 * c2),
        "up2": ((c2, c1, 2, 2, 2), c2),
        "decode1": ((c1, c1, 3, 3, 3), 27 * c1),
        "up1": ((c1, c0 // GROUPS, 3, 3, 3), 27 / 8 * c1 / GROUPS),
        "mix": ((HIDDEN, 2 * c0 + 1), 2 * c0 + 1),
        "head": ((len(TISSUES), HIDDEN), HIDDEN),
    }
    params = {}
    for key, (name, (shape, fan_in)) in zip(
        jax.random.split(jax.random.key(seed), len(layers)), layers.items(), strict=True
    ):
        c_out = c1 if name == "up2" else c0 if name == "up1" else shape[0]
        weight = jax.random.normal(key, shape) * (2 / fan_in) ** 0.5
        params[name] = {"weight": weight, "bias": jnp.zeros(c_out)}
    # These two see the T1 itself: their ReLUs bend at intensities spread over its range.
    for name in ("stem", "mix"):
        params[name]["bias"] = jnp.linspace(-2.0, 2.0, len(params[name]["bias"]))
    return params


def conv(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    y = jax.lax.conv_general_dilated(x, layer["weight"], (1, 1, 1), "SAME")
    return jax.nn.relu(y + layer["bias"][:, None, None, None])


def downsample(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Is a convolution of kernel 2 and stride 2, as a product: its patches do not overlap."""
    n, c, i, j, k = x.shape
    blocks = x.reshape(n, c, i // 2, 2, j // 2, 2, k // 2, 2)
    y = jnp.einsum("ncxaybzd,ocabd->noxyz", blocks, layer["weight"])
    return jax.nn.relu(y + layer["bias"][:, None, None, None])


def dense(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    y = jnp.einsum("ncxyz,oc->noxyz", x, layer["weight"])
    return y + layer["bias"][:, None, None, None]


def unet(params: Params, image: jax.Array, upsample: Upsample) -> jax.Array:
    """Returns the logits [n, tissue, x, y, z] for an image [n, 1, x, y, z]."""
    image = 12 * (image - 0.6)  # grey matter comes near 0.6, and tissues some tenths apart
    fine = conv(params["stem"], image)
    half = conv(params["encode1"], downsample(params["down1"], fine))
    y = conv(params["bottom"], downsample(params["down2"], half))
    y = upsample(y, params["up2"]["weight"], params["up2"]["bias"], stride=2)
    y = conv(params["decode1"], jax.nn.relu(y) + half)
    y = upsample(
        y,
        params["up1"]["weight"],
        params["up1"]["bias"],
        stride=2,
        padding=1,
        output_padding=1,
        groups=GROUPS,
    )
    y = jnp.concatenate([jax.nn.relu(y), fine, image], axis=1)
    return dense(params["head"], jax.nn.relu(dense(params["mix"], y)))


# ---- Training ---------------------------------------------------------------------------------


def make_step(optimizer: optax.GradientTransformation, upsample: Upsample) -> Step:
    """Returns the jitted step (params, state, batch) -> (params, state, loss)."""

    def loss(params: Params, batch: Batch) -> jax.Array:
        logits = unet(params, jnp.asarray(batch.image), upsample)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.truth, axis=1).mean(
            where=batch.counts
        )

    @jax.jit
    def step(
        params: Params, state: optax.OptState, batch: Batch
    ) -> tuple[Params, optax.OptState, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state)
        return jax.tree.map(jnp.add, params, updates), state, value

    return step


def time_step(
    step: Step, params: Params, state: optax.OptState, batch: Batch
) -> tuple[float, list[float]]:
    """Returns the median time of a step in seconds, and the losses of the steps."""
    losses, seconds = [], []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        params, state, loss = jax.block_until_ready(step(params, state, batch))
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
    return statistics.median(seconds[1:]), losses  # the first step compiles


def compare_upsamplings(
    steps: dict[str, Step], params: Params, state: optax.OptState, batch: Batch
) -> None:
    """Prints the time of a step with each upsampling, and checks that the losses of some steps
    agree: those after the first depend on the gradients."""
    seconds, losses = {}, {}
    for name, step in steps.items():
        seconds[name], losses[name] = time_step(step, params, state, batch)
    ours, theirs = losses["jaxconv"], losses["lax"]
    print(
        f"A training step on {' x '.join(map(str, batch.truth.shape[1:]))} voxels takes "
        f"{seconds['jaxconv'] * 1e3:.1f} ms with jaxconv, {seconds['lax'] * 1e3:.1f} ms with lax "
        f"in its place ({seconds['lax'] / seconds['jaxconv']:.2f} x)."
    )
    error = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    # A GPU multiplies float32 with TF32's 11 bits by default, and sums in any order.
    tolerance = 1e-4 if jax.default_backend() == "cpu" else 1e-2
    print(
        f"The loss of step 1 is {ours[0]:.7f} with jaxconv and {theirs[0]:.7f} with lax, that of "
        f"step {TIMED_STEPS} {ours[-1]:.7f} and {theirs[-1]:.7f}: apart by {error:.1e} at most, "
        f"where {tolerance:.0e} is allowed."
    )
    if not error <= tolerance:
        raise SystemExit("The network does not compute the same with jaxconv and with lax.")


# ---- Evaluation -------------------------------------------------------------------------------


def dice(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns 2 |P ∩ T| / (|P| + |T|) for each tissue."""
    tissues = range(len(TISSUES))
    both = [np.sum((prediction == t) & (truth == t)) for t in tissues]
    sizes = [np.sum(prediction == t) + np.sum(truth == t) for t in tissues]
    return 2 * np.array(both) / np.array(sizes)


def best_thresholds(t1: np.ndarray, truth: np.ndarray, bins: int = 256) -> np.ndarray:
    """Returns the thresholds, of all pairs of multiples of 1 / bins, with the best mean Dice of
    grey matter (from the first to the second) and white matter (from the second on)."""
    level = np.digitize(t1, np.arange(1, bins) / bins)
    grey, white = (np.bincount(level[truth == t], minlength=bins) for t in (1, 2))
    every = np.bincount(level, minlength=bins)
    # [i] counts the voxels of intensity i / bins and above.
    above_grey, above_white, above = (
        np.append(np.cumsum(h[::-1])[::-1], 0)[:bins] for h in (grey, white, every)
    )
    lower, upper = np.triu_indices(bins)
    grey_dice = (
        2 * (above_grey[lower] - above_grey[upper]) / (above[lower] - above[upper] + grey.sum())
    )
    white_dice = 2 * above_white[upper] / (above[upper] + white.sum())
    best = np.argmax(grey_dice + white_dice)
    return np.array([lower[best], upper[best]]) / bins


def print_scores(
    network: np.ndarray, thresholds: np.ndarray, cuts: np.ndarray, voxels: int
) -> None:
    print(f"Dice of {voxels:,} held-out voxels:")
    print(f"  {'':14}network   thresholds at {cuts[0]:.3f} and {cuts[1]:.3f}")
    for tissue, ours, baseline in zip(TISSUES, network, thresholds, strict=True):
        print(f"  {tissue:14}{ours:.4f}    {baseline:.4f}")
    gain = network[1:].mean() - thresholds[1:].mean()
    print(f"  The network's mean over grey and white matter is {gain:+.4f} from the thresholds'.")


# ---- Picture ----------------------------------------------------------------------------------

PAPER, INK, BAND = "#111317", "#e8e6e1", "#ff9d2e"
TISSUE_COLOURS = ("#00000000", "#3f8fd2", "#f2ead7")  # other voxels let the T1 through


class View(NamedTuple):
    name: str
    normal: int  # the axis across the plane
    at: float  # mm along it
    sides: tuple[str, str]  # what lies at the left and at the right of the picture


VIEWS = (
    View("axial", 2, 10, ("L", "R")),
    View("coronal", 1, 14, ("L", "R")),
    View("sagittal", 0, -26, ("P", "A")),
)


def draw(brain: Brain, prediction: np.ndarray, caption: str, output: pathlib.Path) -> None:
    """Writes T1, truth and prediction in three planes, with the held-out slabs marked."""
    origin = brain.affine[:3, 3]
    inside = np.argwhere(brain.t1 > 0)
    low, high = origin + inside.min(0) - 4, origin + inside.max(0) + 4
    in_plane = [[axis for axis in range(3) if axis != view.normal] for view in VIEWS]

    figure = Figure(figsize=(11, 12.8), facecolor=PAPER)
    figure.subplots_adjust(0.045, 0.07, 0.99, 0.955, wspace=0.02, hspace=0.02)
    shapes = [(high - low)[v] / (high - low)[h] for h, v in in_plane]
    axes = figure.subplots(3, 3, gridspec_kw={"height_ratios": shapes})
    for row, view, (h, v) in zip(axes, VIEWS, in_plane, strict=True):
        index = round(view.at - origin[view.normal])
        t1, truth, guess = (
            np.take(volume, index, view.normal).T for volume in (brain.t1, brain.truth, prediction)
        )
        ends = np.stack([origin, origin + brain.t1.shape], axis=1) - 0.5
        place: dict[str, Any] = {"origin": "lower", "extent": (*ends[h], *ends[v])}
        for axis, tissue in zip(row, (None, truth, guess), strict=True):
            axis.imshow(t1, cmap="gray", vmin=0, vmax=1, **place)
            if tissue is not None:
                palette = colors.ListedColormap(TISSUE_COLOURS)
                axis.imshow(tissue, palette, vmin=0, vmax=2, interpolation="nearest", **place)
            axis.set(xlim=(low[h], high[h]), ylim=(low[v], high[v]), xticks=[], yticks=[])
            axis.set_facecolor("black")
            axis.spines[:].set_visible(False)
            corner: dict[str, Any] = {"transform": axis.transAxes, "color": INK, "fontsize": 12}
            axis.text(0.02, 0.02, view.sides[0], **corner)
            axis.text(0.98, 0.02, view.sides[1], ha="right", **corner)
            for start, end in held_out_slabs(brain):
                mark_slab(axis, view, h, start, end)
        label = f"{view.name}, {'xyz'[view.normal]} = {view.at:g} mm"
        row[0].set_ylabel(label, color=INK, fontsize=14, labelpad=8)
    for axis, title in zip(axes[0], ("T1", "truth", "prediction"), strict=True):
        axis.set_title(title, color=INK, fontsize=18, pad=8)
    names = dict(zip(TISSUES[1:], TISSUE_COLOURS[1:], strict=True)) | {"held out": BAND}
    figure.legend(
        handles=[patches.Patch(color=colour, label=name) for name, colour in names.items()],
        loc="lower center",
        bbox_to_anchor=(0.5, 0.03),
        ncols=len(names),
        frameon=False,
        labelcolor=INK,
        fontsize=14,
    )
    figure.text(0.5, 0.015, caption, color=INK, fontsize=13, ha="center")
    figure.savefig(output, dpi=130)


def mark_slab(axis: Axes, view: View, horizontal: int, start: float, end: float) -> None:
    """Marks the planes from y = `start` to `end` mm where they cross this view."""
    line: dict[str, Any] = {"color": BAND, "linewidth": 1.2}
    if view.normal == 1:
        if start < view.at < end:  # all of this plane is held out
            frame = patches.Rectangle((0, 0), 1, 1, transform=axis.transAxes, fill=False)
            frame.set(edgecolor=BAND, linewidth=5)
            axis.add_patch(frame)
        return
    span, lines = (axis.axvspan, axis.axvline) if horizontal == 1 else (axis.axhspan, axis.axhline)
    for low, high in ((0, 0.02), (0.98, 1)):
        span(start, end, low, high, color=BAND, linewidth=0)
    for edge in (start, end):
        lines(edge, **line)


# ---- Command ----------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument(
        "--steps", type=int, help="training steps (1500 on patches, 500 on the full volume)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of parameters and patches")
    parser.add_argument(
        "--upsampling", choices=UPSAMPLINGS, default="jaxconv", help="what to train with"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default="segment_brain.png", help="the picture"
    )
    parser.add_argument("--losses", type=pathlib.Path, help="write every step's loss here, as JSON")
    return parser.parse_args()


def main() -> None:
    begin = time.perf_counter()
    arguments = parse_arguments()
    on_gpu = jax.default_backend() == "gpu"
    brain = load_brain(crop=not on_gpu)
    batches = full_volume(brain) if on_gpu else random_patches(brain, arguments.seed)
    number = arguments.steps or (500 if on_gpu else 1500)
    print(
        f"The T1 has {' x '.join(map(str, brain.t1.shape))} voxels of 1 mm. Held out: "
        + " and ".join(f"y from {start:g} to {end:g} mm" for start, end in held_out_slabs(brain))
    )

    rate = optax.warmup_cosine_decay_schedule(1e-3, 7e-3, number // 20, number, 2e-5)
    optimizer = optax.adam(rate, b2=0.99)
    params = init_params(arguments.seed)
    state = optimizer.init(params)
    steps = {name: make_step(optimizer, upsample) for name, upsample in UPSAMPLINGS.items()}
    compare_upsamplings(steps, params, state, next(batches))

    losses: list[float] = []
    with tqdm.trange(number, desc=f"training with {arguments.upsampling}") as progress:
        for _ in progress:
            params, state, loss = steps[arguments.upsampling](params, state, next(batches))
            losses.append(float(loss))
            progress.set_postfix(loss=f"{np.mean(losses[-20:]):.4f}", refresh=False)
    if arguments.losses:
        record = {"upsampling": arguments.upsampling, "seed": arguments.seed, "losses": losses}
        arguments.losses.write_text(json.dumps(record))

    @functools.partial(jax.jit, static_argnums=2)
    def predict(params: Params, t1: jax.Array, upsample: Upsample) -> jax.Array:
        return unet(params, t1[None, None], upsample)[0].argmax(0)

    prediction = np.asarray(predict(params, brain.t1, UPSAMPLINGS[arguments.upsampling]))
    truth = brain.truth[:, brain.held_out]
    cuts = best_thresholds(
        brain.t1[:, brain.trained].ravel(), brain.truth[:, brain.trained].ravel()
    )
    network = dice(prediction[:, brain.held_out], truth)
    thresholds = dice(np.digitize(brain.t1[:, brain.held_out], cuts), truth)
    print_scores(network, thresholds, cuts, truth.size)
    caption = "Dice in the held-out slabs: " + ", ".join(
        f"{tissue} {ours:.3f} (best thresholds {baseline:.3f})"
        for tissue, ours, baseline in list(zip(TISSUES, network, thresholds, strict=True))[1:]
    )
    draw(brain, prediction, caption, arguments.output)
    print(f"Wrote {arguments.output} after {time.perf_counter() - begin:.0f} s.")


if __name__ == "__main__":
    main()
