"""Routing, written a second time as loops over tokens in Python's float64, for the tests to compare with."""

import math
from dataclasses import dataclass


@dataclass
class Route:
    expert: list[list[int]]  # [k][s]
    slot: list[list[int]]
    weight: list[list[float]]
    capacity: int
    aux_loss: float
    count: list[int]

    def kept(self, k, s):
        return self.slot[k][s] < self.capacity


def softmax(row):
    largest = max(row)
    powers = [math.exp(v - largest) for v in row]
    return [p / sum(powers) for p in powers]


def ranked(row):
    """Experts from the highest value down, the lower index first on a tie."""
    return sorted(range(len(row)), key=lambda e: (-row[e], e))


def gshard(logits, experts, k, capacity_factor, min_capacity, *, choices=None):
    """k ≥ 2, or k = 1 with positional drops. ``choices[k][s]`` overrides the experts chosen."""
    tokens = len(logits)
    gate = [softmax(row) for row in logits]
    capacity = max(min_capacity, math.ceil(tokens / experts * capacity_factor * k))
    if choices is None:
        choices = [[ranked(row)[choice] for row in gate] for choice in range(k)]
    count, slot = [0] * experts, []
    for choice in range(k):
        slot.append([])
        for s in range(tokens):
            slot[choice].append(count[choices[choice][s]])
            count[choices[choice][s]] += 1
    weight = [[0.0] * tokens for _ in range(k)]
    for s in range(tokens):
        kept = [choice for choice in range(k) if slot[choice][s] < capacity]
        total = sum(gate[s][choices[choice][s]] for choice in kept)
        for choice in kept:
            g = gate[s][choices[choice][s]]
            weight[choice][s] = g if k == 1 else g / max(total, 2.0**-23)
    return Route(choices, slot, weight, capacity, balance(gate, choices[0], experts), count)


def balance(gate, first, experts):
    tokens = len(gate)
    if tokens == 0:
        return 0.0
    terms = [
        sum(row[e] for row in gate) / tokens * sum(1 for f in first if f == e) / tokens
        for e in range(experts)
    ]
    return experts**2 * sum(terms) / experts


def random_selection(route, uniform):
    """What ``route`` (k = 1) becomes when each expert keeps its tokens of highest random number."""
    gate = {}
    for e in range(len(route.count)):
        mine = [s for s, chosen in enumerate(route.expert[0]) if chosen == e]
        kept = sorted(sorted(mine, key=lambda s: -uniform[s])[: route.capacity])
        for place, s in enumerate(kept + [s for s in mine if s not in kept]):
            gate[s] = place
    return [[gate[s] for s in range(len(route.expert[0]))]]


def megablock(logits, experts, k, capacity_factor, mode):
    """mode: "capacity", "largest" (no token dropped, C the largest count) or "dropless"."""
    tokens = len(logits)
    gate = [softmax(row) for row in logits]
    chosen = [ranked(row)[:k] for row in gate]
    count = [0] * experts
    slot = [[0] * tokens for _ in range(k)]
    for s in range(tokens):
        for choice in range(k):
            slot[choice][s] = count[chosen[s][choice]]
            count[chosen[s][choice]] += 1
    capacity = {
        "capacity": int(capacity_factor * k * tokens / experts),
        "largest": max(count),
        "dropless": tokens,
    }[mode]
    weight = [[0.0] * tokens for _ in range(k)]
    for s in range(tokens):
        total = sum(gate[s][e] for e in chosen[s])
        for choice in range(k):
            if slot[choice][s] < capacity:
                weight[choice][s] = gate[s][chosen[s][choice]] / total
    aux = 0.0
    if tokens:
        means = [sum(row[e] for row in gate) / tokens for e in range(experts)]
        aux = experts / (tokens * k) * sum(c * m for c, m in zip(count, means, strict=True))
    expert = [[chosen[s][choice] for s in range(tokens)] for choice in range(k)]
    return Route(expert, slot, weight, capacity, aux, count)
