"""Everything that commands print. The only part that imports rich.

Results go to standard output, so that they can be piped; notes, progress and errors go to standard
error. Where standard error is not a terminal there are no bars and no colours, only plain lines.
"""

from nanothink.cli.render.console import (
    chapter,
    count,
    duration,
    error,
    note,
    plain,
    print_json,
    say,
    setting,
    size,
    warning,
)
from nanothink.cli.render.data import imported, near_duplicates
from nanothink.cli.render.plan import plan
from nanothink.cli.render.problems import ErrorStream, bad_lines, hints, problems
from nanothink.cli.render.progress import BarReporter, reporting
from nanothink.cli.render.results import (
    estimate,
    evaluations,
    reconstructions,
    routing,
    samples,
    streaming,
    training_summary,
)
from nanothink.cli.render.store import compaction, hits, store_facts
from nanothink.cli.render.tables import facts, fits, histogram, result, table
from nanothink.cli.render.training import training_view
