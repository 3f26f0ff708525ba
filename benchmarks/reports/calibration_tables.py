"""Tables of a calibration: the samples and their spread, the fits and their residuals, and a data sheet's rates."""

from rich.console import Console
from rich.table import Table

from toruslab.partitioning.torus.calibrated import Fit, Machine, Sample
from toruslab.partitioning.torus.chip import Chip


def show(machine: Machine, console: Console) -> None:
    """Prints the rates of matmuls and copies, the other samples, and the fits with their residuals."""
    n = machine.n_devices
    together = f"{n} devices at once" + (", which share the cores" if machine.shared else "")
    for dtype in dict.fromkeys(s.dtype for s in machine.samples if s.what == "matmul"):
        console.print(f"[bold]{dtype} matmuls[/], GFLOP/s of {together}")
        console.print(_matmuls(machine, dtype))
    console.print(f"[bold]everything else[/], {together}: first quartile, median, third quartile")
    listing = Table()
    for heading in ("block", "dtype", "sizes", "us", "GB/s"):
        listing.add_column(heading, justify="right" if heading in ("us", "GB/s") else "left")
    for s in machine.samples:
        if s.what != "matmul" and not s.axes:
            rate = f"{n * s.sizes['bytes'] / s.cost_s / 1e9:,.1f}" if s.what == "copy" else ""
            sizes = ", ".join(f"{k} {v:,}" for k, v in s.sizes.items())
            listing.add_row(s.what, s.dtype, sizes, _spread(s), rate)
    console.print(listing)
    console.print("[bold]fits[/]: fixed + bytes / bandwidth; passes are priced between the samples, as costs bend")
    fits = Table()
    for heading in ("collective", "axes", "of", "group", "fixed us", "GB/s", "worst residual", "samples"):
        fits.add_column(heading, justify="left" if heading in ("collective", "axes", "of") else "right")
    for kind, axes, at in machine.collectives():
        fit = machine.collective_fit(kind, axes, at)
        some = [s for s in machine.samples if (s.what, s.axes, s.at) == (kind, axes, at)]
        per_byte = fit.s_per.get("bytes", 0.0)
        fits.add_row(
            kind,
            axes,
            at,
            str(some[0].sizes["group"]),
            f"{fit.fixed_s * 1e6:,.0f}",
            f"{n / per_byte / 1e9:,.1f}" if per_byte else "",
            _worst(fit),
            str(len(some)),
        )
    console.print(fits)
    for dtype in dict.fromkeys(s.dtype for s in machine.samples if s.what == "attention"):
        for what, fit in zip(("decode", "longer passes"), machine.attention_fits(dtype), strict=True):
            parts = ", ".join(f"{v * 1e9:.3g} ns a unit of {k}" for k, v in fit.s_per.items() if v)
            fixed = f"{fit.fixed_s * 1e6:.1f} us + {parts}"
            console.print(f"attention, {dtype}, {what}: {fixed}; worst residual {_worst(fit)}")


def against(machine: Machine, memory_bytes_per_s: float, sheet: Chip) -> Table:
    """The measured rates of one chip beside its data sheet: the fastest matmul of each dtype, and reading weights."""
    table = Table()
    for heading in ("", "measured", f"data sheet of {sheet.name}", "share"):
        table.add_column(heading, justify="right" if heading else "left")
    for dtype in dict.fromkeys(s.dtype for s in machine.samples if s.what == "matmul"):
        rate = max(2 * _macs(s) / s.cost_s for s in machine.of("matmul", dtype))
        peak = sheet.peak_flops_per_s.get("bf16" if dtype == "int8" else dtype)  # int8 weights, bf16 products
        if peak:
            table.add_row(
                f"{dtype} matmul, TFLOP/s", f"{rate / 1e12:,.1f}", f"{peak / 1e12:,.1f}", f"{rate / peak:.0%}"
            )
    figures = f"{memory_bytes_per_s / 1e9:,.0f}", f"{sheet.hbm_bytes_per_s / 1e9:,.0f}"
    table.add_row("weights read, GB/s", *figures, f"{memory_bytes_per_s / sheet.hbm_bytes_per_s:.0%}")
    return table


def _matmuls(machine: Machine, dtype: str) -> Table:
    found = [s for s in machine.samples if s.what == "matmul" and s.dtype == dtype]
    table = Table()
    table.add_column("rows", justify="right")
    shapes = list(dict.fromkeys((s.sizes["inner"], s.sizes["outer"]) for s in found))
    for inner, outer in shapes:
        table.add_column(f"x {inner} x {outer}", justify="right")
    for rows in dict.fromkeys(s.sizes["rows"] for s in found):
        here = {(s.sizes["inner"], s.sizes["outer"]): s for s in found if s.sizes["rows"] == rows}
        rates = [2 * machine.n_devices * _macs(here[x]) / here[x].cost_s / 1e9 if x in here else None for x in shapes]
        table.add_row(str(rows), *("" if r is None else f"{r:,.0f}" for r in rates))
    return table


def _spread(s: Sample) -> str:
    return " ".join(f"{t * 1e6:,.1f}" for t in (s.low_s, s.seconds, s.high_s))


def _worst(fit: Fit) -> str:
    return f"{max(fit.residuals, key=abs):+.0%}"


def _macs(s: Sample) -> int:
    return s.sizes["rows"] * s.sizes["inner"] * s.sizes["outer"]
