"""From the JSON of a benchmark, beside it: a CSV of everything, a Markdown table and the plots.

python benchmarks/report.py benchmarks/results/cpu.json
"""

import csv
import io
import json
import sys
from pathlib import Path

import matplotlib
from implementations import OURS

from nsa.files import write_aside

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COPIES = ("clone", "copy")  # have one direction
DIRECTIONS = ("forward", "backward", "both")
# forward, and forward with backward, at most so many times input.clone(): what the CPU path was built for
TARGETS = {(32, 16): (1.5, 5), (128, 16): (3, 9)}


def write_report(path):
    """Write all of it; returns the Markdown."""
    results = json.loads(path.read_text())
    write_aside(path.with_suffix(".csv"), table(results))
    text = markdown(results, path.stem)
    write_aside(path.with_suffix(".md"), text)
    for name, plot in (("scaling", scaling), ("limit", limit), ("peers", peers)):
        figure = plot(results)
        if figure is not None:
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=110)
            plt.close(figure)
            write_aside(path.with_name(f"{path.stem}-{name}.png"), image.getvalue())
    return text


def table(results):
    file = io.StringIO()
    keys = ("group", "t", "n", "d", "block", "stride", "dtype_name", "segments")
    times = ("rounds", "p20", "p50", "p80", "gb_s", "peak_bytes")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*keys, "implementation", "direction", *times, "to_ours", "to_clone", "none"])
    for case in results["cases"]:
        head = [case[key] for key in keys]
        for name, found in case["results"].items():
            if "none" in found:
                writer.writerow([*head, name, *[""] * 9, found["none"]])
            for direction in DIRECTIONS:
                if direction in found:
                    ratios = [found[direction]["p50"] / other for other in (ours(case, direction), clone(case))]
                    writer.writerow([*head, name, direction, *[found[direction][t] for t in times], *ratios, ""])
    return file.getvalue()


def ours(case, direction):
    """The time of our fastest family; NaN if none ran."""
    return min((found[direction]["p50"] for found in families(case, direction)), default=float("nan"))


def families(case, direction):
    """What was found of ours; what stands in for the native code only where that is missing."""
    found = {name: case["results"].get(name, {}) for name in OURS}
    found = {name: times for name, times in found.items() if direction in times}
    return [times for name, times in found.items() if name != "operators" or len(found) == 1]


def clone(case):
    return case["results"]["clone"]["forward"]["p50"]


def markdown(results, stem):
    head = results["header"]
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    lines = [
        f"Measured on {head['date']}, commit {head['commit']}: {head['machine']}, {head['threads']} threads, waiting "
        f"{head['wait_policy'].lower()}, load {head['load']} at the start; Python {head['python']}, {versions}.",
        "",
        "Times are medians in ms, `p20 to p80` beside ours; in brackets the ratio to `input.clone()` in the same "
        "rounds, which takes new memory; `copy` writes to memory that is there. Peak: memory on top of the inputs, "
        "results included, in MiB.",
    ]
    if results.get("new_lengths"):
        lines += ["", "Every call has segments of other lengths, and makes a new window table. GB/s are of the first."]
    groups = dict.fromkeys(case["group"] for case in results["cases"])
    for group in groups:
        cases = [case for case in results["cases"] if case["group"] == group]
        names = list(dict.fromkeys(n for case in cases for n, found in case["results"].items() if "none" not in found))
        for direction in ("forward", "both"):
            title = "forward" if direction == "forward" else "forward and backward"
            columns = ["T", "N", "D", "block/stride", "dtype", "segments", *names, "peak, ours", "GB/s, ours"]
            lines += ["", f"### {group}: {title}", "", row(columns), row(["---"] * len(columns))]
            lines += [row(cells(case, names, direction)) for case in cases]
    if results["host"]:
        lines += ["", "### host", "", row(["", "us"]), row(["---", "---"])]
        lines += [row([name, f"{seconds * 1e6:,.1f}"]) for name, seconds in results["host"].items()]
    reasons = {(n, f["none"]) for case in results["cases"] for n, f in case["results"].items() if "none" in f}
    if reasons:
        lines += ["", "Not timed: " + "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons)) + "."]
    return "\n".join(lines) + "\n"


def cells(case, names, direction):
    geometry = f"{case['block']}/{case['stride']}"
    line = [f"{case['t']:,}", case["n"], case["d"], geometry, case["dtype_name"], case["segments"]]
    for name in names:
        found = case["results"].get(name, {}).get("forward" if name in COPIES else direction)
        if found is None:
            line.append("")
            continue
        spread = f" `{found['p20'] * 1e3:.3g} to {found['p80'] * 1e3:.3g}`" if name in OURS else ""
        ratio = "" if name == "clone" else f" ({found['p50'] / clone(case):.2f})"
        line.append(f"{found['p50'] * 1e3:.3g}{spread}{ratio}")
    mine = min((found[direction] for found in families(case, direction)), key=p50, default=None)
    peak = mine and mine["peak_bytes"]
    return [*line, f"{peak / 2**20:.0f}" if peak is not None else "", f"{mine['gb_s']:.1f}" if mine else ""]


def p50(found):
    return found["p50"]


def row(cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def scaling(results):
    """Time against T."""
    cases = [case for case in results["cases"] if case["group"] == "scaling"]
    if not cases:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    rows = [case["t"] for case in cases]
    series = {("clone", "forward"): "input.clone()", ("copy", "forward"): "copy into memory that is there"}
    series |= {(name, d): f"{name}, {label(d)}" for name in OURS for d in ("forward", "both")}
    for (name, direction), text in series.items():
        points = [(c["t"], c["results"][name][direction]) for c in cases if direction in c["results"].get(name, {})]
        if points:
            t, found = zip(*points)
            axes.plot(t, [f["p50"] * 1e3 for f in found], "--" if name in COPIES else "o-", label=text)
            axes.fill_between(t, *([f[p] * 1e3 for f in found] for p in ("p20", "p80")), alpha=0.2)
    middle = len(cases) // 2
    each = ours(cases[middle], "forward") * 1e3 / rows[middle]
    axes.plot(rows, [each * t for t in rows], ":", color="gray", label="linear in T")
    case = cases[0]
    axes.set(xscale="log", yscale="log", xlabel="T, rows", ylabel="ms, median; band p20 to p80")
    axes.set_xscale("log", base=2)
    axes.set_title(f"{case['block']}/{case['stride']}, N {case['n']}, D {case['d']}, {case['dtype_name']}, documents")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def limit(results):
    """Ratio of ours to the limit, by shape."""
    cases = [case for case in results["cases"] if case["group"] in ("targets", "shapes")]
    figure, panels = plt.subplots(1, 2, figsize=(11, 1.2 + 0.24 * len(cases)), sharey=True, layout="constrained")
    for axes, direction, i_target in zip(panels, ("forward", "both"), range(2)):
        axes.barh(range(len(cases)), [ours(case, direction) / clone(case) for case in cases], color="tab:blue")
        copies = [case["results"]["copy"]["forward"]["p50"] / clone(case) for case in cases]
        axes.plot(copies, range(len(cases)), "k|", label="copy into memory that is there")
        for i, case in enumerate(cases):
            target = TARGETS.get((case["block"], case["stride"]))
            if case["group"] == "targets" and case["device_name"] == "cpu":
                axes.plot([target[i_target]] * 2, [i - 0.45, i + 0.45], color="tab:red", label="target")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=label(direction), xlabel="times input.clone()")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(cases)), [shape(case) for case in cases], fontsize=8)
    panels[0].set_ylim(len(cases) - 0.4, -0.6)
    handles, labels = panels[0].get_legend_handles_labels()
    panels[0].legend(handles[:2], labels[:2])
    figure.suptitle("Ours against the limit")
    return figure


def peers(results):
    """Everybody against the limit, at the sizes of the first case."""
    cases = [case for case in results["cases"] if case["group"] in ("targets", "shapes")]
    cases = [case for case in cases if all(case[size] == cases[0][size] for size in ("t", "n", "d"))]
    names = [n for n in dict.fromkeys(n for case in cases for n in case["results"]) if n not in COPIES]
    names = [n for n in names if any("none" not in case["results"].get(n, {"none": 0}) for case in cases)]
    figure, panels = plt.subplots(2, 1, figsize=(11, 8), sharex=True, layout="constrained")
    for axes, direction in zip(panels, ("forward", "both")):
        for i_name, name in enumerate(names):
            heights = [
                case["results"].get(name, {}).get(direction, {"p50": float("nan")})["p50"] / clone(case)
                for case in cases
            ]
            at = [i + (i_name - (len(names) - 1) / 2) * 0.8 / len(names) for i in range(len(cases))]
            axes.bar(at, heights, 0.8 / len(names), label=name)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(yscale="log", title=label(direction), ylabel="times input.clone()")
        axes.grid(axis="y", alpha=0.3)
    labels = [f"{c['block']}/{c['stride']} {c['dtype_name']} {c['segments']}" for c in cases]
    panels[1].set_xticks(range(len(cases)), labels, fontsize=8, rotation=60, ha="right")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.suptitle("T {t:,}, N {n}, D {d}".format(**cases[0]))
    return figure


def label(direction):
    return "forward and backward" if direction == "both" else direction


def shape(case):
    sizes = f"{case['t'] // 1024}k·{case['n']}·{case['d']}"
    return f"{case['block']}/{case['stride']} {case['dtype_name']} {sizes} {case['segments']}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"expected one JSON file, got {len(sys.argv) - 1} arguments\n{__doc__}")
    print(write_report(Path(sys.argv[1])))
