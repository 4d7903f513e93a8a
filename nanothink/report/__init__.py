"""One self-contained HTML page of one or several runs; see docs/report.md.

    curves    a run's numbers, thinned
    figures   which plots there are
    tables    overview, domains, settings, machine, data
    page      all of it as HTML, with the template, style and script beside it

``uplot/`` is uPlot 1.6.32 as its authors publish it (MIT), which draws the plots in the browser.
"""

from nanothink.report.page import GENERATOR, page
from nanothink.report.passages import (
    Missing,
    Rebuilding,
    RebuiltPassage,
    ReportedRun,
    RoutedPassage,
    RoutedToken,
)
