"""The experiments of the papers by name: what each trains, what it found here, and tables made of the records.

Each is a YAML file, which `plan` reads. `reproduce` trains what is missing, `records` keeps what was measured as JSON
lines, and `tables` shows them.
"""

from capsnet.experiments.plan import BUDGETS, Experiment, Row, available, experiment
from capsnet.experiments.records import Record, fingerprint, read

__all__ = ["BUDGETS", "Experiment", "Record", "Row", "available", "experiment", "fingerprint", "read"]
