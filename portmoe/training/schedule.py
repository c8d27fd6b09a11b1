"""Learning rate and beta2 as pure functions of the config and the step (counted from 0).

Nothing here has state, so a resumed run needs nothing but its step.
"""

import math

from portmoe.config import Config


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of step ``step``, as the benchmark schedules it.

    0 for ``init_steps`` steps; then linear over int(total_steps · warmup_ratio) steps, of which the
    last has ``adam.lr``; then a cosine that starts at ``adam.lr``, reaches ``eta_min`` at
    ``total_steps`` and stays there (Loshchilov & Hutter 2016, without restarts).
    """
    schedule = config.lr_scheduler
    base, end = config.adam.lr, schedule.eta_min
    total = config.data.total_steps if schedule.total_steps is None else schedule.total_steps
    warmup = int(total * schedule.warmup_ratio)
    if step < schedule.init_steps:
        return 0.0
    since_init = step - schedule.init_steps
    if since_init < warmup:
        return base * (since_init + 1) / warmup
    done, span = since_init - warmup, total - schedule.init_steps - warmup
    if done >= span:
        return end
    return end + (base - end) * (1 + math.cos(math.pi * done / span)) / 2


def beta2(config: Config, step: int) -> float:
    """AdamW's beta2 of step ``step``.

    The initial value where c ≤ 0; otherwise 1 − step^(−c), never below the initial value (which step 0 has).
    """
    schedule = config.beta2_scheduler
    start = config.adam.adam_beta2 if schedule.init_beta2 is None else schedule.init_beta2
    c = config.adam.adam_beta2_c if schedule.c is None else schedule.c
    if c <= 0 or step == 0:
        return start
    return max(start, 1 - step**-c)
