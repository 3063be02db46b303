"""The examples of the docstrings run and print what they say."""

import doctest
import re
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch

import capsnet
from test_site import members

SOURCE = Path(capsnet.__file__).parent
MODULES = [
    ".".join(["capsnet", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")
    for path in sorted(SOURCE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
PUBLIC: dict[str, Any] = {
    "np": np,
    "torch": torch,
    "load_split": capsnet.data.load_split,
    **{name: getattr(capsnet, name) for name in ("Config", "create", "load")},
}
"""Names that an example may use beside those of its module."""


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPSNET_NATIVE", "off")  # it would be compiled for each empty cache
    module = import_module(name)
    torch.manual_seed(0)
    found = [each for each in doctest.DocTestFinder().find(module, globs={**PUBLIC, **vars(module)}) if each.examples]
    assert found
    for each in found:
        failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(each).failed
        assert failed == 0, each.name


def test_every_public_name_has_an_example() -> None:
    public = members(capsnet)
    public |= {f"{part}.{name}": each for part, module in public.items() for name, each in members(module).items()}
    fetched = {"from_pretrained"}  # from another host
    for name in public.keys() - fetched:
        if isinstance(each := public[name], type | FunctionType):
            assert ">>> " in (each.__doc__ or ""), name


def test_sections_have_the_names_that_the_reference_reads() -> None:
    """`Example:` would be prose, in which `>>>` is a quotation; `Parameters:` would be arguments."""
    for path in sorted(SOURCE.rglob("*.py")):
        code = path.read_text(encoding="utf-8")
        assert not re.findall(r"^ +(?:Example|Parameters|Return|Raise|Yield):$", code, re.MULTILINE), path.name
