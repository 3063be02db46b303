"""Tables in Markdown, made of the records."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from capsnet.evaluation.statistics import (
    McNemar,
    TTest,
    holm,
    in_words,
    mcnemar,
    one_sample,
    paired_images,
    paired_t,
    summarise,
    welch_t,
)
from capsnet.experiments import records
from capsnet.experiments.measures import MEASURES
from capsnet.experiments.plan import Experiment, Row, available, experiment
from capsnet.experiments.records import Record, fingerprint
from capsnet.experiments.reproduce import ENSEMBLE
from capsnet.files import read_json
from capsnet.options.schema import checked

__all__ = ["EPOCH", "SHOWN", "benchmark_of", "comparisons", "overview", "render"]

SHOWN = ("full", "cpu")
"""Budgets whose numbers mean something; of each row those of the first are shown that there are any of."""
SEEDS = 2
"""Up to so many, rows are compared over images: the 95 % interval of two seeds is 12.7 standard errors to each side."""
EPOCH = 60_000
"""Images of an epoch in tables of costs: those of MNIST."""


def render(one: Experiment, folder: Path, *, budgets: Sequence[str] = SHOWN) -> str:
    """The table of an experiment with everything that belongs under it.

    Of each row the records of the first of `budgets` are shown that has any.

    Raises:
        InputError: a damaged record.
    """
    rows = {row.key: _found(one, row, folder, budgets) for row in one.rows}
    shown = [record for ours in rows.values() for record in ours]
    tested = {name for record in shown for name in record.results} - {one.metric}
    others = [name for name in dict.fromkeys((one.config(one.rows[0], "full", 0).data, *one.also)) if name in tested]
    mixed = len({record.budget for record in shown}) > 1
    measured = [(row, rows[row.key]) for row in one.rows]
    if one.ensemble:
        ours = _together(one, folder, budgets)
        row = replace(one.row(one.ensemble[0]), title=_of_ensemble(one, ours), paper=one.ensemble[1], published={})
        measured.append((row, ours))
    costs = _costs(one, folder)
    lines = [_line(one, row, ours, others, mixed=mixed) | costs.of(row, ours) for row, ours in measured]
    heads = [head for head in lines[0] if any(line[head] for line in lines)]
    told = [f"- {line}" for line in (*_beside_paper(one, rows), *comparisons(one, rows, folder, budgets))]
    table = _table(heads, [[line[head] for head in heads] for line in lines])
    further = [MEASURES[name].said for name in one.measures if MEASURES[name].head in heads]
    further += [costs.said()] if set(heads) & set(costs.heads) else []
    return "\n".join([*table, "", *_said(one, shown), *further, *([""] if told else []), *told]) + "\n"


def overview(folder: Path) -> str:
    """One table of the papers' experiments: the first row of each, its baseline, and its ensemble.

    Only what ran as published: no networks that are narrower for the budget.

    Raises:
        InputError: a damaged record.
    """
    heads = ["test images", "network", "test error", "n", "epochs", "minutes", "published"]
    lines = []
    for one in filter(lambda one: one.short, map(experiment, available())):
        chosen = [row for row in one.rows if row is one.rows[0] or row.key == "baseline"]
        shown = [(row, _found(one, row, folder, SHOWN)) for row in chosen]
        if one.ensemble:
            ours = _together(one, folder, SHOWN)
            title = _of_ensemble(one, ours)
            told = one.row(one.ensemble[0]).published  # which tells of the ensemble, too
            shown.append((Row(ENSEMBLE, title, paper=None if told else one.ensemble[1]), ours))
        for row, ours in shown:
            if ours and not (ours[0].budget == "cpu" and one.cpu_says):
                here, n, _ = _measured(ours, one.metric)
                epochs, paper = _range([record.epochs for record in ours]), _paper(one, row.paper, row.spread)
                published = row.published.get(one.metric, paper)
                lines.append([one.short, row.title, here, n, epochs, _minutes(ours), published])
    return "\n".join(_table(heads, lines)) + "\n"


def _minutes(ours: Sequence[Record]) -> str:
    """How long the quickest training took, and where; of an ensemble, how many there are."""
    if ours[0].members:
        return f"{len(ours[0].members)} times that"
    quickest = min(ours, key=lambda record: record.seconds)
    threads, device = quickest.environment.get("threads"), quickest.environment["device"]
    of = "" if device.startswith("NVIDIA") or threads is None else f", {threads} thread{'s' * (threads > 1)}"
    return f"{quickest.seconds / 60:,.0f} ({device}{of})"


def _beside_paper(one: Experiment, rows: dict[str, list[Record]]) -> Iterator[str]:
    """The test behind each difference to the paper that has a standard error."""
    for row in one.rows:
        ours = rows[row.key]
        if len(ours) > 1 and _gap(one, row, ours):
            yield f"{row.title} against the paper: {_against_paper(one, row, ours).summary()}"


def comparisons(
    one: Experiment, rows: dict[str, list[Record]], folder: Path, budgets: Sequence[str] = SHOWN
) -> list[str]:
    """What is compared, with which test, and its p value corrected for the number of these comparisons.

    Over seeds where three or more are shared, else over the test images: of two seeds together, or of one. Two rows are
    compared at the first budget that both have records of, which is named where `rows` shows another.
    """
    told, tests = list[str](), list[TTest | McNemar]()
    for row in one.rows:
        if row.against is None:
            continue
        other = one.row(row.against)
        pairs = [[_found(one, each, folder, [budget]) for each in (row, other)] for budget in budgets]
        ours, theirs = next((pair for pair in pairs if all(pair)), ([], []))
        by_seed = {record.seed: record for record in theirs}
        shared = [(record, by_seed[record.seed]) for record in ours if record.seed in by_seed]
        if not shared:
            continue
        budget = ours[0].budget
        at = "" if rows[row.key][0].budget == rows[other.key][0].budget == budget else f", budget {budget}"
        seed = f", seed {shared[0][0].seed}" if len(shared) == 1 else ""
        told.append(f"{row.title} against {_lower(other.title)}{at}{seed}")
        tests.append(_compared(one.metric, shared))
    with_p = [k for k, test in enumerate(tests) if test.p is not None]
    corrected = dict(zip(with_p, holm([tests[k].p or 0.0 for k in with_p]), strict=True)) if len(with_p) > 1 else {}
    return [
        f"{name}: {test.summary()}" + (f", corrected p {in_words(corrected[k])}" if k in corrected else "")
        for k, (name, test) in enumerate(zip(told, tests, strict=True))
    ]


def _compared(metric: str, shared: Sequence[tuple[Record, Record]]) -> TTest | McNemar:
    """The test between two rows, of records that have their seeds in common."""
    if len(shared) > SEEDS:
        return paired_t(*([pair[k].error(metric) for pair in shared] for k in (0, 1)))
    ours, theirs = ([set(pair[k].wrong_images[metric]) for pair in shared] for k in (0, 1))
    if len(shared) > 1:
        return paired_images(ours, theirs, int(shared[0][0].results[metric]["total"]))
    return mcnemar(ours[0], theirs[0])


def _found(one: Experiment, row: Row, folder: Path, budgets: Sequence[str]) -> list[Record]:
    """The records of a row as it is configured now, by seed."""
    for budget in budgets:
        now = fingerprint(one.config(row, budget, 0))
        if ours := _of(one, row.key, now, folder, budget):
            return sorted(ours, key=lambda record: record.seed or 0)
    return []


def _together(one: Experiment, folder: Path, budgets: Sequence[str]) -> list[Record]:
    """The record of the largest ensemble, or none."""
    assert one.ensemble is not None
    single = _found(one, one.row(one.ensemble[0]), folder, budgets)[:1]
    found = [record for first in single for record in _of(one, ENSEMBLE, first.fingerprint, folder, first.budget)]
    return sorted(found, key=lambda record: len(record.members))[-1:]


def _of(one: Experiment, row: str, wanted: str, folder: Path, budget: str) -> list[Record]:
    """The records of a row and fingerprint."""
    found = records.read(folder, one.name, budget)
    return [record for record in found if (record.row, record.fingerprint) == (row, wanted)]


def _of_ensemble(one: Experiment, ours: list[Record]) -> str:
    return f"The same, ensemble of {len(ours[0].members) if ours else one.seeds}"


def _line(one: Experiment, row: Row, ours: list[Record], others: list[str], *, mixed: bool) -> dict[str, str]:
    """The cells of a line by the heads of their columns; a column that is empty in all lines is left out."""
    here, n, wrong = _measured(ours, one.metric)
    missed = [r.results[one.metric]["missed_percent"] for r in ours if "missed_percent" in r.results[one.metric]]
    precision = sorted({{"32": "float32"}.get(p, p) for p in (r.environment["precision"] for r in ours)})
    return {
        "network": row.title,
        "paper": _paper(one, row.paper, row.spread),
        "here": here,
        "n": n,
        "wrong images": wrong,
        "missed digits": _spread(missed),
        **{f"on {name}": _spread([r.error(name) for r in ours if name in r.results]) for name in others},
        **{
            MEASURES[name].head: MEASURES[name].cell([r.measures[name] for r in ours if name in r.measures])
            for name in one.measures
        },
        "budget": ", ".join(sorted({r.budget for r in ours})) if mixed else "",
        "epochs": _range([r.epochs for r in ours]),
        "precision": ", ".join(precision),
        "parameters": _range([r.parameters for r in ours]),
        "difference to the paper": _gap(one, row, ours),
        "published": row.published.get(one.metric, "") if row.paper is None else "",
    }


def benchmark_of(folder: Path, name: str) -> Path:
    """Where the benchmark of the rows of an experiment is, if there is one, for records in `folder`."""
    return folder.parent / "bench" / f"{name}.json"


@dataclass(frozen=True)
class _Costs:
    """What training costs, of the rows of an experiment at the budget `cpu`, as a benchmark of them found."""

    record: dict[str, Any]
    heads = ("million multiply-adds", "seconds an epoch", "MiB")

    def of(self, row: Row, ours: list[Record]) -> dict[str, str]:
        """The cells of a row; empty where nothing was measured, or its records are of another budget."""
        told = dict.fromkeys(self.heads, "")
        if any(record.budget != "cpu" for record in ours):
            return told
        for variant in self.record.get("variants", ()):
            if variant["variant"] == row.key:
                told[self.heads[0]] = f"{500 * variant['forward_gflop_per_image']:.1f}"
        for measured in self.record.get("rows", ()):
            if measured["section"] == "step" and measured["variant"] == row.key:
                told[self.heads[1]] = f"{EPOCH / measured['images_per_second']:,.0f}"
                told[self.heads[2]] = f"{measured['added_mib']:,.0f}" if "added_mib" in measured else ""
        return told

    def said(self) -> str:
        """What the cells are, and the command."""
        return (
            f"Multiply-adds of one image forward, in convolutions and matrix products; training on {EPOCH:,} images, "
            f"on one thread; memory that a step adds to weights and images: `{self.record['command']}`, "
            f"on {self.record['device']}, torch {self.record['torch']}."
        )


def _costs(one: Experiment, folder: Path) -> _Costs:
    """The record of the benchmark of an experiment, beside the folder of its records; empty where there is none."""
    path = benchmark_of(folder, one.name)
    return _Costs(checked(read_json(path), dict[str, Any], source=f"record {path}") if path.is_file() else {})


def _measured(ours: list[Record], metric: str) -> tuple[str, str, str]:
    """Cells of what was found: mean and standard deviation, number of seeds, wrong images of each."""
    if not ours:
        return "not run", "", ""
    errors = [record.error(metric) for record in ours]
    wrong = ", ".join(f"{record.results[metric]['wrong']:,}" for record in ours)
    n = "" if ours[0].row == ENSEMBLE else str(len(ours))
    return _spread(errors), n, f"{wrong} of {ours[0].results[metric]['total']:,}"


def _spread(errors: list[float]) -> str:
    if not errors:
        return ""
    found = summarise(errors)
    return f"{found.mean:.2f} %" if found.sd is None else f"{found.mean:.3f} ± {found.sd:.3f} %"


def _gap(one: Experiment, row: Row, ours: list[Record]) -> str:
    """Difference to the paper's number, if that is of the same images, and with several seeds its standard error."""
    if not ours or row.paper is None or one.paper_data not in ("", one.metric):
        return ""
    found = _against_paper(one, row, ours)
    if found.standard_error is None:
        return f"{found.difference:+.2f}" + ", one seed" * (not ours[0].members)
    return f"{found.difference:+.3f} ± {found.standard_error:.3f}"


def _against_paper(one: Experiment, row: Row, ours: list[Record]) -> TTest:
    """Welch's t test where the paper states the spread of its three trainings, else that of one sample."""
    assert row.paper is not None
    errors = [record.error(one.metric) for record in ours]
    if row.spread is None or len(errors) < 2:
        return one_sample(errors, row.paper)
    theirs = [row.paper - row.spread, row.paper, row.paper + row.spread]  # three numbers of that mean and deviation
    return welch_t(errors, theirs)


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
        machines = sorted({f"{record.environment['device']}, torch {record.environment['torch']}" for record in ours})
        small = f" ({one.cpu_says})" if one.cpu_says and budget == "cpu" else ""
        nothing = " Quick: these numbers mean nothing." if budget == "quick" else ""
        yield f"`{_command(one, ours)}`{small}, on {'; '.join(machines)}.{nothing}"


def _command(one: Experiment, ours: list[Record]) -> str:
    """What makes these records, which are of one budget."""
    there = {record.row for record in ours}
    keys = [row.key for row in one.rows]
    rows = [] if there == set(keys) else ["--rows", *(key for key in keys if key in there)]
    seeds = str(max(record.seed or 0 for record in ours) + 1)
    return " ".join(["capsnet", "reproduce", one.name, "--budget", ours[0].budget, "--seeds", seeds, *rows])


def _paper(one: Experiment, value: float | None, spread: float | None = None) -> str:
    if value is None:
        return ""
    told = f"{value:g} %" if spread is None else f"{value:g} ± {spread:g} %"
    return told if one.paper_data in ("", one.metric) else f"{told} (on {one.paper_data})"


def _range(values: list[int]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _lower(title: str) -> str:
    """A title inside a sentence; a first word with another capital letter is a name."""
    return title if title.split()[0][1:].lower() != title.split()[0][1:] else title[0].lower() + title[1:]


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]
