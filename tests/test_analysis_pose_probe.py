import pytest
import torch

from capsnet.analysis.pose_probe import features, pose_explained, r2_linear
from capsnet.data.dataset import Split
from capsnet.data.sets.strokes import FACTORS, strokes
from capsnet.errors import InputError
from capsnet.models import create
from tiny import SIZES


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_r2_is_1_for_what_is_linear_and_about_0_for_noise() -> None:
    x = torch.randn(300, 5, generator=generator(0))
    x[:, 4] = 3.0  # a dead unit
    y = torch.stack([x @ torch.tensor([1.0, -2, 0.5, 4, 0]) + 7, torch.randn(300, generator=generator(1))], -1)
    r2 = r2_linear(x[:200], y[:200], x[200:], y[200:])
    assert r2[0] > 0.9999
    assert -0.2 < r2[1] < 0.1


def test_r2_against_numbers_by_hand() -> None:
    x, y = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[0.0], [2], [4], [6]])
    judged = r2_linear(x, y, torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [9.0]]), penalties=(0.0,))
    # predictions 0 and 8, mean of y_train 3: 1 - (1 + 1) / (4 + 36)
    torch.testing.assert_close(judged, torch.tensor([0.95], dtype=torch.float64))


def test_the_penalty_is_chosen_by_leaving_out_one_example_at_a_time() -> None:
    """The closed form of leave-one-out is that of n regressions."""
    x, y = torch.randn(12, 3, generator=generator(5)).double(), torch.randn(12, 1, generator=generator(6)).double()
    x[:, 2] *= 0.01
    scale = (x - x.mean(0)).square().sum() / 3
    errors = []
    for penalty in (1e-6, 0.3, 10.0):
        left = 0.0
        for k in range(12):
            kept = torch.arange(12) != k
            mean, centre = x.mean(0), y.mean(0)  # as in the whole regression
            a = torch.cat([x[kept] - mean, torch.ones(11, 1)], 1)
            ridge = torch.diag(torch.tensor([penalty * scale] * 3 + [0.0]).double())
            w = torch.linalg.solve(a.T @ a + ridge, a.T @ (y[kept] - centre))
            left += float((y[k] - centre - torch.cat([x[k] - mean, torch.ones(1)]) @ w).square())
        errors.append(left)
    best = (1e-6, 0.3, 10.0)[errors.index(min(errors))]
    test = torch.randn(9, 3, generator=generator(7)), torch.randn(9, 1, generator=generator(8))
    torch.testing.assert_close(
        r2_linear(x, y, *test, penalties=(1e-6, 0.3, 10.0)), r2_linear(x, y, *test, penalties=(best,))
    )
    assert errors.index(min(errors)) != 0
    assert len(set(errors)) == 3


def test_a_unit_that_is_hardly_ever_active_does_no_harm() -> None:
    x = torch.randn(200, 3, generator=generator(9))
    y = x[:, :1] + 0.1 * torch.randn(200, 1, generator=generator(10))
    rare = torch.zeros(200, 1)
    rare[7], rare[150] = 1e-3, 1.0  # once in training, hardly; once in the test, fully
    found = r2_linear(torch.cat([x, rare], 1)[:100], y[:100], torch.cat([x, rare], 1)[100:], y[100:])
    assert found > 0.9


def test_r2_is_judged_on_held_out_examples() -> None:
    x, y = torch.randn(30, 25, generator=generator(2)), torch.randn(30, 1, generator=generator(3))
    fitted = r2_linear(x, y, x, y, penalties=(0.0,))
    test = torch.randn(50, 25, generator=generator(4)), torch.randn(50, 1, generator=generator(11))
    held_out = r2_linear(x, y, *test, penalties=(0.0,))
    assert fitted > 0.7  # 25 dimensions fit the noise of 30 examples
    assert fitted > held_out
    assert held_out < 0


def test_pose_explained_finds_the_dimension_that_holds_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = strokes(train=400, validation=0, test=200)
    network = create("capsnet", **SIZES)
    calls: list[int] = []

    def known(network: object, split: Split, **options: int) -> torch.Tensor:
        calls.append(len(split))
        noise = torch.randn(len(split), 4, generator=generator(len(split)))
        noise[:, 2] = 0.01 * split.factors["slant_degrees"] * (1 - 2 * (split.labels % 2))  # another sign in each class
        return noise

    monkeypatch.setattr("capsnet.analysis.pose_probe.features", known)
    found = pose_explained(network, dataset.train, dataset.test)
    assert calls == [400, 200]
    assert found.factors == tuple(FACTORS)
    assert found.mean("slant_degrees") > 0.99
    assert found.spread("slant_degrees") < 0.01
    assert found.mean("scale") < 0.2
    alone = torch.tensor(found.by_dimension[found.factors.index("slant_degrees")])  # [classes, dim]
    assert alone.shape == (10, 4)
    assert (alone[:, 2] > 0.99).all()
    assert (alone[:, [0, 1, 3]] < 0.5).all()
    told = found.to_dict()
    assert told["r2_mean_over_classes"]["slant_degrees"] == found.mean("slant_degrees")
    assert set(told["r2"]["x_pixels"]) == set("0123456789")
    assert told["dimensions"] == 4


def test_features_are_the_true_classs_capsule_or_the_last_hidden_layer() -> None:
    split = strokes(train=20, validation=0, test=13).test
    capsnet = create("capsnet", **SIZES).eval()
    found = features(capsnet, split, batch_size=5)
    with torch.no_grad():
        pose = capsnet(split.images / 255).pose
        torch.testing.assert_close(found, pose[torch.arange(13), split.labels], atol=1e-6, rtol=1e-4)
        baseline = create("baseline")
        found = features(baseline, split, batch_size=5)
        assert baseline.training
        assert found.shape == (13, 192)
        torch.testing.assert_close(
            found @ baseline.layers[-1].weight.T + baseline.layers[-1].bias,  # type: ignore[index, union-attr]
            baseline.eval()(split.images / 255).scores,
            atol=1e-5,
            rtol=1e-4,
        )


def test_it_needs_known_poses_and_enough_images() -> None:
    dataset = strokes(train=40, validation=0, test=40)
    network = create("capsnet", **SIZES)
    with pytest.raises(InputError, match=r"class 0 must have at least 6 training and 2 test images .* got 4 and 4"):
        pose_explained(network, dataset.train, dataset.test)
    bare = Split(dataset.test.images, dataset.test.labels)
    with pytest.raises(InputError, match=r"data must know the true pose of its images"):
        pose_explained(network, dataset.train, bare)
