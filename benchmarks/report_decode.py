"""From the JSON of bench_decode.py, beside it: Markdown tables and a plot.

python benchmarks/report_decode.py benchmarks/results/decode.json
"""

import io
import json
import sys
from pathlib import Path

import matplotlib
from report import row

from nsa.files import write_aside

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = ("empty infer", "infer", "empty append", "append", "gather")
ALIKE = ("block", "stride", "dtype_name", "memory")  # in all cases of the plot


def write_report(path):
    """Write all of it; returns the Markdown."""
    results = json.loads(path.read_text())
    text = markdown(results)
    write_aside(path.with_suffix(".md"), text)
    image, figure = io.BytesIO(), plot(results)
    figure.savefig(image, format="png", dpi=110)
    plt.close(figure)
    write_aside(path.with_suffix(".png"), image.getvalue())
    return text


def markdown(results):
    head = results["header"]
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    lines = [
        f"Measured on {head['date']}, commit {head['commit']}: {head['machine']}, {head['threads']} threads, waiting "
        f"{head['wait_policy'].lower()}, freed memory {head['freed_memory']}, load {head['load']} at the start; Python "
        f"{head['python']}, {versions}.",
        "",
        "Times are medians, `p20 to p80` beside ours. `empty` ops have the same signatures and do nothing: the limit. "
        "`gather` copies the due windows and sums them with einsum in fp32. N 8, D 128, pages of 128 rows.",
        "",
        "### decode: a step of one row a sequence, us",
        "",
        "Calls rotate over several places of memory; `warm` ones find everything in the caches from the call before.",
        "",
    ]
    columns = ["block/stride", "dtype", "length", "batch", "due", "memory", *NAMES, "gather / infer", "gather / append"]
    lines += [row(columns), row(["---"] * len(columns)), *map(_decode_row, results["decode"])]
    columns = ["rows", "chunk", "beside decodes", "calls", "append", "one forward", "append / forward"]
    lines += ["", "### prefill: all chunks of a sequence, ms", "", row(columns), row(["---"] * len(columns))]
    lines += map(_prefill_row, results["prefill"])
    return "\n".join(lines) + "\n"


def _decode_row(case):
    found = case["results"]
    times = [_time(found[name], 1e6, "empty" not in name and name != "gather") for name in NAMES]
    ratios = [f"{p50(case, 'gather') / p50(case, name):.2f}" for name in ("infer", "append")]
    head = [f"{case['block']}/{case['stride']}", case["dtype_name"], f"{case['length']:,}", case["batch"], case["due"]]
    return row([*head, case["memory"], *times, *ratios])


def _prefill_row(case):
    found = case["results"]
    times = [_time(found[name], 1e3, True) for name in ("append", "forward")]
    head = [f"{case['rows']:,}", f"{case['chunk']:,}", case["decodes"], -(-case["rows"] // case["chunk"])]
    return row([*head, *times, f"{p50(case, 'append') / p50(case, 'forward'):.2f}"])


def _time(found, scale, with_spread):
    spread = f" `{found['p20'] * scale:.3g} to {found['p80'] * scale:.3g}`" if with_spread else ""
    return f"{found['p50'] * scale:.3g}{spread}"


def p50(case, name):
    return case["results"][name]["p50"]


def plot(results):
    """The time of a step against the batch, of windows and dtype as in the first case and the middle one of lengths."""
    first = results["decode"][0]
    cases = [case for case in results["decode"] if all(case[key] == first[key] for key in ALIKE)]
    lengths = sorted({case["length"] for case in cases})
    cases = [case for case in cases if case["length"] == lengths[len(lengths) // 2]]
    panels_of = {
        "no window due": lambda case: case["due"] == 0,
        "1 of 16 due": lambda case: case["due"] == -(-case["batch"] // 16),
        "all due": lambda case: case["due"] == case["batch"],
    }
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.5), sharey=True, layout="constrained")
    for axes, (title, belongs) in zip(panels, panels_of.items()):
        mine = [case for case in cases if belongs(case)]
        for name in NAMES:
            style = "--" if "empty" in name else "o-"
            found = [case["results"][name] for case in mine]
            batches = [case["batch"] for case in mine]
            axes.plot(batches, [f["p50"] * 1e6 for f in found], style, label=name)
            axes.fill_between(batches, *([f[p] * 1e6 for f in found] for p in ("p20", "p80")), alpha=0.2)
        axes.set(title=title, xscale="log", yscale="log", xlabel="sequences in the batch")
        ticks = sorted({case["batch"] for case in mine})
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("us a step, median; band p20 to p80")
    panels[0].legend()
    shape = "{block}/{stride}, N 8, D 128, {dtype_name}, {length:,} rows a sequence".format(**cases[0])
    figure.suptitle(f"A decode step, measured on: {results['header']['device']}. {shape}")
    return figure


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"expected one JSON file, got {len(sys.argv) - 1} arguments\n{__doc__}")
    print(write_report(Path(sys.argv[1])))
