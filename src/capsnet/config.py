"""The configuration of a run: the options of every run and those of its model, presets, and the file.

Options of a model live with it (`models`); a `Config` holds them as `options`. On the command line, in Python and in
records all options stand side by side; in `config.yaml` each group has its section. Importing this imports no torch.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from capsnet.errors import InputError
from capsnet.files import is_own_images, read_yaml
from capsnet.options import GROUPS, DataOptions, LossOptions, MachineOptions, OptimisationOptions, OutputOptions, Role
from capsnet.options.schema import brief, check_known, checked, did_you_mean, joined, out_of_range, shown

__all__ = [
    "OPEN",
    "PRESETS",
    "Config",
    "from_dict",
    "open_values",
    "preset",
    "preset_differences",
    "read",
    "renamed",
    "roles",
    "with_defaults",
    "write",
]


@dataclass(frozen=True)
class Config(OutputOptions, MachineOptions, OptimisationOptions, LossOptions, DataOptions):
    """Every choice of a run; saved as `config.yaml` beside its results.

    The defaults are preset `paper`: the text of Sabour, Frosst, Hinton 2017. Where the text is silent the option says
    where its default is from. `Config.of` takes the options of the model too, by their names.

    Attributes:
        preset: name of the recipe that the other options start from.
        model: name of the network.
        options: the options of this model; None for its defaults.

    Raises:
        InputError: options out of their range; all of them are named.

    Examples:
        >>> Config(epochs=5).batch_size
        128
        >>> Config.of(model="vb-capsnet", capsule_types=(8,)).options.capsule_types
        (8,)
    """

    preset: Literal["paper", "authors", "fast"] = "paper"
    model: str = "capsnet"
    options: Any = None

    def __post_init__(self) -> None:
        kind = _model_options(self.model)
        if self.options is None:
            object.__setattr__(self, "options", kind())
        if type(self.options) is not kind:
            raise InputError(f"options of model {self.model} must be {kind.__qualname__}; got {shown(self.options)}")
        modules = self.modules
        faults = out_of_range({name: x for name, x in self.flat().items() if name not in modules}, Config, kind)
        if not faults:
            faults += self._contradictions()
        if not faults and self.preset != "paper" and not self._follows_preset(kind):
            faults.append(f"preset is a name only; start from capsnet.preset({self.preset!r}) to get its options")
        if faults:
            raise InputError(joined(faults))

    def _contradictions(self) -> Iterator[str]:
        """What is wrong with options beside one another; a preset's own may be without effect beside those given."""
        if self.lr < self.lr_floor:
            yield f"lr must be at least lr_floor, {self.lr_floor:g}; got {self.lr:g}"
        sgd, steps = self.optimizer == "sgd", self.schedule == "steps"
        if steps and not self.lr_milestones:
            yield "lr_milestones must be given with schedule steps, as 0.5 0.75; got none"
        if sgd and self.nesterov and not self.momentum:
            yield "nesterov must be left out with momentum 0; got True"
        recipe = preset_options(self.preset, self.model)
        for name, used, beside in (
            ("momentum", sgd, f"optimizer {self.optimizer}"),
            ("nesterov", sgd, f"optimizer {self.optimizer}"),
            ("lr_milestones", steps, f"schedule {self.schedule}"),
        ):
            value, default = getattr(self, name), getattr(Config, name)
            if not used and value not in (default, recipe.get(name, default)):
                yield f"{name} must be left out with {beside}; got {shown(value)}"

    @property
    def modules(self) -> dict[str, str]:
        """The options of the model for which Python must give a module, with the full names of their classes."""
        from capsnet.models.registry import classes_of_modules

        return classes_of_modules(self.model, vars(self.options))

    @property
    def moments(self) -> tuple[str, ...]:
        """The tensors that the optimiser keeps for each parameter, of its shape, by the names that PyTorch has."""
        if self.optimizer == "adam":
            return ("exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.momentum else ()

    def _follows_preset(self, kind: Any) -> bool:
        """Whether any option has the value that the preset gives it."""
        recipe, flat = preset_options(self.preset, self.model), self.flat()
        defaults = {each.name: each.default for each in (*fields(Config), *fields(kind))}
        return any(flat[name] == value != defaults[name] for name, value in recipe.items() if name in flat)

    @classmethod
    def of(cls, *, preset: str = "paper", model: str = "capsnet", **options: Any) -> "Config":
        """The configuration of a preset, with other values of some options, those of the model among them.

        Raises:
            InputError: an unknown preset, model or option, or a value of the wrong type or out of its range.

        Examples:
            >>> Config.of(data="strokes", epochs=1, conv_channels=32).options.conv_channels
            32
        """
        return from_dict({"preset": preset, "model": model, **options})

    def changed(self, **options: Any) -> "Config":
        """The same with other values of some options; another `model` has its own, and its own of the preset."""
        kept = self.flat()
        if options.get("model", self.model) != self.model:
            recipe = preset(self.preset, model=self.model).flat()
            own = {name for name, value in kept.items() if hasattr(self.options, name) or recipe[name] == value}
            kept = {"preset": self.preset} | {name: value for name, value in kept.items() if name not in own}
        return from_dict({**kept, **options})

    def flat(self) -> dict[str, Any]:
        """All options by name, those of the model among them."""
        values = {name: value for name, value in vars(self).items() if name not in ("preset", "model", "options")}
        return {"preset": self.preset, "model": self.model, **values, **vars(self.options)}

    def nested(self) -> dict[str, Any]:
        """The same by group, as in `config.yaml`."""
        groups = {
            name: {each.name: getattr(self, each.name) for each in fields(group)} for name, group in GROUPS.items()
        }
        model = {"name": self.model, **vars(self.options)}
        return {"preset": self.preset, "data": groups.pop("data"), "model": model, **groups}


OPEN: dict[str, Any] = {"epochs": 3, "keep": "last", "primary_scale": 1.0, "augment": "paper"}
"""Options that may be left open (None), with their values for published data sets."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "authors": {
        "margin_scale": 0.05,  # the code takes 0.5 x the margin loss and its mean over the 10 classes
        "reconstruction_weight": 0.0005,  # so this is 0.01 relative to eq. 4
        "primary_scale": 0.0,  # primary pre-activations divided by the number of capsule types
        "routing_bias": True,
        "init": "authors",
        "lr_decay": 0.96,
        "lr_decay_steps": 2000,
    },
    "fast": {"lr": 0.002, "schedule": "linear", "warmup": 0.1, "ema": 0.999, "reconstruction_weight": 0.005},
}
"""Options in which each recipe differs from the defaults, where the model has them; each can be switched alone.

`authors` is https://github.com/Sarasra/models/tree/master/research/capsules. Its margin loss is averaged over classes,
ten in all its MNIST experiments; with another number of classes give `margin_scale` as 0.5 divided by that number.
`fast` is ours. A model may have values of its own for a preset, in the `PRESETS` of its file.
"""


def preset_options(name: str, model: str) -> dict[str, Any]:
    """The options in which preset `name` differs from the defaults of a model; not its epochs, see `open_values`."""
    from capsnet.models.registry import presets

    given = {**PRESETS[name], **presets(model).get(name, {})}
    return {option: value for option, value in given.items() if option != "epochs"}


def open_values(name: str, model: str) -> dict[str, Any]:
    """`OPEN` as preset `name` of a model has it, which may train for other epochs."""
    from capsnet.models.registry import presets

    return {**OPEN, "epochs": presets(model).get(name, {}).get("epochs", OPEN["epochs"])}


RENAMED = {
    "kernel": "routing_kernel",
    "stem": "convolution",
    "conv_kernel": "conv_kernel_size",
    "primary_kernel": "primary_kernel_size",
}
"""Names of options as files of earlier versions have them."""


WORDED = ("flip", "rotation", "scale", "shear", "brightness", "contrast", "erase")
"""What `--augment` says in one word."""


def renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options from a file under their names of today."""
    today = {RENAMED.get(name, name): value for name, value in options.items()}
    if today.get("convolution") == "minimal":
        today["convolution"] = "winograd"
    if {"image_size", "data_seed", "log_every"} <= today.keys() and "resize" not in today:  # of a whole run
        today = {"augment": "paper", **today, "resize": None if today["image_size"] is None else "squash"}
        today |= {name: None for name in WORDED if not today.get(name)}  # which left the word as it was
    return today


def preset(name: str, *, model: str = "capsnet") -> Config:
    """The configuration that preset `name` stands for.

    Raises:
        InputError: an unknown name.

    Examples:
        >>> preset("fast").schedule
        'linear'
    """
    return Config.of(preset=name, model=model)


def with_defaults(config: Config) -> Config:
    """`config` with the options that it leaves open as they are for published data sets."""
    flat, usual = config.flat(), open_values(config.preset, config.model)
    return config.changed(**{name: value for name, value in usual.items() if name in flat and flat[name] is None})


def preset_differences(config: Config) -> dict[str, Any]:
    """The options in which `config` is not its preset; for images of one's own, also what is open in the preset."""
    base = preset(config.preset, model=config.model)
    if not is_own_images(config.data):
        base, config = with_defaults(base), with_defaults(config)
    theirs = {**base.flat(), "model": "capsnet"}
    return {name: value for name, value in config.flat().items() if value != theirs[name]}


def roles(role: Role) -> set[str]:
    """Names of the options that have a role."""
    hints = get_type_hints(Config, include_extras=True)
    return {name for name, hint in hints.items() if role in getattr(hint, "__metadata__", ())}


def from_dict(values: Mapping[str, Any], *, source: str = "") -> Config:
    """A configuration from the preset that `values` name and the other options they give.

    Args:
        values: options by name, or by group and name; or all fields of a run of an earlier version, by their old names.
        source: the file they are from, for errors; "" for arguments.

    Raises:
        InputError: an unknown option, or a value of the wrong type or out of range; all of them are named.
    """
    from capsnet.models.registry import classes_of_modules

    given, old = _flattened(values)
    base: dict[str, Any] = {"preset": "paper", "model": "capsnet", **given}
    model, name, where = base["model"], base["preset"], f"{source}: " if source else ""
    check_known(name, PRESETS, f"{where}preset must be one of")
    if not isinstance(model, str):
        raise InputError(f"{where}model must be text; got {shown(model)}")
    kind = _model_options(model)
    hints = get_type_hints(Config) | get_type_hints(kind)
    hints.pop("options")
    modules = classes_of_modules(model, base)
    hints |= dict.fromkeys(modules, str)
    faults, clean = list[str](), dict[str, Any]()
    for key, value in base.items():
        if key not in hints:
            if old and _is_of_another_model(key, model):
                continue
            other = _is_of_another_model(key, model)
            faults.append(
                f"{brief(key)} is an option of model {other}, not of {model}"
                if other
                else f"{brief(key)} is no option{did_you_mean(key, hints)}"
            )
            continue
        try:
            clean[key] = checked(_as_written(value, hints[key]), hints[key], name=key)
        except InputError as error:
            faults.append(str(error))
    faults += out_of_range({key: value for key, value in clean.items() if key not in modules}, Config, kind)
    merged = {**{key: value for key, value in preset_options(name, model).items() if key in hints}, **clean}
    options = {each.name: merged.pop(each.name) for each in fields(kind) if each.name in merged}
    if faults:
        raise InputError(f"{where}{joined(faults)}")
    try:
        return Config(**merged, options=kind(**options))
    except InputError as error:
        raise InputError(f"{where}{error}") from None


def read(path: str | Path) -> Config:
    """Read a configuration from a YAML file; options that it lacks are those of its preset.

    Raises:
        InputError: no such file, not YAML, or see `from_dict`.
    """
    values = read_yaml(Path(path), what="config file")
    if not isinstance(values, dict):
        raise InputError(f"config file {path} must hold option: value lines; got {type(values).__name__}")
    return from_dict({str(name): value for name, value in values.items()}, source=f"config file {path}")


def write(config: Config, path: Path) -> None:
    """Write every option of `config` to a YAML file, a section for each group."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        return list(value) if isinstance(value, tuple) else value

    path.write_text(yaml.safe_dump(plain(config.nested()), sort_keys=False), encoding="utf-8")


def _model_options(model: str) -> Any:
    """The class of a model's options."""
    from capsnet.models.registry import options_of

    return options_of(model)


def _is_of_another_model(option: str, model: str) -> str | None:
    """The first other model that has an option of this name."""
    from capsnet.models.registry import available

    others = (other for other in available() if other != model)
    return next((other for other in others if option in {each.name for each in fields(_model_options(other))}), None)


def _flattened(values: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Options by their names of today; and whether they are all those of a run of an earlier version."""
    flat, grouped = dict[str, Any](), False
    for name, value in values.items():
        if name in (*GROUPS, "model") and isinstance(value, Mapping):
            grouped = True
            flat |= {"model" if (name, key) == ("model", "name") else str(key): each for key, each in value.items()}
        else:
            flat[name] = value
    old = not grouped and not RENAMED.keys().isdisjoint(flat)
    return renamed(flat), old


def _as_written(value: Any, kind: Any) -> Any:
    """What YAML writes otherwise: 2.0 as 2, and 1e-3, which it reads as text."""
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)
    return value
