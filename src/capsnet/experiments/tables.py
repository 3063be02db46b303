"""Tables in Markdown, made of the records, and put between marks in README and docs."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from capsnet.analysis.significance import mcnemar, one_sample, paired_t, sampling_error, summarise
from capsnet.errors import InputError
from capsnet.experiments import records
from capsnet.experiments.plan import Experiment, Row, available, experiment
from capsnet.experiments.records import Record, fingerprint
from capsnet.experiments.reproduce import ENSEMBLE

__all__ = ["OVERVIEW", "comparisons", "overview", "render", "rewritten"]

OVERVIEW = "overview"
"""Name of the table with the first row of every experiment."""
SHOWN = ("full", "cpu")
"""Budgets whose numbers mean something; of each row those of the first are shown that there are any of."""
MARK = re.compile(r"(<!-- capsnet table (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def render(one: Experiment, folder: Path, *, budgets: Sequence[str] = SHOWN) -> str:
    """The table of an experiment with everything that belongs under it.

    Args:
        one: the experiment.
        folder: of the records.
        budgets: of each row, the records of the first of these that has any.

    Raises:
        InputError: a damaged record.
    """
    rows = {row.key: _found(one, row, folder, budgets) for row in one.rows}
    shown = [record for ours in rows.values() for record in ours]
    others = [name for name in dict.fromkeys((one.rows[0].config.data, *one.also)) if name != one.metric]
    others = [name for name in others if any(name in record.results for record in shown)]
    pairs = any("missed_percent" in record.results[one.metric] for record in shown)
    heads = ["network", "paper", "here", "n", "wrong images", *(["missed digits"] if pairs else [])]
    heads += [*(f"on {name}" for name in others), "epochs", "parameters", "difference to the paper"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in one.rows:
        lines.append(_line([row.title, *_cells(one, rows[row.key], row.paper, others, pairs=pairs)]))
    if one.ensemble:
        ours = _together(one, folder, budgets)
        title = _of_ensemble(one, ours)
        lines.append(_line([title, *_cells(one, ours, one.ensemble[1], others, pairs=pairs)]))
    told = [f"- {line}" for line in comparisons(one, rows)]
    return "\n".join([*lines, "", *_said(one, shown), *([""] if told else []), *told]) + "\n"


def overview(folder: Path) -> str:
    """One table of the paper's experiments: the first row of each, its baseline, and its ensemble.

    Args:
        folder: of the records.

    Raises:
        InputError: a damaged record.
    """
    heads = ["test images", "network", "paper", "here", "n", "epochs", "one command"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for one in filter(lambda one: one.short, map(experiment, available())):
        chosen = [row for row in one.rows if row is one.rows[0] or row.key == "baseline"]
        shown = [(row.title, row.paper, _found(one, row, folder, SHOWN)) for row in chosen]
        if one.ensemble:
            ours = _together(one, folder, SHOWN)
            shown.append((_of_ensemble(one, ours), one.ensemble[1], ours))
        for title, paper, ours in shown:
            here, n, _ = _measured(ours, one.metric)
            narrower = " \\*" if ours and ours[0].budget == "cpu" and one.cpu_says else ""
            command = f"`capsnet reproduce {one.name}`" if title == one.rows[0].title else ""
            epochs = _range([record.epochs for record in ours])
            lines.append(_line([one.short, title, _percent(paper), here + narrower, n, epochs, command]))
    return "\n".join(lines) + "\n"


def comparisons(one: Experiment, rows: dict[str, list[Record]]) -> Iterator[str]:
    """What is compared, with which test: over seeds where two or more are shared, else over the test images."""
    for row in one.rows:
        ours, theirs = rows[row.key], rows.get(row.against or "", [])
        if not ours or not theirs or ours[0].budget != theirs[0].budget:
            continue
        by_seed = {record.seed: record for record in theirs}
        shared = [(record, by_seed[record.seed]) for record in ours if record.seed in by_seed]
        names = f"{row.title} against {_lower(one.row(str(row.against)).title)}"
        if len(shared) > 1:
            test = paired_t(*([pair[k].error(one.metric) for pair in shared] for k in (0, 1)))
            yield f"{names}: {test.summary()}"
        elif shared:
            wrong = (set(record.wrong_images[one.metric]) for record in shared[0])
            yield f"{names}, seed {shared[0][0].seed}: {mcnemar(*wrong).summary()}"


def rewritten(text: str, folder: Path, *, source: str) -> str:
    """A page with the tables between its marks made anew.

    The marks are `<!-- capsnet table NAME -->` and `<!-- end of table -->`, each on a line of its own.

    Args:
        text: of the page.
        folder: of the records.
        source: its name, for errors.

    Raises:
        InputError: a mark names no table.
    """

    def fresh(match: re.Match[str]) -> str:
        name = match[2]
        if name not in (OVERVIEW, *available()):
            raise InputError(f"{source}: a table must be one of {', '.join((OVERVIEW, *available()))}; got {name}")
        table = overview(folder) if name == OVERVIEW else render(experiment(name), folder)
        return f"{match[1]}{table}{match[3]}"

    return MARK.sub(fresh, text)


def _found(one: Experiment, row: Row, folder: Path, budgets: Sequence[str]) -> list[Record]:
    """The records of a row as it is configured now, by seed."""
    for budget in budgets:
        now = fingerprint(one.config(row, budget, 0))
        ours = [
            record
            for record in records.read(folder, one.name, budget)
            if (record.row, record.fingerprint) == (row.key, now)
        ]
        if ours:
            return sorted(ours, key=lambda record: record.seed or 0)
    return []


def _together(one: Experiment, folder: Path, budgets: Sequence[str]) -> list[Record]:
    """The record of the largest ensemble, or none."""
    assert one.ensemble is not None
    single = _found(one, one.row(one.ensemble[0]), folder, budgets)
    found = [
        record
        for record in (records.read(folder, one.name, single[0].budget) if single else [])
        if (record.row, record.fingerprint) == (ENSEMBLE, single[0].fingerprint)
    ]
    return sorted(found, key=lambda record: len(record.members))[-1:]


def _of_ensemble(one: Experiment, ours: list[Record]) -> str:
    return f"The same, ensemble of {len(ours[0].members) if ours else one.seeds}"


def _cells(one: Experiment, ours: list[Record], paper: float | None, others: list[str], *, pairs: bool) -> list[str]:
    """What stands in a line after its name."""
    cells = [_percent(paper), *_measured(ours, one.metric)]
    cells += [_spread([r.results[one.metric]["missed_percent"] for r in ours])] if pairs else []
    cells += [_spread([r.results[name]["error_percent"] for r in ours if name in r.results]) for name in others]
    return [*cells, _range([r.epochs for r in ours]), _range([r.parameters for r in ours]), _gap(one, ours, paper)]


def _measured(ours: list[Record], metric: str) -> list[str]:
    """Cells of what was found: mean and standard deviation, number of seeds, wrong images of each."""
    if not ours:
        return ["not run", "", ""]
    errors = [record.error(metric) for record in ours]
    wrong = ", ".join(f"{record.results[metric]['wrong']:,}" for record in ours)
    return [_spread(errors), str(len(ours)), f"{wrong} of {ours[0].results[metric]['total']:,}"]


def _spread(errors: list[float]) -> str:
    if not errors:
        return ""
    found = summarise(errors)
    return f"{found.mean:.2f} %" if found.sd is None else f"{found.mean:.3f} ± {found.sd:.3f} %"


def _gap(one: Experiment, ours: list[Record], paper: float | None) -> str:
    """Difference to the paper's number with its standard error: over seeds, or of one seed that of sampling images."""
    if not ours or paper is None:
        return ""
    found = one_sample([record.error(one.metric) for record in ours], paper)
    if found.standard_error is not None:
        return f"{found.difference:+.3f} ± {found.standard_error:.3f}"
    counts = ours[0].results[one.metric]
    return f"{found.difference:+.2f} ± {sampling_error(int(counts['wrong']), int(counts['total'])):.2f} (sampling)"


def _said(one: Experiment, shown: list[Record]) -> Iterator[str]:
    """What is measured, by which command, on what."""
    yield f"{one.measure[0].upper()}{one.measure[1:]}, in percent; mean ± standard deviation over n seeds."
    if not shown:
        yield f"Not run yet: `capsnet reproduce {one.name}`."
        return
    for budget in (*SHOWN, "quick"):
        ours = [record for record in shown if record.budget == budget]
        if not ours:
            continue
        seeds = max(record.seed or 0 for record in ours) + 1
        machines = sorted({f"{record.environment['device']}, torch {record.environment['torch']}" for record in ours})
        hours = sum(record.seconds for record in ours) / 3600
        small = f" ({one.cpu_says})" if one.cpu_says and budget == "cpu" else ""
        yield (
            f"`capsnet reproduce {one.name} --budget {budget} --seeds {seeds}`{small}; {hours:.1f} hours of training "
            f"on {'; '.join(machines)}."
        )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:g} %"


def _range(values: list[int]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _lower(title: str) -> str:
    return title if title[:4] == "Caps" else title[0].lower() + title[1:]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
