from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from capsnet import options
from capsnet.cli.parsing import helped
from capsnet.config import PRESETS, Config, from_dict, preset, preset_differences, read, with_defaults, write
from capsnet.errors import InputError
from capsnet.models import available, options_of
from capsnet.options import GROUPS


def written(text: str, folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# presets


def test_the_defaults_are_the_paper() -> None:
    assert Config() == preset("paper")
    config = Config()
    options = config.options
    assert (options.routing_iterations, options.conv_channels, options.capsule_types) == (3, 256, 32)
    assert (options.primary_dim, options.class_dim, options.decoder_sizes) == (8, 16, (512, 1024))
    assert (config.m_pos, config.m_neg, config.down_weight, config.reconstruction_weight) == (0.9, 0.1, 0.5, 0.0005)
    assert (config.margin_scale, config.shift, config.lr, config.batch_size) == (1.0, None, 0.001, 128)
    assert not options.routing_bias
    assert not options.leaky
    assert not options.detach_routing


def test_authors_differ_in_what_design_says() -> None:
    config = preset("authors")
    assert config.preset == "authors"
    assert config.margin_scale == pytest.approx(0.5 / 10)
    assert config.reconstruction_weight / config.margin_scale == pytest.approx(0.01)
    assert (config.options.primary_scale, config.options.routing_bias, config.options.init) == (0.0, True, "authors")
    assert (config.lr, config.lr_decay, config.lr_decay_steps, config.lr_floor) == (1e-3, 0.96, 2000, 1e-6)
    assert preset_differences(config) == {}


@pytest.mark.parametrize("name", PRESETS["authors"])
def test_every_field_of_authors_can_be_switched_alone(name: str) -> None:
    value = PRESETS["authors"][name]
    default = Config().flat()[name]
    alone = Config().changed(**{name: value})
    without = preset("authors").changed(**{name: default})
    assert preset_differences(alone) == from_paper(alone) == ({name: value} if value != default else {})
    assert from_dict({name: value}, source="here") == alone
    assert from_dict({"preset": "authors", name: default}, source="here") == without
    assert from_paper(without) | {name: value} == from_paper(preset("authors")) | {name: value}


def test_an_open_option_that_is_given_its_default_differs_from_the_preset_only_in_a_folder(tmp_path: Path) -> None:
    given = Config.of(epochs=3, primary_scale=1.0, augment="paper", keep="last")
    assert with_defaults(Config()) == given
    assert preset_differences(given) == preset_differences(Config()) == {}
    folder = replace(given, data=str(tmp_path))
    told = {"data": str(tmp_path), "epochs": 3, "primary_scale": 1.0, "augment": "paper", "keep": "last"}
    assert preset_differences(folder) == told
    assert preset_differences(replace(Config(), data=str(tmp_path))) == {"data": str(tmp_path)}


def from_paper(config: Config) -> dict[str, Any]:
    return {name: value for name, value in config.flat().items() if value != Config().flat()[name]}


def test_a_preset_has_values_of_the_model(tmp_path: Path) -> None:
    narrow = {"conv_channels": 64, "capsule_types": 8}
    assert from_paper(preset("fast")) == {"preset": "fast", **PRESETS["fast"], **narrow}
    other = preset("fast", model="efficient-capsnet")
    assert (other.lr, other.ema) == (0.005, PRESETS["fast"]["ema"])
    assert preset_differences(other) == {"model": "efficient-capsnet"}
    assert preset("fast").changed(model="efficient-capsnet") == other
    assert preset("fast").changed(model="efficient-capsnet", lr=0.002).lr == 0.002
    assert preset("fast").changed(lr=0.003).changed(model="efficient-capsnet").lr == 0.003
    write(other.changed(lr=0.01), tmp_path / "config.yaml")
    assert preset_differences(read(tmp_path / "config.yaml")) == {"lr": 0.01, "model": "efficient-capsnet"}


SGD = {"optimizer": "sgd", "momentum": 0.9, "nesterov": False, "lr": 0.1, "schedule": "steps", "lr_decay": 0.1}
CIFAR10 = SGD | {"lr_milestones": (150 / 350, 250 / 350)}
ADAM = {"optimizer": "adam", "batch_size": 64, "lr": 0.003, "schedule": "exponential", "weight_decay": 0.0}
RECIPES: dict[tuple[str, str], dict[str, Any]] = {  # of the papers and their authors' code
    ("resnet", "authors"): SGD | {"lr_milestones": (0.5, 0.75), "weight_decay": 1e-4, "batch_size": 128},
    ("self-routing-capsnet", "authors"): CIFAR10 | {"weight_decay": 1e-4, "batch_size": 64},
    ("inverted-capsnet", "authors"): CIFAR10 | {"weight_decay": 5e-4, "batch_size": 128},
    ("em-capsnet", "paper"): ADAM | {"lr_decay": 0.96, "lr_decay_steps": 20_000},
    ("vb-capsnet", "paper"): ADAM | {"lr_decay": 0.96, "lr_decay_steps": 20_000, "batch_size": 128, "lr": 0.001},
    ("efficient-capsnet", "authors"): ADAM
    | {"lr": 5e-4, "lr_decay": 0.97, "lr_decay_steps": 0, "lr_floor": 5e-5, "batch_size": 16}
    | {"reconstruction_weight": 0.0005, "margin_scale": 1.0, "m_pos": 0.9, "m_neg": 0.1, "down_weight": 0.5},
}


@pytest.mark.parametrize(("model", "name"), RECIPES)
def test_the_published_recipe_of_a_network_is_its_preset(model: str, name: str) -> None:
    flat = preset(name, model=model).flat()
    assert {option: flat[option] for option in RECIPES[model, name]} == RECIPES[model, name]
    other = preset("fast", model=model).flat()
    assert (other["optimizer"], other["schedule"]) == ("adam", "linear")


def test_another_model_has_its_own_of_a_preset() -> None:
    for model in available():
        assert Config().changed(model=model) == preset("paper", model=model)
        assert preset("authors", model=model).changed(model="capsnet") == preset("authors")
    assert Config.of(lr=0.02).changed(model="em-capsnet") == preset("paper", model="em-capsnet").changed(lr=0.02)


def test_what_a_preset_has_may_be_without_effect_beside_what_is_given() -> None:
    config = Config.of(preset="authors", model="resnet", optimizer="adam", schedule="linear", lr=0.001)
    assert config.lr_milestones == (0.5, 0.75)
    assert "lr_milestones" not in preset_differences(config)
    with pytest.raises(InputError, match=r"^lr_milestones must be left out with schedule linear; got \(0.3,\)$"):
        config.changed(lr_milestones=(0.3,))


def test_an_unknown_preset_is_refused_and_the_nearest_named() -> None:
    with pytest.raises(InputError, match=r"^preset must be one of paper, authors, fast; got 'author' \(did you mean"):
        preset("author")
    with pytest.raises(InputError, match=r"^here: preset must be one of paper, authors, fast; got 'xyz'$"):
        from_dict({"preset": "xyz"}, source="here")


@pytest.mark.parametrize("kind", [*GROUPS.values(), *map(options_of, available())])
def test_every_option_says_what_it_is(kind: type) -> None:
    hints = get_type_hints(helped(kind), include_extras=True)
    for field in fields(kind):
        told = [each.help for each in getattr(hints[field.name], "__metadata__", ()) if hasattr(each, "help")]
        assert any(told), field.name


def test_every_option_has_one_group() -> None:
    for model in available():
        names = [field.name for kind in (*GROUPS.values(), options_of(model)) for field in fields(kind)]
        assert len(names) == len(set(names))
        assert {*names, "preset", "model"} == set(Config.of(model=model).flat())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 2.5}, "epochs must be a whole number or nothing; got 2.5"),
        ({"lr": True}, "lr must be a number; got True"),
        ({"lr": None}, "lr must be a number; got None"),
        ({"batch_size": True}, "batch_size must be a whole number; got True"),
        ({"flip": 1}, "flip must be true or false or nothing; got 1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_value_of_another_type_is_refused_in_python_too(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"^{message}"):
        Config(**values)


def test_an_option_of_another_model_is_refused_whatever_its_value() -> None:
    for value in (256, 3):
        with pytest.raises(InputError, match=r"^conv_channels is an option of model capsnet, not of baseline$"):
            Config.of(model="baseline", conv_channels=value)
    assert Config().changed(model="baseline", epochs=4).options == options_of("baseline")()
    with pytest.raises(InputError, match=r"^options of model baseline must be Options; got Options\("):
        Config(model="baseline", options=options_of("capsnet")())


def test_old_files_name_all_options_of_all_models_side_by_side(tmp_path: Path) -> None:
    old = "preset: paper\nmodel: {}\nstem: minimal\nkernel: plain\nconv_kernel: 5\nwidth: 0.5\nepochs: 2\n"
    found = read(written(old.format("capsnet"), tmp_path))
    assert found == Config.of(convolution="winograd", routing_kernel="plain", conv_kernel_size=5, epochs=2)
    assert read(written(old.format("baseline"), tmp_path)) == Config.of(model="baseline", width=0.5, epochs=2)
    for path in (Path(__file__).parent.parent / "results").glob("*/config.yaml"):
        assert read(path).seed in (0, 1, 2)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().epochs = 4  # type: ignore[misc]


# files


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        preset("authors"),
        preset("authors").changed(lr=3e-5, decoder_sizes=(), channels=1, data_dir="/a b/ä", validation=0, leaky=True),
        Config.of(decoder_sizes=(7,), m_neg=0.0, lr_floor=0.0, epochs=0, out="true", mask="prediction"),
    ],
    ids=["paper", "authors", "changed", "edges"],
)
def test_a_file_gives_back_what_was_written(config: Config, tmp_path: Path) -> None:
    write(config, tmp_path / "config.yaml")
    again = read(tmp_path / "config.yaml")
    assert again == config
    assert [type(value) for value in again.flat().values()] == [type(value) for value in config.flat().values()]
    sections = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert list(sections) == ["preset", "data", "model", "loss", "optimisation", "machine", "output"]
    assert sections["model"]["name"] == "capsnet"


def test_a_short_file_takes_the_rest_from_its_preset(tmp_path: Path) -> None:
    path = written("preset: authors\nepochs: 7\n", tmp_path)
    assert read(path) == replace(preset("authors"), epochs=7)
    assert read(str(path)) == read(path)


@pytest.mark.parametrize(("text", "lr"), [("1e-3", 1e-3), ("2", 2.0), ("1.0e-3", 1e-3), (".5", 0.5)])
def test_numbers_are_read_as_people_write_them(text: str, lr: float, tmp_path: Path) -> None:
    """YAML takes 1e-3, without a point, for text."""
    found = read(written(f"lr: {text}\n", tmp_path)).lr
    assert found == lr
    assert type(found) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: [", r"must be YAML; got: while parsing"),
        ("- epochs", r"must hold option: value lines; got list$"),
        ("", r"must hold option: value lines; got NoneType$"),
        ("epoch: 3", r"config.yaml: epoch is no option \(did you mean epochs\?\)$"),
        ("zzz: 3", r"config.yaml: zzz is no option$"),
        ("3: 3", r"config.yaml: 3 is no option$"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^config file .*{message}"):
        read(written(text, tmp_path))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^config file .* must be readable; got: No such file or directory$"):
        read(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"data: \xe4\xf6")
    with pytest.raises(InputError, match=r"^config file .* must be UTF-8 text; it is not$"):
        read(tmp_path / "latin.yaml")


# faults


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": "three"}, "epochs must be a whole number or nothing; got 'three'"),
        ({"epochs": 1.5}, "epochs must be a whole number or nothing; got 1.5"),
        ({"epochs": True}, "epochs must be a whole number or nothing; got True"),
        ({"batch_size": None}, "batch_size must be a whole number; got None"),
        ({"lr": "fast"}, "lr must be a number; got 'fast'"),
        ({"lr": True}, "lr must be a number; got True"),
        ({"lr": 10**400}, "lr must be a finite number; got a whole number of about 401 digits$"),
        ({"lr": float("nan")}, "lr must be a finite number; got nan$"),
        ({"flip": 1}, "flip must be true or false or nothing; got 1"),
        ({"data": 3}, "data must be text; got 3"),
        ({"channels": "1"}, "channels must be a whole number or nothing; got '1'"),
        ({"decoder_sizes": 512}, "decoder_sizes must be a list of whole numbers; got 512"),
        ({"decoder_sizes": [512, "big"]}, r"decoder_sizes\[1\] must be a whole number; got 'big'$"),
        ({"mask": "none"}, "mask must be one of label, prediction; got 'none'"),
        ({"routing_kernel": []}, r"routing_kernel must be one of auto, plain, fused; got \[\]"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^here: {message}"):
        from_dict(values, source="here")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("epochs", -1, "at least 0"),
        ("batch_size", 0, "at least 1"),
        ("routing_iterations", 0, "at least 1"),
        ("image_size", 0, "pixels, 1 to 10,000, or HEIGHTxWIDTH, as 48x64"),
        ("lr", 0.0, "above 0"),
        ("lr_decay", 1.1, r"in \(0, 1\]"),
        ("scale", -0.1, r"in \[0, 1\)"),
        ("m_neg", 1.0, r"in \[0, 1\)"),
        ("m_pos", 0.0, r"in \(0, 1\]"),
        ("channels", 2, "1 or 3"),
        ("decoder_sizes", (8, 0), "numbers of 1 to 2,147,483,647"),
        ("validation", -1, "a whole number, 0 to 2,147,483,647, or a share in \\(0, 1\\)"),
        ("device", "tpu", "one of auto, cpu, cuda, mps"),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, value: Any, rule: str) -> None:
    with pytest.raises(InputError, match=f"^{name} must be {rule}; got "):
        Config.of(**{name: value})
    with pytest.raises(InputError, match=f"^here: {name} must be {rule}; got "):
        from_dict({name: value}, source="here")


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0, "m_pos": 1.0, "m_neg": 0.0, "lr_decay": 1.0, "validation": 0},
        {"channels": None, "threads": None, "decoder_sizes": (), "seed": 0},
    ],
)
def test_values_at_the_edge_are_accepted(values: dict[str, Any]) -> None:
    assert from_dict(values, source="here") == Config.of(**values)


@pytest.mark.usefixtures("unchecked")
def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        from_dict({"epoch": 3, "lr": "fast", "batch_size": 0, "m_neg": 2.0, "mask": "x"}, source="file f")
    text = str(caught.value)
    assert text.startswith("file f: ")
    for fault in (
        "epoch is no option (did you mean epochs?)",
        "lr must be a number; got 'fast'",
        "batch_size must be at least 1; got 0",
        "m_neg must be in [0, 1); got 2.0",
        "mask must be one of label, prediction; got 'x'",
    ):
        assert text.count(fault) == 1, text
    assert text.count("; and ") == 4
    with pytest.raises(InputError, match=r"^device must be .*; and batch_size must be .*; and m_neg must be "):
        Config.of(batch_size=0, m_neg=2.0, device="x")


def test_the_name_of_a_preset_alone_is_not_the_preset() -> None:
    with pytest.raises(InputError, match=r"preset is a name only; start from capsnet.preset\('authors'\)"):
        Config(preset="authors")


def test_a_rate_below_its_floor_is_refused() -> None:
    with pytest.raises(InputError, match=r"^lr must be at least lr_floor, 1e-06; got 1e-07$"):
        Config.of(lr=1e-7)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", [name for name, kind in get_type_hints(Config).items() if kind is float])
def test_numbers_that_are_not_finite_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name} must be .*; got {value}$"):
        Config.of(**{name: value})
    with pytest.raises(InputError, match=f"^here: {name} must be a finite number; got {value}$"):
        from_dict({name: value}, source="here")


def test_a_turn_is_at_most_half_a_circle() -> None:
    with pytest.raises(InputError, match=r"^rotation must be 0 to 180 degrees; got 200"):
        Config.of(rotation=200.0)


# what no machine can do


HINTS = get_type_hints(Config) | get_type_hints(options_of("capsnet"))
WHOLE_NUMBERS = [name for name, kind in HINTS.items() if int in (kind, *get_args(kind))]
MOST = {"seed": 2**62 - 1, "data_seed": 2**62 - 1, "routing_iterations": 100, "image_size": 10_000, "threads": 1024}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_whole_numbers_have_a_largest_value(name: str) -> None:
    most = MOST.get(name, 2**31 - 1)
    rule = rf"(at most {most:,}|1 or 3|8 to 32|(pixels, 1|a whole number, 0) to {most:,}, .*|numbers of 1 to {most:,})"
    wrong: Any
    for value in (most + 1, 10**26, 10**5000):
        wrong = (value,) if name == "decoder_sizes" else value
        with pytest.raises(InputError, match=rf"^{name} must be {rule}; got [^\n]{{1,80}}$"):
            Config.of(**{name: wrong})
    if name not in ("channels", "bit_depth", "decoder_sizes"):
        allowed: Any = most
        assert Config.of(**{name: allowed}).flat()[name] == most


def test_every_seed_that_is_allowed_can_be_used() -> None:
    torch = pytest.importorskip("torch")
    largest = options.LARGEST_SEED
    torch.Generator().manual_seed(3 * largest + 2)  # as strokes do
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(largest)


def test_text_holds_no_nul() -> None:
    with pytest.raises(InputError, match=r"^out must be text without a NUL character; got 'a\\x00b'$"):
        Config.of(out="a\0b")


# hostile files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decoder_sizes: " + "[" * 30_000, "must be YAML; got: maximum recursion depth"),
        ("epochs: " + "9" * 5_000, "must be YAML; got: Exceeds the limit"),
        ('epochs: !!int ""', "must be YAML; got: "),
        ("epochs: !!bool x", "must be YAML; got: "),
        ("epochs: !!timestamp x", "must be YAML; got: "),
        ("epochs: 2001-99-99", "must be YAML; got: "),
        ("? [epochs]\n: 1", "must be YAML; got: "),
        ("epochs: " + "x" * 70_000, "must hold at most 65,536 bytes; got more$"),
        ("epochs: " + "x" * 60_000, "epochs must be a whole number or nothing; got 'xxx"),
        ("? " + "x" * 60_000 + "\n: 1", r"xxx\.\.\.xxx\w+ is no option$"),
        ("\n".join(f"option{k}: 1" for k in range(4_000)), "option4 is no option.*; and 3995 more$"),
    ],
    ids=range(11),
)
def test_a_hostile_file_is_one_short_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(written(text, tmp_path))
    assert len(str(caught.value)) - len(str(tmp_path)) < 600
    assert "\n" not in str(caught.value)


def test_aliases_are_refused_before_they_are_expanded(tmp_path: Path) -> None:
    """Ten lines stand for 10 ** 10 words."""
    lines = ["a0: &a0 lol"] + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 11)]
    with pytest.raises(InputError, match=r"must be YAML; got: an alias, which is not allowed here$"):
        read(written("\n".join([*lines, "decoder_sizes: *a10"]), tmp_path))


def test_a_file_that_never_ends_is_not_read_to_its_end() -> None:
    with pytest.raises(InputError, match=r"^config file /dev/zero must hold at most 65,536 bytes; got more$"):
        read("/dev/zero")
