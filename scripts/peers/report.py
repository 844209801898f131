"""Tables and a plot of what scripts/bench_peers has measured. Standard library only."""
import html, statistics

BAR_HEIGHT, NAME_WIDTH, BAR_WIDTH, MARGIN = 22, 260, 460, 12


def cpu_name():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else "unknown"


def median(row, engine, quantile="p50"):
    """The median over the rounds, in microseconds; None for an engine that was not measured."""
    found = [turn[engine][quantile] for turn in row["rounds"] if engine in turn]
    return statistics.median(found) if found else None


def rate(row, engine):
    """Tokens per second: of the median token, or of all where a busy process halts some of them."""
    us = median(row, engine, "mean" if row["kind"] == "busy" else "p50")
    tokens = row["prompt"] if row["kind"] == "prefill" else 1
    return tokens * 1e6 / us if us else None


def ratio(row):
    ours, theirs = rate(row, "ours"), rate(row, "theirs")
    return ours / theirs if ours and theirs else None


def bandwidth(row):
    """Bytes per second that the median probe read."""
    probes = [turn["bandwidth"]["median_bytes_per_second"] for turn in row["rounds"]]
    return statistics.median(probes)


def share(row, engine):
    """Weights read in a second over the probed read bandwidth, for a decode not from cache."""
    us = median(row, engine)
    if row["kind"] == "prefill" or not us or row["weight_bytes"] < 100e6:
        return None
    return row["weight_bytes"] * 1e6 / us / bandwidth(row)


def shown(value, form):
    return "-" if value is None else format(value, form)


HEADER = ["row", "ours tok/s", "theirs", "ratio", "ours p50", "p99.9", "theirs p50", "p99.9",
          "ours share", "theirs", "GB/s", "others", "ours ran as", "llama.cpp"]


def cells(row):
    us = lambda engine, quantile: shown(median(row, engine, quantile), ".1f")
    others = max(turn["busy_share"] for turn in row["rounds"])
    return [row["name"], shown(rate(row, "ours"), ".1f"), shown(rate(row, "theirs"), ".1f"),
            shown(ratio(row), ".2f"), us("ours", "p50"), us("ours", "p999"), us("theirs", "p50"),
            us("theirs", "p999"), shown(share(row, "ours"), ".0%"),
            shown(share(row, "theirs"), ".0%"), f"{bandwidth(row) / 1e9:.1f}", f"{others:.0%}",
            " ".join(row["ours_choice"] or []) or "default",
            "{}, {}, poll {}".format(*row["theirs_choice"])
            + (" (quick)" if row["is_quick"] else "")]


def line(row):
    return "; ".join(f"{name} {value}" for name, value in list(zip(HEADER, cells(row)))[1:])


def table(rows):
    """Markdown; times in microseconds, medians of the rounds."""
    lines = [HEADER, ["---"] * len(HEADER), *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def svg(rows):
    """A bar for each row that both engines have: our rate over llama.cpp's."""
    bars = [(row["name"], ratio(row)) for row in rows if ratio(row)]
    most = max([value for _, value in bars] + [1.0])
    x = lambda value: NAME_WIDTH + value / most * BAR_WIDTH
    height = (len(bars) + 2) * BAR_HEIGHT + 2 * MARGIN
    title = f"tilert-mk over llama.cpp, {html.escape(cpu_name())}"
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{NAME_WIDTH + BAR_WIDTH + 80}" '
           f'height="{height}" font-family="sans-serif" font-size="13">',
           f'<text x="{MARGIN}" y="{MARGIN + 12}">{title}</text>']
    for idx, (name, value) in enumerate(bars):
        y = MARGIN + (idx + 1) * BAR_HEIGHT
        out.append(f'<text x="{MARGIN}" y="{y + 15}">{html.escape(name)}</text>')
        out.append(f'<rect x="{NAME_WIDTH}" y="{y + 3}" width="{x(value) - NAME_WIDTH:.1f}" '
                   f'height="{BAR_HEIGHT - 6}" fill="{"#2a7" if value >= 1 else "#c63"}"/>')
        out.append(f'<text x="{x(value) + 6:.1f}" y="{y + 15}">{value:.2f}</text>')
    out.append(f'<line x1="{x(1):.1f}" x2="{x(1):.1f}" y1="{MARGIN + BAR_HEIGHT}" '
               f'y2="{height - MARGIN}" stroke="black"/></svg>')
    return "\n".join(out) + "\n"
