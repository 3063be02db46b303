import pytest
import torch

from capsnet.errors import InputError
from capsnet.evaluation.ood import Threshold, auroc, reconstruction_errors, threshold_for
from capsnet.models import create
from tiny import SIZES


def test_reconstruction_errors_are_of_the_winning_capsule() -> None:
    network = create("capsnet", image_shape=(2, 12, 13), num_classes=3, **SIZES).eval()
    images = torch.rand(9, 2, 12, 13)
    with torch.no_grad():
        output = network(images)
    assert output.reconstruction is not None
    expected = (output.reconstruction - images).square().sum((1, 2, 3))
    torch.testing.assert_close(reconstruction_errors(network, images, batch_size=4), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="decoder"):
        reconstruction_errors(create("capsnet", image_shape=(2, 12, 13), reconstruction=False, **SIZES), images)


@pytest.mark.parametrize(("count", "rate", "flagged"), [(20, 0.05, 1), (1000, 0.01, 10), (7, 0.05, 0), (40, 0.5, 20)])
def test_the_threshold_flags_the_stated_share(count: int, rate: float, flagged: int) -> None:
    errors = torch.rand(count, generator=torch.Generator().manual_seed(0))
    found = threshold_for(errors, false_alarm_rate=rate, split="validation")
    assert int((errors > found.value).sum()) == flagged
    assert found == Threshold(found.value, rate, count, "validation")


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(InputError, match=r"false_alarm_rate must be in \(0, 1\)"):
        threshold_for(torch.rand(5), false_alarm_rate=rate, split="test")
    with pytest.raises(InputError, match="errors must be those of at least one image; got none"):
        threshold_for(torch.empty(0), split="test")


def test_auroc_by_hand_and_against_all_pairs() -> None:
    assert auroc(torch.tensor([1.0, 2]), torch.tensor([3.0, 4])) == 1
    assert auroc(torch.tensor([3.0, 4]), torch.tensor([1.0, 2])) == 0
    assert auroc(torch.ones(3), torch.ones(5)) == 0.5
    known = torch.randint(0, 9, (40,), generator=torch.Generator().manual_seed(0)).float()
    strange = torch.randint(3, 12, (23,), generator=torch.Generator().manual_seed(1)).float()
    above = (strange[:, None] > known).double() + 0.5 * (strange[:, None] == known).double()
    assert auroc(known, strange) == pytest.approx(float(above.mean()))
