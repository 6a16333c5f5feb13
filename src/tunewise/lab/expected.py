"""What a combination of methods that was not tried promises, from those of a study that were."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tunewise.lab.factors import On
from tunewise.lab.tried import nats_lost

if TYPE_CHECKING:
    from tunewise.lab.method_study import MethodStudy


def expected_seconds(study: MethodStudy, on: On) -> float:
    """Return the seconds of a step: as measured, as the fitted effects say, or from what was measured nearest."""
    if on in study.tried:
        return study.tried[on].seconds
    if study.model_time is not None:
        return study.model_time.predict(on).middle
    return _product(study, on)


def expected_forgetting(study: MethodStudy, on: On) -> float:
    """Return what a combination forgets: as measured, or the sum of what its switches do alone or around."""
    tried, own = study.tried, study.own
    if on in tried:
        return nats_lost(tried[on])
    lost, lost_by_own = nats_lost(tried.get(frozenset())), nats_lost(tried.get(own))
    for name in on:
        alone, neighbour = tried.get(study.closed(frozenset({name}))), tried.get(own ^ {name})
        if alone is not None and alone.on:
            lost += nats_lost(alone) - nats_lost(tried.get(alone.on - {name}))
        elif neighbour is not None:
            lost += lost_by_own - nats_lost(neighbour) if name in own else nats_lost(neighbour) - lost_by_own
    return lost


def _product(study: MethodStudy, on: On) -> float:
    """Return the seconds of what was measured nearest, times what each switch does there.

    That is the user's recipe where all switches on the way were tried around it, else the baseline.
    """
    own = study.tried.get(study.own)
    steps = [study.tried.get(study.own ^ {name}) for name in on ^ study.own]
    if own is not None and math.isfinite(own.seconds) and all(s and math.isfinite(s.seconds) for s in steps):
        return own.seconds * math.prod(s.seconds / own.seconds for s in steps if s is not None)
    base = study.tried[frozenset()].seconds
    if math.isinf(base):  # the plain form could not be measured, so nothing was measured against it
        prediction = study.predicted(on)
        return math.inf if prediction is None else prediction.step_seconds.middle
    seconds = base
    for name in on:
        alone = study.tried.get(study.closed(frozenset({name})))
        seconds *= alone.seconds / base if alone is not None and math.isfinite(alone.seconds) else 1.0
    return seconds
