"""Coalitions of one response as one short sequence: a prefix that several coalitions share is computed once.

A causal model's state at a token depends only on the tokens before it. Sorted by their bits, coalitions form a trie,
whose nodes are laid out in one sequence; each node attends to those on its coalition's path up to it.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Pack:
    """A part of the trie: N nodes, r coalitions that end in it."""

    column: np.ndarray  # (N,) the token of response + suffix
    absent: np.ndarray  # (N,) bool, the node holds a removed token's replacement
    position: np.ndarray  # (N,) counted from the prompt's end
    owner: np.ndarray  # (N,) the first of the pack's coalitions that has the node
    path: np.ndarray  # (r, width) the nodes of each coalition, -1 for a token that it lacks
    read: np.ndarray  # (r,) node at which each coalition's score is read
    coalition: np.ndarray  # (r,) row of the masks

    def __len__(self) -> int:
        return len(self.column)


def pack(masks: np.ndarray, suffix: int, removal: str, nodes: int) -> tuple[Pack, ...]:
    """Packs of at most `nodes` nodes (one coalition may need more) that cover the coalitions `masks` (m, k) once.

    `suffix` tokens follow every coalition, and its last token is read. `drop` closes the gaps, `attention_mask`
    leaves them empty, `replace` fills them.
    """
    return _pack(np.packbits(masks, axis=1).tobytes(), masks.shape, suffix, removal, nodes)


@lru_cache(maxsize=64)
def _pack(packed: bytes, shape: tuple[int, int], suffix: int, removal: str, nodes: int) -> tuple[Pack, ...]:
    m, k = shape
    masks = np.unpackbits(np.frombuffer(packed, np.uint8).reshape(m, -1), axis=1, count=k).astype(bool)
    order = np.lexsort(masks.T[::-1]) if k else np.arange(m)
    bits = np.concatenate([masks[order], np.ones((m, suffix), bool)], 1)
    present = np.ones_like(bits) if removal == "replace" else bits
    differs = np.zeros(m, int)  # the first token in which a coalition differs from the one before it
    differs[1:] = (bits[1:] != bits[:-1]).argmax(1)
    ahead = present[:, ::-1].cumsum(1)[:, ::-1]  # nodes from a token on
    number = len(_ends(ahead, differs, nodes))
    even = 1 + bisect_left(range(1, nodes), True, key=lambda n: len(_ends(ahead, differs, n)) <= number)
    ends = _ends(ahead, differs, even)  # as many packs, of sizes as even as can be
    return tuple(_trie(bits[a:b], present[a:b], differs[a:b], removal, order[a:b]) for a, b in zip([0, *ends], ends))


def _ends(ahead: np.ndarray, differs: np.ndarray, nodes: int) -> list[int]:
    """Where to cut sorted coalitions, so that each part needs at most `nodes` nodes or is a single coalition."""
    fresh = ahead[np.arange(len(ahead)), differs].cumsum()
    ends, start = [], 0
    while start < len(ahead):
        again = fresh[start] - ahead[start, 0]  # each part repeats its first coalition's shared nodes
        ends.append(max(start + 1, int(np.searchsorted(fresh, nodes + again, "right"))))
        start = ends[-1]
    return ends


def _trie(bits: np.ndarray, present: np.ndarray, differs: np.ndarray, removal: str, rows: np.ndarray) -> Pack:
    r, width = bits.shape
    columns = np.arange(width)
    fresh = columns >= differs[:, None]
    fresh[0] = True
    maker = np.maximum.accumulate(np.where(fresh, np.arange(r)[:, None], 0), 0)  # the coalition that made the node
    number = np.cumsum(fresh & present).reshape(r, width) - 1
    path = np.where(present, number[maker, columns], -1).astype(np.int32)
    owner, column = (x.astype(np.int32) for x in np.nonzero(fresh & present))
    depth = (present.cumsum(1, dtype=np.int32) - 1)[owner, column]
    position = depth if removal == "drop" else column
    return Pack(column, ~bits[owner, column], position, owner, path, path.max(1), rows)
