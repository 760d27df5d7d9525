"""Order and noise as pure functions of (seed, step): a resumed run sees what the uninterrupted one would have seen."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

WHOLE, BLOCK = 256, 32  # rows of a batch that are drawn in one; of a block of a larger batch
ORDER, STEP, VALIDATION, TURNS, MASKS = 1, 2, 3, 4, 5  # streams: of one purpose each, none depends on another

ON_DEVICE = 1 << 20  # beyond any number of blocks: keys of what a GPU draws

LEAST_TURNS, MOST_TURNS = 8, 2**17  # of the rarest bucket in a round of turns, so that its share comes out; of a round


def _key(*parts: int) -> int:
    """63 bits that depend on every part (NumPy's SeedSequence hash)."""
    return int(np.random.SeedSequence([part & 0xFFFFFFFF for part in parts]).generate_state(1, np.uint64)[0] >> 1)


def seed_masks(seed: int, step: int, row: int) -> None:
    """Seed what torch itself draws in a step (dropout's masks) for the part of a batch that begins with `row`.

    So a resumed run drops what the uninterrupted one would have; a batch in other parts drops other things.
    """
    torch.manual_seed(_key(MASKS, seed, step, row))


class Draw:
    """The random numbers of one step, drawn on the host; each process draws those of its own rows.

    So the numbers an item gets do not depend on how many processes share the batch, in how many parts; nor, but for
    the normal ones that a GPU draws for itself, on the device. Rows are drawn in blocks, each from a stream of its own:
    a batch of up to WHOLE rows is one block, drawn whole; of a larger one only those blocks of BLOCK rows are drawn
    that hold some of `rows` (a slice of step 1).
    """

    def __init__(self, seed: int, step: int, total: int, rows: slice = slice(None), *, stream: int = STEP) -> None:
        self.step = step
        self.total = total
        self.rows = rows
        self._named, self._near = (stream, seed, step), 0
        self._generator = torch.Generator().manual_seed(_key(stream, seed, step))
        self._blocks, self._own = [(self._generator, total)], rows  # own: the rows, among those that are drawn
        if total > WHOLE:
            start, stop, _ = rows.indices(total)
            first, end = start // BLOCK, max(start // BLOCK + 1, -(-stop // BLOCK))
            self._own = slice(start - first * BLOCK, stop - first * BLOCK)
            self._blocks = [  # a key that ends in 0 is the key without it, so blocks count from 1
                (torch.Generator().manual_seed(_key(stream, seed, step, 1 + block)), min(BLOCK, total - block * BLOCK))
                for block in range(first, end)
            ]

    def normal(self, *shape: int, device: torch.device | None = None) -> Tensor:
        """Standard normal numbers, (rows, *shape) float32, on a device (None: the host).

        A GPU draws its own, others than the host would: of the whole batch, keyed by (seed, step) as all are.
        """
        if device is None or device.type != "cuda":
            return self._drawn(torch.randn, shape).to(device)
        self._near += 1
        generator = torch.Generator(device).manual_seed(_key(*self._named, ON_DEVICE + self._near))
        return torch.randn((self.total, *shape), generator=generator, device=device)[self.rows]

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), (rows, *shape) float32."""
        return self._drawn(torch.rand, shape)

    def _drawn(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        parts = [draw((count, *shape), generator=generator) for generator, count in self._blocks]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[self._own]

    def shared(self, count: int) -> list[float]:
        """Uniform numbers in [0, 1) that are the same for every row, on every process."""
        return torch.rand(count, generator=self._generator).tolist()

    def stratified(self) -> Tensor:
        """One uniform number a row, (rows,), spread evenly over the batch: row i of n lies at (u + i) / n mod 1.

        Low-discrepancy times of Kingma et al. 2021 (VDM), appendix I.1; the rows are shuffled.
        """
        offset = torch.rand((), generator=self._generator)
        order = torch.randperm(self.total, generator=self._generator)
        return ((offset + order / self.total) % 1.0)[self.rows]


class Order:
    """Which items step k of a run trains on: every epoch a new permutation, batches running across its end.

    An item of weight w is seen w times an epoch on average (systematic resampling, so to within one).
    """

    def __init__(self, weights: np.ndarray, batch: int, seed: int) -> None:
        self.batch = batch
        self._edges = np.cumsum(weights, dtype=np.float64)
        self._seed = seed
        self.epoch_size = max(1, round(float(self._edges[-1])))
        self._epochs: dict[int, np.ndarray] = {}

    def epoch(self, number: int) -> np.ndarray:
        """The items of one epoch, in their order."""
        if number not in self._epochs:
            self._epochs = {key: value for key, value in self._epochs.items() if key == number - 1}
            random = np.random.Generator(np.random.Philox(_key(ORDER, self._seed, number)))
            marks = (random.random() + np.arange(self.epoch_size)) * (self._edges[-1] / self.epoch_size)
            chosen = np.searchsorted(self._edges, marks, side="right").clip(max=len(self._edges) - 1)
            self._epochs[number] = random.permutation(chosen)
        return self._epochs[number]

    def items(self, step: int) -> np.ndarray:
        """The items (batch,) of a step, counted from 0."""
        places = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs = places // self.epoch_size
        parts = [self.epoch(int(epoch))[places[epochs == epoch] % self.epoch_size] for epoch in np.unique(epochs)]
        return np.concatenate(parts)


class BucketOrder:
    """Which items step k of a run trains on, where a batch holds items of one bucket alone.

    Each bucket has an `Order` of its own, which runs on across its epochs, and it is a bucket's turn in proportion to
    what its items weigh; so nothing is dropped, and every item is seen as often as its weight says.
    """

    def __init__(self, weights: np.ndarray, batch: int, seed: int, buckets: np.ndarray) -> None:
        filled = [
            own for bucket in range(int(buckets.max()) + 1) if weights[own := np.flatnonzero(buckets == bucket)].any()
        ]
        self.batch = batch
        self._members = filled
        self._orders = [Order(weights[own], batch, _key(TURNS, seed, n)) for n, own in enumerate(filled)]
        batches = np.array([weights[own].sum() / batch for own in filled])  # of each bucket, in an epoch of its items
        rounds = min(LEAST_TURNS / batches.min(), max(1.0, MOST_TURNS / batches.sum()))
        self._turns = Order(batches * max(1.0, rounds), 1, _key(TURNS, seed))
        self._before = [np.zeros(len(filled), dtype=np.int64)]  # turns of each bucket before each epoch of turns

    def items(self, step: int) -> np.ndarray:
        """The items (batch,) of a step, counted from 0."""
        epoch, place = divmod(step, self._turns.epoch_size)
        while len(self._before) <= epoch:
            turns = self._turns.epoch(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(turns, minlength=len(self._members)))
        turns = self._turns.epoch(epoch)
        bucket = int(turns[place])
        earlier = int(self._before[epoch][bucket]) + int((turns[:place] == bucket).sum())
        return self._members[bucket][self._orders[bucket].items(earlier)]
