"""Images that belong together stay together: those of one group (a patient, a video), and copies of one file."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from capsnet.data.dataset import ImageFile

__all__ = ["belong_together", "copies", "drawn", "units"]


def units(files: Sequence[ImageFile]) -> list[int]:
    """A number for each file, the same for those of one group, and for copies, also in several classes.

    Where a class has but one image, under several names, its copies do not count as such: they are all there is.
    """
    contents = [set[str]() for _ in range(1 + max((file.label for file in files), default=0))]
    for file in files:
        contents[file.label].add(file.hash)
    above = list(range(len(files)))

    def top(place: int) -> int:
        while above[place] != place:
            above[place] = place = above[above[place]]
        return place

    first = dict[tuple[str, str], int]()
    for place, file in enumerate(files):
        keys = [("group", file.group)] * bool(file.group)
        keys += [("content", file.hash)] * (len(contents[file.label]) > 1)
        for key in keys:
            one, other = sorted((top(place), top(first.setdefault(key, place))))
            above[other] = one
    return [top(place) for place in range(len(files))]


def belong_together(units: Sequence[int]) -> bool:
    """Whether some files share a number of `units`, so that files must not be divided one by one."""
    return len(set(units)) < len(units)


def drawn(files: Sequence[ImageFile], of: Sequence[int], share: float, *, seed: int) -> list[int]:
    """Places of about `share` of each class's files, at least one where it can be, units whole; of each one is left.

    `of` are the `units` of the files. The same seed always draws the same.
    """
    whole = dict[int, list[int]]()
    for place, unit in enumerate(of):
        whole.setdefault(unit, []).append(place)
    members = list(whole.values())
    sizes = [Counter(files[place].label for place in unit) for unit in members]
    left, taken = Counter(file.label for file in files), Counter[int]()
    wanted = {label: max(share * count, 1.0) for label, count in left.items()}
    chosen = set[int]()

    def take(unit: int) -> None:
        chosen.add(unit)
        taken.update(sizes[unit])
        left.subtract(sizes[unit])

    def leaves_some(unit: int) -> bool:
        return all(left[label] > count for label, count in sizes[unit].items())

    def gain(unit: int) -> float:
        """By how much the numbers taken come nearer to those that are wanted."""
        each = ((wanted[label], taken[label], count) for label, count in sizes[unit].items())
        return sum(abs(want - has) - abs(want - has - more) for want, has, more in each)

    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    for unit in order:
        if gain(unit) > 0 and leaves_some(unit):
            take(unit)
    for label in wanted:
        possible = [unit for unit in order if label in sizes[unit] and unit not in chosen and leaves_some(unit)]
        if not taken[label] and possible:
            take(min(possible, key=lambda unit: sizes[unit].total()))
    return sorted(place for unit in chosen for place in members[unit])


def copies(files: Iterable[ImageFile]) -> list[list[ImageFile]]:
    """Files of the same content, two or more in each list."""
    same = dict[str, list[ImageFile]]()
    for file in files:
        same.setdefault(file.hash, []).append(file)
    return [found for found in same.values() if len(found) > 1]
