"""The model's numbers as a picture."""

import io

from .model import FAMILIES, WORKLOADS


def plot(reports):
    """The bytes of a PNG with a panel for each target: how many times the memory limit all three ops take together, in
    kernels alone and with what tasks take beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(report["target"] for report in reports))
    labels = [str(work) for work in WORKLOADS]
    figure, panels = pyplot.subplots(2, -(-len(names) // 2), figsize=(16, 10), sharex=True, sharey=True, squeeze=False)
    for panel, name in zip(panels.flat, names):
        for family, marker, color in zip(FAMILIES, ("o", "X"), ("C0", "C1")):
            mine = [r for r in reports if (r["target"], r["family"]) == (name, family)]
            for key, label, fill in (("x_limit", "kernels", "none"), ("x_limit_with_tasks", "with tasks", color)):
                x = [r[key]["both"] for r in mine]
                panel.plot(x, labels, marker, color=color, markerfacecolor=fill, label=f"{family} family, {label}")
        panel.axvline(1, color="black", linewidth=1, label="memory limit")
        panel.set_title(name)
        panel.grid(axis="x", alpha=0.4)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    panels[0, 0].invert_yaxis()
    panels[0, 0].set_xlim(left=0.9)
    panels[0, 0].legend(loc=(0.3, 0.2), fontsize="small")  # where no panel has a point
    figure.suptitle("nsa_compress, forward and both gradients, fp16 or bf16: MODELLED time, never measured on an NPU")
    figure.supxlabel("times the memory limit (every input and output byte once, at the DDR rate)")
    figure.tight_layout()
    png = io.BytesIO()
    figure.savefig(png, dpi=80)
    pyplot.close(figure)
    return png.getvalue()
