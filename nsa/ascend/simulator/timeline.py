"""Launches on a time axis: a trace for chrome://tracing or ui.perfetto.dev, and a picture. Modelled, not measured.

Both take `report.Report`s, of launches that follow each other on one target.
"""

import io
import json
from collections import defaultdict

from nsa.ascend import rates

from .trace import PIPES

US = 1e6
SPANS = 60  # of the busiest pipe in a panel of the picture, about: more could not be told apart
SHOWN = 6  # names of instructions in a legend


def chrome_trace(reports):
    """The text of a JSON trace: a process for each core, a thread for each pipe, times in microseconds."""
    events, processes, start = [], {}, 0.0
    for report in reports:
        clock = report.target.clock
        for span in report.timing.spans:
            process = processes.setdefault(span.core, len(processes))
            operation = span.operation
            events.append(
                {
                    "name": operation.name,
                    "cat": report.launch.kernel,
                    "ph": "X",
                    "ts": start + span.start / clock * US,
                    "dur": (span.end - span.start) / clock * US,
                    "pid": process,
                    "tid": PIPES.index(span.pipe),
                    "args": {
                        "line": operation.line,
                        "bytes": sum(map(_bytes, (*operation.reads, *operation.writes))),
                        "waited for": _waited_for(span),
                    },
                }
            )
        start += report.timing.seconds * US + rates.task_overhead(report.target) * US
    for core, process in processes.items():
        name = f"{core.core_type} {core.index}" + (f".{core.sub_block}" if core.core_type == "AIV" else "")
        events.append({"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}})
        events += [
            {"name": "thread_name", "ph": "M", "pid": process, "tid": i, "args": {"name": pipe}}
            for i, pipe in enumerate(PIPES)
        ]
    return json.dumps({"displayTimeUnit": "ns", "otherData": {"what": "modelled, not measured"}, "traceEvents": events})


def _bytes(view):
    size = view.dtype.itemsize
    for n in view.sizes:
        size *= n
    return size


def _waited_for(span):
    kind, *rest = span.waited_for or ("nothing",)
    return " ".join([kind, *(str(each) for each in rest)])


def plot(reports):
    """The bytes of a PNG: for each launch the core that ends last, or of many instructions its first and its last part,
    with a row for each pipe. A colour is an instruction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(20, 1 + 3 * len(reports)), layout="constrained")
    grid = figure.add_gridspec(len(reports), 2)
    for i, report in enumerate(reports):
        spans, cycles = _of_last_core(report), report.timing.cycles
        colours, width = _colours(spans), _width(spans, cycles)
        in_parts = 2 * width < cycles
        panel = figure.add_subplot(grid[i, 0] if in_parts else grid[i, :])
        _draw(panel, report, spans, colours, 0.0, width if in_parts else cycles)
        panel.set_title(_title(report, spans), loc="left")
        if in_parts:
            panel = figure.add_subplot(grid[i, 1])
            _draw(panel, report, spans, colours, cycles - width, width)
            panel.set_title(f"its last part, of {cycles / report.target.clock * US:.1f} us", loc="left")
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
        legend = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "fontsize": 8, "frameon": False}
        panel.legend(handles, list(colours), title="instruction", **legend)
    figure.supxlabel("microseconds since the start of the launch")
    figure.suptitle(f"{reports[0].target.name}: MODELLED time, never measured on an NPU")
    png = io.BytesIO()
    figure.savefig(png, dpi=80)
    pyplot.close(figure)
    return png.getvalue()


def _title(report, spans):
    x, y, z = report.launch.grid
    last = max(spans, key=lambda span: span.end).core if spans else None
    core = f"; {last.core_type} core {last.index}, which ends last" if last else ""
    return f"{report.launch.kernel}, grid {x} x {y} x {z}{core}"


def _of_last_core(report):
    """The spans of a cube core, with its vector cores, or of a vector core."""
    spans = report.timing.spans
    if not spans:
        return []
    last = max(spans, key=lambda span: span.end).core
    return sorted((span for span in spans if span.core.index == last.index), key=lambda span: span.core.core_type)


def _rows(spans):
    """(core type, sub-block, pipe) of each row, in the order in which data goes through a core."""
    order = ("S", "MTE2", "MTE1", "M", "V", "FIX", "MTE3")
    found = {(*span.core[1:], span.pipe) for span in spans}
    return sorted(found, key=lambda row: (row[0], row[1], order.index(row[2])))


def _width(spans, cycles):
    """Cycles in a panel: so many that the instructions in it can be told apart."""
    counts = defaultdict(int)
    for span in spans:
        counts[(*span.core, span.pipe)] += 1
    return cycles * SPANS / max(counts.values(), default=1)


def _colours(spans):
    """{instruction: colour}, of those that take most time; the others share one."""
    from matplotlib import colormaps

    spent = defaultdict(float)
    for span in spans:
        spent[span.operation.name] += span.end - span.start
    names = sorted(spent, key=spent.get, reverse=True)
    colours = {name: colormaps["tab10"](i) for i, name in enumerate(names[:SHOWN])}
    return colours | ({"others": (0.6, 0.6, 0.6)} if len(names) > SHOWN else {})


def _draw(panel, report, spans, colours, start, width):
    rows = _rows(spans)
    us = US / report.target.clock
    bars = defaultdict(list)
    for span in spans:
        if span.end >= start and span.start <= start + width:
            name = span.operation.name if span.operation.name in colours else "others"
            bars[rows.index((*span.core[1:], span.pipe)), name].append((span.start * us, (span.end - span.start) * us))
    for (row, name), extents in bars.items():
        panel.broken_barh(extents, (row - 0.4, 0.8), color=colours[name], edgecolor="white", linewidth=0.4)
    several = len({row[:2] for row in rows}) > 1
    panel.set_yticks(range(len(rows)), [f"{kind} {sub} {pipe}" if several else pipe for kind, sub, pipe in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(start * us, (start + width) * us or 1)
    panel.grid(axis="x", alpha=0.4)
    panel.set_axisbelow(True)
