"""The page as one string of HTML that fetches nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nanothink.report import figures, tables
from nanothink.report.figures import Figure
from nanothink.report.passages import Missing, ReportedRun, RoutedPassage

GENERATOR = '<meta name="generator" content="nanothink report">'
"""Marks a page as a report, which may be overwritten."""

MAX_DOMAINS = 12
"""Domains with a plot; the table has all."""

MAX_SAMPLES = 8
"""Steps of a run whose samples are shown."""

N_COLORS = 8
"""Colours in the style sheet; the ninth line has the first one again, dashed."""


def page(runs: Sequence[ReportedRun], *, made: str, version: str) -> str:
    """The HTML of a report.

    Args:
        runs: one or more, in the order in which they are shown.
        made: when, as a person reads it.
        version: of NanoThink.
    """
    numbered: list[Figure] = []

    def plot(figure: Figure) -> int:
        """Index by which the script finds a figure."""
        numbered.append(figure)
        return len(numbered) - 1

    environment = Environment(
        loader=PackageLoader("nanothink.report", "template"),
        autoescape=True,  # samples and names may hold HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {"number": tables.number, "color": _color}
    scripts = [_text("uplot", "uPlot.iife.min.js"), _text("template", "page.js")]
    names = tables.domains(runs)
    by_domain = tables.by_domain(runs, names)
    settings = tables.settings(runs)
    return environment.get_template("page.html").render(
        generator=GENERATOR,
        made=made,
        version=version,
        policy="; ".join(
            [
                "default-src 'none'",
                "img-src data:",
                "style-src 'unsafe-inline'",
                "script-src " + " ".join(map(_digest, scripts)),
                "base-uri 'none'",
                "form-action 'none'",
            ]
        ),
        styles=[_text("uplot", "uPlot.min.css"), _text("template", "page.css")],
        scripts=scripts,
        plot=plot,
        data=lambda: [figure.data() for figure in numbered],
        runs=[(run.label, color) for color, run in enumerate(runs)],
        overview=tables.overview(runs),
        progress=figures.progress_figures(runs),
        course=figures.course_figures(runs),
        domains=names,
        by_domain=by_domain,
        lowest=tables.lowest(by_domain) if len(runs) > 1 else [None] * (len(names) + 1),
        domain_figures=figures.domain_figures(runs, names[:MAX_DOMAINS]),
        n_domains_left_out=max(0, len(names) - MAX_DOMAINS),
        denoising=figures.denoising_figures(runs),
        routed=[_routed(run, runs) for run in runs if figures.experts_of(run)],
        rebuilt=[(run.label, run.passages) for run in runs if run.is_rebuilt],
        missing=[(run.label, run.passages.reason) for run in runs if isinstance(run.passages, Missing)],
        samples=[(run.label, color, _samples(run)) for color, run in enumerate(runs) if run.records.samples],
        settings=settings,
        changed=[setting for setting in settings if setting.differs],
        machines=tables.machines(runs),
        corpora=tables.data(runs),
    )


def _routed(run: ReportedRun, runs: Sequence[ReportedRun]) -> dict[str, Any]:
    """Weights of a combined model: by domain, over time, and token by token."""
    experts, colors = figures.experts_of(run), figures.expert_colors(run, runs)
    routing = (run.records.best or {}).get("routing", {})
    passages = () if isinstance(run.passages, Missing) else run.passages
    return {
        "label": run.label,
        "experts": list(zip(experts, colors, strict=True)),
        "by_domain": [
            (name, [of.get("weights", {}).get(expert) for expert in experts], of.get("entropy"))
            for name, of in sorted(routing.items())
        ],
        "figures": figures.routing_figures(run, colors),
        "passages": [
            _tinted(p, dict(zip(experts, colors, strict=True)))
            for p in passages
            if isinstance(p, RoutedPassage)
        ],
    }


def _tinted(passage: RoutedPassage, colors: Mapping[str, int]) -> dict[str, Any]:
    """Passage with the strength of each token's colour: 0 at its lowest, 1 at its highest leading weight."""
    held = [max(token.weights) for token in passage.tokens]
    low, high = min(held, default=0.0), max(held, default=0.0)
    return {
        "domain": passage.domain,
        "experts": [(name, colors.get(name, i)) for i, name in enumerate(passage.experts)],
        "shares": passage.shares(),
        "low": low,
        "high": high,
        "tokens": [
            (token, (weight - low) / (high - low) if high > low else 1.0)
            for token, weight in zip(passage.tokens, held, strict=True)
        ],
    }


def _samples(run: ReportedRun) -> dict[str, Any]:
    """Last samples, and some of the earlier ones at even distances."""
    found = run.records.samples
    n_shown = min(MAX_SAMPLES, len(found))
    chosen = sorted({round(i * (len(found) - 1) / max(1, n_shown - 1)) for i in range(n_shown)})
    return {
        "last": found[-1],
        "earlier": [found[i] for i in chosen if i != len(found) - 1],
        "n_all": len(found),
    }


def _color(index: int) -> str:
    """The CSS variable of a colour."""
    return f"--c{index % N_COLORS}"


def _text(*parts: str) -> str:
    return resources.files("nanothink.report").joinpath(*parts).read_text("utf-8")


def _digest(script: str) -> str:
    """Hash of a script, which a browser checks before it runs it (Content-Security-Policy)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
