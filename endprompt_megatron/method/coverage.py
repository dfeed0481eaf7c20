"""Which relative distances a training supervises, how often, and what it never sees.

Counts come from distances.py, averaged over samples and prompts; here they become bands for a table and
a picture.  matplotlib is imported only to draw.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from endprompt_megatron.common.plotting import PAPER
from endprompt_megatron.method.distances import counts_of_bends, distance_bends, gaps, supervised_ranges
from endprompt_megatron.method.positions import known, position_ids, segment_lengths


@dataclass(frozen=True)
class Coverage:
    """`counts` float64 [L]: expected (query, key) pairs a sample at each relative distance 0 .. L-1."""

    method: str
    target: int
    segments: list[tuple[int, int]]  # (a, b) for each terminal segment that a sample can have
    shares: list[float]  # of the samples, of each of them
    samples: int  # drawn for each of them; 1 where all are alike
    counts: np.ndarray
    examples: list[np.ndarray]  # position ids of a few samples

    @property
    def supervised(self) -> list[tuple[int, int]]:
        """Ranges of distances that some sample supervised, both ends included."""
        return supervised_ranges(self.counts)

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """Ranges of distances that no sample supervised, both ends included."""
        return gaps(self.counts)

    @property
    def share(self) -> float:
        """Share of the distances 0 .. L-1 that are supervised."""
        return float((self.counts > 0).mean())

    @property
    def prompt(self) -> float:
        """Tokens of the terminal segment, the mean over the samples."""
        return sum(share * b for share, (_, b) in zip(self.shares, self.segments, strict=True))

    def bands(self, count: int = 16) -> list[dict]:
        """`count` bands of equal width: first and last distance, share supervised, pairs a sample, mean a distance."""
        edges = np.linspace(0, self.target, min(count, self.target) + 1).astype(int)
        bands = []
        for first, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            inside = self.counts[first:stop]
            bands.append(
                {
                    "first": first,
                    "last": stop - 1,
                    "supervised": float((inside > 0).mean()),
                    "pairs": float(inside.sum()),
                    "pairs_per_distance": float(inside.mean()),
                }
            )
        return bands

    def as_dict(self) -> dict:
        """What --json prints."""
        return {
            "method": self.method,
            "target": self.target,
            "segments": [
                {"context": a, "prompt": b, "share": share}
                for share, (a, b) in zip(self.shares, self.segments, strict=True)
            ],
            "samples": self.samples,
            "share_supervised": self.share,
            "supervised": self.supervised if len(self.supervised) <= 64 else None,
            "gaps": self.gaps if len(self.gaps) <= 64 else None,
            "pairs": float(self.counts.sum()),
            "bands": self.bands(),
        }


def coverage(
    method: str,
    physical_len: int,
    target_len: int,
    prompt_lens: list[int],
    *,
    shares: list[float] | None = None,
    samples: int = 2000,
    of: int | None = None,
    seed: int = 0,
    **knobs: int,
) -> Coverage:
    """Coverage of a method: the mean over its terminal segments and, where samples differ, over `samples` of them.

    `prompt_lens` are lengths of terminal segments, all copies of a prompt together, and `shares` how often each occurs
    (default: equally).  `of`: samples of the run, over which those counted are spread evenly; default: its first ones.
    `knobs`: as position_ids has them.  Raises ValueError where positions.py does.
    """
    lens = prompt_lens or [0]
    shares = shares or [1 / len(lens)] * len(lens)
    drawn = min(samples, of or samples) if known(method).varies else 1
    indices = np.linspace(0, (of or drawn) - 1, drawn).astype(np.int64).tolist()
    counts = np.zeros(target_len)
    segments, examples = [], []
    for length, share in zip(lens, shares, strict=True):
        a, b = segment_lengths(method, physical_len, length, target_len)
        segments.append((a, b))
        bends = np.zeros(target_len + 2, dtype=np.int64)
        for number, index in enumerate(indices):
            positions = position_ids(method, a, b, target_len, index=index, seed=seed, **knobs)
            bends += distance_bends(positions, target_len)
            if number % -(-drawn // 6) == 0 and len(segments) == 1:
                examples.append(positions)
        counts += share / drawn * counts_of_bends(bends)
    return Coverage(method, target_len, segments, shares, drawn, counts, examples)


def table(result: Coverage) -> str:
    """The bands as text, with what is supervised and the gap above them."""
    a, b = result.segments[0]
    lines = [
        f"method {result.method}   target L = {result.target}   context a = {a}   prompt b = {b}"
        + (f"   (and {len(result.segments) - 1} other prompts)" if len(result.segments) > 1 else ""),
        f"supervised  {result.share:.2%} of the distances 0 .. {result.target - 1}: {_ranges(result.supervised)}",
        f"gap         {_ranges(result.gaps)}",
    ]
    if result.samples > 1:
        lines.append(f"samples differ: mean over {result.samples} of them; a range is what these reached")
    lines += ["", f"{'distances':>17}  {'supervised':>10}  {'pairs a sample':>15}  {'a distance':>10}"]
    bands = result.bands()
    max_pairs = max(band["pairs"] for band in bands)
    for band in bands:
        bar = "█" * int(np.ceil(24 * np.log1p(band["pairs"]) / np.log1p(max_pairs))) if band["pairs"] else ""
        span = f"{band['first']} - {band['last']}"
        numbers = f"{band['supervised']:>10.2%}  {band['pairs']:>15,.1f}  {band['pairs_per_distance']:>10,.2f}"
        lines.append(f"{span:>17}  {numbers}  {bar}".rstrip())
    return "\n".join([*lines, "(bars: logarithmic)"])


def _ranges(ranges: list[tuple[int, int]], shown: int = 4) -> str:
    if not ranges:
        return "none"
    text = ", ".join(f"[{first}, {last}]" for first, last in ranges[:shown])
    return text + (f" and {len(ranges) - shown} more ranges" if len(ranges) > shown else "")


def draw(result: Coverage, path: Path | str) -> None:
    """Draw position maps of a few samples and the expected pairs by distance into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ink, muted, blue = PAPER.ink, PAPER.muted, PAPER.extended
    style = {"font.size": 10, "axes.edgecolor": muted, "axes.labelcolor": ink, "text.color": ink}
    with pyplot.rc_context(style):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(11, 4.2), width_ratios=(1, 1.7), layout="constrained", dpi=150
        )
        a, b = result.segments[0]
        for number, positions in enumerate(result.examples):
            # Points, not a line: a line across the jump would show positions that do not exist.
            left.plot(positions, ".", markersize=2.5, color=blue, alpha=1 - 0.13 * number, rasterized=True)
        left.axhline(result.target - 1, color=muted, linewidth=0.8, linestyle="--")
        left.annotate("L - 1", (0, result.target - 1), xytext=(2, -11), textcoords="offset points", color=muted)
        if b and len(result.examples) == 1:
            left.annotate(
                f"prompt, b = {b}",
                (a + b - 1, result.examples[0][-1]),
                xytext=(-14, -22),
                textcoords="offset points",
                ha="right",
                arrowprops={"arrowstyle": "->", "color": muted},
            )
        several = f"{len(result.examples)} samples" if len(result.examples) > 1 else "one sample"
        left.set(title=f"position ids, {several}", xlabel="physical index", ylabel="position id")
        left.set_ylim(-0.03 * result.target, 1.05 * result.target)

        distances = np.arange(result.target)
        right.fill_between(distances, result.counts, 0, step="mid", color=blue, alpha=0.85, linewidth=0)
        smallest = result.counts[result.counts > 0].min()
        right.set_yscale("log")
        right.set_ylim(np.clip(smallest, 1e-2, 1) * 0.5, result.counts.max() * 3)
        wide = [span for span in result.gaps if span[1] - span[0] + 1 >= result.target / 200]
        for first, last in wide[:20]:
            right.axvspan(first, last, color=PAPER.control, alpha=0.2, linewidth=0)
        if wide:
            first, last = max(wide, key=lambda span: span[1] - span[0])
            right.text(
                (first + last) / 2,
                0.55,
                f"never supervised\n{first} .. {last}",
                ha="center",
                transform=right.get_xaxis_transform(),
            )
        right.set(
            title=f"{result.share:.2%} of the relative distances supervised",
            xlabel="relative distance",
            ylabel="expected pairs a sample",
            xlim=(0, result.target),
        )
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.set_major_locator(pyplot.MaxNLocator(5, integer=True))
        figure.suptitle(f"{result.method}: a = {a}, b = {b}, L = {result.target}", fontweight="bold")
        figure.savefig(path)
        pyplot.close(figure)
